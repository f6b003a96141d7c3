"""The state of a layer that accumulates: its open window, its settings, and what a commit asks of it.

All of it is in one private attribute, and its functions are no methods. So a subclass may use any other name.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any, cast

import torch
from torch import Tensor

from syncaccum.errors import CommitError
from syncaccum.layer.accumulation import Accumulation
from syncaccum.layer.following import bring_home, follow
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
            self._accumulation.window = follow(self._accumulation.window, fn)
        return self


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


def match_width(layer: Accumulating) -> None:
    """Give a layer whose channels were pruned or added since a window of its new width.

    Raises:
        CommitError: the open window is of the old width.
    """
    state = layer._accumulation
    size = Moments.packed_size(layer.num_features)
    if state.window.numel() == size:
        return
    if not state.window.is_meta and state.window[0] != 0:
        raise CommitError(
            f"layer {state.name or type(layer).__name__} has {layer.num_features} channels now, and an open window of "
            "another width: commit(model) or discard(model) before its channels are pruned or added"
        )
    state.window = Moments.zeros_packed(layer.num_features, state.window.device)


def release(layer: Any) -> None:
    """Undo `adopt`."""
    del layer._accumulation


def _make_window(layer: Any) -> Tensor:
    running_mean = buffers_of(layer)["running_mean"]
    return Moments.zeros_packed(layer.num_features, None if running_mean is None else running_mean.device)


def has_statistics(layer: Any) -> bool:
    """Whether the layer has running statistics, so that it takes part in commits."""
    return buffers_of(layer)["running_mean"] is not None


def tracks(layer: Any) -> bool:
    """Whether a forward goes into the running statistics, as nn.BatchNorm asks in each.

    Not asked at a commit: the flag may have been switched off since, and the window holds what counted.
    """
    return bool(layer.track_running_stats) and has_statistics(layer)


def committed_mean(layer: Accumulating) -> Tensor | None:
    """The running mean in float64, equal on every rank; 0 where it is NaN or Inf, None where there is none."""
    if not has_statistics(layer):
        return None
    return cast(Tensor, buffers_of(layer)["running_mean"]).to(torch.float64).nan_to_num(0.0, 0.0, 0.0)


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
    state.micro_batches += 1
    if state.micro_batches == _FORGOTTEN_AFTER:
        _warn_of_forgotten_commits(layer)


_replicas = threading.Lock()
"""DataParallel's replicas share one window, and run in threads."""


def _add(state: Accumulation, sums: Tensor) -> None:
    # Some tools move a layer without _apply: follow the data.
    # An inference tensor refuses to be added to.
    if state.window.device != sums.device or state.window.is_inference():
        state.window = bring_home(state.window, sums.device)
    state.window.add_(sums)


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
        RuntimeError: it is a checkpoint's second one, and the first used others, so its gradient would be wrong; or
            the first did not count, and nothing would.
    """
    state = layer._accumulation
    if not runs_in_backward():
        state.has_normalised = True
    if state.has_normalised:
        return
    name = state.name or type(layer).__name__
    if state.ran_untracked:
        raise RuntimeError(
            f"torch.utils.checkpoint runs the forward of layer {name} again, but the first time it had "
            "track_running_stats=False, so nothing was counted. Some wrappers switch it off (fairscale's "
            "checkpoint_wrapper does): use torch.utils.checkpoint, under which this layer counts once"
        )
    if state.normalization != "batch":
        raise RuntimeError(
            f"torch.utils.checkpoint runs the forward of layer {name} again, but its running statistics were "
            "committed or loaded since the first time, so the gradient would be of something else: call backward() "
            'before commit, or use normalization="batch"'
        )


def note_untracked_forward(layer: Accumulating) -> None:
    """Know that a training forward did not count, though the layer has running statistics."""
    if layer.training and has_statistics(layer) and not tracks(layer) and not runs_in_backward():
        layer._accumulation.ran_untracked = True


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
