"""commit_on_step on several ranks: one window for one step, and all ranks decide alike."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from syncaccum import (
    NonFiniteStatisticsError,
    SyncAccumBatchNorm,
    commit_on_step,
    convert_sync_accum,
    discard,
    join,
)
from syncaccum.errors import TooFewValuesError
from tests.oracle import Oracle, assert_same_on_all_ranks
from tests.ranks import Rank, on_ranks


def make_network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2), nn.BatchNorm1d(2)).double()


def make_ddp() -> DistributedDataParallel:
    return DistributedDataParallel(convert_sync_accum(make_network()))


def make_micro_batch(rank: Rank, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * index + rank.index)
    return torch.randn(4 + rank.index, 3, generator=generator, dtype=torch.float64) + rank.index


def backward(model: Any, rank: Rank, index: int = 0) -> None:
    model(make_micro_batch(rank, index)).square().mean().backward()


class Parent(SGD):
    """Its step, and with it its hook, is also called by Calling's."""


class Calling(Parent):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def make_plain(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1)


def make_calling(model: nn.Module) -> Optimizer:
    # torch hooks a class when it is first made. Where only some ranks have made the parent, torch's hooks are uneven.
    if dist.get_rank() == 1:
        Parent(model.parameters(), lr=0.1)
    return Calling(model.parameters(), lr=0.1)


