"""Triton kernels: all that happens to vectors between two walks over the data of a GPU, in one launch.

A program takes some channels. Arithmetic is float64. `policies` has the same in torch, and is the oracle.
"""

import triton
import triton.language as tl

# As in `native`.
_BATCH = tl.constexpr(3)
_RENORM = tl.constexpr(4)


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
    """The same under policy "window".

    wide: packed moments of the micro-batch, then of what it is counted together with; 2 + 4 C numbers.
    squares: get ``samples`` times the mean's square where the micro-batch counts.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    m, v = _load(mean, c, inside), _load(variance, c, inside)
    _pack(wide, m, v, n, c, inside, channels)
    own = tl.cast(n, tl.float64)
    others = wide + 1 + 2 * channels
    if KNOWS_PRIOR:
        alpha = tl.cast(of_sample, tl.float64)
        known = tl.load(window) + alpha * tl.load(prior)
        total = _load(window + 1, c, inside) + alpha * _load(prior + 1, c, inside)
        total_sq = _load(window + 1 + channels, c, inside) + alpha * _load(prior + 1 + channels, c, inside)
    else:
        values = tl.cast(trained, tl.float64)
        if batches is not None:
            values = tl.where(tl.load(batches) == 0, tl.cast(untrained, tl.float64), values)
        mu, sigma = _load(committed_mean, c, inside), _load(committed_variance, c, inside)
        known = tl.load(window) + values
        total = _load(window + 1, c, inside) + values * mu
        total_sq = _load(window + 1 + channels, c, inside) + values * (sigma + mu * mu)
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
    """`Ledger.pay`, from a micro-batch's sums of dy and of dy (x - center).

    payers: the bits of a float64 number; as a number it would be rounded to float32.
    each: what each value pays, as the passes take it: of dy, and of dy (x - center).
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    s = tl.load(scale + c, mask=inside, other=1).to(tl.float64)
    first, second = _load(dy, c, inside), _load(dy_xmu, c, inside) * s
    total, total_xhat = first + _load(owed, c, inside), second + _load(owed + channels, c, inside)
    if not AGAIN:
        first, second = total, total_xhat
    values = tl.cast(payers, tl.float64, bitcast=True)
    first, second = first / values, second / values
    taken = tl.cast(n, tl.float64)
    tl.store(owed_after + c, total - taken * first, mask=inside)
    tl.store(owed_after + channels + c, total_xhat - taken * second, mask=inside)
    dtype = each.dtype.element_ty
    tl.store(each + c, first.to(dtype), mask=inside)
    tl.store(each + channels + c, (second / s).to(dtype), mask=inside)


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
