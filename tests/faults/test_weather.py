"""A network that is slow, loses or reorders frames: the same statistics, later."""

from __future__ import annotations

import statistics

import pytest
from torch import Tensor

from tests.faults.conftest import Row
from tests.faults.crew import Crew
from tests.faults.job import same_bytes
from tests.faults.switch import Weather

# Commits here take a second or two at the most.
TIMEOUT = 30.0


def time_commits(crew: Crew, weather: Weather, expected: list[dict[str, Tensor]]) -> float:
    """Median over as many commits as there are expected states, in ms, of the time until the last rank has it.

    The ranks also meet in this weather.
    """
    crew.network.switch.weather = weather
    crew.start(TIMEOUT, commits=0)
    milliseconds = []
    for step, state in enumerate(expected):
        crew.ask("forward", step)
        outcomes = crew.ask("commit")
        assert not any(outcome.error for outcome in outcomes), outcomes
        began = max(outcome.began for outcome in outcomes)
        milliseconds.append(1000 * (max(outcome.ended for outcome in outcomes) - began))
        for ours in crew.ask("state"):
            assert same_bytes(ours, state), f"commit {step} differs"
    return statistics.median(milliseconds)


@pytest.mark.parametrize(
    ("name", "weather"),
    [
        ("delay 100 ms", Weather(delay=0.1)),
        ("loss 5 %", Weather(loss=0.05)),
        ("reordering: delay 10 ms, 25 % of the frames early", Weather(delay=0.01, early=0.25)),
        ("delay 100 ms, loss 5 %, 25 % early", Weather(delay=0.1, loss=0.05, early=0.25)),
    ],
)
def test_weather(crew: Crew, undisturbed: list[dict[str, Tensor]], row: Row, name: str, weather: Weather) -> None:
    row.try_out(name, "the whole time", "statistics equal to undisturbed, bit for bit; cost reported")
    calm = time_commits(crew, Weather(), undisturbed)
    disturbed = time_commits(crew, weather, undisturbed)
    row.saw(f"{len(undisturbed)} commits on {len(crew.ranks)} ranks equal to undisturbed")
    row.saw(f"median commit {disturbed:.0f} ms, undisturbed {calm:.1f} ms")
