"""Saved activations that wait for the backward in host memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Copies under way ahead of the backward: one being used, one arriving.
_AHEAD = 2


@dataclass
class _Parked:
    """A tensor in host memory, and where it belongs."""

    host: Tensor
    device: torch.device
    returned: Tensor | None = None

    def begin_return(self) -> None:
        if self.returned is None:
            self.returned = self.host.to(self.device, non_blocking=True)

    def take(self) -> Tensor:
        """The tensor back on its device; the host keeps its copy, for a graph that is walked again."""
        self.begin_return()
        assert self.returned is not None
        tensor, self.returned = self.returned, None
        return tensor


class HostStore:
    """Parks what autograd saves while its hooks are in force, and brings it back ahead of need.

    A backward wants what was saved last first. Parameters stay where they are: they live on the device anyway.
    Copies are queued on the current stream, so memory is given up and taken back in order; pinned memory lets the
    host go on meanwhile.
    """

    def __init__(self) -> None:
        self._parked: list[_Parked] = []

    def hooks(self) -> AbstractContextManager[Any]:
        """A context in which autograd saves into the store."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | int:
        if tensor.device.type == "cpu" or (tensor.is_leaf and tensor.requires_grad):
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        host.copy_(tensor, non_blocking=True)
        self._parked.append(_Parked(host, tensor.device))
        return len(self._parked) - 1

    def _unpack(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        for ahead in range(1, _AHEAD):
            if packed >= ahead:
                self._parked[packed - ahead].begin_return()
        return self._parked[packed].take()
