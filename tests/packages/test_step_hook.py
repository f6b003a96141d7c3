"""commit_on_step with accelerate's own optimizer, which steps in some calls only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from syncaccum import SyncAccumBatchNorm, commit_on_step, convert_sync_accum

accelerate = pytest.importorskip("accelerate")


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """accelerate keeps its settings in classes."""
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return convert_sync_accum(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


def make_micro_batch(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("hooked_first", [True, False])
def test_one_commit_for_each_window_of_accumulate(accelerator: Any, hooked_first: bool) -> None:
    model = make_model()
    layer = model[1]
    assert isinstance(layer, SyncAccumBatchNorm)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    if hooked_first:
        commit_on_step(model, optimizer)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if not hooked_first:
        commit_on_step(prepared, optimizer)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, step_size=1))
    counts = []
    for index in range(6):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(make_micro_batch(index)).square().mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        counts.append(int(layer.window.count))
    assert counts == [4, 0] * 3
    assert model[1].num_batches_tracked == 3


def test_an_overflow_that_accelerates_scaler_skips_does_not_end_training_under_discard(accelerator: Any) -> None:
    model = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    commit_on_step(model, optimizer, on_nonfinite="discard")

    def train(index: int, *, factor: float = 1.0) -> bool:
        scaler.scale(model(make_micro_batch(index) * factor).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return bool(optimizer.step_was_skipped)

    assert not train(0)
    assert train(1, factor=torch.inf)
    with pytest.warns(UserWarning, match="it was discarded"):
        assert not train(2)
    assert not train(3)
    assert model[1].num_batches_tracked == 2
    assert all(b.isfinite().all() for b in model.buffers())
