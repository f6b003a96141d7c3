"""A forward in plain differentiable operations: for compilers, transforms, and gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn, cast

import torch
from torch import Tensor

from syncaccum.layer.memory_order import per_channel
from syncaccum.layer.policies import Normalizer, Policy
from syncaccum.moments import pack_statistics


def compose(x: Tensor, weight: Tensor | None, bias: Tensor | None, policy: Policy) -> tuple[Tensor, Tensor]:
    """What `passes.normalize` returns."""
    n = x.numel() // x.shape[1]
    shifted, origin, mean, variance = measure_composed(x)
    norm = policy.normalizer(n, mean, variance)
    slope = norm.slope(weight)
    constant = intercept(norm.center - origin, slope, norm.shift(weight, bias))
    y = shifted * per_channel(slope.to(shifted.dtype), x) + per_channel(constant.to(shifted.dtype), x)
    return y.to(x.dtype), pack_statistics(n, mean.detach(), variance.detach())


def measure_composed(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x less an origin, the origin, and the mean and variance of x."""
    dims = [d for d in range(x.dim()) if d != 1]
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    origin = values.detach().mean(dims)
    shifted = values - per_channel(origin, x)
    # Again, because the first mean was rounded.
    mean_of_shifted = shifted.mean(dims)
    centered = shifted - per_channel(mean_of_shifted, x)
    variance = centered.square().mean(dims).to(torch.float64)
    origin = origin.to(torch.float64)
    return shifted, origin, origin + mean_of_shifted, variance


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
    # What needs a gradient is there.
    inputs = [cast(Tensor, tensor) for tensor, wanted in zip((x, weight, bias), needed, strict=True) if wanted]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    return [next(found) if wanted else None for wanted in needed]


def balanced_gradients(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Normalizer,
    take_back: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]],
    dy: Tensor,
) -> list[Tensor | None]:
    """Those of policy "window", differentiable in dy, x and weight. Statistics, A and B are constants."""
    dims = [d for d in range(x.dim()) if d != 1]
    dy_wide = dy.to(norm.center.dtype)
    x_hat = (x.to(norm.center.dtype) - per_channel(norm.center, x)) * per_channel(norm.scale, x)
    dbias, dweight = dy_wide.sum(dims), (dy_wide * x_hat).sum(dims)
    a, b = (per_channel(s.to(x_hat.dtype), x) for s in take_back((dbias.detach(), dweight.detach())))
    dx = (dy_wide - a - x_hat * b) * per_channel(norm.slope(weight), x)
    of_weight = None if weight is None else dweight.to(weight.dtype)
    of_bias = None if bias is None else dbias.to(bias.dtype)
    return [dx.to(x.dtype), of_weight, of_bias]


def refuse_create_graph() -> NoReturn:
    """In the backward of a lockstep."""
    raise RuntimeError("lockstep does not support create_graph=True: take gradients of gradients without it")
