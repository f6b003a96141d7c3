"""commit_on_step: commit after every optimizer step, from a hook."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from syncaccum.window.commit import commit, to_seconds
from syncaccum.window.layers import tracking_layers


def commit_on_step(
    model: nn.Module, optimizer: Optimizer, *, timeout: float | timedelta | None = None
) -> RemovableHandle:
    """Call ``commit(model, timeout=timeout)`` after each ``optimizer.step()``: one window for one step.

    The step that follows the last micro-batch's backward closes the window. Wrappers that keep the real optimizer
    in ``.optimizer`` (accelerate's) are seen through. Where GradScaler skips a step, the window stays open and is
    committed with the next one. A copy of the optimizer does not carry the hook.

    Collective at every step: all ranks must step equally often. Registering is not collective.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        ValueError: the timeout is not a positive number.
        NoLayersError: the model has no SyncAccumBatchNorm that tracks statistics.
    """
    # Say so now rather than at the first step.
    tracking_layers(model)
    to_seconds(timeout)
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner

    def commit_window(*_: Any) -> None:
        commit(model, timeout=timeout)

    return optimizer.register_step_post_hook(commit_window)
