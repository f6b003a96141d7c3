"""What commits, windows and lockstep need of a layer: its open window, and its part in a commit.

All of it is in one private attribute, so nothing of a subclass is touched. Functions rather than methods, for the
same reason.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from syncaccum.moments import Moments
from syncaccum.ranks.groups import Group, GroupHandle
from syncaccum.torch_private import BatchNormBase, add_all, buffers_of, runs_in_backward

POLICIES = ("renorm", "batch", "running")
"""The names of the normalization policies; `policies` says what they are."""

# Micro-batches without a commit: surely forgotten. Windows of hundreds are in use.
_FORGOTTEN_AFTER = 1000


@dataclass
class Accumulation:
    """What accumulating adds to a BatchNorm: its settings and its open window."""

    handle: GroupHandle
    normalization: str
    r_max: float
    d_max: float
    prior_count: float
    # Not a buffer: DDP overwrites buffers with rank 0's.
    # FSDP and .half() cast them.
    window: Tensor
    """Packed moments, float64."""
    momentum: float | None
    """Of the last forward that counted. Where it is 0 now, a commit still needs the one of its window."""
    micro_batches: int = 0
    """In the open window, where Python counts: not in compiled forwards."""
    locksteps: int = 0
    """How often one has added to a window. Not reset with it."""
    uncounted: int = 0
    """How many ``not_counted`` are open."""
    name: str = ""
    """In the model that was converted; for messages."""
    normalises_itself: bool = False
    """Found in its first training forward: nothing of it comes to us."""

    def __post_init__(self) -> None:
        check_settings(self.normalization, self.r_max, self.d_max, self.prior_count)

    def drop(self) -> None:
        """Start a new window."""
        self.window.zero_()
        self.micro_batches = 0


class Accumulating(BatchNormBase):
    """A BatchNorm with a window. What it does with data is in `batchnorm`."""

    _accumulation: Accumulation

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if "_accumulation" in self.__dict__:  # not yet in nn.BatchNorm's constructor
            self._accumulation.drop()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # The window belongs to the statistics that were replaced.
        if prefix + "running_mean" in state_dict:
            self._accumulation.drop()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Under inference_mode even a move to where it is would spoil it.
        with torch.inference_mode(False):
            self._accumulation.window = _follow(self._accumulation.window, fn)
        return self


def _follow(window: Tensor, fn: Any) -> Tensor:
    """The window where ``fn`` moves tensors to, still float64, every bit as it was; empty where the sums are gone."""
    # As integers: .half() and .to(dtype) leave those alone.
    bits = window.view(torch.int64)
    moved = fn(bits)
    # to_empty() gives memory as it lay.
    emptied = moved.dtype == torch.int64 and not moved.is_meta and not bits.is_meta and not _equal(moved, bits)
    if moved.is_meta or bits.is_meta or emptied:
        return torch.zeros_like(window, device=moved.device)
    return window.to(moved.device)


def _equal(first: Tensor, second: Tensor) -> bool:
    return first is second or torch.equal(first.cpu(), second.cpu())


def adopt(
    layer: Any,
    process_group: Group,
    normalization: str,
    r_max: float = 1.5,
    d_max: float = 0.5,
    prior_count: float = 1.0,
    *,
    name: str = "",
) -> None:
    """Give a BatchNorm's instance what `Accumulating` adds to one. `release` takes it away again."""
    layer._accumulation = Accumulation(
        GroupHandle(process_group),
        normalization,
        r_max,
        d_max,
        prior_count,
        window=_make_window(layer),
        momentum=layer.momentum,
        name=name,
    )


def release(layer: Any) -> None:
    """Undo `adopt`."""
    del layer._accumulation


def _make_window(layer: Any) -> Tensor:
    running_mean = buffers_of(layer)["running_mean"]
    return Moments.zeros_packed(layer.num_features, None if running_mean is None else running_mean.device)


