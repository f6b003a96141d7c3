"""The first pass over data: mean and variance of a micro-batch, accurate however large the mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from syncaccum.layer.memory_order import as_columns, is_rows, per_channel
from syncaccum.moments import pack_statistics

# A handful of positions is enough for `channel_origin`: see there.
_ORIGIN_POSITIONS = 16
_ORIGIN_SAMPLES = 64

# Most values that torch's reductions may add to a running float32 sum. They keep one per SIMD lane or channel,
# whose rounding error grows with the number of additions (measured, relative error of a variance, rows and columns:
# 4e-7 and 1e-6 at 4,096, 1e-6 and 6e-6 at 50,000, 3e-5 and 2e-4 at a million); longer runs are cut, and the pieces
# added in float64.
_MAX_RUN = 8192

# Largest mean^2/variance at which float32 values are measured as they are: their sums carry the mean to 1e-7 of
# itself, and plain sums of squares the variance to 1e-7 times this.
_MAX_OFFSET = 4.0**2


class Measured(NamedTuple):
    """A micro-batch about to be normalised.

    ``values`` has the shape of the input and is float32 or wider: the input's values, less a constant per channel
    where there is an ``origin``. ``mean`` and ``variance`` (population) are the input's; they and ``origin`` are
    float64, ``(C,)``.
    """

    values: Tensor
    origin: Tensor | None
    n: int
    mean: Tensor
    variance: Tensor

    def sums(self) -> Tensor:
        """What to add to a window: packed moments."""
        return pack_statistics(self.n, self.mean, self.variance)


def measure(x: Tensor) -> Measured:
    """First pass: mean and variance of a dense micro-batch.

    Raw float32 sums of squares lose everything once mean/std reaches 1e4 (1702 % error). Where a channel's mean
    dwarfs its deviation, ``x - origin`` is measured in place of x, which float32 carries to 1e-7, and the shift is
    undone in float64. On a GPU that is always done: to look first would make the forward wait for the device.
    """
    channels = x.shape[1]
    count = x.numel() // channels
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    if count == 0:
        zeros = torch.zeros(channels, dtype=torch.float64, device=x.device)
        return Measured(values, None, 0, zeros, zeros)
    if not x.is_cuda:
        mean, variance = _mean_and_variance(values)
        if torch.addcmul(variance, mean, mean, value=-1 / _MAX_OFFSET).min().item() >= 0:
            return Measured(values, None, count, mean, variance)
    origin = channel_origin(values)
    shifted = values - per_channel(origin, x)
    origin = origin.to(torch.float64)
    mean, variance = _mean_and_variance(shifted)
    return Measured(shifted, origin, count, mean + origin, variance)


def channel_origin(values: Tensor) -> Tensor:
    """A constant per channel, a few standard deviations from its mean at most.

    The mean over central positions of some samples: any single value may be an outlier, and the borders of an
    image may be padding. Its own rounding is of no matter, because exactly this value is subtracted.
    """
    sample = values[:: max(1, values.shape[0] // _ORIGIN_SAMPLES)]
    if values.dim() == 2:
        return sample.mean(0)
    flat = sample.flatten(2) if is_rows(values) else sample.movedim(1, -1).flatten(1, -2).movedim(-1, 1)
    middle = max(0, (flat.shape[2] - _ORIGIN_POSITIONS) // 2)
    return flat[:, :, middle : middle + _ORIGIN_POSITIONS].mean((0, 2))


def _mean_and_variance(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance per channel of a dense float32 or float64 tensor; float64."""
    channels = values.shape[1]
    if values.is_cuda:
        mean, variance = torch.batch_norm_update_stats(values, None, None, 0.0)
        return mean.to(torch.float64), variance.to(torch.float64)
    if is_rows(values):
        return _of_rows(values.view(values.shape[0], channels, -1))
    return _of_columns(as_columns(values))


def _of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of shape (N, C, L). nn.BatchNorm's own reduction of this order takes six times as long on a CPU."""
    count = rows.shape[0] * rows.shape[2]
    pieces = -(-rows.shape[2] // _MAX_RUN)
    whole = rows.shape[2] // pieces * pieces
    if pieces == 1:
        squares = torch.linalg.vector_norm(rows, dim=2).square_()
    else:
        norms = torch.linalg.vector_norm(torch.unflatten(rows[:, :, :whole], 2, (pieces, -1)), dim=3)
        squares = norms.square_().sum(2, dtype=torch.float64)
    sums = torch.stack((rows.sum(2), squares)).sum(1, dtype=torch.float64)
    if whole < rows.shape[2]:
        sums[1] += rows[:, :, whole:].to(torch.float64).square().sum((0, 2))
    mean, mean_sq = sums.div_(count).unbind()
    return mean, torch.addcmul(mean_sq, mean, mean, value=-1).clamp_min_(0)


def _of_columns(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Of shape (values, C)."""
    count, channels = columns.shape
    pieces = -(-count // _MAX_RUN)
    whole = count // pieces * pieces
    # Neighbouring values side by side, as if they were channels: fewer additions to each running sum.
    means, variances = torch.batch_norm_update_stats(columns[:whole].view(-1, pieces * channels), None, None, 0.0)
    means, variances = means.to(torch.float64), variances.to(torch.float64)
    if pieces == 1:
        return means, variances
    mean, mean_sq = torch.stack((means, variances.addcmul_(means, means))).view(2, pieces, channels).mean(1).unbind()
    if whole < count:
        rest = columns[whole:].to(torch.float64)
        mean = (mean * whole + rest.sum(0)) / count
        mean_sq = (mean_sq * whole + rest.square().sum(0)) / count
    return mean, torch.addcmul(mean_sq, mean, mean, value=-1).clamp_min_(0)
