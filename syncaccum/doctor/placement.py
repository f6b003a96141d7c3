"""Where this process stands among the ranks and where they meet, and what is wrong with what the launcher said."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from syncaccum.doctor.findings import ProblemError
from syncaccum.integrations import mpi

Launcher = Literal["alone", "torchrun", "environment", "mpi"]

_REMEDY = (
    "start the ranks with torchrun, which sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and "
    "MASTER_PORT, or with mpirun, which needs none of them; unset all of them to look at this machine alone"
)


@dataclass(frozen=True)
class Placement:
    """Rank ``rank`` of ``size``, and ``local_rank`` of ``local_size`` on its node.

    ``master`` is host and port of the store; under MPI rank 0 chooses it later. ``speaks``: whether this rank prints
    a report of its own where there can be none of all ranks; one of each node does.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: Launcher = "alone"
    master: tuple[str, int] | None = None
    speaks: bool = True


def guess(environment: Mapping[str, str] = os.environ) -> Placement:
    """Who prints what, should it turn out that this process cannot be located."""
    rank = environment.get("RANK", "0")
    return Placement(rank=int(rank) if rank.isdecimal() else 0, speaks=environment.get("LOCAL_RANK", "0") == "0")


def locate(environment: Mapping[str, str] = os.environ) -> Placement:
    """This process among the ranks. Collective under MPI, and only there.

    Raises:
        ProblemError: the launcher's variables are incomplete or contradict each other, or MPI cannot be used.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _locate_by_variables(environment)
    if not mpi.started_by_mpi(environment):
        return Placement()
    try:
        here = mpi.locate()
    except ImportError as error:
        raise ProblemError("an MPI launcher started this process, but mpi4py is unusable", str(error)) from error
    return Placement(here.rank, here.size, here.local_rank, here.local_size, "mpi", speaks=here.local_rank == 0)


def _locate_by_variables(environment: Mapping[str, str]) -> Placement:
    missing = [
        name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name, "").strip()
    ]
    if missing:
        raise ProblemError(f"{', '.join(missing)} not set, though others of the launcher's variables are", _REMEDY)
    rank, size = _read_number(environment, "RANK"), _read_number(environment, "WORLD_SIZE")
    local_rank, local_size = (
        _read_number(environment, "LOCAL_RANK", rank),
        _read_number(environment, "LOCAL_WORLD_SIZE", size),
    )
    port = _read_number(environment, "MASTER_PORT")
    for name, limit_name, value, limit in (
        ("RANK", "WORLD_SIZE", rank, size),
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE", local_rank, local_size),
    ):
        if value >= limit:
            raise ProblemError(f"{name} is {value} and {limit_name} is {limit}: ranks count from 0", _REMEDY)
    if local_size > size:
        raise ProblemError(f"LOCAL_WORLD_SIZE is {local_size}, more than WORLD_SIZE {size}", _REMEDY)
    if not 0 < port < 1 << 16:
        raise ProblemError(f"MASTER_PORT is {port}", "give a port from 1 to 65535 that is free on rank 0's node")
    return Placement(
        rank,
        size,
        local_rank,
        local_size,
        "torchrun" if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "environment",
        (environment["MASTER_ADDR"], port),
        speaks=rank == 0 or environment.get("LOCAL_RANK", "0") == "0",
    )


def _read_number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise ProblemError(f"{name} is {text!r}, not a number from 0 up", _REMEDY)
    return int(text)
