"""Commits and lockstep over mpi4py communicators, under both MPI libraries, on one to four ranks."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest

from tests.mpi import jobs
from tests.mpi.bodies import BODIES


@functools.cache
def run_bodies(implementation: str, ranks: int) -> tuple[list[dict[str, str]], str]:
    """Each rank's stories, and what the job printed; one job for all bodies, which take milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        finished = jobs.run(implementation, ranks, "-m", "tests.mpi.run_bodies", folder)
        files = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        return [json.loads(f.read_text()) if f.exists() else {} for f in files], finished.stdout


@pytest.mark.parametrize("name", [body.__name__ for body in BODIES])
@pytest.mark.parametrize("ranks", jobs.RANKS)
@pytest.mark.parametrize("implementation", jobs.IMPLEMENTATIONS)
def test_over_mpi(implementation: str, ranks: int, name: str) -> None:
    by_rank, printed = run_bodies(implementation, ranks)
    for rank, stories in enumerate(by_rank):
        assert stories.get(name, "was not run") == "", f"rank {rank}: {stories.get(name, printed)}"