def distributed_optimizers() -> Any:
    """torch's module, which warns of its own use of TorchScript when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("torch.distributed.optim")


def make_post_local(model: nn.Module) -> Optimizer:
    return distributed_optimizers().PostLocalSGDOptimizer(
        make_plain(model), PeriodicModelAverager(period=2, warmup_steps=1)
    )


def make_zero(model: nn.Module) -> Optimizer:
    return distributed_optimizers().ZeroRedundancyOptimizer(model.parameters(), SGD, lr=0.1)


@pytest.mark.parametrize("make", [make_plain, make_calling, make_post_local, make_zero])
@on_ranks(2)
def test_each_step_commits_the_window_that_it_closes(rank: Rank, make: Callable[[nn.Module], Optimizer]) -> None:
    ddp = make_ddp()
    optimizer = make(ddp)
    commit_on_step(ddp, optimizer)
    oracle = Oracle(ddp)
    for step in range(3):
        for index in range(1 + step):
            oracle.forward(make_micro_batch(rank, 10 * step + index)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        oracle.check_commit()
        assert ddp.module[1].window.count == 0
        assert ddp.module[1].num_batches_tracked == 1 + step
    assert_same_on_all_ranks([*ddp.parameters(), *ddp.buffers()])


@on_ranks(2)
def test_a_removed_hook_commits_no_more(rank: Rank) -> None:
    model = convert_sync_accum(make_network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = commit_on_step(model, optimizer)
    for expected_batches in (1, 1):
        backward(model, rank)
        optimizer.step()
        handle.remove()
        assert model[1].num_batches_tracked == expected_batches


@on_ranks(2)
def test_several_optimizers_in_an_order_of_each_ranks_own_commit_once_a_round(rank: Rank) -> None:
    ddp = make_ddp()
    pair = [SGD(ddp.module[:2].parameters(), lr=0.1), SGD(ddp.module[2:].parameters(), lr=0.1)]
    commit_on_step(ddp, pair)
    oracle = Oracle(ddp)
    for step in range(3):
        for index in range(2):
            oracle.forward(make_micro_batch(rank, 2 * step + index)).square().mean().backward()
        for optimizer in pair if (rank.index + step) % 2 else reversed(pair):
            optimizer.step()
            optimizer.zero_grad()
        oracle.check_commit()
    assert ddp.module[1].num_batches_tracked == 3


def make_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)


@on_ranks(2)
def test_one_of_several_steps_that_grad_scaler_skips_holds_no_rank_up(rank: Rank) -> None:
    ddp, scaler = make_ddp(), make_scaler()
    pair = [SGD(ddp.module[:4].parameters(), lr=0.1), SGD(ddp.module[4:].parameters(), lr=0.1)]
    commit_on_step(ddp, pair)
    oracle = Oracle(ddp)
    overflows = False
    ddp.module[0].weight.register_hook(lambda g: g + torch.inf if overflows else g)
    for step in range(4):
        # On one rank alone; DDP's gradients are infinite on both.
        overflows = step == 1 and rank.index == 1
        scaler.scale(oracle.forward(make_micro_batch(rank, step)).square().mean()).backward()
        for optimizer in pair:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update(1.0)
        if step != 1:
            oracle.check_commit()
    assert ddp.module[1].num_batches_tracked == 3
    assert_same_on_all_ranks([*ddp.parameters(), *ddp.buffers()])


# --- NaN and Inf --------------------------------------------------------------------------------------------------


def spoil(model: Any, rank: Rank) -> None:
    """A micro-batch with an infinite value on rank 1, and gradients that are finite all the same."""
    micro_batch = make_micro_batch(rank, 5)
    if rank.index == 1:
        micro_batch[0, 0] = torch.inf
    with torch.no_grad():
        model(micro_batch)


@on_ranks(2)
def test_discard_drops_the_window_on_all_ranks_and_training_goes_on(rank: Rank) -> None:
    ddp = make_ddp()
    optimizer = make_plain(ddp)
    commit_on_step(ddp, optimizer, on_nonfinite="discard")
    backward(ddp, rank)
    optimizer.step()
    before = [b.clone() for b in ddp.buffers()]
    spoil(ddp.module, rank)
    backward(ddp, rank, 1)
    with pytest.warns(UserWarning, match=r"\(rank 1: 1, 4\): it was discarded on all ranks") as caught:
        optimizer.step()
    assert len(caught) == 1
    assert all(torch.equal(b, now) for b, now in zip(before, ddp.buffers(), strict=True))
    optimizer.zero_grad()
    oracle = Oracle(ddp)
    for step in range(2):
        oracle.forward(make_micro_batch(rank, step)).square().mean().backward()
        optimizer.step()
        oracle.check_commit()
    assert_same_on_all_ranks([*ddp.parameters(), *ddp.buffers()])


@on_ranks(2)
def test_an_overflow_that_grad_scaler_skips_does_not_end_training_under_discard(rank: Rank) -> None:
    ddp, scaler = make_ddp(), make_scaler()
    optimizer = make_plain(ddp)
    commit_on_step(ddp, optimizer, on_nonfinite="discard")
    for step in range(4):
        micro_batch = make_micro_batch(rank, step)
        if step == 1 and rank.index == 0:
            micro_batch *= torch.inf
        scaler.scale(ddp(micro_batch).square().mean()).backward()
        if step == 2:
            with pytest.warns(UserWarning, match="rank 0: 1, 4"):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        scaler.update(1.0)
        optimizer.zero_grad()
    # Of steps 0 and 3: step 1 was skipped, and its window was dropped with that of step 2.
    assert ddp.module[1].num_batches_tracked == 2
    assert all(b.isfinite().all() for b in ddp.buffers())
    assert_same_on_all_ranks([*ddp.parameters(), *ddp.buffers()])


@on_ranks(2)
def test_raise_raises_on_all_ranks_at_every_step_until_discard(rank: Rank) -> None:
    ddp = make_ddp()
    optimizer = make_plain(ddp)
    commit_on_step(ddp, optimizer)
    spoil(ddp.module, rank)
    for index in range(2):
        backward(ddp, rank, index)
        with pytest.raises(NonFiniteStatisticsError, match="rank 1: 1, 4"):
            optimizer.step()
    discard(ddp)
    backward(ddp, rank)
    optimizer.step()
    assert ddp.module[1].num_batches_tracked == 1


def make_layers_of_two_groups() -> nn.ModuleDict:
    groups = {"first": dist.new_group([0, 1]), "second": dist.new_group([0, 1])}
    return nn.ModuleDict({name: SyncAccumBatchNorm(3, process_group=group) for name, group in groups.items()})


@pytest.mark.parametrize("bad", ["first", "second"])
@on_ranks(2)
def test_discard_concerns_the_layers_of_the_group_alone(rank: Rank, bad: str) -> None:
    layers = make_layers_of_two_groups()
    optimizer = make_plain(layers)
    commit_on_step(layers, optimizer, on_nonfinite="discard")
    for name, layer in layers.items():
        layer(torch.full((2, 3), torch.nan if (name, rank.index) == (bad, 0) else 1.0))
    with pytest.warns(UserWarning, match=rf"\(rank 0: {bad}\)"):
        optimizer.step()
    for name, layer in layers.items():
        assert layer.num_batches_tracked == (name != bad)
        assert layer.window.count == 0


@pytest.mark.parametrize("bad", ["first", "second"])
@on_ranks(2)
def test_discard_raises_another_groups_error_of_another_kind(rank: Rank, bad: str) -> None:
    layers = make_layers_of_two_groups()
    optimizer = make_plain(layers)
    commit_on_step(layers, optimizer, on_nonfinite="discard")
    for name, layer in layers.items():
        if name == bad:
            layer(torch.full((2, 3), torch.nan))
        elif rank.index == 0:
            layer(torch.ones(1, 3))
    with pytest.raises(TooFewValuesError), pytest.warns(UserWarning, match=rf"\(rank 0: {bad}; rank 1: {bad}\)"):
        optimizer.step()
    for name, layer in layers.items():
        assert layer.num_batches_tracked == 0
        assert layer.window.count == (name != bad and rank.index == 0)


def train_until_inputs_end(ddp: DistributedDataParallel, optimizer: Optimizer, rank: Rank) -> None:
    """Rank 2 has no data, and rank 1 runs out with Inf in its window."""
    with join(ddp):
        if rank.index == 1:
            spoil(ddp.module, rank)
        for step in range(3 if rank.index == 0 else 0):
            backward(ddp, rank, step)
            optimizer.step()
            optimizer.zero_grad()


@on_ranks(3)
def test_ranks_that_wait_in_join_discard_with_the_others(rank: Rank) -> None:
    ddp = make_ddp()
    optimizer = make_plain(ddp)
    commit_on_step(ddp, optimizer, on_nonfinite="discard")
    with pytest.warns(UserWarning, match=r"\(rank 1: 1, 4\)") as caught:
        train_until_inputs_end(ddp, optimizer, rank)
    assert sum("discarded" in str(w.message) for w in caught) == 1
    assert ddp.module[1].num_batches_tracked == 2
    assert ddp.module[1].window.count == 0
    assert_same_on_all_ranks([*ddp.parameters(), *ddp.buffers()])
