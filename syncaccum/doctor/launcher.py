"""What the launcher said: where this process stands among the ranks, and where they meet. Or what is wrong with it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from syncaccum.doctor.rank import ProblemError, Rank
from syncaccum.integrations import mpi

# Seconds: for what takes milliseconds where all is well, and between looks.
GRACE, PAUSE = 5.0, 0.2
T = TypeVar("T")
_REMEDY = "start the ranks with torchrun, which sets all of them, or mpirun, which needs none; unset all to be alone"


def within(seconds: float, function: Callable[[], T]) -> T:
    """``function()``, for torch heeds no limit where a peer is silent. After a TimeoutError leave by ``os._exit``."""
    try:
        return futures.ThreadPoolExecutor(1).submit(function).result(seconds)
    except futures.TimeoutError as error:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from error


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
    return Rank(rank, size, local_rank, local_size, "variables", rank == 0 or environment.get("LOCAL_RANK", "0") == "0")


def open_store(us: Rank, timeout: float) -> dist.Store:
    """Raises ProblemError where the port is taken, or no store answers within ``timeout``. Under MPI collective."""
    if us.launcher == "alone":
        return dist.HashStore()
    if us.launcher == "mpi":
        try:
            return mpi.open_store(mpi.world(), mpi.locate(), timedelta(seconds=timeout))
        except RuntimeError as error:
            raise ProblemError(str(error), "see whether rank 0's node can be reached there") from error
    # torchrun's agent hosts the store, also for rank 0, and keeps it when it restarts the ranks.
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _reach_store(host, port, timeout) if us.rank > 0 or by_agent else _host_store(port, timeout)
    return dist.PrefixStore(f"syncaccum.doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _host_store(port: int, timeout: float) -> dist.Store:
    try:  # MASTER_ADDR may be a name that only other machines can reach; the store listens on all addresses
        return dist.TCPStore("localhost", port, None, True, timedelta(seconds=timeout), wait_for_workers=False)
    except RuntimeError as error:
        why = "the port is taken" if "EADDRINUSE" in str(error) else str(error).partition("\n")[0]
        remedy = f"set MASTER_PORT to a free one on every rank, or end what has it: ss -ltnp 'sport = :{port}' names it"
        what = f"rank 0 cannot open the store on port {port} of {socket.gethostname()}: {why}"
        raise ProblemError(what, remedy) from error


def _reach_store(host: str, port: int, timeout: float) -> dist.Store:
    end = time.monotonic() + timeout
    while True:
        try:  # by plain sockets: torch's own attempts print C++ stack traces and take twice their timeout
            socket.create_connection((host, port), timeout=max(PAUSE, end - time.monotonic())).close()
            break
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= end:
                raise _explain_silence(host, port, error) from error
        time.sleep(PAUSE)  # rank 0, or a name in the cluster's DNS, may be late
    limit = max(GRACE, end - time.monotonic())
    try:  # what answers is either a store, and does so at once, or never will
        seconds = timedelta(seconds=limit)
        return within(limit, lambda: dist.TCPStore(host, port, None, False, seconds, wait_for_workers=False))
    except (TimeoutError, RuntimeError) as error:
        what = f"something listens at {host}:{port}, but it is no store of torch"
        remedy = "another program has that port on rank 0's node: set MASTER_PORT to a free one, the same on every rank"
        raise ProblemError(what, remedy) from error


def _explain_silence(host: str, port: int, error: Exception) -> ProblemError:
    if isinstance(error, (socket.gaierror, UnicodeError)):
        what = f"MASTER_ADDR is {host!r}, which does not resolve ({error})"
        remedy = "set it (torchrun: --master-addr, --rdzv-endpoint, --local-addr) to an address of rank 0's node"
        return ProblemError(what, remedy)
    remedy = "see whether rank 0 started there, this node reaches that address, and firewalls; --timeout waits longer"
    return ProblemError(f"no store answers at {host}:{port} ({error})", remedy)
