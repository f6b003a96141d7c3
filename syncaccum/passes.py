"""The four passes over data, and the one autograd function that uses them.

Whatever the policy, every forward is ``y = a x + b`` per channel and every backward is ``dx = A dy + B x + C``
with the sums of dy and dy*x_hat: moments of x, affine of x, moments of dy, affine of dy and x. Policies differ in
C-sized arithmetic only (`normalization`).

The passes see data in one of two memory orders, chosen by `_is_columns`: *columns*, where the channel varies
fastest (channels_last of any dimension, and (N, C)), or *rows*, where each (sample, channel) is contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from syncaccum.moments import Moments
from syncaccum.normalization import Normalizer, Policy

# A handful of positions is enough for `_channel_origin`: see there.
_ORIGIN_POSITIONS = 16
_ORIGIN_SAMPLES = 64

# Most squares that torch's reductions may add to a running float32 sum. They keep one per SIMD lane or channel,
# whose rounding error grows with the number of additions (measured, relative error of a variance: 1e-6 at 4,096,
# 2e-4 at a million); longer runs are cut, and the pieces added in float64.
_MAX_RUN = 8192


class Measured(NamedTuple):
    """A micro-batch about to be normalised: its moments, and its values less one constant per channel.

    ``shifted`` has the shape of the input and is float32 or wider; :func:`apply_affine` turns it into the output
    in place. ``mean`` and ``variance`` (population) are those of the micro-batch, float64.
    """

    shifted: Tensor
    origin: Tensor
    count: int
    mean: Tensor
    variance: Tensor
    moments: Moments


def make_dense(x: Tensor) -> Tensor:
    """x itself where a pass can walk it in memory order, else a contiguous copy (through autograd)."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def measure(x: Tensor) -> Measured:
    """First pass: the moments of a dense micro-batch.

    Raw float32 sums of squares lose everything once mean/std reaches 1e4 (1702 % error), so the sums are those of
    ``x - origin``, which float32 carries to 1e-7, and the shift is undone in float64.
    """
    count = x.numel() // x.shape[1]
    if count == 0:
        zeros = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        return Measured(x.clone(), zeros, 0, zeros, zeros, Moments.zeros(x.shape[1], x.device))
    origin = _channel_origin(x)
    shifted = x - _per_channel(origin, x)
    total, total_sq = _sums(shifted)
    origin = origin.to(torch.float64)
    return _undo_shift(shifted, origin, count, total, total_sq)


def _undo_shift(shifted: Tensor, origin: Tensor, count: int, total: Tensor, total_sq: Tensor) -> Measured:
    offset = total / count
    variance = torch.addcmul(total_sq / count, offset, offset, value=-1).clamp_min_(0)
    raw_total = torch.add(total, origin, alpha=count)
    raw_total_sq = torch.addcmul(total_sq, origin, total + raw_total)
    count_ = torch.full((), count, dtype=torch.float64, device=shifted.device)
    return Measured(
        shifted, origin, count, origin + offset, variance, Moments(count_, raw_total, raw_total_sq)
    )


