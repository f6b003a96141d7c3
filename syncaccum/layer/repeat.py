"""A checkpoint's second forward must see the running statistics of the first: else its gradient is of something else.

The first forward leaves a few sums of its data, and the second finds by them which statistics it used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncaccum.layer.notices import leave_record, refuse_other_statistics
from syncaccum.layer.policies import Normalizer, Policy, hold
from syncaccum.layer.replay import Record
from syncaccum.layer.state import Accumulating, name_of
from syncaccum.moments import pack_statistics
from syncaccum.torch_private import has_no_values, is_transformed, runs_in_backward, saved_tensor_hooks


def watch_repeats(layer: Accumulating, policy: Policy, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Policy:
    """The policy for a forward of this layer; one that watches, where a checkpoint may run it again, or does so now."""
    if layer._accumulation.normalization == "batch":
        return policy
    may_repeat = saved_tensor_hooks() is not None or not torch.is_grad_enabled()
    if not (may_repeat or runs_in_backward()) or is_transformed() or has_no_values(x):
        return policy
    return _Watching(layer, hold(policy), has_node=has_node(x, weight, bias))


def has_node(*inputs: Tensor | None) -> bool:
    """Whether a forward of these leaves a node in a graph, which then holds its policy."""
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs)


class _Watching:
    """A policy, and the record of the forward that it is for."""

    def __init__(self, layer: Accumulating, policy: Policy, *, has_node: bool) -> None:
        self._policy = policy
        self._hold = not has_node
        self._layer: Accumulating | None = layer
        self._record: Record | None = None

    def normalizer(self, count: int, mean: Tensor, variance: Tensor) -> Normalizer:
        # A gradient of the gradient asks again, in a backward.
        layer, self._layer = self._layer, None
        if layer is not None:
            self._watch(layer, pack_statistics(count, mean, variance))
        return self._policy.normalizer(count, mean, variance)

    def _watch(self, layer: Accumulating, own: Tensor) -> None:
        if runs_in_backward():
            refuse_other_statistics(layer._accumulation, name_of(layer), own)
        else:
            self._record = leave_record(layer._accumulation, own, hold=self._hold)
