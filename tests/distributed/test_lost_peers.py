"""A peer that is late, killed or stopped: CommitError in time, statistics unchanged, window kept."""

from __future__ import annotations

import datetime
import os
import signal
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncaccum import CommitError, LayoutMismatchError, SyncAccumBatchNorm, commit, commit_on_step
from tests.oracle import (
    assert_unchanged,
    feed_layers,
    make_layers,
    take_snapshot,
)
from tests.ranks import Rank, on_ranks

TIMEOUT = 2.0
# How much later than its due an error may come on a busy machine.
SLACK = 8.0


def assert_commit_fails(layers: nn.ModuleDict, *, after: float = 0.0) -> None:
    """No sooner than ``after`` seconds and hardly later, and without a trace."""
    before = take_snapshot(layers)
    start = time.monotonic()
    with pytest.raises(CommitError, match="a peer is gone, is stuck or did not call commit"):
        commit(layers)
    assert after * 0.9 <= time.monotonic() - start < after + SLACK
    assert_unchanged(layers, before)


def assert_fails_within(layers: nn.ModuleDict, seconds: float) -> None:
    """A commit with a timeout of its own, shorter than the group's."""
    before = take_snapshot(layers)
    start = time.monotonic()
    with pytest.raises(CommitError, match="a peer is gone, is stuck or did not call commit"):
        commit(layers, timeout=seconds)
    assert seconds * 0.9 <= time.monotonic() - start < seconds + SLACK
    assert_unchanged(layers, before)


def make_fed_layers(rank: Rank, *, commits: int) -> nn.ModuleDict:
    """Layers with an open window, after some good commits."""
    layers = make_layers(a=3, b=4)
    for step in range(commits):
        feed_layers(layers, rank, seed=step)
        commit(layers)
    feed_layers(layers, rank, seed=commits)
    return layers


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("commits", [0, 1])
@on_ranks(3, timeout=TIMEOUT)
def test_a_rank_that_skips_a_commit_makes_the_others_time_out(rank: Rank, commits: int) -> None:
    layers = make_fed_layers(rank, commits=commits)
    before = take_snapshot(layers)
    if rank.index == 2:
        time.sleep(TIMEOUT + 0.5)  # alive, and busy with something else
        assert_unchanged(layers, before)
    else:
        assert_commit_fails(layers, after=TIMEOUT)


@pytest.mark.parametrize("commits", [0, 1])
@on_ranks(2, lost={1})
def test_a_peer_killed_before_the_commit_is_noticed_long_before_the_timeout(rank: Rank, commits: int) -> None:
    layers = make_fed_layers(rank, commits=commits)
    if rank.index == 1:
        die()
    assert_commit_fails(layers)


@on_ranks(3, lost={1})
def test_a_peer_killed_in_the_commit_is_noticed_long_before_the_timeout(rank: Rank) -> None:
    """Ranks 0 and 1 are in the all-reduce, which waits for rank 2, when rank 1 dies."""
    layers = make_fed_layers(rank, commits=1)
    if rank.index == 1:
        threading.Timer(0.3, die).start()
    if rank.index == 2:
        time.sleep(0.6)
    assert_commit_fails(layers)


@on_ranks(4, lost={1})
def test_a_rank_that_waits_for_survivors_only_is_told_by_them(rank: Rank) -> None:
    """gloo's ring: rank 1's neighbours see that it dies, and rank 3 waits for those two."""
    layers = make_fed_layers(rank, commits=1)
    if rank.index == 1:
        time.sleep(0.3)  # the others are in the all-reduce by then
        die()
    assert_commit_fails(layers)


@on_ranks(2, lost={1})
def test_a_peer_killed_between_fingerprint_and_statistics_leaves_nothing_half_done(rank: Rank) -> None:
    layers = make_fed_layers(rank, commits=0)
    if rank.index == 1:
        reduce_once_then_die()
    assert_commit_fails(layers)


def reduce_once_then_die() -> None:
    all_reduce = dist.all_reduce

    def patched(tensor: Tensor, *args: Any, **options: Any) -> Any:
        dist.all_reduce = lambda *_, **__: die()
        return all_reduce(tensor, *args, **options)

    dist.all_reduce = patched  # in a process that is about to die


