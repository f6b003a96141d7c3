"""The doctor under mpirun: facts, and a commit, over gloo and over MPI."""

from __future__ import annotations

import socket

import pytest

from tests.mpi import jobs


@pytest.mark.parametrize("implementation", jobs.IMPLEMENTATIONS)
def test_a_healthy_job(implementation: str) -> None:
    finished = jobs.run(implementation, 2, "-m", "syncaccum.doctor")
    assert finished.returncode == 0, finished.stdout
    assert "syncaccum doctor: 2 of 2 rank(s), on 1 node(s), gloo" in finished.stdout
    assert {"openmpi": "Open MPI v", "mpich": "MPICH Version: "}[implementation] in finished.stdout
    for transport in ("gloo", "mpi"):
        assert f"commit over {transport}: as nn.BatchNorm on the global batch" in finished.stdout


# Of the next two each runs under one library: what they say is the doctor's, and both end a job in one way.
@pytest.mark.parametrize("implementation", ["openmpi"])
def test_a_mistake_ends_the_job_with_its_remedy(implementation: str) -> None:
    finished = jobs.run(implementation, 2, "-m", "syncaccum.doctor", GLOO_SOCKET_IFNAME="nonesuch0")
    assert finished.returncode != 0
    assert "PROBLEM (ranks 0-1): GLOO_SOCKET_IFNAME names 'nonesuch0'" in finished.stdout
    assert "remedy: set GLOO_SOCKET_IFNAME" in finished.stdout


@pytest.mark.parametrize("implementation", ["mpich"])
def test_a_store_that_cannot_be_opened_is_named_by_rank_0(implementation: str) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        finished = jobs.run(implementation, 2, "-m", "syncaccum.doctor", MASTER_PORT=port)
    assert finished.returncode != 0
    assert "PROBLEM: torch.distributed could not be started from MPI: rank 0 on " in finished.stdout
    assert "Unset MASTER_PORT" in finished.stdout
    assert "remedy: see whether rank 0's node can be reached there" in finished.stdout
    assert "Traceback" not in finished.stdout
