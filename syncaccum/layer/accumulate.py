"""Add a forward's sums to the open window: once, and only where the forward counts."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from syncaccum.layer.accumulation import Accumulation
from syncaccum.layer.following import bring_home
from syncaccum.layer.notices import FORGOTTEN_AFTER, warn_of_forgotten_commits
from syncaccum.layer.state import Accumulating, match_width
from syncaccum.torch_private import (
    add_to_all,
    is_in_vmap,
    is_transformed,
    outside_transforms,
    runs_in_backward,
    take_out_of_transforms,
)


def is_counted(layer: Accumulating) -> bool:
    """Whether a forward goes into the window. Asked in each forward, as nn.BatchNorm reads its momentum in each.

    Users set momentum to 0 for forwards that shall not count. A layer that had 0 from the start counts, though: its
    commits leave the statistics as they are, but add to ``num_batches_tracked``, as nn.BatchNorm's forwards do.
    """
    state = layer._accumulation
    return not state.uncounted and (layer.momentum != 0 or state.always_counts)


def accumulate(layer: Accumulating, sums: Tensor) -> None:
    """Add a micro-batch's packed moments to the window. Not collective.

    Raises:
        RuntimeError: under ``torch.vmap``, which has a micro-batch of its own for each example.
    """
    state = layer._accumulation
    _open(layer)
    if torch.compiler.is_compiling():
        add_unless_in_backward(state.window, sums)
        return
    # A checkpoint's second forward: its data was counted in the first.
    if runs_in_backward():
        return
    match_width(layer)
    if is_transformed():
        _refuse_vmap(layer, sums)
        with outside_transforms():
            _add(state, take_out_of_transforms(sums))
    elif getattr(layer, "_is_replica", False):
        # DataParallel's copies share this state, on several devices.
        with _replicas:
            state.window.add_(sums.to(state.window.device))
    else:
        _add(state, sums)
    _count(layer)


def accumulate_together(sums: Mapping[Accumulating, Tensor]) -> None:
    """`accumulate` for several layers: for all, or for none where a signal interrupts. Not collective."""
    for layer in sums:
        _open(layer)
        match_width(layer)
        bring_window_home(layer._accumulation, sums[layer].device)
    # One call for all layers: a signal comes before or after it.
    if sums:
        add_to_all([layer._accumulation.window for layer in sums], list(sums.values()))
    for layer in sums:
        layer._accumulation.locksteps += 1
        _count(layer)


def _open(layer: Accumulating) -> None:
    # Assigned, never read: reading would make compiled code depend on it.
    layer._accumulation.momentum = layer.momentum
    layer._accumulation.is_open = True


def _count(layer: Accumulating) -> None:
    state = layer._accumulation
    state.micro_batches += 1
    if state.micro_batches == FORGOTTEN_AFTER:
        warn_of_forgotten_commits(layer)


_replicas = threading.Lock()
"""DataParallel's replicas share one window, and run in threads."""


def _add(state: Accumulation, sums: Tensor) -> None:
    bring_window_home(state, sums.device)
    state.window.add_(sums)


def bring_window_home(state: Accumulation, device: torch.device) -> None:
    """Have the open window, and what goes with it, on the device of the data."""
    # Some tools move a layer without _apply: follow the data.
    # An inference tensor refuses to be added to.
    if state.window.device != device or state.window.is_inference():
        state.window = bring_home(state.window, device)
        if state.ledger is not None:
            state.ledger.follow(lambda books: bring_home(books, device))


def _refuse_vmap(layer: Accumulating, sums: Tensor) -> None:
    if is_in_vmap(sums):
        raise RuntimeError(
            f"a training forward under torch.vmap would be a micro-batch for each example: call {layer} on the whole "
            "batch, or in eval mode"
        )


@torch.library.custom_op("syncaccum::add_unless_in_backward", mutates_args={"window"})
def add_unless_in_backward(window: Tensor, sums: Tensor) -> None:
    """Add a compiled forward's sums to the window, but not in a checkpoint's second forward.

    A compiled graph fixes all Python at the time of compiling. It calls an operator as it is, which asks each time.
    """
    if not runs_in_backward():
        window.add_(sums)
