"""The four passes over data; `node` has the autograd function that uses them.

Whatever the policy, every forward is ``y = a x + b`` per channel and every backward is ``dx = A dy + B x + C``
with the sums of dy and dy*x_hat: moments of x, affine of x, moments of dy, affine of dy and x. Policies differ in
C-sized arithmetic only (`policies`).

The first pass is in `measure`; the two memory orders in which data is seen are in `memory_order`. On a CPU the passes
are compiled ones (`native`), or else torch's own. On a GPU they are the kernels of nn.SyncBatchNorm (`gpu`), and on any
other device plain operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from syncaccum.layer import fused, gpu, native
from syncaccum.layer.compiled import Balance, find_recipe, normalize_compiled
from syncaccum.layer.compose import compose, intercept
from syncaccum.layer.measure import Measured, measure
from syncaccum.layer.memory_order import (
    as_passes,
    is_on_cpu,
    is_on_cuda,
    is_rows,
    make_dense,
    per_channel,
)
from syncaccum.layer.node import Gradients, Needs, normalize_by
from syncaccum.layer.policies import Normalizer, Policy, ReduceSums, hold
from syncaccum.torch_private import has_no_values, is_transformed


def apply_normalizer(
    x: Tensor, measured: Measured, weight: Tensor | None, bias: Tensor | None, norm: Normalizer, narrow: Normalizer
) -> Tensor:
    """Second pass: the output, in x's dtype and memory order. ``narrow`` is ``norm`` in the precision of the values."""
    narrow = _shift_center(measured, norm, narrow)
    values = measured.values.to(narrow.center.dtype)
    return _apply_affine(values, narrow.center, narrow.slope(weight), narrow.shift(weight, bias)).to(x.dtype)


def _shift_center(measured: Measured, norm: Normalizer, narrow: Normalizer) -> Normalizer:
    """``narrow``, for values that lack the origin: the center lacks it, too.

    Center and origin may be large and nearly equal, so their difference is taken in float64.
    """
    if measured.origin is None:
        return narrow
    return narrow._replace(center=(norm.center - measured.origin).to(measured.values.dtype))


def _apply_affine(x: Tensor, center: Tensor, slope: Tensor, shift: Tensor | None) -> Tensor:
    """A new tensor, (x - center) slope + shift, per channel."""
    if x.numel() == 0:
        return torch.empty_like(x)
    shift = None if shift is None else shift.to(x.dtype)
    slope = slope.to(x.dtype)
    if is_rows(x) and is_on_cpu(x):
        # nn.BatchNorm's eval forward: the one kernel that walks rows once.
        # addcmul takes six times as long, but in columns less.
        return torch.native_batch_norm(x, slope, shift, center, torch.ones_like(center), False, 0.0, 0.0)[0]
    return torch.addcmul(per_channel(intercept(center, slope, shift), x), x, per_channel(slope, x))


