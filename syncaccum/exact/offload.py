"""Saved activations that wait for the backward in host memory."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Parked:
    """A tensor in host memory, for as long as the graph refers to it."""

    host: Tensor
    device: torch.device
    before: weakref.ref[Parked] | None
    """The one parked just before, which a backward wants just after; weak, so that it is freed when it was used."""
    walks: int = 0
    returning: Tensor | None = None

    def begin_return(self) -> None:
        if self.returning is None:
            self.returning = self.host.to(self.device, non_blocking=True)

    def take(self) -> Tensor:
        """The tensor, on its device; the host keeps its copy, for a graph that is walked again."""
        self.begin_return()
        assert self.returning is not None
        tensor, self.returning = self.returning, None
        self.walks += 1
        return tensor


class HostStore:
    """Parks what autograd saves while its hooks are in force, and brings it back ahead of need.

    Parameters stay where they are: they live on the device anyway. Copies are queued on the current stream, so
    memory is given up and taken back in order; pinned memory lets the host go on meanwhile.
    """

    def __init__(self) -> None:
        self._last: weakref.ref[Parked] | None = None

    def hooks(self) -> AbstractContextManager[Any]:
        """A context in which autograd saves into the store."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | Parked:
        if tensor.device.type == "cpu" or (tensor.is_leaf and tensor.requires_grad):
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        host.copy_(tensor, non_blocking=True)
        parked = Parked(host, tensor.device, self._last)
        self._last = weakref.ref(parked)
        return parked

    def _unpack(self, packed: Tensor | Parked) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor = packed.take()
        following = None if packed.before is None else packed.before()
        if following is not None and following.walks < packed.walks:  # not yet taken in this walk
            following.begin_return()
        return tensor
