"""Fold reduced sums into running statistics: all channels of all layers at once, whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from syncaccum.errors import NonFiniteStatisticsError
from syncaccum.layer.state import Accumulating, commit_momentum
from syncaccum.torch_private import add_to_all, buffers_of, copy_all
from syncaccum.window.layers import NamedLayer
from syncaccum.window.layout import Layout
from syncaccum.window.prior import steps_of_commit
from syncaccum.window.uninterrupted import run_uninterrupted, steps_of_new_window


def apply_to_some(layout: Layout, counts: Sequence[int], seen: Sequence[NamedLayer], reduced: Tensor) -> None:
    """Apply, leaving out the layers that no rank has seen data for."""
    # As if the other layers were not in the model.
    header, *sums = torch.split(reduced, layout.sizes)
    kept = [s for s, count in zip(sums, counts, strict=True) if count > 0]
    key = tuple(k for k, count in zip(layout.key, counts, strict=True) if count > 0)
    apply(Layout.of(key), seen, torch.cat([header, *kept]))


def apply(layout: Layout, members: Sequence[NamedLayer], reduced: Tensor) -> None:
    """Fold the reduced sums into the running statistics, and start a new window: all of it or, on an error, nothing.

    All channels of all layers at once: a few operations for each layer would take longer than the all-reduce.
    """
    # m = S1 / n and v = S2 / n - m^2 of the global batch,
    # one row of means and one of variances.
    _, at_count, at_sums = layout.indices(reduced.device)
    n = reduced.index_select(0, at_count)
    update = reduced.index_select(0, at_sums).view(2, -1).div_(n)
    layers = [layer for _, layer in members]
    closing = _close_windows(layers, layout, n, update)
    mean, variance = update.unbind()
    # In place: variance is a view of update's second row.
    # Rounding can leave a constant channel below zero.
    # n / (n - 1): running_var is unbiased, as nn.BatchNorm's.
    variance.addcmul_(mean, mean, value=-1).clamp_min_(0).mul_(n / (n - 1))
    buffers = [buffers_of(layer) for layer in layers]
    current = [cast(Tensor, b[name]) for name in ("running_mean", "running_var") for b in buffers]
    # Computed in float64, then rounded once.
    old = concatenate(current, reduced.device).to(torch.float64).view(2, -1)
    new = torch.lerp(old, update, _factors(layers, layout, reduced.device)).view(-1)
    rounded, stored = _round_as_stored(new, layout, current)
    _judge_rounded(layout, members, current, rounded)
    # Until here nothing has changed. What follows does not fail.
    counters = [batches for b in buffers if (batches := b["num_batches_tracked"]) is not None]
    states = [layer._accumulation for layer in layers]
    run_uninterrupted(
        [
            partial(copy_all, current, stored),
            # It refuses an empty list.
            *([partial(add_to_all, counters, 1)] if counters else []),
            *steps_of_new_window(states),
            *closing,
            # A checkpoint's second forward would now see other statistics.
            *(partial(setattr, state, "has_normalised", False) for state in states),
        ]
    )


def _close_windows(layers: Sequence[Accumulating], layout: Layout, n: Tensor, moments: Tensor) -> list[partial[Any]]:
    """The steps for layers under policy "window". ``moments``: means and mean squares of the global batch."""
    having = [index for index, layer in enumerate(layers) if layer._accumulation.ledger is not None]
    if not having:
        return []
    rows = torch.cat((n.unsqueeze(0), moments))
    if len(having) < len(layers):
        pieces = torch.split(rows, list(layout.widths), 1)
        rows = torch.cat([pieces[index] for index in having], 1)
    states = [layers[index]._accumulation for index in having]
    return steps_of_commit(states, [layers[index].eps for index in having], *rows)


def _round_as_stored(new: Tensor, layout: Layout, current: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The new statistics in the dtype of their buffers: once in one piece to judge, once for each buffer to copy."""
    sizes = list(layout.widths * 2)
    if len({buffer.dtype for buffer in current}) == 1:
        # The usual case: one cast for all.
        rounded = new.to(current[0].dtype)
        return rounded, list(torch.split(rounded, sizes))
    pieces = [piece.to(buffer.dtype) for piece, buffer in zip(torch.split(new, sizes), current, strict=True)]
    return torch.cat([piece.to(torch.float64) for piece in pieces]), pieces


