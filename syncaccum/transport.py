"""Who takes part in a commit, and the only collectives of the package.

The group rule: a layer's ``process_group`` is a torch ProcessGroup, an mpi4py communicator, or None. None means the
default process group if one is initialised when a commit runs, else this process alone.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist

# DDP imports it, and its functions then keep the default group of that moment as their arguments' default, for good:
# destroy_process_group() no longer ends gloo's threads, and one that frees a message's tensor while Python exits aborts
# the process. Imported here, which is before a group exists in most programs, it keeps nothing.
import torch.distributed.nn.functional
from torch import Tensor

from syncaccum.errors import CommitError

Group: TypeAlias = Any  # dist.ProcessGroup | mpi4py.MPI.Intracomm | None; torch types a non-member's group as int


class GroupHandle:
    """Holds a layer's group so that the layer can be deep-copied; the group itself cannot be.

    A copy takes part in the same group. Pickling a layer that has a group of its own is refused: a group names
    live connections of this process.
    """

    def __init__(self, group: Group) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            if not _is_communicator(group):
                remedy = (
                    "this rank is not a member of it"
                    if isinstance(group, int)
                    else "pass one of those; an mpi4py communicator needs pip install syncaccum[mpi]"
                )
                raise ValueError(
                    "process_group must be a torch.distributed ProcessGroup, an mpi4py communicator or None, "
                    f"got {group!r}: {remedy}"
                )
            _check_communicator(group)
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupHandle:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is not None:
            raise TypeError(
                "a layer with a process_group of its own cannot be pickled: save its state_dict, "
                "or revert_sync_accum(model) first and convert again after loading"
            )
        return GroupHandle, (None,)


def _is_communicator(group: Group) -> bool:
    # Importing mpi4py.MPI calls MPI_Init. Whoever has a communicator has imported it.
    return "mpi4py.MPI" in sys.modules and isinstance(group, sys.modules["mpi4py.MPI"].Comm)


def _check_communicator(comm: Any) -> None:
    if not comm:
        raise ValueError("process_group is MPI.COMM_NULL: this rank is not a member of it, or it was freed")
    if comm.is_inter:
        raise ValueError("process_group is an intercommunicator: pass an intracommunicator, such as comm.Merge()")


class Transport(Protocol):
    """The collectives a commit needs, over one group."""

    rank: int
    size: int

    def choose_device(self, device: torch.device) -> torch.device:
        """Where a tensor must live to be reduced; ``device`` itself where the group can reach it."""

    def all_reduce(self, flat: Tensor) -> None:
        """Sum a float64 tensor over the group, in place. Collective."""


class _Alone:
    rank = 0
    size = 1

    def choose_device(self, device: torch.device) -> torch.device:
        return device

    def all_reduce(self, flat: Tensor) -> None:
        return


class _TorchTransport:
    def __init__(self, group: dist.ProcessGroup, timeout: float | None) -> None:
        self._group = group
        self._remaining = _count_down(timeout)
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def choose_device(self, device: torch.device) -> torch.device:
        reachable = self._list_backends()
        if device.type in reachable:
            return device
        return torch.device("cpu" if "cpu" in reachable else next(iter(reachable)))

    def _list_backends(self) -> dict[str, str]:
        """By kind of device; torch says "cpu:gloo,cuda:nccl"."""
        return dict(pair.split(":") for pair in dist.get_backend_config(self._group).split(","))

    def all_reduce(self, flat: Tensor) -> None:
        try:
            if self._remaining is None:
                dist.all_reduce(flat, group=self._group)
            else:
                # Not by waiting for less long: the operation would go on, and be applied by peers that come late.
                options = dist.AllreduceOptions()
                options.timeout = timedelta(seconds=self._remaining())
                self._group.allreduce([flat], options).wait()
        except RuntimeError as error:
            self._hang_up(flat.device.type)
            raise _lost_peer(self) from error

    def _hang_up(self, device_type: str) -> None:
        """Close gloo's connections, so that peers that wait for this rank, and not for the lost one, learn of it too.

        gloo closes one connection when a peer closes it, all when something times out, and none when asked: torch's
        ``abort()`` does nothing there. So something times out.
        """
        if self._list_backends().get(device_type) != "gloo":
            return
        with suppress(RuntimeError):  # which is the time-out
            nothing = torch.zeros(1, device=device_type)
            self._group.recv_anysource([nothing], _NOBODYS_TAG).wait(timedelta(seconds=_SHORTEST))


_NOBODYS_TAG = 2**30 + 1
"""Of messages that nobody sends: torch's own count up from 0, and so do users'."""


class _Communicator:
    """An mpi4py communicator, as something that is hashed by identity and remembers a failure."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.unfinished: tuple[Any, Tensor] | None = None
        """A collective that timed out, and its memory, which MPI may still write to."""

    @classmethod
    def of(cls, comm: Any) -> _Communicator:
        """The one that belongs to this communicator; MPI itself keeps it, until the communicator is freed."""
        if cls._key is None:
            cls._key = type(comm).Create_keyval()
        communicator: _Communicator | None = comm.Get_attr(cls._key)
        if communicator is None:
            communicator = cls(comm)
            comm.Set_attr(cls._key, communicator)
        return communicator

    _key: int | None = None


