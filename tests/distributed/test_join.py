"""Ranks that run out of inputs under DDP take part in the commits of the others; under DDP's own join they cannot."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncaccum import (
    CommitError,
    LockstepError,
    NonFiniteStatisticsError,
    SyncAccumBatchNorm,
    commit,
    commit_on_step,
    convert_sync_accum,
    join,
    lockstep,
)
from syncaccum.errors import NoLayersError
from tests.oracle import (
    Oracle,
    as_columns,
    assert_same_on_all_ranks,
    assert_unchanged,
    make_reference,
    take_snapshot,
)
from tests.ranks import Rank, on_ranks


def make_network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2), nn.BatchNorm1d(2, momentum=None)
    ).double()


def make_ddp(normalization: str = "renorm") -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    ddp = DistributedDataParallel(convert_sync_accum(make_network(), normalization=normalization))
    return ddp, torch.optim.SGD(ddp.parameters(), lr=0.1)


def make_micro_batch(rank: Rank, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * index + rank.index)
    return torch.randn(4 + rank.index, 3, generator=generator, dtype=torch.float64) + rank.index


def train(ddp: nn.Module, optimizer: torch.optim.Optimizer, rank: Rank, micro_batches: int, window: int = 1) -> None:
    """A step after each ``window`` micro-batches; a window that is not full is left open."""
    for index in range(micro_batches):
        closes = (index + 1) % window == 0
        with nullcontext() if closes else ddp.no_sync():
            ddp(make_micro_batch(rank, index)).square().mean().backward()
        if closes:
            optimizer.step()
            optimizer.zero_grad()


class Recorder:
    """Keeps what the layers of this rank see, by step, and their statistics after each commit."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, SyncAccumBatchNorm)}
        self._before = {name: make_reference(layer) for name, layer in self._layers.items()}
        self._seen: dict[str, list[list[Tensor]]] = {name: [[]] for name in self._layers}
        self._after: list[dict[str, dict[str, Tensor]]] = []
        for name, layer in self._layers.items():
            layer.register_forward_pre_hook(lambda _, inputs, name=name: self._see(name, inputs[0]))
        commit_on_step(model, optimizer)
        optimizer.register_step_post_hook(lambda *_: self._close_step())

    def _see(self, name: str, x: Tensor) -> None:
        self._seen[name][-1].append(as_columns(x))

    def _close_step(self) -> None:
        self._after.append({n: {k: b.clone() for k, b in m.named_buffers()} for n, m in self._layers.items()})
        for steps in self._seen.values():
            steps.append([])

    def check(self, steps: int) -> None:
        """Each commit of the longest-running rank took up what all ranks saw in that step. Collective."""
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, (self._seen, self._after))
        longest = max((after for _, after in everyones), key=len)
        assert len(longest) == steps
        for name, reference in self._before.items():
            for step, after in enumerate(longest):
                seen = [
                    x for windows, _ in everyones for x in (windows[name][step] if step < len(windows[name]) else [])
                ]
                reference(torch.cat(seen))
                expected = dict(reference.named_buffers())
                torch.testing.assert_close(after[name], expected, rtol=1e-12, atol=1e-12)  # of float64's 1e-16
                for _, theirs in everyones:
                    if step < len(theirs):
                        assert all(torch.equal(theirs[step][name][k], after[name][k]) for k in expected)


@pytest.mark.parametrize("window", [1, 2, 3])
@on_ranks(3)
def test_every_commit_takes_up_the_global_batch_whoever_still_has_data(rank: Rank, window: int) -> None:
    ddp, optimizer = make_ddp()
    recorder = Recorder(ddp, optimizer)
    # Rank 1 runs out in the middle of a window, where there is one, and rank 2 never has any data.
    micro_batches = (6 * window, 4 * window - 1, 0)[rank.index]
    with join(ddp):
        train(ddp, optimizer, rank, micro_batches, window)
    recorder.check(steps=6)
    assert_same_on_all_ranks([*ddp.parameters(), *ddp.buffers()])
    assert ddp.module[1].window.count == 0


@on_ranks(2)
def test_parameters_become_those_of_ddps_own_join_without_us(rank: Rank) -> None:
    plain = DistributedDataParallel(make_network())
    ours, optimizer = make_ddp("batch")
    commit_on_step(ours, optimizer)
    with plain.join():
        train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), rank, 6 - 4 * rank.index, window=2)
    with join(ours):
        train(ours, optimizer, rank, 6 - 4 * rank.index, window=2)
    torch.testing.assert_close(list(ours.parameters()), list(plain.parameters()))


@on_ranks(2)
def test_ranks_join_again_and_train_without_in_between(rank: Rank) -> None:
    ddp, optimizer = make_ddp()
    commit_on_step(ddp.module, optimizer)  # the wrapped model itself, as where the hook came before DDP
    oracle = Oracle(ddp)
    for epoch in range(2):
        with join(ddp):
            train(ddp, optimizer, rank, 2 + rank.index)
        assert ddp.module[1].num_batches_tracked == 4 * epoch + 3
        oracle = Oracle(ddp)
        oracle.forward(make_micro_batch(rank, 0)).square().mean().backward()
        optimizer.step()
        oracle.check_commit()
    assert_same_on_all_ranks([*ddp.parameters(), *ddp.buffers()])


