"""The state of a layer that accumulates: its open window, its settings, and what a commit asks of it.

All of it is in one private attribute, and its functions are no methods. So a subclass may use any other name.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor

from syncaccum.errors import CommitError
from syncaccum.layer.accumulation import Accumulation
from syncaccum.layer.following import follow
from syncaccum.moments import Moments
from syncaccum.ranks.groups import Group, GroupHandle
from syncaccum.torch_private import BatchNormBase, buffers_of

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
            # With assign=True it is another tensor.
            self._accumulation.home = buffers_of(self)["running_mean"]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # What is made under inference_mode refuses to change later.
        with torch.inference_mode(False):
            self._accumulation.window = follow(self._accumulation.window, fn)
            if self._accumulation.ledger is not None:
                self._accumulation.ledger.follow(fn)
        self._accumulation.home = buffers_of(self)["running_mean"]
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
        home=buffers_of(layer)["running_mean"],
        owner=weakref.ref(layer),
        name=name,
        said=set() if said is None else said,
    )


def name_of(layer: Accumulating) -> str:
    """For messages: what conversion called the layer, else what it is."""
    return layer._accumulation.name or type(layer).__name__


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
            f"layer {name_of(layer)} has {layer.num_features} channels now, and an open window of "
            "another width: commit(model) or discard(model) before its channels are pruned or added"
        )
    state.window = Moments.zeros_packed(layer.num_features, state.window.device)
    state.match_ledger()


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


def commit_momentum(layer: Accumulating) -> float | None:
    """The momentum for the open window: the last counted forward's; of an empty window, the layer's own.

    Ranks compare it before a commit. So a rank with an empty window must say what the others say.
    """
    # A pause is momentum 0 for forwards that do not count.
    # It may be on now, and is no factor of a commit.
    state = layer._accumulation
    momentum = layer.momentum if state.call_momentum is None else state.call_momentum
    paused = layer.momentum == 0 and not state.always_counts
    return state.momentum if state.is_open or paused else momentum
