"""Collectives over an mpi4py communicator, in host memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from syncaccum.errors import CommitError
from syncaccum.ranks.groups import Communicator
from syncaccum.ranks.transport import SHORTEST, count_down, lost_peer


class MPITransport:
    """Sums over an mpi4py communicator. In host memory, because not every MPI can read a GPU's."""

    def __init__(self, communicator: Communicator, timeout: float | None, call: str) -> None:
        self._communicator = communicator
        self._comm = communicator.comm
        self._remaining = count_down(timeout)
        self.call = call
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()

    def choose_device(self, device: torch.device) -> torch.device:
        return torch.device("cpu")

    def all_reduce(self, flat: Tensor) -> None:
        # Not imported: an import would call MPI_Init.
        # The user's communicator comes from this very module.
        mpi = sys.modules["mpi4py.MPI"]
        if self._communicator.unfinished is not None:
            raise CommitError(
                f"rank {self.rank} of {self.size}: an earlier commit over this communicator timed out, and MPI "
                "cannot take a collective back: commit over another communicator, or end the job with comm.Abort()"
            )
        message = [flat, mpi.DOUBLE]
        try:
            # A blocking call is the fastest, but it cannot be given up.
            if self._remaining is None:
                self._comm.Allreduce(mpi.IN_PLACE, message)
            else:
                self._wait(self._comm.Iallreduce(mpi.IN_PLACE, message), flat)
                # A rank that gives up has sent its sums already.
                # Without a barrier, a late peer would still apply them.
                self._wait(self._comm.Ibarrier(), flat)
        except mpi.Exception as error:
            raise lost_peer(self) from error

    def start_all_reduce(self, flat: Tensor) -> Callable[[], None]:
        # At once: most MPIs go on in their own calls only.
        self.all_reduce(flat)
        return lambda: None

    def _wait(self, request: Any, memory: Tensor) -> None:
        assert self._remaining is not None
        pause = 0.0
        while not request.Test():
            if self._remaining() <= SHORTEST:
                # MPI may still write there: the memory must not be freed.
                self._communicator.unfinished = request, memory
                raise lost_peer(self)
            time.sleep(pause)
            # Quick where peers are there, cheap where they are late.
            pause = min(pause + 1e-5, 1e-3)
