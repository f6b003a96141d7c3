"""commit_on_step(overlap=True): the same statistics, to the last bit, and the same errors as without."""

from __future__ import annotations

import os
import signal
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from syncaccum import (
    CommitError,
    LayoutMismatchError,
    NonFiniteStatisticsError,
    SyncAccumBatchNorm,
    commit,
    commit_on_step,
    convert_sync_accum,
    discard,
    gather_window_state_dict,
    join,
    lockstep,
    lookahead,
)
from syncaccum.errors import TooFewValuesError
from tests.distributed.test_collectives import count_collectives
from tests.oracle import Oracle, as_bytes, assert_same_on_all_ranks, make_layers
from tests.ranks import Rank, on_ranks


def make_network(normalization: str = "renorm", **groups: Any) -> nn.Sequential:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.Tanh(), nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4), nn.Flatten(1)
    )
    return convert_sync_accum(network.double(), normalization=normalization, **groups)


def make_micro_batch(rank: Rank, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * index + rank.index)
    return torch.randn(2 + rank.index, 3, 8, generator=generator, dtype=torch.float64) + rank.index


def make_pair(normalization: str = "renorm") -> tuple[DistributedDataParallel, Optimizer]:
    ddp = DistributedDataParallel(make_network(normalization))
    return ddp, SGD(ddp.parameters(), lr=0.1)


def walk(model: Any, rank: Rank, index: int = 0) -> None:
    model(make_micro_batch(rank, index)).square().mean().backward()


def walk_all(ddp: DistributedDataParallel, rank: Rank, step: int, count: int = 2) -> None:
    """So many micro-batches, and gradients reduced in the last one's backward."""
    for index in range(count):
        ddp.require_backward_grad_sync = index == count - 1
        walk(ddp, rank, 10 * step + index)


def step(optimizer: Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def state_of(model: nn.Module) -> list[Tensor]:
    """Everything that a commit changes, or that comes of it."""
    states = [layer._accumulation for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm)]
    ledgers = [state.ledger.pack() for state in states if state.ledger is not None]
    counts = [torch.tensor([state.micro_batches, state.is_open, state.is_committed]) for state in states]
    tensors = [*model.parameters(), *model.buffers(), *(state.window for state in states), *counts]
    return [tensor.detach().clone() for tensor in tensors + [part for packed in ledgers for part in packed.values()]]


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert torch.equal(as_bytes(a), as_bytes(b))


# --- the same as without ------------------------------------------------------------------------------------------


def train(rank: Rank, normalization: str, *, overlap: bool) -> list[Tensor]:
    ddp, optimizer = make_pair(normalization)
    commit_on_step(ddp, optimizer, overlap=overlap)
    for number in range(4):
        walk_all(ddp, rank, number, 2 + rank.index)
        step(optimizer)
    assert_same_on_all_ranks([*ddp.parameters(), *ddp.buffers()])
    return state_of(ddp)


@pytest.mark.parametrize("normalization", ["renorm", "batch", "window"])
@on_ranks(2)
def test_uneven_ranks_of_ddp_get_the_same_bits_as_without(rank: Rank, normalization: str) -> None:
    assert_same_bits(train(rank, normalization, overlap=True), train(rank, normalization, overlap=False))


def train_without_ddp(rank: Rank, *, overlap: bool) -> list[Tensor]:
    """Rank 2 has no data in two steps, and then no micro-batch at all."""
    model = make_network()
    optimizer = SGD(model.parameters(), lr=0.0)
    handle = commit_on_step(model, optimizer, overlap=overlap)
    for number in range(4):
        for index in range(0 if rank.index == 2 and number in (1, 2) else 1 + rank.index):
            output = model(make_micro_batch(rank, 10 * number + index))
            if overlap and index == rank.index:
                handle.start_commit()
            output.square().mean().backward()
        if overlap and rank.index == 2 and number in (1, 2):
            handle.start_commit()
        step(optimizer)
    return state_of(model)


@on_ranks(3)
def test_uneven_ranks_without_ddp_get_the_same_bits_as_without(rank: Rank) -> None:
    assert_same_bits(train_without_ddp(rank, overlap=True), train_without_ddp(rank, overlap=False))


