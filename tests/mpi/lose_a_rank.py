"""The last rank is killed, raises, stops or comes late; the others commit. Each rank prints what it saw."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from mpi4py import MPI

from syncaccum import CommitError, SyncAccumBatchNorm, commit

TIMEOUT = 2.0


def main(fault: str) -> None:
    comm = MPI.COMM_WORLD
    layer = SyncAccumBatchNorm(3, process_group=comm)
    layer(torch.arange(12.0).view(4, 3))
    commit(layer)
    layer(torch.arange(12.0).view(4, 3))
    statistics, window = layer.running_mean.clone(), layer.window.pack()
    if comm.rank == comm.size - 1:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "raises":
            raise RuntimeError("the last rank has had enough")
        if fault == "late":
            time.sleep(TIMEOUT + 1.5)
    if fault != "late":
        commit(layer)  # MPI's launcher ends the job while this waits
        return
    start = time.monotonic()
    try:
        commit(layer, timeout=TIMEOUT)
    except CommitError as error:
        seconds = time.monotonic() - start
        unchanged = torch.equal(layer.running_mean, statistics) and torch.equal(layer.window.pack(), window)
        print(f"rank {comm.rank}: {error}; after {seconds:.1f} s; unchanged {unchanged}", flush=True)
    try:
        commit(layer)
    except CommitError as error:
        print(f"rank {comm.rank}: again: {error}", flush=True)
    time.sleep(2 * TIMEOUT)  # the late rank's turn
    comm.Abort(7)


if __name__ == "__main__":
    main(sys.argv[1])
