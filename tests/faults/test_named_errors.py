"""Ranks at odds: the same named error on every rank, which says what and where."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from torch import Tensor

from tests.faults.conftest import Row
from tests.faults.crew import Crew
from tests.faults.job import Outcome, same_bytes

ODD = 1
OTHERS = (0, 2, 3)
TIMEOUT = 2.0
PROMISE = 2.0  # seconds beyond the timeout, as in test_lost_ranks.py
LONG = 20.0


def assert_named(outcomes: Sequence[Outcome], error: str, *named: str) -> None:
    for outcome in outcomes:
        assert outcome.error == error, outcome
        assert outcome.unchanged
        for what in named:
            assert what in outcome.message, outcome.message


@pytest.mark.parametrize("commits", [0, 1])
def test_layers_differ(crew: Crew, row: Row, commits: int) -> None:
    moment = "first commit" if commits == 0 else "between two commits"
    row.try_out(f"layers differ on rank {ODD}", moment, "LayoutMismatchError on every rank, with layer and rank")
    crew.start(LONG, commits)
    crew.ask("replace_layer", 7, members=[ODD])
    outcomes = crew.ask("commit")
    assert_named(outcomes, "LayoutMismatchError", "'2' (2048 channels", f"rank {ODD} has '2' (7 channels")
    row.saw(f"on all {len(outcomes)} ranks: {outcomes[0].message.split('. ')[0]}")


def test_nan(crew: Crew, undisturbed: list[dict[str, Tensor]], row: Row) -> None:
    row.try_out(f"NaN on rank {ODD}", "during forward", "NonFiniteStatisticsError on every rank, with layer and rank")
    crew.start(LONG)
    crew.ask("forward", 1, members=OTHERS)
    crew.ask("forward", 1, 0.0, True, members=[ODD])
    outcomes = crew.ask("commit")
    assert_named(outcomes, "NonFiniteStatisticsError", f"rank {ODD}: 0, 2")
    row.saw(f"on all {len(outcomes)} ranks: {outcomes[0].message.split('. ')[0]}")
    crew.ask("discard", members=[ODD])
    crew.ask("forward", 1, members=[ODD])
    assert not any(outcome.error for outcome in crew.ask("commit"))
    assert all(same_bytes(state, undisturbed[1]) for state in crew.ask("state"))
    row.saw("after discard and a good micro-batch in its place: equal to undisturbed")


def test_skips_a_commit_for_another_model(crew: Crew, row: Row) -> None:
    row.try_out(
        f"rank {ODD} skips a commit and commits another model",
        "between two commits",
        "LayoutMismatchError on every rank, with layer and rank",
    )
    crew.start(LONG)
    crew.ask("forward", 1)
    crew.post("commit", members=OTHERS)
    crew.post("commit_another", members=[ODD])
    outcomes = crew.answers()
    assert_named(outcomes, "LayoutMismatchError", f"rank {ODD} has '0' (5 channels")
    row.saw(f"on all {len(outcomes)} ranks: {outcomes[0].message.split('. ')[0]}")


def test_skips_a_commit(crew: Crew, undisturbed: list[dict[str, Tensor]], row: Row) -> None:
    row.try_out(
        f"rank {ODD} skips a commit and comes after the timeout of {TIMEOUT:g} s",
        "between two commits",
        "CommitError on every rank; which rank cannot be known: it may as well be gone",
    )
    crew.start(TIMEOUT)
    crew.ask("forward", 1)
    outcomes = crew.ask("commit", members=OTHERS)
    time.sleep(0.5)
    outcomes += crew.ask("commit", members=[ODD])
    assert_named(outcomes, "CommitError", "a peer is gone, is stuck or did not call commit")
    waited = max(outcome.ended - outcome.began for outcome in outcomes)
    assert waited <= TIMEOUT + PROMISE
    crew.meet(LONG)
    assert not any(outcome.error for outcome in crew.ask("commit"))
    assert all(same_bytes(state, undisturbed[1]) for state in crew.ask("state"))
    row.saw(f"on all {len(outcomes)} ranks, {waited:.2f} s after their call at most; then equal to undisturbed")


def test_skips_a_commit_and_joins_the_next(crew: Crew, row: Row) -> None:
    row.try_out(
        f"rank {ODD} skips a commit and comes with its next window in time",
        "between two commits",
        "no value lost or counted twice; CommitError on those left over",
    )
    crew.start(LONG)
    per_step = sum(2 * (3 + rank) for rank in range(len(crew.ranks)))  # micro-batches of 3 images and one more by rank
    crew.ask("forward", 1)
    crew.ask("forward", 2, members=[ODD])
    joined = crew.ask("commit", TIMEOUT)
    assert not any(outcome.error for outcome in joined)
    crew.ask("forward", 2, members=OTHERS)
    left_over = crew.ask("commit", TIMEOUT, members=OTHERS)
    assert_named(left_over, "CommitError", "did not call commit")
    windows = [state["2.window"][0].item() for state in crew.ask("state")]
    assert joined[0].values == per_step + 2 * (3 + ODD)
    assert windows == [0 if rank == ODD else 2 * (3 + rank) for rank in range(len(crew.ranks))]
    row.saw("its two windows count in one commit; the others' next one waits for it: CommitError, windows kept")