def train_until_inputs_end(rank: Rank, *, overlap: bool) -> list[Tensor]:
    ddp, optimizer = make_pair()
    commit_on_step(ddp, optimizer, overlap=overlap)
    walk_all(ddp, rank, 0)
    step(optimizer)
    walk_all(ddp, rank, 1)  # on its way when the join begins
    with join(ddp):
        for number in range(2, 6 - rank.index):
            walk(ddp, rank, 10 * number)
            step(optimizer)
    walk_all(ddp, rank, 7)
    step(optimizer)
    assert_same_on_all_ranks([*ddp.parameters(), *ddp.buffers()])
    return state_of(ddp)


@on_ranks(3)
def test_ranks_in_a_join_get_the_same_bits_as_without(rank: Rank) -> None:
    assert_same_bits(train_until_inputs_end(rank, overlap=True), train_until_inputs_end(rank, overlap=False))


def train_several(rank: Rank, *, overlap: bool) -> list[Tensor]:
    ddp, _ = make_pair()
    pair = [SGD(ddp.module[:3].parameters(), lr=0.1), SGD(ddp.module[3:].parameters(), lr=0.1)]
    commit_on_step(ddp, pair, overlap=overlap)
    for number in range(3):
        walk_all(ddp, rank, number)
        for optimizer in pair if (rank.index + number) % 2 else reversed(pair):
            step(optimizer)
    return state_of(ddp)


@on_ranks(2)
def test_several_optimizers_get_the_same_bits_as_without(rank: Rank) -> None:
    assert_same_bits(train_several(rank, overlap=True), train_several(rank, overlap=False))


def train_exactly(rank: Rank, mode: str, *, overlap: bool) -> list[Tensor]:
    ddp, optimizer = make_pair()
    handle = commit_on_step(ddp, optimizer, overlap=overlap)
    for number in range(3):
        batches = [make_micro_batch(rank, 10 * number + index) for index in range(2 + rank.index)]
        if mode == "lookahead":
            for output in lookahead(ddp, ddp, batches):
                output.square().mean().backward()
        else:
            loss = torch.stack([output.square().mean() for output in lockstep(ddp, ddp, batches)]).sum()
            if overlap:
                handle.start_commit()
            loss.backward()
        step(optimizer)
    return state_of(ddp)