class _MPITransport:
    """Sums in host memory, in place."""

    def __init__(self, communicator: _Communicator, timeout: float | None) -> None:
        self._communicator = communicator
        self._comm = communicator.comm
        self._remaining = _count_down(timeout)
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()

    def choose_device(self, device: torch.device) -> torch.device:
        return torch.device("cpu")

    def all_reduce(self, flat: Tensor) -> None:
        mpi = sys.modules["mpi4py.MPI"]
        if self._communicator.unfinished is not None:
            raise CommitError(
                f"rank {self.rank} of {self.size}: an earlier commit over this communicator timed out, and MPI "
                "cannot take a collective back: commit over another communicator, or end the job with comm.Abort()"
            )
        message = [flat, mpi.DOUBLE]
        try:
            if self._remaining is None:
                self._comm.Allreduce(mpi.IN_PLACE, message)
            else:
                self._wait(self._comm.Iallreduce(mpi.IN_PLACE, message), flat)
                # A rank that has timed out has sent its sums, which a late peer would apply. It is not here.
                self._wait(self._comm.Ibarrier(), flat)
        except mpi.Exception as error:
            raise _lost_peer(self) from error

    def _wait(self, request: Any, memory: Tensor) -> None:
        assert self._remaining is not None
        pause = 0.0
        while not request.Test():
            if self._remaining() <= _SHORTEST:
                self._communicator.unfinished = request, memory
                raise _lost_peer(self)
            time.sleep(pause)
            pause = min(pause + 1e-5, 1e-3)  # quick where the peers are, cheap where they are not


_SHORTEST = 1e-3
"""Seconds; gloo counts milliseconds, and takes 0 for no limit."""


def _count_down(timeout: float | None) -> Callable[[], float] | None:
    """What is left of ``timeout`` seconds from now on, whenever asked."""
    if timeout is None:
        return None
    end = time.monotonic() + timeout
    return lambda: max(_SHORTEST, end - time.monotonic())


def _lost_peer(transport: Transport) -> CommitError:
    return CommitError(
        f"rank {transport.rank} of {transport.size}: the all-reduce of a commit failed, because a peer is gone, is "
        "stuck or did not call commit; running statistics are unchanged and the window is kept"
    )


def resolve_group(group: Group) -> Group:
    """Something hashable that stands for the group; for None the default process group, or None without one."""
    if group is None:
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if not _is_communicator(group):
        return group
    _check_communicator(group)  # it may have been freed since
    return _Communicator.of(group)


def transport_over(group: Group, timeout: float | None = None) -> Transport:
    """The transport of a resolved group. Not collective.

    Args:
        group: what ``resolve_group`` returned.
        timeout: seconds from now in which its collectives must end, instead of the group's own timeout for each.
    """
    if group is None:
        return _Alone()
    if isinstance(group, _Communicator):
        return _MPITransport(group, timeout)
    return _TorchTransport(group, timeout)


def gather_objects(transport: Transport, value: Any) -> list[Any]:
    """Every rank's value, in rank order. Collective: two all-reduces, so that it ends when they do."""
    mine = pickle.dumps(value)
    home = transport.choose_device(torch.device("cpu"))
    sizes = torch.zeros(transport.size, dtype=torch.float64, device=home)
    sizes[transport.rank] = len(mine)
    transport.all_reduce(sizes)
    lengths = [int(length) for length in sizes.tolist()]
    table = torch.zeros(transport.size, max(lengths), dtype=torch.float64)
    table[transport.rank, : len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    table = table.to(home)
    transport.all_reduce(table)
    everyones = table.to("cpu", torch.uint8)
    return [pickle.loads(bytes(row[:length].tolist())) for row, length in zip(everyones, lengths, strict=True)]
