"""Micro-batches on a GPU: the kernels of nn.SyncBatchNorm, called as they must be.

They walk rows and columns, take float16 and bfloat16 data as it is, and no empty tensor. Vectors are float32 then, and
float64 for float64 data. The results are as accurate as nn.BatchNorm's on a GPU. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncaccum.layer.memory_order import as_passes, per_channel
from syncaccum.layer.node import Gradients, Needs, normalize_by
from syncaccum.layer.policies import Normalizer, ReduceSums

Pay = Callable[[Tensor, Tensor, Tensor], "tuple[Tensor, Tensor] | None"]
"""From sums of dy and of dy (x - center), and the scale, to those that the gradient takes; None where it cannot."""


class Vectors(NamedTuple):
    """What the kernels are given: a normalizer together with a weight and a bias."""

    norm: Normalizer
    slope: Tensor
    shift: Tensor | None
    gamma: Tensor | None
    """Weight times gain; None stands for 1."""
    divisor: Tensor | None = None
    """What the last kernel divides by, an int32 number; None if nobody has made it yet."""
    pay: Pay | None = None
    """What to do with the sums in the backward, in place of ``reduce_sums``, where one launch does it."""


def make_vectors(norm: Normalizer, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Vectors:
    """In the dtype that the kernels take for x."""
    norm = norm.to_dtype(torch.promote_types(x.dtype, torch.float32))
    dtype = norm.center.dtype
    weight = None if weight is None else weight.to(dtype)
    gamma = weight if norm.gain is None else norm.gain if weight is None else norm.gain * weight
    shift = norm.shift(weight, bias)
    slope = norm.scale if gamma is None else norm.scale * gamma
    return Vectors(norm, slope, None if shift is None else shift.to(dtype), gamma)


def normalize(
    xs: Sequence[Tensor],
    vectors: Vectors,
    weight: Tensor | None,
    bias: Tensor | None,
    reduce_sums: ReduceSums | None,
    policy: Any,
) -> tuple[Tensor, ...]:
    """The outputs of dense micro-batches that share their statistics; the rest as in `node`."""
    return normalize_by(_Kernels(vectors), xs, weight, bias, reduce_sums, policy)


class _Kernels:
    def __init__(self, vectors: Vectors) -> None:
        self._vectors, self.norm = vectors, vectors.norm

    def outputs(self, xs: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(apply(x, self._vectors) for x in xs)

    def gradients(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        weight: Tensor | None,
        bias: Tensor | None,
        needs: Needs,
        reduce_sums: ReduceSums | None,
    ) -> Gradients:
        norm = self.norm
        local = _add_up([_sum_up(dy, x, weight, norm) for dy, x in pairs if x.numel() > 0], norm)
        # From this process's sums: DDP adds up the others'.
        dweight = _gradient_of_weight(local, norm) if needs.weight else None
        sums = _balance(local, self._vectors, reduce_sums)
        return _apply_gradient(pairs, needs.xs, self._vectors, sums), dweight, local.dy


def apply(x: Tensor, vectors: Vectors) -> Tensor:
    """The output of a dense micro-batch, without a graph."""
    y = torch.empty_like(x)
    if x.numel() > 0:
        center = vectors.norm.center
        # Into y: a view of the result could not be changed in place by an activation.
        torch.batch_norm_elemt(as_passes(x), None, vectors.shift, center, vectors.slope, 0.0, out=as_passes(y))
    return y


class _Sums(NamedTuple):
    """Over values: of dy, of dy (x - center), and where a kernel gave it, of dy x_hat."""

    dy: Tensor
    dy_xmu: Tensor
    dy_xhat: Tensor | None

    def with_xhat(self, norm: Normalizer) -> Tensor:
        return self.dy_xmu * norm.scale if self.dy_xhat is None else self.dy_xhat


def _sum_up(dy: Tensor, x: Tensor, weight: Tensor | None, norm: Normalizer) -> _Sums:
    # The kernel takes the dtype of its last two results from the weight.
    fitting = None if weight is None or weight.dtype != norm.scale.dtype else weight.contiguous()
    dy_sum, dy_xmu, dy_xhat, _ = torch.batch_norm_backward_reduce(
        as_passes(dy, x), as_passes(x), norm.center, norm.scale, fitting, True, fitting is not None, False
    )
    return _Sums(dy_sum, dy_xmu, None if fitting is None else dy_xhat)


def _add_up(each: Sequence[_Sums], norm: Normalizer) -> _Sums:
    if len(each) == 1:
        return each[0]
    if not each:
        zeros = torch.zeros_like(norm.center)
        return _Sums(zeros, zeros, zeros)
    vectors = [[vector for vector in sums if vector is not None] for sums in each]
    flat = torch.stack([vector for part in vectors for vector in part])
    summed = flat.view(len(each), -1, flat.shape[1]).sum(0)
    dy, dy_xmu, *dy_xhat = summed.unbind()
    return _Sums(dy, dy_xmu, dy_xhat[0] if dy_xhat else None)


def _gradient_of_weight(sums: _Sums, norm: Normalizer) -> Tensor:
    dweight = sums.with_xhat(norm)
    if norm.gain is not None:
        dweight = dweight * norm.gain
    return dweight if norm.offset is None else torch.addcmul(dweight, sums.dy, norm.offset)


def _balance(local: _Sums, vectors: Vectors, reduce_sums: ReduceSums | None) -> tuple[Tensor, Tensor]:
    """The sums of dy and dy (x - center) that the gradient takes."""
    norm = vectors.norm
    if vectors.pay is not None and (paid := vectors.pay(local.dy, local.dy_xmu, norm.scale)) is not None:
        return paid
    if reduce_sums is None:
        return local.dy, local.dy_xmu
    dy, dy_xhat = reduce_sums((local.dy, local.with_xhat(norm)))
    return dy.to(norm.scale.dtype), (dy_xhat / norm.scale).to(norm.scale.dtype)


def _apply_gradient(
    pairs: Sequence[tuple[Tensor, Tensor]], needs_x: Sequence[bool], vectors: Vectors, sums: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    r"""The kernel gives :math:`\gamma s (dy - (S_1 + (x - c) s^2 S_2) / n)`; our feedback stands for its 1/n."""
    norm, feedback = vectors.norm, vectors.norm.feedback
    if not any(needs_x):
        return [None] * len(pairs)
    if feedback is None:
        return [
            # Into a new tensor: the product of 16 and 32 bits would have 32.
            torch.mul(dy, per_channel(vectors.slope, x), out=torch.empty_like(x)) if wanted else None
            for (dy, x), wanted in zip(pairs, needs_x, strict=True)
        ]
    n, rest = split_feedback(feedback)
    if rest is not None:
        sums = sums[0] * rest, sums[1] * rest
    count = vectors.divisor
    if count is None:
        count = torch.full((1,), n, dtype=torch.int32, device=norm.center.device)
    given = (norm.center, norm.scale, vectors.gamma, *sums, count)
    return [
        (_apply_gradient_to(dy, x, *given) if x.numel() > 0 else torch.empty_like(x)) if wanted else None
        for (dy, x), wanted in zip(pairs, needs_x, strict=True)
    ]


def _apply_gradient_to(dy: Tensor, x: Tensor, *given: Any) -> Tensor:
    return torch.batch_norm_backward_elemt(as_passes(dy, x), as_passes(x), *given).as_strided(x.shape, x.stride())


def sum_up_apart(dy: Tensor, x: Tensor, vectors: Vectors) -> Tensor:
    """Of one micro-batch, the sums of dy and of dy (x - center) as two rows."""
    if x.numel() == 0:
        return torch.zeros_like(vectors.norm.center).expand(2, -1)
    sums = _sum_up(dy, x, None, vectors.norm)
    return torch.stack((sums.dy, sums.dy_xmu))


def apply_gradient_apart(dy: Tensor, x: Tensor, vectors: Vectors, sums: Tensor) -> Tensor:
    """The gradient of one micro-batch, from everyone's sums as two rows."""
    first, second = sums
    (dx,) = _apply_gradient([(dy, x)], [True], vectors, (first, second))
    assert dx is not None  # it is wanted
    return dx


def split_feedback(feedback: Tensor | float) -> tuple[int, Tensor | float | None]:
    """n and a factor, which together are factor/n; None for 1, which is the usual case."""
    if isinstance(feedback, Tensor):
        return 1, feedback
    n = max(1, round(1 / feedback))
    # 1e-12: 1/n is rounded to 1e-16.
    return n, None if math.isclose(feedback * n, 1, rel_tol=1e-12) else feedback * n
