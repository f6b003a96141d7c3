"""Under DistributedDataParallel with its default flags every micro-batch counts once, and no window is overwritten."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncaccum import commit, convert_sync_accum
from tests.oracle import (
    Oracle,
    assert_same_on_all_ranks,
    assert_same_statistics,
    gather_global_batch,
    make_reference,
)
from tests.ranks import Rank, on_ranks


def make_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3, momentum=None),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.BatchNorm1d(5),
    ).double()


class Checkpointed(nn.Module):
    """A network whose forward runs again in backward."""

    def __init__(self, network: nn.Module, *, use_reentrant: bool) -> None:
        super().__init__()
        self.network = network
        self._use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.network, x, use_reentrant=self._use_reentrant)


def make_window(rank: Rank, step: int, count: int = 3) -> list[Tensor]:
    """Micro-batches of sizes and values that depend on the rank."""
    generator = torch.Generator().manual_seed(100 * step + rank.index)
    sizes = [3 + rank.index + i for i in range(count)]
    return [
        torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64) * (1 + rank.index) + rank.index for n in sizes
    ]


def accumulate(ddp: nn.Module, window: Sequence[Tensor], oracle: Oracle | None = None, *, no_sync: bool = True) -> None:
    forward = ddp if oracle is None else oracle.forward
    for index, micro_batch in enumerate(window):
        hold = no_sync and index + 1 < len(window)
        with ddp.no_sync() if hold else nullcontext():
            forward(micro_batch).square().mean().backward()


@pytest.mark.parametrize("normalization", ["renorm", "batch", "running"])
@pytest.mark.parametrize("no_sync", [False, True])
@on_ranks(2)
def test_statistics_are_those_of_the_global_batch_step_after_step(
    rank: Rank, no_sync: bool, normalization: str
) -> None:
    """torchgpipe's accumulators are buffers, which DDP overwrites with rank 0's before every forward."""
    ddp = DistributedDataParallel(convert_sync_accum(make_network(), normalization=normalization))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    oracle = Oracle(ddp)
    for step in range(3):
        accumulate(ddp, make_window(rank, step), oracle, no_sync=no_sync)
        optimizer.step()
        optimizer.zero_grad()
        commit(ddp)
        oracle.check_commit()
    assert_same_on_all_ranks([*ddp.parameters(), *ddp.buffers()])


@on_ranks(3)
def test_windows_hold_each_ranks_own_micro_batches(rank: Rank) -> None:
    ddp = DistributedDataParallel(convert_sync_accum(nn.Sequential(nn.BatchNorm1d(1))))
    for value in (1.0, 2.0):
        ddp(torch.full((2, 1), value * (1 + rank.index)))
    window = ddp.module[0].window
    assert window.count == 4
    assert window.total.item() == 6 * (1 + rank.index)


@on_ranks(2)
def test_a_model_that_ddp_already_wraps_can_be_converted(rank: Rank) -> None:
    ddp = DistributedDataParallel(make_network())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    assert convert_sync_accum(ddp) is ddp
    oracle = Oracle(ddp)
    for step in range(2):
        accumulate(ddp, make_window(rank, step), oracle)
        optimizer.step()
        optimizer.zero_grad()
        commit(ddp)
        oracle.check_commit()
    assert_same_on_all_ranks([*ddp.parameters(), *ddp.buffers()])


@on_ranks(2)
def test_ranks_may_commit_through_different_wrappers(rank: Rank) -> None:
    ddp = DistributedDataParallel(convert_sync_accum(make_network()))
    oracle = Oracle(ddp)
    accumulate(ddp, make_window(rank, 0), oracle)
    commit(ddp if rank.index == 0 else ddp.module)
    oracle.check_commit()


@on_ranks(2)
def test_a_converted_sync_batch_norm_trains_on_the_cpu(rank: Rank) -> None:
    """torch's SyncBatchNorm refuses CPU tensors, and DDP asks for a GPU where it sees one."""
    network = nn.SyncBatchNorm.convert_sync_batchnorm(make_network())
    ddp = DistributedDataParallel(convert_sync_accum(network))
    oracle = Oracle(ddp)
    accumulate(ddp, make_window(rank, 0), oracle)
    commit(ddp)
    oracle.check_commit()


@pytest.mark.parametrize("wrap_first", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@on_ranks(2)
def test_a_checkpointed_forward_counts_once(rank: Rank, use_reentrant: bool, wrap_first: bool) -> None:
    network = Checkpointed(make_network(), use_reentrant=use_reentrant)
    ddp = (
        convert_sync_accum(DistributedDataParallel(network))
        if wrap_first
        else DistributedDataParallel(convert_sync_accum(network))
    )
    oracle = Oracle(ddp)
    for step in range(2):
        # Reentrant checkpointing needs an input with a gradient.
        window = [x.requires_grad_() for x in make_window(rank, step)]
        accumulate(ddp, window, oracle)
        expected = sum(x.shape[0] for x in window)
        assert ddp.module.network[-1].window.count == expected
        commit(ddp)
        oracle.check_commit()


@on_ranks(2)
def test_gradients_are_batch_norms_under_the_batch_policy(rank: Rank) -> None:
    """Accumulating gradients over micro-batches and ranks is what it was before the conversion."""
    plain = DistributedDataParallel(make_network())
    ours = DistributedDataParallel(convert_sync_accum(deepcopy(plain.module), normalization="batch"))
    for ddp in (plain, ours):
        accumulate(ddp, make_window(rank, 0))
    expected = [p.grad for p in plain.parameters()]
    torch.testing.assert_close([p.grad for p in ours.parameters()], expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("compile_outside", [False, True])
@on_ranks(2)
def test_commit_sees_through_ddp_and_compile(rank: Rank, compile_outside: bool, backend: str) -> None:
    torch._dynamo.reset()
    network = convert_sync_accum(make_network())
    # Not an Oracle: its hooks would be compiled too. The first layer's input can be computed beside the model.
    convolution, first = network[0], network[1]
    reference = make_reference(first)
    model: Any
    if compile_outside:  # DDP's own forward breaks the graph
        model = torch.compile(DistributedDataParallel(network), backend=backend)
    else:
        model = DistributedDataParallel(torch.compile(network, backend=backend, fullgraph=True))
    for step in range(2):
        window = make_window(rank, step, count=2)
        with warnings.catch_warnings():
            # torch.compile's own, where it resumes after the graph break.
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
            accumulate(model, window, no_sync=False)
        assert commit(model).layers == ("1", "4", "7")
        with torch.no_grad():
            reference(gather_global_batch([convolution(x) for x in window]))
        assert_same_statistics(first, reference)


def test_destroying_the_process_group_ends_its_threads() -> None:
    """One that is left may abort the process while Python exits, after all else went well."""
    program = Path(__file__).with_name("leave_group.py")
    command = [sys.executable, "-m", f"tests.distributed.{program.stem}"]
    finished = subprocess.run(command, cwd=program.parents[2], capture_output=True, text=True, timeout=100)

    assert finished.returncode == 0, finished.stderr
    assert "gloo" not in finished.stdout
    assert finished.stdout.strip()  # it did look
