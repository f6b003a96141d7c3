"""The store of a job, opened or reached in time, or the reason why not."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from concurrent import futures
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from syncaccum.doctor.findings import ProblemError
from syncaccum.doctor.rank import Rank
from syncaccum.integrations import mpi

# Seconds: for what takes milliseconds where all is well, and between looks.
GRACE, PAUSE = 5.0, 0.2
T = TypeVar("T")


def within(seconds: float, function: Callable[[], T]) -> T:
    """``function()``, for torch heeds no limit where a peer is silent. After a TimeoutError leave by ``os._exit``."""
    try:
        return futures.ThreadPoolExecutor(1).submit(function).result(seconds)
    except futures.TimeoutError as error:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from error


def open_store(us: Rank, timeout: float) -> dist.Store:
    """Raises ProblemError where the port is taken, or no store answers within ``timeout``. Under MPI collective."""
    if us.launcher == "alone":
        return dist.HashStore()
    if us.launcher == "mpi":
        here = mpi.MPIRank(us.rank, us.size, us.local_rank, us.local_size)
        try:
            return mpi.open_store(mpi.world(), here, timedelta(seconds=timeout))
        except RuntimeError as error:
            remedy = "see whether rank 0's node can be reached at that address and port"
            raise ProblemError(str(error), remedy) from error
    # torchrun's agent hosts the store, also for rank 0, and keeps it when it restarts the ranks.
    attempt, by_agent = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("RESTART_COUNT", "USE_AGENT_STORE"))
    port = int(os.environ["MASTER_PORT"])
    if us.rank == 0 and by_agent != "True":
        store = _host_store(port, timeout)
    else:
        store = _reach_store(os.environ["MASTER_ADDR"], port, time.monotonic() + timeout)
    return dist.PrefixStore(f"syncaccum.doctor/{attempt or 0}", store)


def _host_store(port: int, timeout: float) -> dist.Store:
    try:  # MASTER_ADDR may be a name that only other machines can reach; the store listens on all addresses
        return dist.TCPStore("localhost", port, None, True, timedelta(seconds=timeout), wait_for_workers=False)
    except RuntimeError as error:
        why = "the port is taken" if "EADDRINUSE" in str(error) else str(error).partition("\n")[0]
        remedy = (
            "set MASTER_PORT to a free port, the same on every rank, or end the program that has it, perhaps an "
            f"earlier run: ss -ltnp 'sport = :{port}' names it"
        )
        where = f"port {port} of {socket.gethostname()}"
        raise ProblemError(f"rank 0 cannot open the store on {where}: {why}", remedy) from error


def _reach_store(host: str, port: int, end: float) -> dist.Store:
    _await_listener(host, port, end)
    limit = max(GRACE, end - time.monotonic())
    try:  # what answers is either a store, and does so at once, or never will
        seconds = timedelta(seconds=limit)
        return within(limit, lambda: dist.TCPStore(host, port, None, False, seconds, wait_for_workers=False))
    except (TimeoutError, RuntimeError) as error:
        what = f"something listens at {host}:{port}, but it is no store of torch"
        remedy = "another program has that port on rank 0's node: set MASTER_PORT to a free one, the same on every rank"
        raise ProblemError(what, remedy) from error


def _await_listener(host: str, port: int, end: float) -> None:
    """By plain sockets: torch's own attempts print C++ stack traces and take twice their timeout."""
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(PAUSE, end - time.monotonic())).close()
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= end:
                raise _explain_silence(host, port, error) from error
        time.sleep(PAUSE)  # rank 0, or a name in the cluster's DNS, may be late


def _explain_silence(host: str, port: int, error: Exception) -> ProblemError:
    if isinstance(error, (socket.gaierror, UnicodeError)):
        what = f"MASTER_ADDR is {host!r}, which does not resolve ({error})"
        return ProblemError(what, "set it (torchrun: --master-addr, --rdzv-endpoint) to an address of rank 0's node")
    remedy = (
        "see whether rank 0 runs on that node and started; whether MASTER_ADDR is an address of that node that this "
        "one reaches; and whether a firewall lets it through. --timeout waits longer"
    )
    return ProblemError(f"no store answers at {host}:{port} ({error})", remedy)
