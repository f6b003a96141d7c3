"""A forward in plain differentiable operations: for compilers, transforms, and gradients of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from syncaccum.layer.memory_order import per_channel
from syncaccum.layer.policies import Policy
from syncaccum.moments import pack_statistics


def compose(x: Tensor, weight: Tensor | None, bias: Tensor | None, policy: Policy) -> tuple[Tensor, Tensor]:
    """What `passes.normalize` returns."""
    n = x.numel() // x.shape[1]
    dims = [d for d in range(x.dim()) if d != 1]
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    origin = values.detach().mean(dims)
    shifted = values - per_channel(origin, x)
    # Again, because the first mean was rounded.
    mean_of_shifted = shifted.mean(dims)
    centered = shifted - per_channel(mean_of_shifted, x)
    variance = centered.square().mean(dims).to(torch.float64)
    origin = origin.to(torch.float64)
    mean = origin + mean_of_shifted
    norm = policy.normalizer(n, mean, variance)
    slope = norm.slope(weight)
    constant = intercept(norm.center - origin, slope, norm.shift(weight, bias))
    y = shifted * per_channel(slope.to(shifted.dtype), x) + per_channel(constant.to(shifted.dtype), x)
    return y.to(x.dtype), pack_statistics(n, mean.detach(), variance.detach())


def intercept(center: Tensor, slope: Tensor, shift: Tensor | None) -> Tensor:
    """b of a x + b = (x - center) a + shift."""
    return -center * slope if shift is None else torch.addcmul(shift, center, slope, value=-1)


def differentiable_gradients(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    policy: Policy,
    needed: Sequence[bool],
    dy: Tensor,
) -> list[Tensor | None]:
    """The gradients of x, weight and bias that are needed, such that they can be differentiated again."""
    y, _ = compose(x, weight, bias, policy)
    inputs = [tensor for tensor, wanted in zip((x, weight, bias), needed, strict=True) if wanted]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    return [next(found) if wanted else None for wanted in needed]
