"""One micro-batch by the compiled passes, under a policy that they know: one call in each direction."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from syncaccum.layer import native
from syncaccum.layer.compose import differentiable_gradients
from syncaccum.layer.memory_order import match_order
from syncaccum.layer.policies import Batch, Policy, Renorm, Running


def find_recipe(policy: Policy, x: Tensor) -> native.Recipe | None:
    """The policy as the compiled passes know it; None if they do not, and its own arithmetic is to be called."""
    if isinstance(policy, Running):
        return native.Recipe(native.RUNNING, None, policy.eps, policy.committed_mean, policy.committed_variance)
    count = x.numel() // x.shape[1]
    if isinstance(policy, Batch):
        return native.Recipe(native.BATCH, 1 / count, policy.eps)
    if isinstance(policy, Renorm):
        return native.Recipe(native.RENORM, 1 / (count + policy.prior_count), *policy)
    return None


def normalize_compiled(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, policy: Policy, recipe: native.Recipe
) -> tuple[Tensor, Tensor]:
    """What `passes.normalize` returns, for tensors that the compiled passes take."""
    y, found = native.normalize(x, weight, bias, recipe)
    if torch.is_grad_enabled():
        # In a tuple, where autograd takes y for no input.
        y = cast(Tensor, _Normalize.apply((y, found, recipe, policy), weight, bias, x))  # type: ignore[no-untyped-call]
    return y, found[: 1 + 2 * x.shape[1]]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, done, weight, bias, x):  # type: ignore[no-untyped-def]
        # x is mostly held anyway; x_hat would be one more.
        ctx.save_for_backward(weight, bias, x)
        y, ctx.found, ctx.recipe, ctx.policy = done
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        weight, bias, x = ctx.saved_tensors
        _, needs_weight, needs_bias, needs_x = ctx.needs_input_grad
        needed = (needs_x, needs_weight, needs_bias)
        # create_graph=True: the gradient itself needs a graph.
        if torch.is_grad_enabled():
            dx, dweight, dbias = differentiable_gradients(x, weight, bias, ctx.policy, needed, dy)
            return None, dweight, dbias, dx
        dy = match_order(dy, x)
        if native.takes(dy, x, weight, bias):
            dx, dweight, dbias = native.gradients_of(ctx.found, ctx.recipe, dy, x, weight, bias, needed)
        else:
            # Somebody watches this backward, or has a tensor of his own in it.
            with torch.enable_grad():
                gradients = differentiable_gradients(x, weight, bias, ctx.policy, needed, dy)
            dx, dweight, dbias = (None if gradient is None else gradient.detach() for gradient in gradients)
        return None, dweight, dbias, dx
