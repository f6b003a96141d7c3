"""What does look-ahead cost over ordinary gradient accumulation, in time and in memory?

ResNet-18, forward and backward of a window of 32 images: ordinary micro-batches with nn.BatchNorm, the same with the
converted model (policy window), look-ahead, and lockstep. For time they take turns; a ratio is the median over rounds
of the ratio within a round. Memory is the most that tensors take above the start. "On the host" is look-ahead with
``offload="cpu"``; the host's part is NumPy's memory then, which is not counted.

    python -m benchmarks.lookahead_cost
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.lockstep_speed import one_by_one, side_by_side
from benchmarks.report import Figure, publish
from benchmarks.resnet18 import build_resnet18
from syncaccum import convert_sync_accum, discard, lookahead
from syncaccum.exact.offload import WaitingRoom

ROUNDS = 8
WINDOW = 32
MICRO_BATCHES = (1, 4)
SIDE, LARGE_SIDE = 32, 64

Walk = Callable[[nn.Module, Sequence[Tensor]], None]


def look_ahead(model: nn.Module, parts: Sequence[Tensor], offload: str | None = None) -> None:
    for loss in lookahead(model, lambda x: model(x).square().sum(), parts, offload=offload):
        torch.autograd.backward(loss)
        # The loop variable is alive while the next forward runs.
        del loss


def look_ahead_on_host(model: nn.Module, parts: Sequence[Tensor]) -> None:
    with patch("syncaccum.exact.lookahead.WaitingRoom", _OutsideRoom):
        look_ahead(model, parts, offload="cpu")


class _OutsideRoom(WaitingRoom):
    """Takes CPU tensors for tensors on a device, and NumPy's memory for the host's."""

    def _is_to_go(self, x: Tensor) -> bool:
        return id(x) not in self._shared

    def _make_room(self, x: Tensor) -> Tensor:
        flat = torch.from_numpy(np.empty(x.numel(), dtype=np.float32))
        return flat.as_strided(x.shape, x.stride())


def time_all(walks: dict[str, tuple[Walk, nn.Module]], parts: Sequence[Tensor]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in walks}
    for _ in range(ROUNDS + 1):
        for name, (walk, model) in walks.items():
            start = time.perf_counter()
            walk(model, parts)
            times[name].append(time.perf_counter() - start)
            _clear(model)
    # The first round warms up.
    return {name: seconds[1:] for name, seconds in times.items()}


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Live bytes of the tensors that operators make, in all threads of a lockstep: they take the mode along."""

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


def peak_bytes(walk: Walk, model: nn.Module, parts: Sequence[Tensor]) -> int:
    """Above the start, with gradients of the parameters there already, as in a training after its first step."""
    walk(model, parts)
    with _Live() as live:
        walk(model, parts)
    _clear(model)
    return int(live.peak)


def _clear(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)
    if any(hasattr(module, "_accumulation") for module in model.modules()):
        discard(model)


def main() -> None:
    figures = []
    plain, converted = build_resnet18(), convert_sync_accum(build_resnet18())
    walks: dict[str, tuple[Walk, nn.Module]] = {
        "ordinary": (one_by_one, plain),
        "window": (one_by_one, converted),
        "lookahead": (look_ahead, converted),
        "lookahead, on the host": (look_ahead_on_host, converted),
        "lockstep": (side_by_side, converted),
    }
    for micro_batch in MICRO_BATCHES:
        parts = torch.split(torch.randn(WINDOW, 1, SIDE, SIDE), micro_batch)
        times = time_all(walks, parts)
        for name in list(walks)[1:]:
            ratio = statistics.median(a / b for a, b in zip(times[name], times["ordinary"], strict=True))
            note = f"{statistics.median(times[name]) * 1e3:.0f} / {statistics.median(times['ordinary']) * 1e3:.0f} ms"
            what = f"time of {name} / nn.BatchNorm, ResNet-18, {_describe(parts)}"
            figures.append(Figure(what, ratio, 1.45 if name == "lookahead" else None, note=note))
        for side in (SIDE, LARGE_SIDE):
            parts = torch.split(torch.randn(WINDOW, 1, side, side), micro_batch)
            peaks = {name: peak_bytes(walk, model, parts) for name, (walk, model) in walks.items()}
            for name in list(walks)[1:]:
                note = f"{peaks[name] / 2**20:.1f} / {peaks['ordinary'] / 2**20:.1f} MiB"
                what = f"peak of {name} / nn.BatchNorm, ResNet-18, {_describe(parts)}"
                target = 1.2 if name == "lookahead, on the host" else None
                figures.append(Figure(what, peaks[name] / peaks["ordinary"], target, note=note))
    publish("lookahead_cost", figures)


def _describe(parts: Sequence[Tensor]) -> str:
    return f"{len(parts)} micro-batches of {'x'.join(map(str, parts[0].shape))}"


if __name__ == "__main__":
    main()