def _judge_rounded(layout: Layout, members: Sequence[NamedLayer], current: Sequence[Tensor], rounded: Tensor) -> None:
    """Raise on new statistics that their dtype cannot hold.

    They come from reduced values and from running statistics. Both are equal on all ranks, so all decide alike.
    """
    # float32 at least: in float16 good values sum to Inf.
    if math.isfinite(rounded.sum(dtype=torch.promote_types(rounded.dtype, torch.float32)).item()):
        return
    # The sum itself may be too large: now look at each layer.
    after = _find_non_finite(members, torch.split(rounded, list(layout.widths * 2)))
    # Spoilt before: discarding the window would not help.
    if spoilt := [name for name in _find_non_finite(members, current) if name in after]:
        raise NonFiniteStatisticsError(
            f"running statistics held NaN or Inf before this commit, in {', '.join(spoilt)}; nothing has changed and "
            "the window is kept: load an earlier checkpoint, or call the layer's reset_running_stats()"
        )
    if after:
        dtypes = {str(buffer.dtype).removeprefix("torch.") for buffer in current}
        raise NonFiniteStatisticsError(
            f"new running statistics are beyond the range of {' or '.join(sorted(dtypes))}, in {', '.join(after)}; "
            "running statistics are unchanged and the window is kept: keep the layer's statistics in float32 "
            "(layer.float() after model.half()) and commit again, or discard(model)"
        )


def _find_non_finite(members: Sequence[NamedLayer], statistics: Sequence[Tensor]) -> list[str]:
    """The layers with NaN or Inf in their statistics: first come the means of all layers, then their variances."""
    bad = [not bool(tensor.isfinite().all()) for tensor in statistics]
    pairs = zip(bad[: len(members)], bad[len(members) :], strict=True)
    return [name for (name, _), pair in zip(members, pairs, strict=True) if any(pair)]


def _factors(layers: Sequence[Accumulating], layout: Layout, device: torch.device) -> Tensor | float:
    """How much of the new statistics to take: momentum, or 1 / (batches so far, this one included)."""
    momenta = [commit_momentum(layer) for layer in layers]
    # One number for all needs no tensor on the device.
    if None not in momenta and len(set(momenta)) == 1:
        return cast(float, momenta[0])
    shares = iter(_count_in([layer for layer, m in zip(layers, momenta, strict=True) if m is None], device))
    factors = [next(shares) if m is None else m for m in momenta]
    widths = torch.tensor(layout.widths, device=device)
    return torch.tensor(factors, dtype=torch.float64, device=device).repeat_interleave(widths)


def _count_in(layers: Sequence[Accumulating], device: torch.device) -> list[float]:
    """The share of the next batch in each cumulative average. Without a counter it is 0, as in nn.BatchNorm."""
    counters = [buffers_of(layer)["num_batches_tracked"] for layer in layers]
    given = [counter.reshape(1) for counter in counters if counter is not None]
    # One tolist() for all: each waits for a GPU.
    counts = iter(concatenate(given, device).tolist() if given else ())
    return [0.0 if counter is None else 1.0 / (next(counts) + 1) for counter in counters]


def concatenate(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """torch.cat on ``device``. One transfer if all tensors are on one device, else one for each."""
    home = tensors[0].device
    if all(tensor.device == home for tensor in tensors):
        return torch.cat(list(tensors)).to(device)
    return torch.cat([tensor.to(device) for tensor in tensors])
