"""How much memory a GPU would need for a step, counted on a CPU: device tensors, and apart from them what is parked.

On a CPU the host's memory and the device's are the same, so ``offload="cpu"`` has nothing to do, and resident memory
cannot tell them apart. Here every tensor that an operator makes counts for the device. What is parked goes to memory
that NumPy owns, which does not count; what comes back is a new tensor, which does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from syncaccum.exact.offload import HostStore, Parked, WaitingRoom


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Live bytes of the tensors that operators make, in all threads of a lockstep: they take the mode along.

    Memory that an operator takes and gives back on its way is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Operators in place, and views, return memory that there was.
        there = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in there:
                self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._forget, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [tensor.untyped_storage() for tensor in tree_leaves(tree) if isinstance(tensor, Tensor)]


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that the device holds above the start. A first step makes what stays: gradients of the parameters."""
    step()
    with Live() as live:
        step()
    return int(live.peak)


@contextmanager
def parking_outside() -> Iterator[None]:
    """``offload="cpu"`` takes CPU tensors for a device's, and NumPy's memory for the host's."""
    with (
        patch("syncaccum.exact.lookahead.WaitingRoom", _OutsideRoom),
        patch("syncaccum.exact.lockstep.HostStore", _OutsideStore),
    ):
        yield


class _OutsideParked(Parked):
    def _fetch(self) -> tuple[Tensor, Callable[[], None]]:
        return self.host.clone(), lambda: None


class _OutsideStore(HostStore):
    def takes(self, tensor: Tensor) -> bool:
        return True

    def _copy(self, tensor: Tensor) -> Parked:
        return _OutsideParked(_copy_outside(tensor), tensor.device)


class _OutsideRoom(WaitingRoom):
    def __init__(self, shared: Iterable[Tensor], store: HostStore | None = None) -> None:
        super().__init__(shared, _OutsideStore() if store is None else store)


def _copy_outside(tensor: Tensor) -> Tensor:
    """In memory that no operator has made."""
    shape = torch.empty_like(tensor, device="meta")
    flat = torch.from_numpy(np.empty(tensor.numel() * tensor.element_size(), dtype=np.uint8))
    return flat.view(tensor.dtype).as_strided(shape.shape, shape.stride()).copy_(tensor)
