"""The rank pool itself: what it hides, no test of this folder can see."""

from __future__ import annotations

import os
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Rank, RankError, on_ranks, open_ranks, run_on_ranks


def sum_indices(rank: Rank, start: int = 0) -> float:
    total = torch.tensor(float(start + rank.index))
    dist.all_reduce(total)
    return total.item()


def raise_on_rank_1(rank: Rank) -> None:
    if rank.index == 1:
        raise KeyError("only here")
    sum_indices(rank)


def kill_rank_1(rank: Rank) -> None:
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def hang_rank_0(rank: Rank) -> None:
    if rank.index == 0:
        time.sleep(60)


def warn(rank: Rank) -> None:
    warnings.warn("as an error", stacklevel=1)


def tell_process(rank: Rank) -> tuple[int, int]:
    return rank.index, os.getpid()


def test_results_come_in_rank_order_from_processes_that_stay() -> None:
    first = run_on_ranks(tell_process, 3)
    assert [index for index, _ in first] == [0, 1, 2]
    assert run_on_ranks(tell_process, 2) == first[:2]
    assert os.getpid() not in dict(first).values()


def test_several_runs_share_one_group() -> None:
    with open_ranks(3) as ranks:
        assert [ranks.run(sum_indices, start) for start in range(3)] == [[3.0] * 3, [6.0] * 3, [9.0] * 3]


def test_exception_on_one_rank_fails_the_run_with_every_story() -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)--- rank 0: Traceback.*--- rank 1: Traceback.*only here"):
        run_on_ranks(raise_on_rank_1, 2)
    assert time.monotonic() - started < 10  # rank 0 did not wait for the group's 30 s
    assert run_on_ranks(sum_indices, 2) == [1.0, 1.0]


def test_dead_rank_is_reported_and_replaced() -> None:
    with pytest.raises(RankError, match=r"--- rank 0: returned\n--- rank 1: died, exit code -9"):
        run_on_ranks(kill_rank_1, 2)
    assert run_on_ranks(sum_indices, 2) == [1.0, 1.0]


def test_hanging_rank_is_reported_and_replaced() -> None:
    with open_ranks(2) as ranks:
        with pytest.raises(RankError, match=r"--- rank 0: did not answer\n--- rank 1: returned"):
            ranks.run(hang_rank_0, patience=2.0)
        assert ranks.run(sum_indices) == [1.0, 1.0]


def test_rank_that_should_be_lost_and_is_not_fails_the_run() -> None:
    with open_ranks(2) as ranks, pytest.raises(RankError, match="--- rank 1: returned"):
        ranks.run(sum_indices, lost={1})


def test_warnings_are_errors_on_ranks() -> None:
    with pytest.raises(RankError, match="UserWarning: as an error"):
        run_on_ranks(warn, 1)


@pytest.mark.parametrize("start", [0, 5])
@on_ranks(2)
def test_body_takes_what_pytest_provides(rank: Rank, start: int) -> None:
    assert sum_indices(rank, start) == 2 * start + 1


@on_ranks(2, lost={1})
def test_body_may_lose_a_rank_on_purpose(rank: Rank) -> None:
    kill_rank_1(rank)
