"""Who takes part in a commit, and the only collectives of the package.

The group rule: a layer's ``process_group`` is a torch ProcessGroup or None. None means the default process group
if one is initialised when a commit runs, else this process alone.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from syncaccum.errors import CommitError

Group: TypeAlias = Any  # dist.ProcessGroup | None; torch types a non-member's group as int


class GroupHandle:
    """Holds a layer's group so that the layer can be deep-copied; the group itself cannot be.

    A copy takes part in the same group. Pickling a layer that has a group of its own is refused: a group names
    live connections of this process.
    """

    def __init__(self, group: Group) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            remedy = "this rank is not a member of it" if isinstance(group, int) else "pass a ProcessGroup or None"
            raise ValueError(f"process_group must be a torch.distributed ProcessGroup or None, got {group!r}: {remedy}")
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


class Transport(Protocol):
    """The collectives a commit needs, over one group."""

    rank: int
    size: int

    def choose_device(self, device: torch.device) -> torch.device:
        """Where a tensor must live to be reduced; ``device`` itself where the group can reach it."""

    def all_reduce(self, flat: Tensor) -> None:
        """Sum a float64 tensor over the group, in place. Collective."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order. Collective."""


class _Alone:
    rank = 0
    size = 1

    def choose_device(self, device: torch.device) -> torch.device:
        return device

    def all_reduce(self, flat: Tensor) -> None:
        return

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


class _TorchTransport:
    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def choose_device(self, device: torch.device) -> torch.device:
        # "cpu:gloo,cuda:nccl", say: the kinds of device that this group has a backend for.
        reachable = [pair.split(":")[0] for pair in dist.get_backend_config(self._group).split(",")]
        if device.type in reachable:
            return device
        return torch.device("cpu" if "cpu" in reachable else reachable[0])

    def all_reduce(self, flat: Tensor) -> None:
        try:
            dist.all_reduce(flat, group=self._group)
        except RuntimeError as error:
            raise CommitError(
                f"rank {self.rank} of {self.size}: the all-reduce of a commit failed, because a peer is gone, is "
                "stuck or did not call commit; running statistics are unchanged and the window is kept"
            ) from error

    def gather_objects(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise CommitError(f"rank {self.rank} of {self.size}: a peer left while ranks compared notes") from error
        return values


def resolve_group(group: Group) -> Group:
    """The group itself; for None the default process group, or None where there is none."""
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return group


def transport_over(group: Group) -> Transport:
    """The transport of a resolved group. Not collective."""
    return _Alone() if group is None else _TorchTransport(group)
