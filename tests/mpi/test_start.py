"""What a start from MPI says where there is no MPI; on ranks that have one it is among the bodies."""

from __future__ import annotations

import pytest

from tests.launch import jobs as processes


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
