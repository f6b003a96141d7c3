"""accelerate: models and optimizers that it prepared, its accumulation, and statistics of the global batch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from syncaccum import commit_on_step, convert_sync_accum
from tests.oracle import Oracle
from tests.ranks import Rank, on_ranks

WINDOW = 3
# Micro-batches of each rank; the last window is a short one, which accelerate ends with the data loader.
MICRO_BATCHES = 2 * WINDOW + 2


@contextmanager
def accelerator(environment: dict[str, str]) -> Iterator[Any]:
    """An Accelerator that accumulates; nothing of it is left for the next one in this process."""
    from accelerate import Accelerator

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ACCELERATE_USE_CPU": "1", **environment}.items():
            patch.setenv(name, value)
        made = Accelerator(cpu=True, gradient_accumulation_steps=WINDOW)
        try:
            yield made
        finally:
            made.free_memory()
            made.state._reset_state(reset_partial_state=True)
            made.gradient_state._reset_state()
            gc.collect()  # DDP's reference cycles keep gloo busy after the group is gone


def make_network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2), nn.BatchNorm1d(2)).double()


def check_training(accelerator: Any) -> tuple[nn.Module, list[int]]:
    """Train an epoch; every optimizer step commits what a BatchNorm would have made of its window on torch.cat.

    Returns the prepared model, and the micro-batches behind each commit.
    """
    torch.manual_seed(0)
    ranks = accelerator.num_processes
    examples = torch.randn(ranks * MICRO_BATCHES * 4, 3, dtype=torch.float64) * 2 + 1
    model = convert_sync_accum(make_network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader: Any = DataLoader(TensorDataset(examples), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    commit_on_step(model, optimizer)
    oracle = Oracle(model)
    layer: Any = accelerator.unwrap_model(model)[1]
    windows: list[int] = []
    seen = 0
    for (x,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(oracle.forward(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        seen += 1
        if layer.num_batches_tracked > len(windows):
            oracle.check_commit()
            windows.append(seen)
            seen = 0
            assert layer.window.count == 0
    return model, windows


def test_each_step_of_accelerate_commits_its_window() -> None:
    with accelerator({}) as alone:
        _, windows = check_training(alone)
    assert windows == [WINDOW, WINDOW, 2]


@on_ranks(2)
def test_each_step_of_accelerate_commits_the_window_of_two_ranks(rank: Rank) -> None:
    # What accelerate's own launcher sets, and by what it knows that there are peers; the group is there already.
    launched = {"RANK": str(rank.index), "LOCAL_RANK": str(rank.index), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    launched["OMP_NUM_THREADS"] = "1"  # else accelerate sets it, with a warning
    with accelerator(launched) as joint:
        assert joint.num_processes == rank.size
        model, windows = check_training(joint)
        assert isinstance(model, DistributedDataParallel)
        del model
    assert windows == [WINDOW, WINDOW, 2]
