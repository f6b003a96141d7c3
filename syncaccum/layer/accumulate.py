"""Add a forward's sums to the open window: once, and only where the forward counts."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from syncaccum.layer.accumulation import Accumulation
from syncaccum.layer.following import bring_home
from syncaccum.layer.keys import find
from syncaccum.layer.notices import (
    FORGOTTEN_AFTER,
    leave_record,
    note_export,
    refuse_other_statistics,
    warn_of_forgotten_commits,
)
from syncaccum.layer.replay import number_forward
from syncaccum.layer.state import Accumulating, match_width
from syncaccum.torch_private import (
    add_to_all,
    buffers_of,
    given_to_functional_call,
    is_in_vmap,
    is_transformed,
    outside_transforms,
    runs_in_backward,
    saved_tensor_hooks,
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
    if torch.compiler.is_compiling():
        _open(layer)
        note_export(layer)
        own = buffers_of(layer)["running_mean"]
        assert own is not None
        add_unless_in_backward(state.window, sums, own, state.key, torch.is_grad_enabled())
        return
    if is_transformed():
        refuse_vmap(layer, sums)
    _open(layer)
    # A checkpoint's second forward: its data was counted in the first.
    if runs_in_backward():
        return
    match_width(layer)
    if is_transformed():
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
    state = layer._accumulation
    # Assigned, never read: reading would make compiled code depend on it.
    state.momentum = layer.momentum if state.call_momentum is None else state.call_momentum
    state.is_open = True


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


def refuse_vmap(layer: Accumulating, sums: Tensor) -> None:
    """Raise where sums are those of many examples that look like one."""
    if is_in_vmap(sums):
        raise RuntimeError(
            f"a training forward under torch.vmap would be a micro-batch for each example: call {layer} on the whole "
            "batch, or in eval mode"
        )


@torch.library.custom_op("syncaccum::add_unless_in_backward", mutates_args={"window"})
def add_unless_in_backward(window: Tensor, sums: Tensor, running_mean: Tensor, key: Tensor, grad: bool) -> None:
    """Add a compiled forward's sums to the window, but not in a checkpoint's second forward.

    A compiled graph fixes all Python at the time of compiling. It calls an operator as it is, which asks each time.
    """
    state: Accumulation = find(key)
    _refuse_given_statistics(state, running_mean)
    # Policy "window" has its own operators for this; "batch" looks at no running statistics.
    looks = state.normalization in ("renorm", "running")
    if runs_in_backward():
        if looks:
            refuse_other_statistics(state, state.name or "in compiled code", sums)
        return
    window.add_(sums)
    if state.used_since is None:
        state.used_since = number_forward()
    if looks and (saved_tensor_hooks() is not None or not grad):
        leave_record(state, sums, hold=True)


def _refuse_given_statistics(state: Accumulation, running_mean: Tensor) -> None:
    """Raise where a compiled forward has the caller's running statistics, see `given`: its window would get them."""
    owner = None if state.owner is None else state.owner()
    now = None if owner is None else buffers_of(owner)["running_mean"]
    own = [tensor.data_ptr() for tensor in (state.home, now) if tensor is not None]
    is_given = running_mean.data_ptr() not in own
    # A compiled model inside a functional_call: the layer has them now.
    if not is_given and now is not None and now is not state.home:
        is_given = any(now is tensor for tensor in given_to_functional_call())
    if is_given:
        raise RuntimeError(
            f"torch.func.functional_call gives layer {state.name or 'of its own'} other running statistics in compiled "
            "code: give it the parameters alone, or call it uncompiled"
        )
