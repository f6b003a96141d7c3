"""Commits, lockstep and lookahead over mpi4py communicators, under both MPI libraries, on one to four ranks."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest

from tests.mpi import jobs
from tests.mpi.bodies import BODIES


@functools.cache
def run_bodies(implementation: str) -> tuple[list[dict[str, dict[str, str]]], str]:
    """Each rank's stories by size of group and body, and what the job printed."""
    with tempfile.TemporaryDirectory() as folder:
        finished = jobs.run(implementation, jobs.JOB_SIZE, "-m", "tests.mpi.run_bodies", folder)
        files = [Path(folder) / f"{rank}.json" for rank in range(jobs.JOB_SIZE)]
        return [json.loads(f.read_text()) if f.exists() else {} for f in files], finished.stdout


@pytest.mark.parametrize("name", [body.__name__ for body in BODIES])
@pytest.mark.parametrize("partition", jobs.PARTITIONS, ids=str)
@pytest.mark.parametrize("implementation", jobs.IMPLEMENTATIONS)
def test_over_mpi(implementation: str, partition: tuple[int, ...], name: str) -> None:
    by_rank, printed = run_bodies(implementation)
    sizes = [size for size in partition for _ in range(size)]
    for rank, (size, stories) in enumerate(zip(sizes, by_rank, strict=True)):
        story = stories.get(str(size), {}).get(name, "was not run")
        assert story == "", f"rank {rank} of the job: {story}\n{printed}"
