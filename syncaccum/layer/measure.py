"""The first pass over data: mean and variance of a micro-batch, accurate however large the mean."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from syncaccum.layer.memory_order import as_columns, as_passes, is_on_cuda, is_rows, per_channel
from syncaccum.moments import pack_statistics

# Of so many values of a channel is the median taken that serves as an origin: see `channel_origin`.
_ORIGIN_VALUES = 64
_ORIGIN_SAMPLES = 8

# float32 sums are exact to 1e-6 where no running sum takes more than some 50 additions: each may lose half a unit in
# the last place, 6e-8, and equal values (a border, a mask) all lose it on the same side: 2e-4 measured at 8,192.
# So data is cut into runs, whose sums are added in float64. A run in columns is one running sum of each channel;
# a run in rows has one for each SIMD lane, 8 or 16 of them.
_COLUMN_RUN = 49
_ROW_RUN = 256
# So many running sums stay in a core's first cache.
_CACHED_SUMS = 8192

# Largest mean^2/variance at which sums of values as they are carry the variance to 1e-6. In rows it is a difference of
# two sums, each right to 2e-7. In columns torch subtracts a mean first, but float32 has the mean to 1e-7 only, which is
# what sets the limit there; and in float32 (x - mean) is then off by 2e-7 standard deviations.
_MAX_ROW_OFFSET = 1.0
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


def merge(parts: Sequence[Measured]) -> tuple[int, Tensor, Tensor]:
    """Count, mean and variance of several micro-batches together, as accurate as theirs (Chan et al., 1979)."""
    n = sum(part.n for part in parts)
    means, variances = (torch.stack(vectors) for vectors in zip(*((p.mean, p.variance) for p in parts), strict=True))
    shares = torch.tensor([part.n / max(n, 1) for part in parts], dtype=means.dtype, device=means.device).unsqueeze(1)
    # From one mean on: their differences are small, where they themselves are large.
    start = max(parts, key=lambda part: part.n).mean
    delta = means - start
    step = (delta * shares).sum(0)
    return n, start + step, ((variances + (delta - step).square()) * shares).sum(0)


def measure(x: Tensor) -> Measured:
    """First pass: mean and variance of a dense micro-batch.

    Raw float32 sums of squares lose everything once mean/std reaches 1e4 (1702 % error). Where a channel's mean
    dwarfs its deviation, ``x - origin`` is measured in place of x, which float32 carries to 1e-7, and the shift is
    undone in float64. The origin is the mean just found. On a GPU it is always done, with an origin from a sample: to
    look first would make the forward wait for the device.
    """
    channels = x.shape[1]
    count = x.numel() // channels
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    if count == 0:
        zeros = torch.zeros(channels, dtype=torch.float64, device=x.device)
        return Measured(values, None, 0, zeros, zeros)
    if is_on_cuda(x):
        origin = channel_origin(values)
    else:
        mean, variance = _mean_and_variance(values)
        rows = is_rows(values)
        if _is_within(_MAX_ROW_OFFSET if rows else _MAX_OFFSET, mean, variance):
            return Measured(values, None, count, mean, variance)
        if rows and _is_within(_MAX_OFFSET, mean, variance):
            _refine(values, mean, variance)
            return Measured(values, None, count, mean, variance)
        origin = mean.to(values.dtype)
    shifted = values - per_channel(origin, x)
    origin = origin.to(torch.float64)
    mean, variance = _mean_and_variance(shifted)
    return Measured(shifted, origin, count, mean + origin, variance)


def _is_within(offset: float, mean: Tensor, variance: Tensor) -> bool:
    """Whether mean^2/variance is no larger in any channel; False where something is NaN."""
    return torch.addcmul(variance, mean, mean, value=-1 / offset).min().item() >= 0


def _refine(rows: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Measure again, less their mean, the channels whose mean is too large for the sums of rows; in place."""
    far = (variance * _MAX_ROW_OFFSET < mean.square()).nonzero().flatten()
    origin = mean[far].to(rows.dtype)
    part = rows[:, far]
    mean[far], variance[far] = _mean_and_variance(part.sub_(per_channel(origin, part)))
    mean[far] += origin