@on_ranks(2, timeout=TIMEOUT, lost={1})
def test_a_stopped_peer_is_noticed_at_the_timeout(rank: Rank) -> None:
    layers = make_fed_layers(rank, commits=1)
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    assert_commit_fails(layers, after=TIMEOUT)


@pytest.mark.parametrize("commits", [0, 1])
@on_ranks(3, timeout=60.0, lost={1})
def test_a_commit_may_have_a_shorter_timeout_than_its_group(rank: Rank, commits: int) -> None:
    layers = make_fed_layers(rank, commits=commits)
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    assert_fails_within(layers, TIMEOUT)


@on_ranks(3, timeout=60.0)
def test_a_peer_that_comes_after_the_timeout_of_a_commit_does_not_apply_it_either(rank: Rank) -> None:
    layers = make_fed_layers(rank, commits=1)
    if rank.index < 2:
        assert_fails_within(layers, 1.0)
    else:
        time.sleep(2.0)
        assert_commit_fails(layers)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{rank.folder}/again", rank=rank.index, world_size=3)
    report = commit(layers, timeout=20.0)
    assert set(report.layers) == set(layers)


@on_ranks(3, timeout=60.0)
def test_in_a_group_of_their_own_commits_never_meet_another_collective(rank: Rank) -> None:
    """In the group that rank 2 uses for its gradients, gloo would abort or add up sums of the wrong things."""
    own = dist.new_group()
    layers = nn.ModuleDict({"a": SyncAccumBatchNorm(3, process_group=own, dtype=torch.float64)})
    for step in range(2):
        feed_layers(layers, rank, seed=step)
        if step == 0:
            commit(layers)
    gradient = torch.ones(1000)
    if rank.index < 2:
        assert_fails_within(layers, TIMEOUT)
    dist.all_reduce(gradient)  # where rank 2, which skipped the commit, has been all along
    assert gradient.eq(3).all()


@on_ranks(3)
def test_ranks_that_are_a_commit_apart_are_told_when_they_meet_again(rank: Rank) -> None:
    """A peer that dies in the last message of an all-reduce may leave some survivors with the result."""
    layers = make_fed_layers(rank, commits=1)
    if rank.index == 1:
        layers["b"].get_buffer("num_batches_tracked").add_(1)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{rank.folder}/again", rank=rank.index, world_size=3)
    before = take_snapshot(layers)
    with pytest.raises(LayoutMismatchError, match="layer 'b' has tracked 1 batches on rank 0 and 2 on rank 1"):
        commit(layers)
    assert_unchanged(layers, before)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_cannot_be_is_refused(timeout: float) -> None:
    layers = make_layers(a=3)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    for act in (
        lambda: commit(layers, timeout=timeout),
        lambda: commit_on_step(layers, optimizer, timeout=timeout),
    ):
        with pytest.raises(ValueError, match="give a positive number of seconds"):
            act()


@on_ranks(2, timeout=60.0)
def test_the_timeout_of_commits_on_step(rank: Rank) -> None:
    layers = make_fed_layers(rank, commits=1)
    before = take_snapshot(layers)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    commit_on_step(layers, optimizer, timeout=datetime.timedelta(seconds=TIMEOUT))
    if rank.index == 1:
        time.sleep(TIMEOUT + 1.0)
        return
    start = time.monotonic()
    with pytest.raises(CommitError, match="a peer is gone, is stuck or did not call commit"):
        optimizer.step()
    assert TIMEOUT * 0.9 <= time.monotonic() - start < TIMEOUT + SLACK
    assert_unchanged(layers, before)


@on_ranks(3, timeout=TIMEOUT, lost={2})
def test_a_kept_window_can_be_committed_by_the_ranks_that_are_left(rank: Rank) -> None:
    """As elastic training does: a new group, and no micro-batch of the survivors is lost."""
    layers: Any = make_fed_layers(rank, commits=1)
    if rank.index == 2:
        die()
    assert_commit_fails(layers)
    windows = torch.stack([layer.window.count for layer in layers.values()])
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{rank.folder}/survivors", rank=rank.index, world_size=2)
    report = commit(layers)
    assert report.ranks == 2
    dist.all_reduce(windows)
    assert list(report.values.values()) == windows.tolist()