@on_ranks(2)
def test_an_exception_in_the_block_comes_out_and_ends_it(rank: Rank) -> None:
    ddp, optimizer = make_ddp()
    commit_on_step(ddp, optimizer)

    def stop_on_the_way() -> None:
        with join(ddp):
            train(ddp, optimizer, rank, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stop_on_the_way()
    train(ddp, optimizer, rank, 1)
    assert ddp.module[1].num_batches_tracked == 2


@on_ranks(3)
def test_ranks_at_odds_over_a_commit_are_told_also_those_that_wait(rank: Rank) -> None:
    ddp, optimizer = make_ddp()
    commit_on_step(ddp, optimizer)
    before = take_snapshot(ddp)

    def train_with_a_window_of_its_own() -> None:
        with join(ddp):
            for index in range((2, 2, 0)[rank.index]):
                ddp(make_micro_batch(rank, index)).square().mean().backward()
                if index == rank.index:
                    optimizer.step()

    with pytest.raises(CommitError, match="1 of 2 ranks that still have inputs commit"):
        train_with_a_window_of_its_own()
    if rank.index == 2:
        assert_unchanged(ddp, before)
    assert ddp.module[1].num_batches_tracked == 0


@on_ranks(3)
def test_what_a_commit_raises_is_raised_on_ranks_that_wait_too(rank: Rank) -> None:
    ddp, _ = make_ddp()

    def train_on_nan() -> None:
        with join(ddp):
            for factor in ([1.0], [torch.nan], [])[rank.index]:
                ddp(make_micro_batch(rank, 0) * factor).mean().backward()
                commit(ddp)

    with pytest.raises(NonFiniteStatisticsError, match=r"rank 1: 1, 4\)"):
        train_on_nan()


@pytest.mark.parametrize("committed", ["wrapper", "module"])
@on_ranks(2)
def test_ddps_own_join_is_refused_in_the_first_forward(rank: Rank, committed: str) -> None:
    ddp, optimizer = make_ddp()
    commit_on_step(ddp if committed == "wrapper" else ddp.module, optimizer)
    before = take_snapshot(ddp)
    with pytest.raises(CommitError, match=r"with syncaccum\.join\(ddp\):"), ddp.join():
        train(ddp, optimizer, rank, 2 + rank.index)
    assert_unchanged(ddp, before)
    with join(ddp):  # the remedy
        train(ddp, optimizer, rank, 2 + rank.index)
    train(ddp, optimizer, rank, 1)
    assert ddp.module[1].num_batches_tracked == 4


@on_ranks(2)
def test_empty_micro_batches_are_the_other_remedy(rank: Rank) -> None:
    ddp, optimizer = make_ddp()
    recorder = Recorder(ddp, optimizer)
    for index in range(2):
        x = make_micro_batch(rank, index)
        ddp(x if index <= rank.index else x[:0]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    recorder.check(steps=2)
    assert ddp.module[1].num_batches_tracked == 2


@on_ranks(2)
def test_ddps_own_join_may_end_all_ranks_at_once(rank: Rank) -> None:
    ddp, optimizer = make_ddp()
    recorder = Recorder(ddp, optimizer)
    with (
        pytest.raises(RuntimeError, match="exhausted"),
        ddp.join(throw_on_early_termination=True),
    ):
        train(ddp, optimizer, rank, 2 + rank.index)
    recorder.check(steps=2)


def commit_a_part(ddp: DistributedDataParallel) -> None:
    commit(ddp.module[1])


def commit_another(ddp: DistributedDataParallel) -> None:
    commit(convert_sync_accum(make_network()))


def commit_one_layer(ddp: DistributedDataParallel) -> None:
    ddp.module[4].update_stats()


@pytest.mark.parametrize("verb", [commit_a_part, commit_another, commit_one_layer])
@on_ranks(2)
def test_only_its_model_can_be_committed_inside(rank: Rank, verb: Callable[[DistributedDataParallel], None]) -> None:
    ddp, _ = make_ddp()
    with pytest.raises(CommitError, match=r"only its model can be committed, as a whole: commit\(ddp\)"), join(ddp):
        verb(ddp)


@on_ranks(2)
def test_what_cannot_join_says_so(rank: Rank) -> None:
    ddp, _ = make_ddp()
    with pytest.raises(TypeError, match="takes a DistributedDataParallel, got Sequential"), join(ddp.module):
        pass
    with pytest.raises(NoLayersError), join(DistributedDataParallel(make_network())):
        pass
    with pytest.raises(RuntimeError, match="join inside join"), join(ddp), join(ddp):
        pass
    with pytest.raises(LockstepError, match="lockstep inside join"), join(ddp):
        lockstep(ddp, ddp, [make_micro_batch(rank, 0)])
    commit(ddp)  # none of it left a mark
