"""The state of a layer that accumulates: its open window, its settings, and what a commit asks of it.

All of it is in one private attribute, and its functions are no methods. So a subclass may use any other name.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from syncaccum.layer.settings import check_settings
from syncaccum.moments import Moments
from syncaccum.ranks.groups import Group, GroupHandle
from syncaccum.torch_private import (
    BatchNormBase,
    buffers_of,
    is_in_vmap,
    is_transformed,
    outside_transforms,
    runs_in_backward,
    take_out_of_transforms,
)

# So many micro-batches without a commit: surely forgotten.
# Windows of some hundred are in use.
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
    """The layer's at the last forward that counted. A commit uses it for the window, even if the layer's changed."""
    always_counts: bool
    """Whether the layer had momentum 0 from the start. Else a forward under momentum 0 counts nothing."""
    is_open: bool = False
    """Whether any forward counted since the last commit."""
    is_committed: bool = False
    """Whether there was a commit since the statistics were reset. One without any values is enough."""
    has_normalised: bool = False
    """Whether any training forward used the running statistics as they are now: see `note_forward`."""
    micro_batches: int = 0
    """How many are in the open window; those of compiled forwards aside, which run no Python."""
    uncounted: int = 0
    """How many ``not_counted`` are open."""
    name: str = ""
    """In the model that was converted; for messages."""
    normalises_itself: bool = False
    """Whether its forward calls no batch_norm, so that nothing is accumulated. Its first training forward tells."""
    said: set[str] = field(default_factory=set)
    """Warnings that were given. The layers of one conversion share it: one of them speaks for all."""

    def __post_init__(self) -> None:
        check_settings(self.normalization, self.r_max, self.d_max, self.prior_count)

    def drop(self) -> None:
        """Forget the open window."""
        self.window.zero_()
        self.close()

    def close(self) -> None:
        """The window is empty: a new one starts."""
        self.micro_batches = 0
        self.is_open = False

    def replace_statistics(self, *, is_committed: bool) -> None:
        """Start anew, because the running statistics came from elsewhere. The window belonged to those before."""
        self.drop()
        self.is_committed = is_committed
        self.has_normalised = False


TRACED_AS = "torch.nn.modules.batchnorm"
"""The module that a layer says it is from. torch.fx does not trace into layers of torch, and must not into ours."""


class Accumulating(BatchNormBase):
    """A BatchNorm with a window. What it does with data is in `batchnorm`."""

    _accumulation: Accumulation

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if "_accumulation" in self.__dict__:  # not yet in nn.BatchNorm's constructor
            self._accumulation.replace_statistics(is_committed=False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # A state without running_mean replaces weights only.
        if prefix + "running_mean" in state_dict:
            self._accumulation.replace_statistics(is_committed=True)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # What is made under inference_mode refuses to change later.
        with torch.inference_mode(False):
            self._accumulation.window = _follow(self._accumulation.window, fn)
        return self


def _follow(window: Tensor, fn: Any) -> Tensor:
    """The window on the device that ``fn`` moves tensors to, every bit as it was; empty where the sums are lost."""
    # As integers, which .half() and .to(dtype) leave alone.
    bits = window.view(torch.int64)
    moved = fn(bits)
    # to_empty() gives memory with anything in it.
    emptied = moved.dtype == torch.int64 and not moved.is_meta and not bits.is_meta and not _equal(moved, bits)
    if moved.is_meta or bits.is_meta or emptied:
        # A meta tensor has no values to move, either.
        return torch.zeros_like(window, device=moved.device)
    # Of the answer only the device is taken.
    return window.to(moved.device)


def _equal(first: Tensor, second: Tensor) -> bool:
    # Most often nothing moved: no copy from a GPU then.
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
    said: set[str] | None = None,
) -> None:
    """Give a BatchNorm layer the state that `Accumulating` expects. `release` takes it away again."""
    layer._accumulation = Accumulation(
        GroupHandle(process_group),
        normalization,
        r_max,
        d_max,
        prior_count,
        window=_make_window(layer),
        momentum=layer.momentum,
        always_counts=layer.momentum == 0,
        name=name,
        said=set() if said is None else said,
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
    # Assigned, never read: reading would make compiled code depend on it.
    state.momentum = layer.momentum
    state.is_open = True
    if torch.compiler.is_compiling():
        add_unless_in_backward(state.window, sums)
        return
    # A checkpoint's second forward: its data was counted in the first.
    if runs_in_backward():
        return
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
    state.micro_batches += 1
    if state.micro_batches == _FORGOTTEN_AFTER:
        _warn_of_forgotten_commits(layer)


_replicas = threading.Lock()
"""DataParallel's replicas share one window, and run in threads."""


