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
_MOST_RANKS = 1_000_000  # more than any job has


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
        """Where this process stands; ends it, with one line per machine, where the variables contradict themselves."""
        local_rank = environment.get("LOCAL_RANK", "")
        speaker = cls(local_rank=int(local_rank) if local_rank.isdecimal() else 0)
        try:
            if "RANK" in environment or "WORLD_SIZE" in environment:
                return cls._from_torchrun(environment)
            return cls._from_mpi(environment)
        except (ValueError, ImportError) as error:
            speaker.stop(f"train.py: error: {error}", 2)

    @classmethod
    def _from_torchrun(cls, environment: Mapping[str, str]) -> Placement:
        rank = _read_number(environment, "RANK", 0, _MOST_RANKS - 1)
        size = _read_number(environment, "WORLD_SIZE", rank + 1, _MOST_RANKS)
        local_size = _read_number({"LOCAL_WORLD_SIZE": str(size), **environment}, "LOCAL_WORLD_SIZE", 1, size)
        local_rank = _read_number(
            {"LOCAL_RANK": str(rank % local_size), **environment}, "LOCAL_RANK", 0, local_size - 1
        )
        return cls(rank, size, local_rank, local_size, True)

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


def _read_number(environment: Mapping[str, str], name: str, lowest: int, highest: int) -> int:
    text = environment.get(name)
    if text is not None and text.isdecimal() and lowest <= int(text) <= highest:
        return int(text)
    found = "is not set" if text is None else f"is {text!r}"
    raise ValueError(
        f"environment variable {name} {found}, and must be a number from {lowest} to {highest}: start with torchrun or "
        "launch/torchrun_local.sh, which set it, or unset RANK and WORLD_SIZE to train alone"
    )
