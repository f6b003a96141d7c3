"""Where this process stands among the ranks, and what is wrong with what the launcher said."""

from __future__ import annotations

import os
from collections.abc import Mapping

from syncaccum.doctor.findings import ProblemError
from syncaccum.doctor.rank import Rank
from syncaccum.integrations import mpi

_REMEDY = (
    "start the ranks with torchrun, which sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and "
    "MASTER_PORT, or with mpirun, which needs none of them; unset all of them to look at this machine alone"
)


def locate(environment: Mapping[str, str] = os.environ) -> Rank:
    """This process among the ranks; ProblemError where that cannot be known. Collective under MPI, and only there."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _locate_by_variables(environment)
    if not mpi.started_by_mpi(environment):
        return Rank()
    try:
        here = mpi.locate()
    except ImportError as error:
        raise ProblemError("an MPI launcher started this process, but mpi4py is unusable", str(error)) from error
    return Rank(here.rank, here.size, here.local_rank, here.local_size, "mpi", here.local_rank == 0)


def _locate_by_variables(environment: Mapping[str, str]) -> Rank:
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not environment.get(name, "").strip()]:
        raise ProblemError(f"{', '.join(missing)} not set, though others of the launcher's variables are", _REMEDY)
    texts = {"LOCAL_RANK": environment["RANK"], "LOCAL_WORLD_SIZE": environment["WORLD_SIZE"], **environment}
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    if wrong := [name for name in names if not texts[name].isdecimal()]:
        raise ProblemError(f"{wrong[0]} is {texts[wrong[0]]!r}, not a number from 0 up", _REMEDY)
    rank, size, local_rank, local_size, port = (int(texts[name]) for name in names)
    if rank >= size:
        raise ProblemError(f"RANK is {rank} and WORLD_SIZE is {size}: ranks count from 0", _REMEDY)
    if not local_rank < local_size <= size:
        what = f"LOCAL_RANK is {local_rank} and LOCAL_WORLD_SIZE is {local_size}"
        more = f", more than WORLD_SIZE {size}" if local_size > size else ": ranks count from 0"
        raise ProblemError(what + more, _REMEDY)
    if not 0 < port < 1 << 16:
        raise ProblemError(f"MASTER_PORT is {port}", "give a port from 1 to 65535 that is free on rank 0's node")
    speaks = rank == 0 or environment.get("LOCAL_RANK", "0") == "0"
    return Rank(rank, size, local_rank, local_size, "variables", speaks)