@pytest.mark.parametrize("mode", ["lockstep", "lookahead"])
@on_ranks(2)
def test_exact_modes_get_the_same_bits_as_without(rank: Rank, mode: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nothing had sent the windows")
        assert_same_bits(train_exactly(rank, mode, overlap=True), train_exactly(rank, mode, overlap=False))


# --- when it is sent ----------------------------------------------------------------------------------------------


@on_ranks(2)
def test_all_steps_but_the_first_leave_the_sending_to_the_last_backward(rank: Rank) -> None:
    ddp, optimizer = make_pair()
    commit_on_step(ddp, optimizer, overlap=True)
    counts = []
    for number in range(3):
        walk_all(ddp, rank, number)
        counts.append(sum(count_collectives(optimizer.step).values()))
    assert counts == [2, 0, 0]


@on_ranks(2)
def test_windows_are_sent_before_the_gradients_and_once(rank: Rank) -> None:
    ddp, optimizer = make_pair()
    handle = commit_on_step(ddp, optimizer, overlap=True)
    walk(ddp, rank)
    step(optimizer)
    was_sent: list[bool] = []
    for parameter in ddp.parameters():
        parameter.register_hook(lambda _: was_sent.append(bool(handle._overlap._messages)))
    with ddp.no_sync():
        walk(ddp, rank, 1)
    assert not any(was_sent)
    was_sent.clear()
    outputs = [ddp(make_micro_batch(rank, index)) for index in (2, 3)]
    # One backward through two results of two forwards.
    loss = torch.stack([output[:, at].mean() for output in outputs for at in (0, 1)]).sum()
    # And one bucket of gradients.
    assert count_collectives(loss.backward)["gloo:all_reduce"] == 2
    assert was_sent
    assert all(was_sent)


def train_scaled(rank: Rank, *, overlap: bool) -> list[Tensor]:
    """Rank 1 overflows in step 1, all ranks skip it, and the window goes on."""
    ddp, optimizer = make_pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)
    commit_on_step(ddp, optimizer, overlap=overlap)
    overflows = False
    ddp.module[0].weight.register_hook(lambda g: g + torch.inf if overflows else g)
    for number in range(4):
        overflows = number == 1 and rank.index == 1
        scaler.scale(ddp(make_micro_batch(rank, number)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update(1.0)
        optimizer.zero_grad()
    assert ddp.module[1].num_batches_tracked == 3
    return state_of(ddp)


@on_ranks(2)
def test_a_step_that_grad_scaler_skips_drops_what_was_sent(rank: Rank) -> None:
    assert_same_bits(train_scaled(rank, overlap=True), train_scaled(rank, overlap=False))


@on_ranks(2)
def test_without_no_sync_the_last_backward_counts(rank: Rank) -> None:
    ends = []
    for overlap in (True, False):
        ddp, optimizer = make_pair()
        commit_on_step(ddp, optimizer, overlap=overlap)
        for number in range(3):
            for index in range(3):
                walk(ddp, rank, 10 * number + index)
            step(optimizer)
        ends.append(state_of(ddp))
    assert_same_bits(*ends)


# --- between the backward and the step ----------------------------------------------------------------------------


def begin(rank: Rank, normalization: str = "renorm") -> tuple[DistributedDataParallel, Optimizer, Any]:
    """One step is done, and the next window is on its way."""
    ddp, optimizer = make_pair(normalization)
    handle = commit_on_step(ddp, optimizer, overlap=True)
    walk_all(ddp, rank, 0)
    step(optimizer)
    walk_all(ddp, rank, 1)
    return ddp, optimizer, handle


@pytest.mark.parametrize("normalization", ["renorm", "window"])
@on_ranks(2)
def test_a_forward_on_one_rank_goes_into_the_next_window(rank: Rank, normalization: str) -> None:
    ddp, optimizer, _ = begin(rank, normalization)
    layer = ddp.module[1]
    sent = layer._accumulation.window.clone()
    if rank.index == 1:
        with torch.no_grad():
            ddp.module(make_micro_batch(rank, 5))
        expected = layer._accumulation.window - sent
        with pytest.warns(UserWarning, match=r"a training forward came when the window was on its way .*layer 1,"):
            step(optimizer)
        # Sums of float64, from which others were taken off.
        torch.testing.assert_close(layer._accumulation.window, expected, rtol=1e-12, atol=1e-12)
        assert layer._accumulation.micro_batches == 1
        assert layer.window.count == 3 * 6
        if normalization == "window":
            assert (layer._accumulation.ledger.samples, layer._accumulation.ledger.micro_batches) == (3, 1)
    else:
        step(optimizer)
        assert layer.window.count == 0
    assert_same_on_all_ranks([*ddp.parameters(), *ddp.buffers()])
    walk_all(ddp, rank, 2)
    counts = layer.window.count.clone()
    dist.all_reduce(counts)
    step(optimizer)
    assert counts == 2 * (2 + 3) * 6 + 3 * 6
    assert_same_on_all_ranks([*ddp.parameters(), *ddp.buffers()])
    assert layer.window.count == 0


@on_ranks(2)
def test_a_discard_on_one_rank_comes_too_late_and_holds_no_rank_up(rank: Rank) -> None:
    ddp, optimizer, _ = begin(rank)
    peer, peers_optimizer, _ = begin(rank)
    if rank.index == 0:
        discard(ddp)
        with torch.no_grad():
            ddp.module(make_micro_batch(rank, 5))
        later = ddp.module[1]._accumulation.window.clone()
        with pytest.warns(UserWarning, match=r"dropped when it was on its way .*layer 1,"):
            step(optimizer)
        assert torch.equal(ddp.module[1]._accumulation.window, later)
    else:
        step(optimizer)
    step(peers_optimizer)
    assert_same_bits([*ddp.buffers()], [*peer.buffers()])


@on_ranks(2)
def test_a_discard_and_no_step_drops_the_window(rank: Rank) -> None:
    ddp, optimizer, _ = begin(rank)
    discard(ddp)
    optimizer.zero_grad()
    oracle = Oracle(ddp)
    ddp.require_backward_grad_sync = True
    oracle.forward(make_micro_batch(rank, 5)).mean().backward()
    step(optimizer)
    oracle.check_commit()


@on_ranks(2)
def test_a_commit_by_hand_counts_nothing_twice(rank: Rank) -> None:
    ddp, optimizer, _ = begin(rank)
    peer, _ = make_pair()
    for number in range(2):
        walk_all(peer, rank, number)
        commit(peer)
    for p, q in zip(ddp.parameters(), peer.parameters(), strict=True):
        q.data.copy_(p)
    before = [b.clone() for b in ddp.buffers()]
    commit(ddp)
    assert not torch.equal(before[0], ddp.module[1].running_mean)
    after = [b.clone() for b in ddp.buffers()]
    step(optimizer)
    assert_same_bits(after, [*ddp.buffers()])


@on_ranks(2)
def test_checkpoints_have_the_window_that_is_on_its_way(rank: Rank) -> None:
    ddp, optimizer, _ = begin(rank)
    state = gather_window_state_dict(ddp)
    assert state["1"][0, 0] == 2 * (2 + 3) * 6
    assert ddp.module[1].window.count == 2 * (2 + rank.index) * 6
    step(optimizer)
    assert ddp.module[1].num_batches_tracked == 2


@on_ranks(2)
def test_remove_leaves_the_window_open(rank: Rank) -> None:
    ddp, optimizer, handle = begin(rank)
    handle.remove()
    step(optimizer)
    assert ddp.module[1].num_batches_tracked == 1
    assert not ddp._forward_hooks
    walk_all(ddp, rank, 2)
    assert commit(ddp).values["1"] == 2 * 2 * (2 + 3) * 6


# --- errors -------------------------------------------------------------------------------------------------------


@on_ranks(2)
def test_ranks_at_odds_about_overlap_learn_it_in_the_first_step(rank: Rank) -> None:
    ddp, optimizer = make_pair()
    commit_on_step(ddp, optimizer, overlap=rank.index == 1)
    for number in range(2):
        walk_all(ddp, rank, number)
        with pytest.raises(LayoutMismatchError, match="rank 0 commit, rank 1 commit with overlap=True"):
            optimizer.step()
    assert ddp.module[1].num_batches_tracked == 0


@on_ranks(2)
def test_a_layout_that_one_rank_changes_is_named(rank: Rank) -> None:
    ddp, optimizer = make_pair()
    commit_on_step(ddp, optimizer, overlap=True)
    for number in range(3):
        walk_all(ddp, rank, number)
        if number == 1:
            with pytest.raises(LayoutMismatchError, match=r"layer 0 differs between ranks.*momentum 0.1.*momentum 0.3"):
                optimizer.step()
            ddp.module[1].momentum = 0.1
        else:
            optimizer.step()
            if number == 0 and rank.index == 1:
                ddp.module[1].momentum = 0.3
    assert ddp.module[1].num_batches_tracked == 2


@on_ranks(2)
def test_a_layout_that_all_ranks_change_is_compared_and_committed(rank: Rank) -> None:
    ends = []
    for overlap in (True, False):
        ddp, optimizer = make_pair()
        commit_on_step(ddp, optimizer, overlap=overlap)
        for number in range(3):
            ddp.module[1].momentum = 0.1 + 0.1 * number
            walk_all(ddp, rank, number)
            step(optimizer)
        ends.append(state_of(ddp))
    assert_same_bits(*ends)


def spoil(model: Any, rank: Rank) -> None:
    """A micro-batch with an infinite value on rank 1, and gradients that are finite all the same."""
    micro_batch = make_micro_batch(rank, 5)
    if rank.index == 1:
        micro_batch[0, 0] = torch.inf
    with torch.no_grad():
        model(micro_batch)


@on_ranks(2)
def test_nan_raises_on_all_ranks_at_every_step_until_discard(rank: Rank) -> None:
    ddp, optimizer = make_pair()
    commit_on_step(ddp, optimizer, overlap=True)
    walk_all(ddp, rank, 0)
    step(optimizer)
    spoil(ddp.module, rank)
    for number in range(2):
        walk_all(ddp, rank, number)
        with pytest.raises(NonFiniteStatisticsError, match=r"\(rank 1: 1, 4\)"):
            optimizer.step()
    discard(ddp)
    walk_all(ddp, rank, 2)
    optimizer.step()
    assert ddp.module[1].num_batches_tracked == 2
    assert_same_on_all_ranks([*ddp.buffers()])


@on_ranks(2)
def test_nan_is_discarded_on_all_ranks(rank: Rank) -> None:
    ddp, optimizer = make_pair("window")
    commit_on_step(ddp, optimizer, on_nonfinite="discard", overlap=True)
    walk(ddp, rank, 0)
    step(optimizer)
    spoil(ddp.module, rank)
    walk(ddp, rank, 1)
    with pytest.warns(UserWarning, match=r"\(rank 1: 1, 4\): it was discarded on all ranks"):
        step(optimizer)
    assert ddp.module[1].window.count == 0
    oracle = Oracle(ddp)
    for number in range(2):
        oracle.forward(make_micro_batch(rank, number)).square().mean().backward()
        step(optimizer)
        oracle.check_commit()


def make_fed() -> tuple[nn.ModuleDict, Optimizer, Any]:
    """Layers without DDP, one step, and an open window."""
    layers = make_layers(a=3, b=4)
    optimizer = SGD(layers.parameters(), lr=0.1)
    handle = commit_on_step(layers, optimizer, overlap=True)
    for number in range(2):
        for layer, width in zip(layers.values(), (3, 4), strict=True):
            layer(torch.randn(4, width, dtype=torch.float64))
        if number == 0:
            optimizer.step()
    # A rank that dies now is missed by no peer's first step.
    dist.barrier()
    return layers, optimizer, handle


@on_ranks(2)
def test_one_value_in_the_global_batch_raises_on_all_ranks(rank: Rank) -> None:
    layers, optimizer, handle = make_fed()
    discard(layers)
    if rank.index == 0:
        layers["a"](torch.ones(1, 3, dtype=torch.float64))
    handle.start_commit()
    with pytest.raises(TooFewValuesError, match="in a:"):
        optimizer.step()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@on_ranks(3, lost={1})
def test_a_peer_that_dies_before_it_sends_is_named_by_the_step(rank: Rank) -> None:
    layers, optimizer, handle = make_fed()
    before = state_of(layers)
    if rank.index == 1:
        die()
    handle.start_commit()
    with pytest.raises(
        CommitError, match=rf"rank {rank.index} of 3: .* a peer is gone, is stuck or did not call commit"
    ):
        optimizer.step()
    assert_same_bits(before, state_of(layers))


@on_ranks(2)
def test_a_peer_that_sends_nothing_is_given_up_after_the_commits_own_timeout(rank: Rank) -> None:
    layers, optimizer, handle = make_fed()
    given_up = rank.folder / "given_up"
    if rank.index == 1:  # alive, and busy with something else
        while not given_up.exists():
            time.sleep(0.01)
        return
    # Not of the first step, which a busy machine may hold up.
    handle._timeout = handle._overlap._timeout = 0.3
    handle.start_commit()
    with pytest.raises(CommitError, match=r"rank 0 of 2: .* did not call commit"):
        optimizer.step()
    assert layers["a"].window.count == 4
    given_up.touch()


@pytest.mark.parametrize("bad", ["first", "second"])
@on_ranks(2)
def test_each_group_is_all_or_nothing(rank: Rank, bad: str) -> None:
    groups = {"first": dist.new_group([0, 1]), "second": dist.new_group([0, 1])}
    layers = nn.ModuleDict({name: SyncAccumBatchNorm(3, process_group=group) for name, group in groups.items()})
    optimizer = SGD(layers.parameters(), lr=0.1)
    handle = commit_on_step(layers, optimizer, overlap=True)
    for value in (1.0, torch.nan):
        for name, layer in layers.items():
            layer(torch.full((2, 3), value if (name, rank.index) == (bad, 0) else 1.0))
        handle.start_commit()
        if value == 1.0:
            optimizer.step()
    with pytest.raises(NonFiniteStatisticsError, match=rf"\(rank 0: {bad}\).*unchanged are {bad}; done are"):
        optimizer.step()
    for name, layer in layers.items():
        assert layer.num_batches_tracked == 1 + (name != bad)
        assert layer.window.count == (2 if name == bad else 0)


@on_ranks(2)
def test_a_step_that_nothing_was_sent_for_commits_all_the_same_and_says_so_once(rank: Rank) -> None:
    layers, optimizer, _ = make_fed()
    with pytest.warns(UserWarning, match="nothing had sent the windows when the step came"):
        optimizer.step()
    optimizer.step()
    assert layers["a"].num_batches_tracked == 2
