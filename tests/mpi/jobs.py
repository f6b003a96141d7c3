"""Jobs under both MPI libraries. Both come from wheels; they share a folder, so MPICH has an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.launch import jobs

IMPLEMENTATIONS = ("openmpi", "mpich")
JOB_SIZE = 4
PARTITIONS = ((1, 3), (2, 2), (4,))
"""Of a job's ranks into groups that try out the bodies: every size from one to four."""


def find_programs(implementation: str) -> Path:
    """The folder of an implementation's mpirun, and of a python that uses its library."""
    environment = Path(sys.executable).parent.parent
    programs = environment / {"openmpi": "bin", "mpich": "mpich/bin"}[implementation]
    if not (programs / "mpirun").exists():
        raise FileNotFoundError(f"{programs} has no mpirun: `make test` installs it")
    return programs


def run(implementation: str, ranks: int, *command: object, **changes: str) -> subprocess.CompletedProcess[str]:
    """``mpirun.sh ranks command`` to its end."""
    path = f"{find_programs(implementation)}{os.pathsep}{os.environ['PATH']}"
    return jobs.run(jobs.MPIRUN, ranks, *command, PATH=path, **changes)
