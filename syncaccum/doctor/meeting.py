"""How ranks meet and compare notes through the store, which works before, and beside, any process group."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from syncaccum.doctor.bounded import within
from syncaccum.doctor.findings import ProblemError
from syncaccum.doctor.placement import Placement
from syncaccum.integrations import mpi

# Between looks at the store: 4,096 ranks then ask it 20,000 times a second, which it can answer.
_PAUSE = 0.2
_GRACE = 5.0
"""Seconds for what takes milliseconds where all is well: a store that is there to answer, a peer to take note."""


class Meeting:
    """The ranks of a job around one store. Rank 0 hears what the others have to say, decides, and tells them."""

    def __init__(self, placement: Placement, store: dist.Store) -> None:
        self.store = store
        self._rank = placement.rank
        self._size = placement.size

    def tell(self, topic: str, value: Any) -> None:
        """Leave a note for rank 0."""
        if self.store.add(f"{topic}/told/{self._rank}", 1) > 1:
            self.store.set(f"{topic}/duplicate/{self._rank}", "")
            self.store.add(f"{topic}/duplicates", 1)
        else:
            self.store.set(f"{topic}/{self._rank}", json.dumps(value))

    def hear(self, topic: str, timeout: float) -> tuple[dict[int, Any], list[int]]:
        """On rank 0: the notes of the ranks that left one in time, and the ranks that more than one process has."""
        ranks = range(self._size)
        keys = [f"{topic}/{rank}" for rank in ranks]
        end = time.monotonic() + timeout
        while not self.store.check(keys) and not self.store.add(f"{topic}/duplicates", 0) and time.monotonic() < end:
            time.sleep(_PAUSE)
        arrived = [rank for rank in ranks if self.store.check([keys[rank]])]
        duplicates = [rank for rank in ranks if self.store.check([f"{topic}/duplicate/{rank}"])]
        return {rank: json.loads(self.store.get(keys[rank])) for rank in arrived}, duplicates

    def decide(self, topic: str, decision: Any) -> None:
        """On rank 0: tell all others."""
        self.store.set(f"{topic}/decision", json.dumps(decision))

    def await_decision(self, topic: str, timeout: float) -> Any:
        """On the others: what rank 0 decided.

        Raises:
            TimeoutError: nothing was decided in time.
        """
        end = time.monotonic() + timeout
        while not self.store.check([f"{topic}/decision"]):
            if time.monotonic() > end:
                raise TimeoutError("rank 0 did not arrive, or did not decide")
            time.sleep(_PAUSE)
        decision = json.loads(self.store.get(f"{topic}/decision"))
        self.store.add(f"{topic}/noted", 1)
        return decision

    def await_notice(self, topic: str, ranks: int) -> None:
        """On rank 0, which may host the store, before it leaves: wait until so many others know the decision."""
        end = time.monotonic() + _GRACE
        while self.store.add(f"{topic}/noted", 0) < ranks and time.monotonic() < end:
            time.sleep(_PAUSE)


def open_meeting(placement: Placement, timeout: float) -> Meeting:
    """Open the store, or reach it. Under MPI collective.

    Raises:
        ProblemError: the port is taken, or nothing, or no store, answers within ``timeout`` seconds.
    """
    end = time.monotonic() + timeout
    if placement.launcher == "mpi":
        store = _open_by_mpi(placement, timeout)
    elif placement.launcher == "environment" and placement.rank == 0:
        assert placement.master is not None
        store = _host_store(placement.master[1], timeout)
    else:  # torchrun's agent hosts the store, also for rank 0
        assert placement.master is not None
        store = _reach_store(*placement.master, end)
    # torchrun keeps its store when it restarts the ranks.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Meeting(placement, dist.PrefixStore(f"syncaccum.doctor/{attempt}", store))


def _open_by_mpi(placement: Placement, timeout: float) -> dist.Store:
    here = mpi.MPIRank(placement.rank, placement.size, placement.local_rank, placement.local_size)
    try:
        return mpi.open_store(mpi.world(), here, timedelta(seconds=timeout))
    except RuntimeError as error:
        raise ProblemError(str(error), "see whether rank 0's node can be reached at that address and port") from error


def _host_store(port: int, timeout: float) -> dist.TCPStore:
    try:
        # By this name, because MASTER_ADDR may be one that only other machines can reach; it listens on all addresses.
        return dist.TCPStore(
            "localhost", port, None, is_master=True, timeout=timedelta(seconds=timeout), wait_for_workers=False
        )
    except RuntimeError as error:
        what = f"rank 0 cannot open the store on port {port} of {socket.gethostname()}: "
        if "EADDRINUSE" in str(error):
            raise ProblemError(
                what + "the port is taken",
                "set MASTER_PORT to a free port, the same on every rank, or end the program that has it, perhaps an "
                f"earlier run: ss -ltnp 'sport = :{port}' names it",
                (0,),
            ) from error
        raise ProblemError(what + str(error).splitlines()[0], "set MASTER_PORT to another port", (0,)) from error


def _reach_store(host: str, port: int, end: float) -> dist.TCPStore:
    _await_listener(host, port, end)
    # What answers is either a store, and does so at once, or never will.
    limit = max(_GRACE, end - time.monotonic())
    try:
        return within(
            limit,
            lambda: dist.TCPStore(host, port, None, False, timedelta(seconds=limit), wait_for_workers=False),
        )
    except (TimeoutError, RuntimeError) as error:
        raise ProblemError(
            f"something listens at {host}:{port}, but it is no store of torch",
            "another program has that port on rank 0's node: set MASTER_PORT to a free one, the same on every rank",
        ) from error


def _await_listener(host: str, port: int, end: float) -> None:
    """By plain sockets: torch's own attempts print C++ stack traces and take twice their timeout."""
    started = time.monotonic()
    while True:
        try:
            socket.create_connection((host, port), timeout=max(_PAUSE, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() < end:  # rank 0, or a name in the cluster's DNS, may be late
                time.sleep(_PAUSE)
                continue
            waited = f"within {time.monotonic() - started:.0f} s"
            if isinstance(error, socket.gaierror):
                raise ProblemError(
                    f"MASTER_ADDR is {host!r}, which does not resolve {waited} ({error})",
                    "set MASTER_ADDR (torchrun: --master-addr, --rdzv-endpoint, or --local-addr on node 0) to an "
                    "address of rank 0's node",
                ) from error
            raise ProblemError(
                f"no store answers at {host}:{port} {waited} ({error})",
                "see whether rank 0 runs on that node and started; whether MASTER_ADDR is an address of that node that "
                "this one reaches; and whether a firewall lets it through. --timeout waits longer",
            ) from error
