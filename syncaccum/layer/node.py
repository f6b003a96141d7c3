"""The node in autograd's graph of micro-batches that share their statistics, whichever passes run over their data.

An ordinary forward has one micro-batch, a lockstep several. On a CPU most single ones go another way: see `compiled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from syncaccum.layer.compose import balanced_gradients, differentiable_gradients, refuse_create_graph
from syncaccum.layer.memory_order import match_order
from syncaccum.layer.policies import Normalizer, Policy, ReduceSums


class Needs(NamedTuple):
    """Which gradients are asked for."""

    xs: Sequence[bool]
    weight: bool
    bias: bool


Gradients = tuple[Sequence[Tensor | None], Tensor | None, Tensor | None]
"""Of the micro-batches, the weight and the bias; in the backward's own precision."""


class Passes(Protocol):
    """The passes over dense data of one kind of device, for one forward and its backward."""

    @property
    def norm(self) -> Normalizer:
        """What they apply."""

    def outputs(self, xs: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        """Called once."""

    def gradients(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        weight: Tensor | None,
        bias: Tensor | None,
        needs: Needs,
        reduce_sums: ReduceSums | None,
    ) -> Gradients:
        """From pairs of dy and x in one memory order."""


def normalize_by(
    passes: Passes,
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    reduce_sums: ReduceSums | None,
    policy: Policy | None,
) -> tuple[Tensor, ...]:
    """The outputs.

    Args:
        reduce_sums: from this process's sums to those that the gradients of the micro-batches take.
        policy: for gradients of gradients; None where there are none.
    """
    outputs = _Normalize.apply(passes, weight, bias, reduce_sums, policy, *xs)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, ...], outputs)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, passes, weight, bias, reduce_sums, policy, *xs):  # type: ignore[no-untyped-def]
        # x is mostly held anyway; x_hat would be one more.
        ctx.save_for_backward(weight, bias, *xs)
        ctx.passes, ctx.reduce_sums, ctx.policy = passes, reduce_sums, policy
        return passes.outputs(xs, weight, bias)

    @staticmethod
    def backward(ctx, *dys):  # type: ignore[no-untyped-def]
        weight, bias, *xs = ctx.saved_tensors
        _, needs_weight, needs_bias, _, _, *needs_x = ctx.needs_input_grad
        needs = Needs(needs_x, needs_weight, needs_bias)
        # create_graph=True: the gradient itself needs a graph.
        if torch.is_grad_enabled():
            dxs, dweight, dbias = _differentiable(ctx, xs, weight, bias, needs, dys)  # type: ignore[no-untyped-call]
        else:
            pairs = [(match_order(dy, x), x) for dy, x in zip(dys, xs, strict=True)]
            dxs, dweight, dbias = ctx.passes.gradients(pairs, weight, bias, needs, ctx.reduce_sums)
        dweight = dweight.to(weight.dtype) if needs_weight and dweight is not None else None
        dbias = dbias.to(bias.dtype) if needs_bias and dbias is not None else None
        return None, dweight, dbias, None, None, *dxs


def _differentiable(ctx, xs, weight, bias, needs, dys):  # type: ignore[no-untyped-def]
    """Gradients that can be differentiated again (``create_graph=True``)."""
    if ctx.policy is None:
        refuse_create_graph()
    (x,), (dy,) = xs, dys
    if ctx.reduce_sums is not None:
        dx, *others = balanced_gradients(x, weight, bias, ctx.passes.norm, ctx.reduce_sums, dy)
    else:
        needed = (*needs.xs, needs.weight, needs.bias)
        dx, *others = differentiable_gradients(x, weight, bias, ctx.policy, needed, dy)
    return [dx], *others