def _add(state: Accumulation, sums: Tensor) -> None:
    # Some tools move a layer without _apply: follow the data.
    # An inference tensor refuses to be added to.
    if state.window.device != sums.device or state.window.is_inference():
        state.window = _bring_home(state.window, sums.device)
    state.window.add_(sums)


def _bring_home(window: Tensor, device: torch.device) -> Tensor:
    """The window on the device of the data, as an ordinary tensor."""
    if window.is_meta:  # which never held a sum
        return torch.zeros_like(window, device=device)
    return window.detach().clone().to(device)


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


def note_forward(layer: Accumulating) -> None:
    """Note that a training forward uses the running statistics as they are now. Not called in compiled forwards.

    Raises:
        RuntimeError: it is a checkpoint's second forward, and the first one used other statistics: wrong gradients.
    """
    state = layer._accumulation
    if not runs_in_backward():
        state.has_normalised = True
    # Policy "batch" looks at no running statistics.
    elif not state.has_normalised and state.normalization != "batch":
        raise RuntimeError(
            f"torch.utils.checkpoint runs the forward of layer {state.name or type(layer).__name__} again, but its "
            "running statistics were committed or loaded since the first time, so the gradient would be of something "
            'else: call backward() before commit, or use normalization="batch"'
        )


def warn_if_uncommitted(layer: Accumulating) -> None:
    """Say in an eval forward that its statistics lack what training forwards have seen."""
    state = layer._accumulation
    # After a first commit, eval between two commits is ordinary.
    if state.is_open and not state.is_committed:
        _warn_once(
            layer,
            "uncommitted",
            f"was fed {state.micro_batches} micro-batches in training mode, none of them committed, and is now used in "
            "eval mode: its running statistics do not know them. Call syncaccum.commit(model) first; to refresh "
            "statistics without training, as torch.optim.swa_utils.update_bn does, "
            "syncaccum.recalibrate(model, batches)",
        )


def _warn_of_forgotten_commits(layer: Accumulating) -> None:
    _warn_once(
        layer,
        "forgotten",
        f"was fed {_FORGOTTEN_AFTER} micro-batches that were never committed, so its running statistics stay as they "
        "were: call syncaccum.commit(model) after each optimizer step, or "
        "syncaccum.commit_on_step(model, optimizer) once",
    )


def _warn_once(layer: Accumulating, kind: str, what: str) -> None:
    state = layer._accumulation
    if kind not in state.said:
        state.said.add(kind)
        warnings.warn(f"layer {state.name or type(layer).__name__} {what} (the first such layer)", stacklevel=2)


def commit_momentum(layer: Accumulating) -> float | None:
    """The momentum for the open window: the last counted forward's; of an empty window, the layer's own.

    Ranks compare it before a commit. So a rank with an empty window must say what the others say.
    """
    # A pause is momentum 0 for forwards that do not count.
    # It may be on now, and is no factor of a commit.
    state, momentum = layer._accumulation, layer.momentum
    paused = momentum == 0 and not state.always_counts
    return state.momentum if state.is_open or paused else momentum
