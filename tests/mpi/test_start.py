"""torch.distributed started from MPI, and what is said where it cannot be."""

from __future__ import annotations

import re
import socket

import pytest

from tests.launch import jobs as processes
from tests.mpi import jobs


@pytest.mark.parametrize("ranks", jobs.RANKS)
@pytest.mark.parametrize("implementation", jobs.IMPLEMENTATIONS)
def test_all_ranks_meet(implementation: str, ranks: int) -> None:
    finished = jobs.run(implementation, ranks, "tests/mpi/meet.py")
    assert finished.returncode == 0, finished.stdout
    # By pattern: launchers do not keep the lines of different ranks apart.
    met = re.findall(rf"rank (\d) of {ranks}, local rank (\d) of {ranks}: the ranks sum to (\d)", finished.stdout)
    assert sorted(met) == [(str(rank), str(rank), str(sum(range(ranks)))) for rank in range(ranks)]


@pytest.mark.parametrize("implementation", jobs.IMPLEMENTATIONS)
def test_a_taken_port_is_named_on_every_rank(implementation: str) -> None:
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finished = jobs.run(implementation, 2, "tests/mpi/meet.py", MASTER_PORT=str(port))
    assert finished.returncode != 0
    assert "torch.distributed could not be started from MPI: rank 0 on " in finished.stdout
    assert "Unset MASTER_PORT" in finished.stdout


@pytest.mark.parametrize(
    ("prelude", "changes"),
    [
        ("import sys; sys.modules['mpi4py'] = None", {}),
        ("", {"MPI4PY_LIBMPI": "/nowhere/libmpi.so", "MPI4PY_MPIABI": "openmpi"}),
    ],
    ids=["no mpi4py", "no MPI library"],
)
def test_what_is_missing_is_named_with_the_remedy(prelude: str, changes: dict[str, str]) -> None:
    program = f"{prelude}\nfrom syncaccum.integrations import mpi\nmpi.init_process_group()"
    finished = processes.run("python", "-c", program, **changes)
    assert finished.returncode != 0
    assert "pip install syncaccum[mpi]" in finished.stdout.splitlines()[-1]


def test_importing_syncaccum_and_its_integration_does_not_start_mpi() -> None:
    program = "import sys, syncaccum.integrations.mpi\nassert 'mpi4py' not in sys.modules"
    finished = processes.run("python", "-c", program)
    assert finished.returncode == 0, finished.stdout
