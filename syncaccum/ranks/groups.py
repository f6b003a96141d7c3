"""Who takes part in a commit.

The group rule: a layer's ``process_group`` is a torch ProcessGroup, an mpi4py communicator, or None. None means the
default process group if one is initialised when a commit runs, else this process alone.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor

# dist.ProcessGroup, mpi4py.MPI.Intracomm or None.
# torch gives a rank that is not in a new group an int.
Group: TypeAlias = Any


class GroupHandle:
    """Holds a layer's group, so that the layer can be deep-copied: a group itself cannot be.

    A copy takes part in the same group. A layer that has a group of its own cannot be pickled, because a group is made
    of live connections of this process.
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
            check_communicator(group)
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


def resolve_group(group: Group) -> Group:
    """Something hashable that stands for the group; for None the default process group, or None without one.

    Asked at each commit, not at conversion: models are often converted before ``init_process_group``.
    """
    if group is None:
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if not _is_communicator(group):
        return group
    # A freed communicator gets a wrapper, too, and fails in connect.
    # Failing here would keep this rank from its other groups.
    return Communicator.of(group) if group else Communicator(group)


def describe_group(group: Group) -> str:
    """Who takes part, for people: the backend and how many ranks, as this rank knows it. Not collective."""
    if group is not None and _is_communicator(group):
        return f"MPI, {_count_ranks(group.size)}" if group else "MPI, freed"
    group = resolve_group(group)
    if group is None:
        return "this process alone"
    try:
        backend: str = dist.get_backend(group)
    except ValueError:  # torch knows it no more
        return "destroyed"
    if backend == "undefined":
        # Nobody chose one, so each kind of device has its own.
        backend = dist.get_backend_config(group)
    return f"{backend}, {_count_ranks(group.size())}"


def _count_ranks(size: int) -> str:
    return f"{size} rank{'s' if size > 1 else ''}"


class Communicator:
    """An mpi4py communicator, as something that can be a key, and that remembers a failure."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.unfinished: tuple[Any, Tensor] | None = None
        """A collective that timed out, and its memory, which MPI may still write to."""

    @classmethod
    def of(cls, comm: Any) -> Communicator:
        """The one that belongs to this communicator, for as long as that lives."""
        # Several Python objects may stand for one communicator.
        # MPI knows: it keeps ours as an attribute.
        if cls._key is None:
            cls._key = type(comm).Create_keyval()
        communicator: Communicator | None = comm.Get_attr(cls._key)
        if communicator is None:
            communicator = cls(comm)
            comm.Set_attr(cls._key, communicator)
        return communicator

    _key: int | None = None


def _is_communicator(group: Group) -> bool:
    # Importing mpi4py.MPI calls MPI_Init.
    # Whoever has a communicator has imported it.
    return "mpi4py.MPI" in sys.modules and isinstance(group, sys.modules["mpi4py.MPI"].Comm)


def check_communicator(comm: Any) -> None:
    """Raise ValueError for one that this rank cannot reduce over."""
    if not comm:
        raise ValueError("process_group is MPI.COMM_NULL: this rank is not a member of it, or it was freed")
    # Between two groups, a sum is that of the other group.
    if comm.is_inter:
        raise ValueError("process_group is an intercommunicator: pass an intracommunicator, such as comm.Merge()")