def tracks(layer: Any) -> bool:
    """Whether the layer has running statistics to commit to, as nn.BatchNorm asks in each forward."""
    buffers = buffers_of(layer)
    return bool(layer.track_running_stats) and buffers["running_mean"] is not None


def is_counted(layer: Accumulating) -> bool:
    """Whether a forward goes into the window now: read in each forward, as nn.BatchNorm reads its momentum.

    A layer whose momentum always was 0 counts: its commits change its statistics by nothing, and are counted.
    """
    state = layer._accumulation
    return not state.uncounted and (layer.momentum != 0 or state.momentum == 0)


def accumulate(layer: Accumulating, sums: Tensor) -> None:
    """Add a micro-batch's packed moments to the window. Not collective."""
    state = layer._accumulation
    _follow_momentum(layer)
    if torch.compiler.is_compiling():
        state.window.add_(sums)  # alone: a Python counter would recompile every call
        return
    if runs_in_backward():
        return
    if getattr(layer, "_is_replica", False):
        with _replicas:
            state.window.add_(sums.to(state.window.device))
        return
    _bring_home(state, sums.device)
    state.window.add_(sums)
    _count(state)


def accumulate_together(sums: Mapping[Accumulating, Tensor]) -> None:
    """`accumulate` for several layers: for all, or for none where a signal interrupts. Not collective."""
    states = [layer._accumulation for layer in sums]
    for layer, state in zip(sums, states, strict=True):
        _follow_momentum(layer)
        _bring_home(state, sums[layer].device)
    if states:
        add_all([state.window for state in states], list(sums.values()))
    for state in states:
        state.locksteps += 1
        _count(state)


def _follow_momentum(layer: Accumulating) -> None:
    state = layer._accumulation
    if state.momentum != layer.momentum:
        if state.momentum == 0:
            state.window.zero_()  # what came before counts for nothing
        state.momentum = layer.momentum


def _count(state: Accumulation) -> None:
    state.micro_batches += 1
    if state.micro_batches == _FORGOTTEN_AFTER:
        _warn_of_forgotten_commits()


_replicas = threading.Lock()
"""DataParallel's replicas share one window, and run in threads."""


def _bring_home(state: Accumulation, device: torch.device) -> None:
    """Keep the window on the device of the data, whatever moved that."""
    window = state.window
    if window.device == device and not window.is_inference():
        return
    # A meta tensor never held a sum.
    state.window = torch.zeros_like(window, device=device) if window.is_meta else window.detach().clone().to(device)


def _warn_of_forgotten_commits() -> None:
    # No layer in the text: Python then says it once for all.
    warnings.warn(
        f"{_FORGOTTEN_AFTER} micro-batches were accumulated and never committed, so running statistics stay as "
        "they were: call syncaccum.commit(model) after each optimizer step, or "
        "syncaccum.commit_on_step(model, optimizer) once",
        stacklevel=2,
    )


def commit_momentum(layer: Accumulating) -> float | None:
    """The momentum to fold the open window with: that of the forwards that counted."""
    momentum = layer.momentum
    return layer._accumulation.momentum if momentum == 0 else momentum


def check_settings(normalization: str, r_max: float = 1.5, d_max: float = 0.5, prior_count: float = 1.0) -> None:
    """Raise ValueError for a setting out of range. Written so that NaN fails."""
    if normalization not in POLICIES:
        raise ValueError(f"normalization must be one of {', '.join(map(repr, POLICIES))}, got {normalization!r}")
    if not r_max >= 1:
        raise ValueError(f"r_max must be at least 1, got {r_max}")
    if not d_max >= 0:
        raise ValueError(f"d_max must be at least 0, got {d_max}")
    if not 0 <= prior_count < math.inf:
        raise ValueError(f"prior_count must be finite and at least 0, got {prior_count}")


def check_momentum(momentum: float | None) -> None:
    """Raise ValueError for a momentum that nn.BatchNorm would take and that no average has."""
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], or None for the cumulative average, got {momentum}")
