"""One micro-batch by the compiled passes, under a policy that they know: one call in each direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from syncaccum.layer import native
from syncaccum.layer.balance import Due
from syncaccum.layer.compose import balanced_gradients, differentiable_gradients
from syncaccum.layer.memory_order import match_order
from syncaccum.layer.policies import Batch, Normalizer, Policy, Renorm, Running, Window


class Balance(Protocol):
    """One forward under policy "window", and what its backward takes back."""

    @property
    def window(self) -> Window | None:
        """The policy with all that it needs; None if the micro-batch's moments must be known first."""

    def note(self, own: Tensor, mean: Tensor) -> None:
        """The forward was run with ``window``; packed moments and mean of its micro-batch."""

    def ask(self) -> Due:
        """What a backward is to pay."""

    def book(self, due: Due, sums: Tensor) -> None:
        """A backward with these sums of dy and dy*x_hat has paid what was due."""

    def take_back(self, sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Both at once: from the sums to A and B."""


def find_recipe(policy: Policy, x: Tensor, balance: Balance | None) -> native.Recipe | None:
    """The policy as the compiled passes know it; None if they do not, and its own arithmetic is to be called."""
    if balance is not None:
        # In a backward each walk has a feedback of its own.
        window = balance.window
        return None if window is None else native.Recipe(native.WINDOW, None, window.eps, others=window.others)
    if isinstance(policy, Running):
        return native.Recipe(native.RUNNING, None, policy.eps, policy.committed_mean, policy.committed_variance)
    count = x.numel() // x.shape[1]
    if isinstance(policy, Batch):
        return native.Recipe(native.BATCH, 1 / count, policy.eps)
    if isinstance(policy, Renorm):
        return native.Recipe(native.RENORM, 1 / (count + policy.prior_count), *policy)
    return None


def normalize_compiled(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    policy: Policy,
    recipe: native.Recipe,
    balance: Balance | None,
) -> tuple[Tensor, Tensor]:
    """What `passes.normalize` returns, for tensors that the compiled passes take."""
    y, found = native.normalize(x, weight, bias, recipe)
    channels = x.shape[1]
    own = found[: 1 + 2 * channels]
    if balance is not None:
        balance.note(own, found[1 + 2 * channels : 1 + 3 * channels])
    if torch.is_grad_enabled():
        # In a tuple, where autograd takes y for no input.
        done = (y, found, recipe, policy, balance)
        y = cast(Tensor, _Normalize.apply(done, weight, bias, x))  # type: ignore[no-untyped-call]
    return y, own


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, done, weight, bias, x):  # type: ignore[no-untyped-def]
        # x is mostly held anyway; x_hat would be one more.
        ctx.save_for_backward(weight, bias, x)
        y, ctx.found, ctx.recipe, ctx.policy, ctx.balance = done
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        weight, bias, x = ctx.saved_tensors
        _, needs_weight, needs_bias, needs_x = ctx.needs_input_grad
        needed = (needs_x, needs_weight, needs_bias)
        # create_graph=True: the gradient itself needs a graph.
        if torch.is_grad_enabled():
            dx, dweight, dbias = _differentiable(ctx, x, weight, bias, needed, dy)
            return None, dweight, dbias, dx
        dy = match_order(dy, x)
        if native.takes(dy, x, weight, bias):
            dx, dweight, dbias = _compiled(ctx, x, weight, bias, needed, dy)
        else:
            # Somebody watches this backward, or has a tensor of his own in it.
            with torch.enable_grad():
                gradients = _differentiable(ctx, x, weight, bias, needed, dy)
            dx, dweight, dbias = (None if gradient is None else gradient.detach() for gradient in gradients)
        return None, dweight, dbias, dx


def _differentiable(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, needed: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    if ctx.balance is None:
        return differentiable_gradients(x, weight, bias, ctx.policy, needed, dy)
    center, scale = ctx.found[1:].unflatten(0, (8, -1))[4:6]
    norm = Normalizer(center, scale, None, None, 1.0)
    return balanced_gradients(x, weight, bias, norm, ctx.balance.take_back, dy)


def _compiled(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, needed: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    if ctx.balance is None:
        return native.gradients_of(ctx.found, ctx.recipe, dy, x, weight, bias, needed, ctx.recipe.feedback)[0]
    due = ctx.balance.ask()
    owed = None if due.owed is None else due.owed.to(x.device)
    feedback = 1 / float(due.payers)
    gradients, sums = native.gradients_of(ctx.found, ctx.recipe, dy, x, weight, bias, needed, feedback, owed)
    ctx.balance.book(due, sums)
    return gradients
