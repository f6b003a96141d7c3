"""Peers lost at random moments of an all-reduce: who has the result applies it, who has not raises, and they find out.

No protocol can rule out that some ranks get the last message and others lose the sender before theirs (the two
generals' problem). What must hold: each rank has all of the commit or nothing, ranks that are apart are told when they
meet again, and the remedy that the message names loses nothing and counts nothing twice.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
from torch import Tensor

from tests.faults.conftest import Row
from tests.faults.crew import Crew
from tests.faults.job import IN_COMMIT, Outcome, same_bytes
from tests.faults.switch import Weather

# Wide enough to hit between any two messages.
DELAY = 0.02
# How long a commit over four ranks takes with that delay, and a little more; seconds.
SPAN = 0.32
# Of the group: above SPAN, as the network is slow and not gone until the fault.
TIMEOUT = 1.0
LONG = 20.0


def lose_at_random(
    crew: Crew, fault: Callable[[int], None], chance: random.Random, *, hears: bool
) -> tuple[int, dict[int, Outcome]]:
    """Step 1, whose commit loses a random rank at a random moment; that rank, and what came of each that can tell."""
    crew.restore()
    crew.start(TIMEOUT)
    crew.ask("forward", 1)
    victim = chance.randrange(len(crew.ranks))
    crew.network.switch.weather = Weather(delay=DELAY)
    crew.post("commit")
    crew.await_word(IN_COMMIT)
    time.sleep(chance.uniform(0.0, SPAN))
    fault(victim)
    told = [rank for rank in range(len(crew.ranks)) if hears or rank != victim]
    outcomes = dict(zip(told, crew.answers(told), strict=True))
    crew.network.clear_up()
    return victim, outcomes


def judge(crew: Crew, outcomes: dict[int, Outcome], undisturbed: list[dict[str, Tensor]]) -> str:
    """All or nothing on each rank; says which of it."""
    for rank, outcome in outcomes.items():
        if outcome.error:
            assert outcome.error == "CommitError", outcome
            assert outcome.unchanged
        else:
            assert same_bytes(crew.ranks[rank].ask("state"), undisturbed[1])
    applied = sum(not outcome.error for outcome in outcomes.values())
    return "all applied" if applied == len(outcomes) else "split" if applied else "all raised"


def mend(crew: Crew, victim: int, outcomes: dict[int, Outcome]) -> None:
    """Go on as the error says, with a new process in the place of a dead one."""
    ahead = [rank for rank, outcome in outcomes.items() if not outcome.error]
    behind = [rank for rank, outcome in outcomes.items() if outcome.error]
    if ahead and behind:
        crew.meet(LONG, members=outcomes)
        for outcome in crew.ask("commit", members=outcomes):
            assert outcome.error == "LayoutMismatchError", outcome
            assert "take the statistics of one that is ahead, and discard(model)" in outcome.message
            assert outcome.unchanged
    # A process that is new has no statistics, and no window.
    if victim not in outcomes:
        crew.replace(victim)
        crew.ranks[victim].ask("take_statistics", crew.ranks[(ahead or behind)[0]].ask("statistics"))
        if not ahead:
            crew.ranks[victim].ask("forward", 1)
    for rank in behind if ahead else []:
        crew.ranks[rank].ask("take_statistics", crew.ranks[ahead[0]].ask("statistics"))
        crew.ranks[rank].ask("discard")
    crew.meet(LONG)
    if not ahead:
        assert not any(outcome.error for outcome in crew.ask("commit"))


@pytest.mark.parametrize(("name", "trials"), [("SIGKILL", 30), ("link cut", 10)])
def test_a_rank_lost_at_a_random_moment(
    crew: Crew, undisturbed: list[dict[str, Tensor]], row: Row, name: str, trials: int
) -> None:
    row.try_out(
        f"{name} of a random rank, {trials} times",
        f"at random in an all-reduce of {SPAN * 1000:.0f} ms",
        "each rank raises or applies all of it; a split is told when they meet; then equal to undisturbed",
    )
    chance = random.Random(f"{name} 0")
    counts = Counter[str]()
    for _ in range(trials):
        if name == "SIGKILL":
            victim, outcomes = lose_at_random(crew, lambda rank: crew.ranks[rank].kill(), chance, hears=False)
        else:
            victim, outcomes = lose_at_random(
                crew, lambda rank: crew.network.nodes[rank].cut_link(), chance, hears=True
            )
        counts[judge(crew, outcomes, undisturbed)] += 1
        mend(crew, victim, outcomes)
        assert all(same_bytes(state, undisturbed[1]) for state in crew.ask("state"))
        assert not any(outcome.error for outcome in crew.ask("step", 2))
        assert all(same_bytes(state, undisturbed[2]) for state in crew.ask("state"))
    row.saw(", ".join(f"{counts[kind]} {kind}" for kind in ("all raised", "all applied", "split")))
    row.saw("each split was told on all ranks and mended as told; all equal to undisturbed, before and after step 2")
    # Else the moments were not spread over the all-reduce, and nothing was tried.
    assert counts["all raised"] > 0
    assert counts["all applied"] > 0