def channel_origin(values: Tensor) -> Tensor:
    """A constant per channel, a few standard deviations from its mean at most.

    The median of values from all over the tensor: no median is further from the mean than one standard deviation,
    whatever spots, borders and outliers there are. Its own rounding is of no matter: exactly this is subtracted.
    """
    if values.dim() == 2:
        sample = values[_spread(values.shape[0], _ORIGIN_VALUES)]
    else:
        flat = values[_spread(values.shape[0], _ORIGIN_SAMPLES)].flatten(2)
        positions = _spread(flat.shape[2], -(-_ORIGIN_VALUES // flat.shape[0]))
        sample = flat[:, :, positions].movedim(1, -1).flatten(0, 1)
    # Sorted: CUDA's median is not deterministic, and refuses where that is asked for.
    return sample.sort(0).values[sample.shape[0] // 2]


def _spread(size: int, most: int) -> slice:
    """About so many indices, evenly spread, by an odd step: an even one may keep to one column of an image."""
    step = max(1, size // most) | 1
    return slice(min(step // 2, size - 1), None, step)


def _mean_and_variance(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance per channel of a dense float32 or float64 tensor; float64."""
    if is_on_cuda(values):
        mean, variance = torch.batch_norm_update_stats(as_passes(values), None, None, 0.0)
        return mean.to(torch.float64), variance.to(torch.float64)
    return _of_rows(as_passes(values)) if is_rows(values) else _of_columns(as_columns(values))


def _of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of shape (N, C, L). nn.BatchNorm's own reduction of this order takes six times as long on a CPU."""
    count, length = rows.shape[0] * rows.shape[2], rows.shape[2]
    run = _choose_run(length, _ROW_RUN)
    pieces = length // run
    whole = pieces * run
    norms = torch.linalg.vector_norm(torch.unflatten(rows[:, :, :whole], 2, (pieces, run)), dim=3)
    squares = norms.square_().sum(2, dtype=torch.float64)
    # torch's sums of rows are pairwise, which is good for any length.
    sums = torch.stack((rows.sum(2), squares)).sum(1, dtype=torch.float64)
    if whole < length:
        sums[1] += rows[:, :, whole:].to(torch.float64).square().sum((0, 2))
    mean, mean_sq = sums.div_(count).unbind()
    return mean, torch.addcmul(mean_sq, mean, mean, value=-1).clamp_min_(0)


def _of_columns(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Of shape (values, C)."""
    count, channels = columns.shape
    run = _choose_run(count, _COLUMN_RUN)
    pieces = count // run
    whole = pieces * run
    # Neighbouring values side by side, as if they were channels: fewer additions to each running sum.
    at_once = max(1, _CACHED_SUMS * torch.get_num_threads() // channels) * run
    parts = torch.split(columns[:whole], at_once)
    each = [torch.batch_norm_update_stats(part.view(run, -1), None, None, 0.0) for part in parts]
    means, variances = each[0] if len(each) == 1 else map(torch.cat, zip(*each, strict=True))
    if pieces == 1:
        return means.to(torch.float64), variances.to(torch.float64)
    # Sums over dimension 0 are pairwise, and of small numbers but the first, whose error the second takes away.
    means = means.view(pieces, channels)
    center = means.mean(0)
    spread = means.sub_(center)
    error = spread.mean(0).to(torch.float64)
    variance = variances.view(pieces, channels).addcmul_(spread, spread).mean(0).to(torch.float64) - error.square()
    variance.clamp_min_(0)
    mean = center + error
    if whole < count:
        return _add_rest(columns[whole:].to(torch.float64), count, mean, variance)
    return mean, variance


@functools.lru_cache(maxsize=1024)
def _choose_run(count: int, most: int) -> int:
    """How long to make the runs, such that few values or none are left over."""
    if count <= most:
        return count
    even = [run for run in range(most // 2, most + 1) if count % run == 0]
    return even[-1] if even else count // -(-count // most)


def _add_rest(rest: Tensor, count: int, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``count`` values, ``rest`` among them, from those of the others (Chan et al., 1979)."""
    share = rest.shape[0] / count
    delta = rest - mean
    step = delta.mean(0) * share
    return mean + step, variance * (1 - share) + delta.square().mean(0) * share - step.square()
