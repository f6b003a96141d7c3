"""Offload: what is needed later waits in host memory, and is back before it is needed.

That is what autograd saves for the backward, and in the first pass of a lookahead what waits at a layer.
"""

from __future__ import annotations

import collections
import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from syncaccum.torch_private import tensors_in, version_of


class Lane:
    """Copies between a device and the host on a stream of their own, so that the device computes meanwhile.

    Args:
        streams: what enters a stream, as torch.cuda does.
        own: the copies' stream, one for a device: a tensor has gone before it comes back.
        current: the stream that computes.
    """

    def __init__(self, streams: Any, own: Any, current: Any) -> None:
        self._streams = streams
        self._own = own
        self._current = current
        self._lock = threading.Lock()
        self._going: collections.deque[tuple[Tensor, Any]] = collections.deque()

    def send(self, tensor: Tensor, host: Tensor) -> None:
        """Copy to pinned memory."""
        # Not before the values are there.
        self._own.wait_stream(self._current)
        with self._streams.stream(self._own):
            host.copy_(tensor, non_blocking=True)
        self._going.append((tensor.detach(), self._own.record_event()))
        # Then its memory is given up in the order of the current stream:
        # the next tensor has it at once, and the host need not look.
        self._let_go(1)

    def fetch(self, host: Tensor, device: torch.device) -> tuple[Tensor, Callable[[], None]]:
        """Begin to copy from pinned memory; the tensor, and what has the current stream wait until it is there."""
        self._let_go(0)
        tensor = torch.empty_like(host, device=device)
        # Its memory may still be in use there.
        self._own.wait_stream(self._current)
        with self._streams.stream(self._own):
            tensor.copy_(host, non_blocking=True)
        # Nobody may take it: then it is given up while on its way.
        tensor.record_stream(self._own)
        event = self._own.record_event()
        return tensor, lambda: self._current.wait_event(event)

    def _let_go(self, keep: int) -> None:
        with self._lock:
            while len(self._going) > keep:
                _, event = self._going.popleft()
                self._current.wait_event(event)


def _lane_of(device: torch.device) -> Lane | None:
    """The lane beside a device's current stream; None where copies are made in the order of its other work."""
    return _lane_beside(torch.cuda.current_stream(device)) if device.type == "cuda" else None


@functools.cache
def _lane_beside(current: torch.cuda.Stream) -> Lane:
    return Lane(torch.cuda, _copy_stream(current.device), current)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class Parked:
    """A tensor in host memory. What is saved lives as long as the graph refers to it."""

    host: Tensor
    device: torch.device
    before: weakref.ref[Parked] | None = None
    """What was parked just before this one. A backward goes the other way, so it needs that next.

    A weak reference: the graph alone decides how long memory is kept.
    """
    walks: int = 0
    """How many backwards have taken it: a graph may be walked several times."""
    returning: tuple[Tensor, Callable[[], None]] | None = None
    """The tensor on its way back to the device, or there and not yet taken; and what waits for it."""

    def begin_return(self) -> None:
        if self.returning is None:
            self.returning = self._fetch()

    def _fetch(self) -> tuple[Tensor, Callable[[], None]]:
        lane = _lane_of(self.device)
        if lane is None:
            return self.host.to(self.device, non_blocking=True), _do_nothing
        return lane.fetch(self.host, self.device)

    def take(self) -> Tensor:
        """The tensor, on its device. The host keeps its copy, because a graph may be walked again."""
        self.begin_return()
        assert self.returning is not None
        (tensor, wait), self.returning = self.returning, None
        wait()
        self.walks += 1
        return tensor


class HostStore:
    """Parks what autograd saves while its hooks are in force, and brings it back ahead of need.

    Parameters stay where they are, because they live on the device anyway. Nodes that save the same tensor share its
    copy in host memory, which is pinned, so that the host need not wait for copies.
    """

    def __init__(self) -> None:
        self._last: weakref.ref[Parked] | None = None
        self._parked: weakref.WeakValueDictionary[Hashable, Parked] = weakref.WeakValueDictionary()

    def hooks(self) -> AbstractContextManager[Any]:
        """A context in which autograd saves into the store."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | Parked:
        if not self.takes(tensor) or (tensor.is_leaf and tensor.requires_grad):
            return tensor
        parked = self.keep(tensor)
        parked.before = self._last
        self._last = weakref.ref(parked)
        return parked

    def takes(self, tensor: Tensor) -> bool:
        """Whether it is on a device."""
        return tensor.device.type != "cpu"

    def keep(self, tensor: Tensor) -> Parked:
        """Park a tensor, or find its copy."""
        values = _identify(tensor)
        same = self._parked.get(values)
        parked = self._copy(tensor) if same is None else replace(same, before=None, walks=0, returning=None)
        self._parked[values] = parked
        return parked

    def _copy(self, tensor: Tensor) -> Parked:
        return Parked(_copy_to_host(tensor), tensor.device)

    def remember(self, tensor: Tensor, parked: Parked) -> None:
        """It is that one again, in other memory."""
        self._parked[_identify(tensor)] = parked

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
    lane = _lane_of(tensor.device)
    if lane is None:
        return host.copy_(tensor, non_blocking=True)
    lane.send(tensor, host)
    return host


class WaitingRoom:
    """Host memory for inputs that wait at a layer, while other micro-batches run.

    The forwards that wait hold the tensor, too. So it is emptied, and gets its values back before they go on. Other
    tensors with the same memory keep it, and the device's memory is not given up then.

    Args:
        shared: tensors that another micro-batch may look at meanwhile; they stay.
        store: knows copies that it has of them already, and shares those made here.
    """

    def __init__(self, shared: Iterable[Tensor], store: HostStore | None = None) -> None:
        self._shared = {id(tensor) for tensor in shared}
        self._store = HostStore() if store is None else store

    def park(self, x: Tensor) -> Callable[[], None]:
        """Send a tensor to the host; what is returned brings it back."""
        if not self._is_to_go(x):
            return _do_nothing
        parked = self._store.keep(x)
        x.data = x.new_empty(0)

        def bring_back() -> None:
            x.data = parked.take()
            self._store.remember(x, parked)

        return bring_back

    def _is_to_go(self, x: Tensor) -> bool:
        return self._store.takes(x) and type(x) is Tensor and not x.is_inference() and id(x) not in self._shared


def shared_tensors(model: nn.Module, batches: Sequence[object]) -> list[Tensor]:
    """Tensors that several micro-batches may hold."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    return [*model.parameters(), *model.buffers(), *tensors_in(list(attributes)), *tensors_in(batches)]


def stay(x: Tensor) -> Callable[[], None]:
    """In the place of ``WaitingRoom.park``, where there is no offload."""
    return _do_nothing


def _do_nothing() -> None:
    return