def _channel_origin(x: Tensor) -> Tensor:
    """A constant per channel, a few standard deviations from its mean at most; float32 or wider.

    The mean over central positions of some samples: any single value may be an outlier, and the borders of an
    image may be padding. Its own rounding is of no matter, because exactly this value is subtracted.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    sample = x[:: max(1, x.shape[0] // _ORIGIN_SAMPLES)]
    if x.dim() == 2:
        return sample.mean(0, dtype=wide)
    flat = sample.flatten(2) if _is_rows(x) else sample.movedim(1, -1).flatten(1, -2).movedim(-1, 1)
    middle = max(0, (flat.shape[2] - _ORIGIN_POSITIONS) // 2)
    return flat[:, :, middle : middle + _ORIGIN_POSITIONS].mean((0, 2), dtype=wide)


def apply_affine(measured: Measured, weight: Tensor | None, bias: Tensor | None, to: Normalizer) -> Tensor:
    """Second pass: the output, in place of ``measured.shifted``; float32 or wider."""
    a = to.scale * to.gain
    b = (measured.origin - to.center) * a + to.offset
    if weight is not None:
        a = a * weight
        b = b * weight
    if bias is not None:
        b = b + bias
    y = measured.shifted
    a, b = _per_channel(a.to(y.dtype), y), _per_channel(b.to(y.dtype), y)
    if _is_rows(y):
        return y.mul_(a).add_(b)
    return torch.addcmul(b, y, a, out=y)


def gradient_sums(dy: Tensor, x: Tensor, center: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    r"""Third pass: :math:`\sum dy` and :math:`\sum dy\,\hat x`, float64, of dense dy and x in the same order."""
    if x.numel() == 0:
        zeros = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        return zeros, zeros
    if not _is_rows(x):
        dy, x = _columns(dy), _columns(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    # The reduction that torch's own BatchNorm uses; it subtracts the center before it multiplies.
    _, sum_dy_xhat, sum_dy = torch.ops.aten.native_batch_norm_backward(
        dy, x, None, None, None, center.to(wide), scale.to(wide), True, 0.0, [False, True, True]
    )
    return sum_dy.to(torch.float64), sum_dy_xhat.to(torch.float64)


def apply_gradient(
    dy: Tensor, x: Tensor, weight: Tensor | None, to: Normalizer, sums: tuple[Tensor, Tensor]
) -> Tensor:
    """Fourth pass: the gradient of x, in x's dtype and memory order."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a = to.scale * to.gain
    if weight is not None:
        a = a * weight
    a_ = _per_channel(a.to(wide), x)
    if to.feedback is None:
        return (dy * a_).to(x.dtype)
    sum_dy, sum_dy_xhat = sums
    b = a * to.feedback * to.scale * sum_dy_xhat
    c = b * to.center - a * to.feedback * sum_dy
    dx = x * _per_channel((-b).to(wide), x)
    dx.add_(_per_channel(c.to(wide), x))
    return dx.addcmul_(dy, a_).to(x.dtype)


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, policy: Policy
) -> tuple[Tensor, Moments]:
    """Normalise a micro-batch under a policy; also its moments, detached.

    Args:
        x: shape ``(N, C, *)``; float64, float32, bfloat16 or float16. The result has its shape, dtype and
            memory order.
        weight, bias: shape ``(C,)`` or None.
        policy: turns the micro-batch's moments into what to apply.
    """
    x = make_dense(x)
    if torch.compiler.is_compiling():
        # The compiler fuses plain operations better than it can our passes, and differentiates them itself.
        return _compose(x, weight, bias, policy)
    with torch.no_grad():
        measured = measure(x)
        to = policy(measured.count, measured.mean, measured.variance)
    return _Normalize.apply(x, weight, bias, measured, to, policy), measured.moments


def _compose(x: Tensor, weight: Tensor | None, bias: Tensor | None, policy: Policy) -> tuple[Tensor, Moments]:
    """`normalize` in plain differentiable operations: for compilers and for gradients of gradients."""
    count = x.numel() // x.shape[1]
    origin = _channel_origin(x.detach())
    shifted = x - _per_channel(origin, x)
    dims = [d for d in range(x.dim()) if d != 1]
    offset = shifted.mean(dims)
    variance = (shifted - _per_channel(offset, x)).square().mean(dims).to(torch.float64)
    offset, origin = offset.to(torch.float64), origin.to(torch.float64)
    mean = origin + offset
    to = policy(count, mean, variance)
    y = (shifted - _per_channel((to.center - origin).to(shifted.dtype), x)) * _per_channel(
        to.scale.to(shifted.dtype), x
    )
    gain, shift = (
        torch.as_tensor(v, dtype=shifted.dtype, device=x.device).expand(x.shape[1]) for v in to[2:4]
    )
    y = y * _per_channel(gain, x) + _per_channel(shift, x)
    if weight is not None:
        y = y * _per_channel(weight.to(y.dtype), x)
    if bias is not None:
        y = y + _per_channel(bias.to(y.dtype), x)
    mean, variance = mean.detach(), variance.detach()
    moments = Moments(
        torch.full((), count, dtype=torch.float64, device=x.device),
        mean * count,
        (variance + mean.square()) * count,
    )
    return y.to(x.dtype), moments


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, measured, to, policy):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight, bias)
        ctx.to, ctx.policy = to, policy
        y = apply_affine(measured, weight, bias, to).to(x.dtype)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_gradients_of_composite(ctx, dy, x, weight, bias), None, None, None
        dy = _match_order(dy, x)
        to = ctx.to
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        sums = gradient_sums(dy, x, to.center, to.scale)
        dx = apply_gradient(dy, x, weight, to, sums) if needs_x else None
        dweight = parameter_gradient(weight, sums, to) if needs_weight else None
        dbias = sums[0].to(bias.dtype) if needs_bias else None
        return dx, dweight, dbias, None, None, None


