"""Watches an optimizer's steps: after each, statistics must be those of nn.BatchNorm on the window it closed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from syncaccum import SyncAccumBatchNorm
from tests.oracle import as_columns, assert_same_statistics, gather_global_batch, make_reference


class Steps:
    """Made after the hook that commits, so that its own comes after it. ``windows`` are lengths in micro-batches."""

    def __init__(self, model: nn.Module, optimizer: Any, **tolerance: float) -> None:
        self.windows: list[int] = []
        self._tolerance = tolerance
        self._layers = [layer for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm)]
        self._references = [make_reference(layer) for layer in self._layers]
        self._seen: list[list[Tensor]] = [[] for _ in self._layers]
        for layer, seen in zip(self._layers, self._seen, strict=True):
            layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(as_columns(inputs[0])))
        optimizer.register_step_post_hook(lambda *_: self._check())

    def _check(self) -> None:
        """Collective."""
        self.windows.append(len(self._seen[0]))
        for layer, expected, seen in zip(self._layers, self._references, self._seen, strict=True):
            expected(gather_global_batch(seen))
            assert_same_statistics(layer, expected, **self._tolerance)
            assert layer.window.count == 0
            seen.clear()
