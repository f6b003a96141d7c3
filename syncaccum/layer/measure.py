"""The first pass over data: mean and variance of a micro-batch, accurate however large the mean."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from syncaccum.layer import native
from syncaccum.layer.memory_order import as_columns, as_passes, is_on_cpu, is_on_cuda, is_rows, per_channel
from syncaccum.moments import pack_statistics
from syncaccum.torch_private import scale_each

# An origin is the median of so many values: `channel_origin`.
_ORIGIN_VALUES = 64
_ORIGIN_SAMPLES = 8

# Each addition to a float32 sum may lose 6e-8 of it:
# half a unit in the last place.
# Equal values (a border, a mask) all lose on the same side.
# After 8,192 additions that was 2e-4 (measured).
# After some 50 it is 1e-6 at most.
# So data is cut into runs, whose sums are added in float64.
# In columns a run is one running sum of each channel.
# In rows it is one for each SIMD lane, 8 or 16 of them.
_COLUMN_RUN = 49
_ROW_RUN = 256
# So many running sums stay in a core's first cache.
_CACHED_SUMS = 8192

# Sums of the values as they are give the variance to 1e-6
# as long as mean^2/variance is no larger than this.
# In rows the variance is a difference of two sums,
# each right to 2e-7.
# In columns torch subtracts a mean before it squares.
# float32 has that mean to 1e-7, which sets the limit.
# x - mean is then off by 2e-7 standard deviations.
_MAX_ROW_OFFSET = 1.0
_MAX_OFFSET = 4.0**2


class Measured(NamedTuple):
    """A micro-batch about to be normalised.

    ``values`` has the shape of the input: its values, less a constant per channel where there is an ``origin``. It is
    float32 or wider, or the input itself, where the values need no origin. ``mean`` and ``variance`` (population)
    are the input's; they and ``origin`` are float64, ``(C,)``. On a GPU they are as the kernel gave them, see `widen`.
    Compiled passes also fill ``packed``, the moments.
    """

    values: Tensor
    origin: Tensor | None
    n: int
    mean: Tensor
    variance: Tensor
    packed: Tensor | None = None

    def widen(self) -> Measured:
        """The same with mean and variance in float64."""
        return self._replace(mean=self.mean.to(torch.float64), variance=self.variance.to(torch.float64))

    def sums(self) -> Tensor:
        """What to add to a window: packed moments, of float64 statistics."""
        return pack_statistics(self.n, self.mean, self.variance) if self.packed is None else self.packed


def merge(parts: Sequence[Measured]) -> tuple[int, Tensor, Tensor]:
    """Count, mean and variance of several micro-batches together, as accurate as theirs (Chan et al., 1979)."""
    n = sum(part.n for part in parts)
    # In one: each conversion is a launch on a GPU.
    vectors = torch.stack([part.mean for part in parts] + [part.variance for part in parts]).to(torch.float64)
    means, variances = vectors.chunk(2)
    # max: all of them may be empty.
    shares = [part.n / max(n, 1) for part in parts]
    # Means less one of them: small numbers, also where means are large.
    start = means[max(range(len(parts)), key=lambda k: parts[k].n)]
    delta = means - start
    step = _weigh(delta, shares)
    return n, start + step, _weigh(variances + (delta - step).square(), shares)


def _weigh(vectors: Tensor, shares: Sequence[float]) -> Tensor:
    """The sum of vectors, each times its share."""
    # Numbers, and no tensor of them: to send it, the host would wait for the device.
    if len(set(shares)) == 1:
        return vectors.sum(0) * shares[0]
    return torch.stack(scale_each(vectors.unbind(), shares)).sum(0)


def measured_before(x: Tensor, mean: Tensor, *, is_far: bool) -> Measured:
    """A dense micro-batch to be normalised with what is known: nobody will ask for its own mean and variance.

    Args:
        is_far: whether the pass that found them subtracted an origin, because the mean is large. Then it is done here.
    """
    values, origin = _subtract(_widen(x), mean) if is_far else (x, None)
    return Measured(values, origin, x.numel() // x.shape[1], mean, mean)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _subtract(values: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """The values less a constant per channel, and the constant as it was rounded, in float64."""
    origin = origin.to(values.dtype)
    return values - per_channel(origin, values), origin.to(torch.float64)


def measure(x: Tensor) -> Measured:
    """First pass: mean and variance of a dense micro-batch.

    float32 sums of squares lose everything once mean/std reaches 1e4 (1702 % error). So where a channel's mean is large
    beside its deviation, ``x - origin`` is measured in place of x. float32 carries that to 1e-7. The origin is added
    again in float64. It is the mean just found. CUDA's kernel (Welford's) is as accurate as nn.BatchNorm there, and
    walks float16 and bfloat16 as they are. On other devices an origin is always subtracted, the median of a sample: to
    look at the mean first would make the forward wait for the device.
    """
    if native.takes(x):
        return _measure_compiled(x)
    channels = x.shape[1]
    count = x.numel() // channels
    if count == 0:
        zeros = torch.zeros(channels, dtype=torch.float64, device=x.device)
        return Measured(x, None, 0, zeros, zeros)
    if is_on_cuda(x):
        return Measured(x, None, count, *torch.batch_norm_update_stats(as_passes(x), None, None, 0.0))
    values = _widen(x)
    if not is_on_cpu(x):
        origin = channel_origin(values)
    else:
        mean, variance = _mean_and_variance(values)
        # Mostly the values can be taken as they are.
        rows = is_rows(values)
        if _is_within(_MAX_ROW_OFFSET if rows else _MAX_OFFSET, mean, variance):
            return Measured(values, None, count, mean, variance)
        # Rows have a tighter limit: measure again what breaks it.
        if rows and _is_within(_MAX_OFFSET, mean, variance):
            _refine(values, mean, variance)
            return Measured(values, None, count, mean, variance)
        origin = mean
    shifted, origin = _subtract(values, origin)
    mean, variance = _mean_and_variance(shifted)
    return Measured(shifted, origin, count, mean + origin, variance)


def _measure_compiled(x: Tensor) -> Measured:
    """`measure` by the compiled passes.

    They subtract a value of each channel, in float64. No value is further from the mean than sqrt(n) deviations, so
    that they are right to n times 1e-16, however large the mean is.
    """
    channels = x.shape[1]
    packed, mean, variance = torch.split_with_sizes(native.measure(x), [1 + 2 * channels, channels, channels])
    return Measured(x, None, x.numel() // channels, mean, variance, packed)


def _is_within(offset: float, mean: Tensor, variance: Tensor) -> bool:
    """Whether mean^2/variance is no larger in any channel; False where something is NaN."""
    # Without a division: a variance may be 0.
    return torch.addcmul(variance, mean, mean, value=-1 / offset).min().item() >= 0


def _refine(rows: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Measure again, less their mean, the channels whose mean is too large for the sums of rows; in place."""
    far = (variance * _MAX_ROW_OFFSET < mean.square()).nonzero().flatten()
    origin = mean[far].to(rows.dtype)
    part = rows[:, far]
    # In place on a copy: indexing with a tensor makes one.
    mean[far], variance[far] = _mean_and_variance(part.sub_(per_channel(origin, part)))
    mean[far] += origin