def parameter_gradient(weight: Tensor, sums: tuple[Tensor, Tensor], to: Normalizer) -> Tensor:
    """The gradient of the weight, from the two sums."""
    return (sums[1] * to.gain + sums[0] * to.offset).to(weight.dtype)


def _gradients_of_composite(ctx, dy, x, weight, bias):  # type: ignore[no-untyped-def]
    """Gradients that can be differentiated again (``create_graph=True``)."""
    inputs = [t for t, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if needed]
    y, _ = _compose(x, weight, bias, ctx.policy)
    gradients = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    return [next(gradients) if needed else None for needed in ctx.needs_input_grad[:3]]


def _is_rows(x: Tensor) -> bool:
    # A tensor can be both, when there is one channel or one position: short rows are slow, so ask for long ones.
    return x.is_contiguous() and x.dim() > 2 and x.stride(1) > 1


def _columns(x: Tensor) -> Tensor:
    """(values, C) view of a dense tensor in columns order."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _match_order(dy: Tensor, x: Tensor) -> Tensor:
    """dy in x's memory order; a copy where it is not (an expanded gradient, another memory format)."""
    return dy.contiguous() if _is_rows(x) else dy.movedim(1, -1).contiguous().movedim(-1, 1)


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(1, -1, *[1] * (like.dim() - 2))


def _sums(shifted: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares per channel of a dense float32 or float64 tensor, in float64."""
    channels = shifted.shape[1]
    if shifted.is_cuda:
        return _sums_of_columns(shifted)
    if _is_rows(shifted):
        # nn.BatchNorm's own NCHW reduction on a CPU takes six times as long as these two.
        rows = shifted.view(shifted.shape[0], channels, -1)
        return _fold(rows.sum(2), channels), _sum_of_squares_of_rows(rows)
    columns = _columns(shifted)
    # Neighbouring positions side by side, as if they were channels: fewer additions to each running sum.
    pieces = -(-columns.shape[0] // _MAX_RUN)
    whole = columns.shape[0] // pieces * pieces
    total, total_sq = _sums_of_columns(columns[:whole].view(-1, pieces * channels))
    rest = columns[whole:].to(torch.float64)
    return _fold(total, channels) + rest.sum(0), _fold(total_sq, channels) + rest.square().sum(0)


def _sums_of_columns(columns: Tensor) -> tuple[Tensor, Tensor]:
    count = columns.numel() // columns.shape[1]
    mean, variance = torch.batch_norm_update_stats(columns, None, None, 0.0)
    mean, variance = mean.to(torch.float64), variance.to(torch.float64)
    return mean * count, torch.addcmul(variance, mean, mean).mul_(count)


def _sum_of_squares_of_rows(rows: Tensor) -> Tensor:
    pieces = -(-rows.shape[2] // _MAX_RUN)
    whole = rows.shape[2] // pieces * pieces
    norms = torch.linalg.vector_norm(rows[:, :, :whole].unflatten(2, (pieces, -1)), dim=3)
    squares = norms.to(torch.float64).square().sum((0, 2))
    return squares + rows[:, :, whole:].to(torch.float64).square().sum((0, 2))


def _fold(sums: Tensor, channels: int) -> Tensor:
    return sums.to(torch.float64).view(-1, channels).sum(0)
