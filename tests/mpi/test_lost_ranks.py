"""A rank that is killed, raises or comes late under MPI: nobody waits forever, and nothing is half done."""

from __future__ import annotations

import re
import time

import pytest

from tests.mpi import jobs
from tests.mpi.lose_a_rank import TIMEOUT

# How much later than its due something may come on a busy machine.
SLACK = 8.0


@pytest.mark.parametrize("fault", ["killed", "raises"])
@pytest.mark.parametrize("implementation", jobs.IMPLEMENTATIONS)
def test_the_job_ends(implementation: str, fault: str) -> None:
    start = time.monotonic()
    finished = jobs.run(implementation, 3, "-m", "tests.mpi.lose_a_rank", fault)
    assert finished.returncode != 0
    # Starting takes most of it; the launchers take 2 to 5 s to end the others.
    assert time.monotonic() - start < 30 + SLACK
    if fault == "raises":
        assert "the last rank has had enough" in finished.stdout


@pytest.mark.parametrize("implementation", jobs.IMPLEMENTATIONS)
def test_a_timeout_holds_and_the_late_rank_does_not_apply_the_commit_either(implementation: str) -> None:
    finished = jobs.run(implementation, 3, "-m", "tests.mpi.lose_a_rank", "late")
    # Not by lines, which launchers do not keep apart.
    errors = re.findall(r"rank (\d): rank \d of 3: [^;]*; [^;]*; after (\S+) s; unchanged True", finished.stdout)
    assert sorted(rank for rank, _ in errors) == ["0", "1", "2"], finished.stdout
    for _, seconds in errors:
        assert TIMEOUT * 0.9 <= float(seconds) < TIMEOUT + SLACK
    again = re.findall(
        r"rank (\d): again: rank \d of 3: an earlier commit over this communicator timed out", finished.stdout
    )
    assert sorted(again) == ["0", "1", "2"], finished.stdout
