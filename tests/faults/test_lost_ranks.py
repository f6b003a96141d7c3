"""A rank that is killed, stopped or cut off: CommitError in time, nothing changed, and nothing lost in the end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence

import pytest
from torch import Tensor

from tests.faults.conftest import Row
from tests.faults.crew import Crew
from tests.faults.job import IN_COMMIT, IN_FORWARD, Outcome, same_bytes
from tests.faults.switch import Weather

VICTIM = 1
SURVIVORS = (0, 2, 3)
MOMENTS = ("during forward", "during the all-reduce", "between two commits")
# What issue and README promise: so much after a kill, and so much after a timeout, on a machine that is not overloaded.
PROMISE = 2.0
TIMEOUT = 2.0
# Of a group whose commits bring a timeout of their own: so long that it cannot be what ended them.
LONG = 30.0
# A forward that lasts this long is struck in the midst of it.
PAUSE = 0.4
# An all-reduce over four ranks takes six messages in a row: after the first, none can have its result.
DELAY = 0.1


def strike(crew: Crew, moment: str, fault: Callable[[], None], heard_by: Sequence[int], timeout: float | None) -> float:
    """Step 1 on all ranks, with a fault at this moment; returns when. Answers are awaited from ``heard_by``."""
    if moment == "between two commits":
        struck = time.monotonic()
        fault()
        crew.post("step", 1, 0.0, timeout, members=heard_by)
        return struck
    if moment == "during forward":
        crew.post("step", 1, PAUSE, timeout)
        crew.await_word(IN_FORWARD)
        time.sleep(PAUSE / 2)
    else:
        crew.ask("forward", 1)
        crew.network.switch.weather = Weather(delay=DELAY)
        crew.post("commit", timeout)
        crew.await_word(IN_COMMIT)
        time.sleep(DELAY)
    struck = time.monotonic()
    fault()
    return struck


def assert_at_moment(outcomes: Sequence[Outcome], moment: str, struck: float) -> None:
    for outcome in outcomes:
        if moment == "during the all-reduce":
            assert outcome.began < struck < outcome.ended
        else:
            assert struck < outcome.began


def assert_nothing_happened(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.error == "CommitError", outcome
        assert "a peer is gone, is stuck or did not call commit" in outcome.message
        assert outcome.unchanged, "a failed commit changed statistics or windows"


def assert_commit_goes_through(crew: Crew, expected: dict[str, Tensor]) -> None:
    """With windows as they are, in a new group: then all is as if nothing had been."""
    crew.network.clear_up()
    crew.meet(timeout=20.0)
    outcomes = crew.ask("commit")
    assert not any(outcome.error for outcome in outcomes), outcomes
    for state in crew.ask("state"):
        assert same_bytes(state, expected)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(crew: Crew, undisturbed: list[dict[str, Tensor]], row: Row, moment: str) -> None:
    row.try_out("SIGKILL of a rank", moment, f"CommitError within {PROMISE:g} s, statistics unchanged, window kept")
    crew.start(LONG)
    struck = strike(crew, moment, crew.ranks[VICTIM].kill, SURVIVORS, None)
    outcomes = crew.answers(SURVIVORS)
    assert_at_moment(outcomes, moment, struck)
    assert_nothing_happened(outcomes)
    waited = max(outcome.ended - max(outcome.began, struck) for outcome in outcomes)
    row.saw(f"CommitError on all survivors, {waited * 1000:.0f} ms after the kill or their own call")
    assert waited <= PROMISE
    crew.replace(VICTIM)
    crew.ranks[VICTIM].ask("take_statistics", crew.ranks[SURVIVORS[0]].ask("statistics"))
    crew.ranks[VICTIM].ask("forward", 1)
    assert_commit_goes_through(crew, undisturbed[1])
    row.saw("lost: the window of the killed process, which its successor fed again; then equal to undisturbed")


def stop(crew: Crew) -> None:
    crew.ranks[VICTIM].signal(signal.SIGSTOP)


def cut_link(crew: Crew) -> None:
    crew.network.nodes[VICTIM].cut_link()


def silence(crew: Crew) -> None:
    crew.network.silence(VICTIM)


@pytest.mark.parametrize("limit", ["group", "commit"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("name", "fault"), [("SIGSTOP of a rank", stop), ("link cut", cut_link), ("100 % loss", silence)]
)
def test_out_of_reach(
    crew: Crew,
    undisturbed: list[dict[str, Tensor]],
    row: Row,
    name: str,
    fault: Callable[[Crew], None],
    moment: str,
    limit: str,
) -> None:
    row.try_out(
        f"{name}; the {limit}'s timeout {TIMEOUT:g} s",
        moment,
        f"CommitError within {TIMEOUT + PROMISE:g} s, statistics unchanged, window kept",
    )
    crew.start(TIMEOUT if limit == "group" else LONG)
    everyone = range(len(crew.ranks))
    struck = strike(crew, moment, lambda: fault(crew), everyone, TIMEOUT if limit == "commit" else None)
    # Whoever is cut off is alive, and is told too.
    told = SURVIVORS if fault is stop else everyone
    outcomes = crew.answers(told)
    assert_at_moment(outcomes, moment, struck)
    assert_nothing_happened(outcomes)
    waited = [outcome.ended - outcome.began for outcome in outcomes]
    row.saw(f"CommitError on {len(told)} ranks, {min(waited):.2f} to {max(waited):.2f} s after their call")
    assert max(waited) <= TIMEOUT + PROMISE
    if fault is stop:
        crew.ranks[VICTIM].signal(signal.SIGCONT)
        late = crew.answers([VICTIM])
        assert_nothing_happened(late)
        row.saw(f"the stopped rank too, {late[0].ended - late[0].began:.2f} s after its call")
    assert_commit_goes_through(crew, undisturbed[1])
    row.saw("lost: nothing; in a new group the kept windows commit, equal to undisturbed")