def gradients_of_own_statistics(
    dy: Tensor, x: Tensor, weight: Tensor | None, norm: Normalizer, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Third and fourth pass in one, for dense dy and x in the same order; gradients of x, weight and bias.

    Where the statistics are this micro-batch's alone, torch has a kernel for both.
    """
    norm = _narrow(norm, x)
    weight = None if weight is None else weight.to(norm.center.dtype)
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        as_passes(dy, x), as_passes(x), weight, None, None, norm.center, norm.scale, True, 0.0, needed
    )
    if dx is not None:
        dx = dx.as_strided(x.shape, x.stride())
    return dx, dweight, dbias


def _narrow(norm: Normalizer, x: Tensor) -> Normalizer:
    """The normalizer in the precision of torch's passes; itself, mostly."""
    return norm.to_dtype(torch.promote_types(x.dtype, torch.float32))


def gradient_sums(dy: Tensor, x: Tensor, norm: Normalizer) -> tuple[Tensor, Tensor]:
    r"""Third pass: :math:`\sum dy` and :math:`\sum dy\,\hat x` of dense dy and x in the same order."""
    if native.takes(dy, x):
        return native.gradient_sums(dy, x, norm)
    norm = _narrow(norm, x)
    if x.numel() == 0:
        zeros = torch.zeros_like(norm.center)
        return zeros, zeros
    if not is_on_cpu(x):
        dy, dims = dy.to(norm.center.dtype), [d for d in range(x.dim()) if d != 1]
        return dy.sum(dims), (dy * (x - per_channel(norm.center, x))).sum(dims) * norm.scale
    dy, x = as_passes(dy, x), as_passes(x)
    # nn.BatchNorm's reduction: it subtracts before it multiplies.
    _, sum_dy_xhat, sum_dy = torch.ops.aten.native_batch_norm_backward(
        dy, x, None, None, None, norm.center, norm.scale, True, 0.0, [False, True, True]
    )
    return sum_dy, sum_dy_xhat


def apply_gradient(
    dy: Tensor, x: Tensor, weight: Tensor | None, norm: Normalizer, sums: tuple[Tensor, Tensor]
) -> Tensor:
    """Fourth pass: the gradient of x, in x's dtype and memory order."""
    if native.takes(dy, x, weight):
        return native.apply_gradient(dy, x, weight, norm, sums)
    norm = _narrow(norm, x)
    wide = norm.center.dtype
    slope = norm.slope(weight)
    a = per_channel(slope.to(wide), x)
    if norm.feedback is None:
        return (dy * a).to(x.dtype)
    sum_dy, sum_dy_xhat = sums
    # Normalizer's dx, sorted by dy, x - c and a constant.
    pull = slope * -norm.feedback
    b = pull * norm.scale * sum_dy_xhat
    return _apply_affine(x.to(wide), norm.center, b, pull * sum_dy).addcmul_(dy, a).to(x.dtype)


def parameter_gradients(norm: Normalizer, sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias, from the two sums."""
    sum_dy, dweight = sums
    if norm.gain is not None:
        dweight = dweight * norm.gain
    if norm.offset is not None:
        dweight = dweight + sum_dy * norm.offset
    return dweight, sum_dy


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, policy: Policy, balance: Balance | None = None
) -> tuple[Tensor, Tensor]:
    """Normalise a micro-batch under a policy; also its packed moments, detached.

    Args:
        x: shape ``(N, C, *)``; float64, float32, bfloat16 or float16. The result has its shape, dtype and
            memory order.
        weight, bias: shape ``(C,)`` or None.
        policy: turns the micro-batch's moments into what to apply.
        balance: says what the gradient takes back, instead of the micro-batch's own sums. It is the policy itself.
    """
    x = make_dense(x)
    is_plain = not (torch.compiler.is_compiling() or is_transformed() or has_no_values(x))
    if (
        is_plain
        and balance is None
        and is_on_cuda(x)
        and (done := fused.normalize(x, weight, bias, policy)) is not None
    ):
        return done
    policy = hold(policy)
    if not is_plain:
        # Compilers fuse plain operations better than our passes.
        # Transforms of torch.func differentiate them in their own ways.
        return compose(x, weight, bias, policy)
    if native.takes(x, weight, bias) and (recipe := find_recipe(policy, x, balance)) is not None:
        return normalize_compiled(x, weight, bias, policy, recipe, balance)
    with torch.no_grad():
        measured = measure(x).widen()
        norm = policy.normalizer(measured.n, measured.mean, measured.variance)
        sums = measured.sums()
    reduce_sums = None if balance is None else balance.take_back
    (y,) = _apply_normalize(norm, [measured], weight, bias, reduce_sums, policy, x)
    return y, sums


def normalize_together(
    xs: Sequence[Tensor],
    measured: Sequence[Measured],
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Normalizer,
    reduce_sums: ReduceSums | None,
    vectors: gpu.Vectors | None = None,
) -> tuple[Tensor, ...]:
    """Normalise several dense micro-batches with statistics that all of them took part in.

    Args:
        norm: from the moments of everyone's micro-batches; its feedback counts all their values.
        reduce_sums: from this process's two sums of the backward to everyone's, collective where the moments were;
            None where there is nobody else.
        vectors: the normalizer, weight and bias as a GPU's kernels take them, where somebody has made them.
    """
    if vectors is not None:
        return gpu.normalize(xs, vectors, weight, bias, reduce_sums, None)
    return _apply_normalize(norm, measured, weight, bias, reduce_sums, None, *xs)


def apply_known(
    x: Tensor,
    measured: Measured,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Normalizer,
    vectors: gpu.Vectors | None = None,
) -> Tensor:
    """The output of one dense micro-batch with known statistics, and no graph; see `normalize_together`."""
    if is_on_cuda(x):
        return gpu.apply(x, vectors or gpu.make_vectors(norm, x, weight, bias))
    if native.takes(x, weight, bias):
        return native.apply(x, norm, weight, bias)
    return apply_normalizer(x, measured, weight, bias, norm, _narrow(norm, x))


def _apply_normalize(
    norm: Normalizer,
    measured: Sequence[Measured],
    weight: Tensor | None,
    bias: Tensor | None,
    reduce_sums: ReduceSums | None,
    policy: Policy | None,
    *xs: Tensor,
) -> tuple[Tensor, ...]:
    if is_on_cuda(xs[0]):
        with torch.no_grad():
            vectors = gpu.make_vectors(norm, xs[0], weight, bias)
        return gpu.normalize(xs, vectors, weight, bias, reduce_sums, policy)
    return normalize_by(_Passes(norm, measured), xs, weight, bias, reduce_sums, policy)


class _Passes:
    """Compiled ones, or torch's own."""

    def __init__(self, norm: Normalizer, measured: Sequence[Measured]) -> None:
        self.norm, self._measured = norm, measured

    def outputs(self, xs: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        # The graph is not to hold them.
        norm, measured, self._measured = self.norm, self._measured, ()
        if all(native.takes(x, weight, bias) for x in xs):
            # In float64, also for the backward.
            return tuple(native.apply(x, norm, weight, bias) for x in xs)
        # Not shifted: the backward reads x, not the measured values.
        self.norm = _narrow(norm, xs[0])
        pairs = zip(xs, measured, strict=True)
        return tuple(apply_normalizer(x, m, weight, bias, norm, self.norm) for x, m in pairs)

    def gradients(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        weight: Tensor | None,
        bias: Tensor | None,
        needs: Needs,
        reduce_sums: ReduceSums | None,
    ) -> Gradients:
        if len(pairs) == 1 and reduce_sums is None:
            needed = [needs.xs[0], needs.weight, needs.bias]
            if native.takes(*pairs[0], weight, bias):
                dx, dweight, dbias = native.gradients(*pairs[0], weight, bias, self.norm, needed)
                return [dx], dweight, dbias
            if self.norm.is_plain and is_on_cpu(pairs[0][1]):
                dx, dweight, dbias = gradients_of_own_statistics(*pairs[0], weight, self.norm, needed)
                return [dx], dweight, dbias
        local = _add_sums([gradient_sums(dy, x, self.norm) for dy, x in pairs])
        # From this process's sums: DDP adds up the others'.
        of_parameters = parameter_gradients(self.norm, local)
        sums = local if reduce_sums is None else reduce_sums(local)
        dxs = [
            apply_gradient(dy, x, weight, self.norm, sums) if wanted else None
            for (dy, x), wanted in zip(pairs, needs.xs, strict=True)
        ]
        return dxs, *of_parameters


def _add_sums(each: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(each) == 1:
        return each[0]
    first, second = (torch.stack(s).sum(0, dtype=torch.float64) for s in zip(*each, strict=True))
    return first, second
