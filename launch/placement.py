"""Where this process stands among the ranks, as torchrun's environment variables or MPI tell it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

# torchrun looks after its ranks every 0.1 s, and when one has failed it ends the others at once.
_LAUNCHER_REACTS_WITHIN = 5.0


@dataclass(frozen=True)
class Placement:
    """One rank of ``size``; the rank ``local_rank`` of ``local_size`` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False
    """Whether a launcher started this process; if so it joins a process group, also where it is alone."""
    mpi: bool = False
    """Whether that launcher is MPI's."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Placement:
        if "WORLD_SIZE" not in environment:
            return cls._from_mpi(environment)
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", rank))
        return cls(rank, size, local_rank, int(environment.get("LOCAL_WORLD_SIZE", size)), True)

    @classmethod
    def _from_mpi(cls, environment: Mapping[str, str]) -> Placement:
        """Collective, where mpirun or srun started this process."""
        if not any(name.startswith(("OMPI_", "PMI")) for name in environment):
            return cls()
        # Late: a closer look imports torch, which takes seconds.
        from syncaccum.integrations.mpi import locate, started_by_mpi

        if not started_by_mpi(environment):
            return cls()
        here = locate()
        return cls(here.rank, here.size, here.local_rank, here.local_size, launched=True, mpi=True)

    def stop(self, message: str, status: int) -> NoReturn:
        """End a run that every rank ends alike, with one message per machine.

        The launcher ends the other ranks when the first is gone, so those that say nothing wait for that: one
        that left first could have the one that speaks ended before it has spoken.
        """
        if self.local_rank == 0:
            print(message, file=sys.stderr, flush=True)
        else:
            time.sleep(_LAUNCHER_REACTS_WITHIN)
        raise SystemExit(status)
