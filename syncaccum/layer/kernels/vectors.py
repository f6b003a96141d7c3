"""Triton kernels: all that happens to vectors between two walks over the data of a GPU, in one launch.

A program takes some channels. Arithmetic is float64. `policies` has the same in torch, and is the oracle.
"""

import triton
import triton.language as tl

# As in `native`.
_BATCH = tl.constexpr(3)
_RENORM = tl.constexpr(4)

# What all programs must know alike, each looks at itself: so many
# numbers at a time, which for most layers is all of them.
_SCAN = tl.constexpr(1024)


@triton.jit(do_not_specialize=["n", "divisor"])
def find_vectors(
    mean,
    variance,
    committed_mean,
    committed_variance,
    weight,
    bias,
    wide,
    narrow,
    count,
    n,
    divisor,
    channels,
    POLICY: tl.constexpr,
    EPS: tl.constexpr,
    PRIOR_COUNT: tl.constexpr,
    R_MAX: tl.constexpr,
    D_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From a micro-batch's mean and variance to what is applied.

    wide: packed moments, then the committed mean and variance as they are now; 1 + 4 C float64 numbers.
    narrow: center, scale, slope, shift, gamma, gain, offset; 7 C numbers of the passes' dtype.
    count: the divisor, as one int32 number.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    if tl.program_id(0) == 0:
        tl.store(wide, tl.cast(n, tl.float64))
        tl.store(count, tl.cast(divisor, tl.int32))
    m, v = _load(mean, c, inside), _load(variance, c, inside)
    _pack(wide, m, v, n, c, inside, channels)
    eps, one, zero = _full(EPS, BLOCK), _full(1.0, BLOCK), _full(0.0, BLOCK)
    gain, offset = one, zero
    if POLICY != _BATCH:
        mu, sigma = _load(committed_mean, c, inside), _load(committed_variance, c, inside)
        tl.store(wide + 1 + 2 * channels + c, mu, mask=inside)
        tl.store(wide + 1 + 3 * channels + c, sigma, mask=inside)
        center, scale = mu, one / tl.sqrt(sigma + eps)
        if POLICY == _RENORM:
            values = tl.cast(n, tl.float64)
            share = values / (values + _full(PRIOR_COUNT, BLOCK))
            step = m - mu
            both = sigma + share * (v - sigma) + step * step * (share * (one - share))
            center = mu + share * step
            committed_scale, scale = scale, one / tl.sqrt(both + eps)
            gain = _clamp(committed_scale / scale, one / _full(R_MAX, BLOCK), _full(R_MAX, BLOCK))
            offset = _clamp((center - mu) * committed_scale, _full(-D_MAX, BLOCK), _full(D_MAX, BLOCK))
    else:
        center, scale = m, one / tl.sqrt(v + eps)
    _store(narrow, center, scale, gain, offset, weight, bias, c, inside, channels, one, zero)


@triton.jit(do_not_specialize=["n", "samples", "of_sample", "trained", "untrained"])
def find_window_vectors(
    mean,
    variance,
    window,
    prior,
    committed_mean,
    committed_variance,
    batches,
    squares,
    weight,
    bias,
    wide,
    narrow,
    count,
    n,
    samples,
    of_sample,
    trained,
    untrained,
    channels,
    KNOWS_PRIOR: tl.constexpr,
    COUNTS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same under policy "window". A window that is not finite counts for nothing.

    wide: packed moments of the micro-batch, then of what it is counted together with; 2 + 4 C numbers.
    squares: get ``samples`` times the mean's square where the micro-batch counts.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    m, v = _load(mean, c, inside), _load(variance, c, inside)
    _pack(wide, m, v, n, c, inside, channels)
    own = tl.cast(n, tl.float64)
    others = wide + 1 + 2 * channels
    is_finite = _is_finite(window, 1 + 2 * channels)
    known = tl.where(is_finite, tl.load(window), 0)
    total = tl.where(is_finite, _load(window + 1, c, inside), 0)
    total_sq = tl.where(is_finite, _load(window + 1 + channels, c, inside), 0)
    if KNOWS_PRIOR:
        alpha = tl.cast(of_sample, tl.float64)
        known += alpha * tl.load(prior)
        total += alpha * _load(prior + 1, c, inside)
        total_sq += alpha * _load(prior + 1 + channels, c, inside)
    else:
        values = tl.cast(trained, tl.float64)
        if batches is not None:
            values = tl.where(tl.load(batches) == 0, tl.cast(untrained, tl.float64), values)
        mu, sigma = _load(committed_mean, c, inside), _load(committed_variance, c, inside)
        known += values
        total += values * mu
        total_sq += values * (sigma + mu * mu)
    if tl.program_id(0) == 0:
        tl.store(wide, own)
        tl.store(others, known)
        tl.store(count, tl.cast(1, tl.int32))
    tl.store(others + 1 + c, total, mask=inside)
    tl.store(others + 1 + channels + c, total_sq, mask=inside)
    one, zero = _full(1.0, BLOCK), _full(0.0, BLOCK)
    center = (total + own * m) / (known + own)
    mean_sq = (total_sq + own * (v + m * m)) / (known + own)
    var = tl.maximum(mean_sq - center * center, zero, propagate_nan=tl.PropagateNan.ALL)
    scale = one / tl.sqrt(var + _full(EPS, BLOCK))
    if COUNTS:
        seen = _load(squares, c, inside) + tl.cast(samples, tl.float64) * m * m
        tl.store(squares + c, seen, mask=inside)
    _store(narrow, center, scale, one, zero, weight, bias, c, inside, channels, one, zero)


@triton.jit
def _load(pointer, c, inside):
    return tl.load(pointer + c, mask=inside, other=0).to(tl.float64)


@triton.jit
def _is_finite(pointer, size):
    """Whether so many numbers are. As `drop_if_nonfinite`, by their sum."""
    seen = _full(0.0, _SCAN)
    for start in range(0, size, _SCAN):
        k = start + tl.arange(0, _SCAN)
        seen += _load(pointer, k, k < size)
    return _has_finite_sum(seen)


@triton.jit
def _has_finite_sum(values):
    # Not tl.sum: Triton's interpreter may have come too late for it.
    total = tl.reduce(values, 0, _add)
    # NaN less itself is NaN, and so is infinity's.
    return total - total == 0


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _full(value: tl.constexpr, BLOCK: tl.constexpr):
    # A bare constant would be rounded to float32.
    return tl.full([BLOCK], value, tl.float64)


@triton.jit
def _clamp(x, low, high):
    # NaN stays NaN.
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pack(wide, m, v, n, c, inside, channels):
    values = tl.cast(n, tl.float64)
    tl.store(wide + 1 + c, values * m, mask=inside)
    tl.store(wide + 1 + channels + c, values * (v + m * m), mask=inside)


@triton.jit
def _store(narrow, center, scale, gain, offset, weight, bias, c, inside, channels, one, zero):
    gamma, shift = gain, offset
    if weight is not None:
        w = _load(weight, c, inside)
        gamma, shift = gain * w, offset * w
    if bias is not None:
        shift += _load(bias, c, inside)
    dtype = narrow.dtype.element_ty
    tl.store(narrow + c, center.to(dtype), mask=inside)
    tl.store(narrow + channels + c, scale.to(dtype), mask=inside)
    tl.store(narrow + 2 * channels + c, (scale * gamma).to(dtype), mask=inside)
    tl.store(narrow + 3 * channels + c, shift.to(dtype), mask=inside)
    tl.store(narrow + 4 * channels + c, gamma.to(dtype), mask=inside)
    tl.store(narrow + 5 * channels + c, gain.to(dtype), mask=inside)
    tl.store(narrow + 6 * channels + c, offset.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["payers", "n"])
def pay(dy, dy_xmu, scale, owed, owed_after, each, payers, n, channels, AGAIN: tl.constexpr, BLOCK: tl.constexpr):
    """`Ledger.pay`, from a micro-batch's sums of dy and of dy (x - center). Books that are not finite become zeros.

    payers: the bits of a float64 number; as a number it would be rounded to float32.
    each: what each value pays, as the passes take it: of dy, and of dy (x - center).
    """
    seen = _full(0.0, _SCAN)
    for start in range(0, channels, _SCAN):
        k = start + tl.arange(0, _SCAN)
        _, _, left, left_xhat, _ = _settle(dy, dy_xmu, scale, owed, payers, n, k, channels, AGAIN)
        seen += left + left_xhat
    is_finite = _has_finite_sum(seen)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    first, second, left, left_xhat, s = _settle(dy, dy_xmu, scale, owed, payers, n, c, channels, AGAIN)
    tl.store(owed_after + c, tl.where(is_finite, left, 0), mask=inside)
    tl.store(owed_after + channels + c, tl.where(is_finite, left_xhat, 0), mask=inside)
    dtype = each.dtype.element_ty
    tl.store(each + c, first.to(dtype), mask=inside)
    tl.store(each + channels + c, (second / s).to(dtype), mask=inside)


@triton.jit
def _settle(dy, dy_xmu, scale, owed, payers, n, c, channels, AGAIN: tl.constexpr):
    """What each value pays, what is owed then, and the scale."""
    inside = c < channels
    s = tl.load(scale + c, mask=inside, other=1).to(tl.float64)
    first, second = _load(dy, c, inside), _load(dy_xmu, c, inside) * s
    total, total_xhat = first + _load(owed, c, inside), second + _load(owed + channels, c, inside)
    if not AGAIN:
        first, second = total, total_xhat
    values = tl.cast(payers, tl.float64, bitcast=True)
    first, second = first / values, second / values
    taken = tl.cast(n, tl.float64)
    return first, second, total - taken * first, total_xhat - taken * second, s


@triton.jit(do_not_specialize=["values", "last"])
def merge_vectors(
    statistics,
    weight,
    bias,
    wide,
    narrow,
    count,
    values,
    last,
    channels,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Several micro-batches together (`measure.merge`), normalised as one.

    statistics: mean and variance of each; (PARTS, 2, C) numbers.
    values, last: per channel in each, and in the last.
    wide: packed moments of all; 1 + 2 C numbers.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    n = values * (PARTS - 1) + last
    if tl.program_id(0) == 0:
        tl.store(wide, tl.cast(n, tl.float64))
        tl.store(count, tl.cast(n, tl.int32))
    one, zero = _full(1.0, BLOCK), _full(0.0, BLOCK)
    # Means less one of them: small numbers, also where means are large.
    start = _load(statistics, c, inside)
    share, share_of_last = tl.cast(values, tl.float64) / n, tl.cast(last, tl.float64) / n
    final = statistics + 2 * (PARTS - 1) * channels
    step, spread = zero, zero
    for k in range(PARTS - 1):
        step += _load(statistics + 2 * k * channels, c, inside) - start
    step = step * share + (_load(final, c, inside) - start) * share_of_last
    for k in range(PARTS - 1):
        here = statistics + 2 * k * channels
        delta = _load(here, c, inside) - start - step
        spread += _load(here + channels, c, inside) + delta * delta
    delta = _load(final, c, inside) - start - step
    m = start + step
    v = spread * share + (_load(final + channels, c, inside) + delta * delta) * share_of_last
    _pack(wide, m, v, n, c, inside, channels)
    scale = one / tl.sqrt(v + _full(EPS, BLOCK))
    _store(narrow, m, scale, one, zero, weight, bias, c, inside, channels, one, zero)