def channel_origin(values: Tensor) -> Tensor:
    """A constant per channel, a few standard deviations from its mean at most.

    It is the median of values from all over the tensor. No median is further from the mean than one standard deviation,
    whatever spots, borders and outliers there are. Its rounding does not matter: what is subtracted is added again.
    """
    if values.dim() == 2:
        sample = values[_spread(values.shape[0], _ORIGIN_VALUES)]
    else:
        flat = values[_spread(values.shape[0], _ORIGIN_SAMPLES)].flatten(2)
        positions = _spread(flat.shape[2], -(-_ORIGIN_VALUES // flat.shape[0]))
        sample = flat[:, :, positions].movedim(1, -1).flatten(0, 1)
    # Sorted: CUDA's median is not deterministic,
    # and raises where torch is told to be.
    return sample.sort(0).values[sample.shape[0] // 2]


def _spread(size: int, most: int) -> slice:
    """About so many indices, evenly spread, by an odd step: an even one may keep to one column of an image."""
    step = max(1, size // most) | 1
    return slice(min(step // 2, size - 1), None, step)


def _mean_and_variance(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance per channel of a dense float32 or float64 tensor; float64."""
    if not is_on_cpu(values):
        variance, mean = torch.var_mean(values, [d for d in range(values.dim()) if d != 1], correction=0)
        return mean.to(torch.float64), variance.to(torch.float64)
    return _of_rows(as_passes(values)) if is_rows(values) else _of_columns(as_columns(values))


def _of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of shape (N, C, L). nn.BatchNorm's own reduction of this order takes six times as long on a CPU."""
    count, length = rows.shape[0] * rows.shape[2], rows.shape[2]
    run = _choose_run(length, _ROW_RUN)
    pieces = length // run
    whole = pieces * run
    # The norm squares and sums in one pass, without a copy.
    norms = torch.linalg.vector_norm(torch.unflatten(rows[:, :, :whole], 2, (pieces, run)), dim=3)
    squares = norms.square_().sum(2, dtype=torch.float64)
    # torch's sums of rows are pairwise: good for any length.
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
    # Neighbouring values side by side, as if they were channels:
    # each running sum has fewer additions.
    at_once = max(1, _CACHED_SUMS * torch.get_num_threads() // channels) * run
    parts = torch.split(columns[:whole], at_once)
    each = [torch.batch_norm_update_stats(part.view(run, -1), None, None, 0.0) for part in parts]
    means, variances = each[0] if len(each) == 1 else map(torch.cat, zip(*each, strict=True))
    if pieces == 1:
        return means.to(torch.float64), variances.to(torch.float64)
    # Variance of all: mean of the runs' variances,
    # and variance of their means (law of total variance).
    # torch's sums over dimension 0 are pairwise.
    # The first one adds large numbers; `error` is what it lost.
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
    # No shorter than half: short runs make many pieces.
    even = [run for run in range(most // 2, most + 1) if count % run == 0]
    return even[-1] if even else count // -(-count // most)


def _add_rest(rest: Tensor, count: int, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``count`` values, ``rest`` among them, from those of the others (Chan et al., 1979)."""
    share = rest.shape[0] / count
    delta = rest - mean
    step = delta.mean(0) * share
    return mean + step, variance * (1 - share) + delta.square().mean(0) * share - step.square()
