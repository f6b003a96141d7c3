"""Offload: what is needed later waits in host memory, and is back before it is needed.

That is what autograd saves for the backward, and in the first pass of a lookahead what waits at a layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from syncaccum.torch_private import version_of


@dataclass(eq=False)
class Parked:
    """A saved tensor in host memory. It lives as long as the graph refers to it."""

    host: Tensor
    device: torch.device
    before: weakref.ref[Parked] | None
    """What was parked just before this one. A backward goes the other way, so it needs that next.

    A weak reference: the graph alone decides how long memory is kept.
    """
    walks: int = 0
    """How many backwards have taken it: a graph may be walked several times."""
    returning: Tensor | None = None
    """The tensor on its way back to the device, or there and not yet taken."""

    def begin_return(self) -> None:
        if self.returning is None:
            self.returning = self.host.to(self.device, non_blocking=True)

    def take(self) -> Tensor:
        """The tensor, on its device. The host keeps its copy, because a graph may be walked again."""
        self.begin_return()
        assert self.returning is not None
        tensor, self.returning = self.returning, None
        self.walks += 1
        return tensor


class HostStore:
    """Parks what autograd saves while its hooks are in force, and brings it back ahead of need.

    Parameters stay where they are, because they live on the device anyway. Copies are queued on the current stream, so
    the device's memory is given up and taken again in order. Pinned host memory lets the host go on meanwhile.
    Nodes that save the same tensor share its copy there.
    """

    def __init__(self) -> None:
        self._last: weakref.ref[Parked] | None = None
        self._parked: weakref.WeakValueDictionary[Hashable, Parked] = weakref.WeakValueDictionary()

    def hooks(self) -> AbstractContextManager[Any]:
        """A context in which autograd saves into the store."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | Parked:
        if tensor.device.type == "cpu" or (tensor.is_leaf and tensor.requires_grad):
            return tensor
        values = _identify(tensor)
        same = self._parked.get(values)
        parked = Parked(_copy_to_host(tensor) if same is None else same.host, tensor.device, self._last)
        self._parked[values] = parked
        self._last = weakref.ref(parked)
        return parked

    def _unpack(self, packed: Tensor | Parked) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor = packed.take()
        following = None if packed.before is None else packed.before()
        # Ahead of need, unless this backward has taken it already.
        if following is not None and following.walks < packed.walks:
            following.begin_return()
        return tensor


def _identify(tensor: Tensor) -> Hashable:
    """Equal for tensors that are one in memory, and were not written to in between."""
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        return object()  # its values are not simply those in its memory
    # While the key lives, no other storage takes this one's place.
    storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, version_of(tensor)


def _copy_to_host(tensor: Tensor) -> Tensor:
    host: Tensor = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


class WaitingRoom:
    """Host memory for inputs that wait at a layer, while other micro-batches run.

    The forwards that wait hold the tensor, too. So it is emptied, and gets its values back before they go on. Other
    tensors with the same memory keep it, and the device's memory is not given up then.

    Args:
        shared: tensors that another micro-batch may look at meanwhile; they stay.
    """

    def __init__(self, shared: Iterable[Tensor]) -> None:
        self._shared = {id(tensor) for tensor in shared}

    def park(self, x: Tensor) -> Callable[[], None]:
        """Send a tensor to the host; what is returned brings it back."""
        if not self._is_to_go(x):
            return _do_nothing
        device = x.device
        host = self._make_room(x).copy_(x, non_blocking=True)
        x.data = x.new_empty(0)

        def bring_back() -> None:
            x.data = host.to(device, non_blocking=True)

        return bring_back

    def _is_to_go(self, x: Tensor) -> bool:
        return x.device.type != "cpu" and type(x) is Tensor and not x.is_inference() and id(x) not in self._shared

    def _make_room(self, x: Tensor) -> Tensor:
        return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)


def stay(x: Tensor) -> Callable[[], None]:
    """In the place of ``WaitingRoom.park``, where there is no offload."""
    return _do_nothing


def _do_nothing() -> None:
    return
