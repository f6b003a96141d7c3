"""Fold reduced sums into running statistics: all channels of all layers at once, whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from syncaccum.errors import NonFiniteStatisticsError
from syncaccum.layer.state import Accumulating
from syncaccum.ranks.agreement import HEADER
from syncaccum.torch_private import add_to_all, buffers_of, copy_all
from syncaccum.window import compiled_fold, spare
from syncaccum.window.layers import NamedLayer
from syncaccum.window.layout import Layout
from syncaccum.window.prior import steps_of_commit
from syncaccum.window.taken import Taken, steps_of_rest
from syncaccum.window.uninterrupted import run_uninterrupted, steps_of_new_window


def apply_to_some(
    layout: Layout, seen: Sequence[int], members: Sequence[NamedLayer], reduced: Tensor, taken: Sequence[Taken] | None
) -> None:
    """Apply, leaving out the layers that no rank has seen data for."""
    # As if the other layers were not in the model.
    header, *sums = torch.split(reduced, layout.sizes)
    kept = Layout.of(tuple(layout.key[index] for index in seen))
    parts = None if taken is None else [taken[index] for index in seen]
    apply(kept, [members[index] for index in seen], torch.cat([header, *(sums[index] for index in seen)]), parts)


def apply(layout: Layout, members: Sequence[NamedLayer], reduced: Tensor, taken: Sequence[Taken] | None = None) -> None:
    """Fold the reduced sums into the running statistics, and start a new window: all of it or, on an error, nothing.

    All channels of all layers at once: a few operations for each layer would take longer than the all-reduce.

    Args:
        taken: this rank's part of the sums; None for all that is in the windows.
    """
    layers = [layer for _, layer in members]
    closing = _close_windows(layers, layout, reduced, taken)
    buffers = [buffers_of(layer) for layer in layers]
    current = [cast(Tensor, b[name]) for name in ("running_mean", "running_var") for b in buffers]
    factors = _find_factors(layers, layout, reduced.device)
    if compiled_fold.takes(reduced, current, layout.widths * 2):
        key, new = _fold_compiled(layout, reduced, current, factors)
    else:
        key, new = None, _fold(layout, reduced, current, factors)
    _judge_rounded(layout, members, current, new)
    # Until here nothing has changed. What follows does not fail.
    counters = [batches for b in buffers if (batches := b["num_batches_tracked"]) is not None]
    states = [layer._accumulation for layer in layers]
    changes: dict[str, Any] = {"used_since": None, "is_committed": True}
    run_uninterrupted(
        [
            partial(copy_all, current, new.stored),
            # It refuses an empty list.
            *([partial(add_to_all, counters, 1)] if counters else []),
            # A checkpoint's second forward would now see other statistics.
            *(steps_of_new_window(states, changes) if taken is None else steps_of_rest(states, taken, changes)),
            *closing,
        ]
    )
    if key is not None:
        spare.give_back(key, (new.rounded, new.stored))


class _New(NamedTuple):
    """New statistics in the dtype of their buffers."""

    rounded: Tensor
    """In one piece, to judge: the means of all layers, then their variances."""
    stored: list[Tensor]
    """For each buffer, to copy."""
    checksum: float
    """Finite where all of them are, unless the sum itself is too large."""


def _fold_compiled(
    layout: Layout, reduced: Tensor, current: Sequence[Tensor], factors: Sequence[float]
) -> tuple[Hashable, _New]:
    """The arithmetic of `_fold` in one pass, to the last bit, and the key of the memory that it is in."""
    key = layout.widths, current[0].dtype
    rounded, stored = spare.take(key, partial(_make_statistics, layout.widths * 2, current[0].dtype))
    torch.cat(list(current), out=rounded)
    checksum = compiled_fold.fold(reduced[HEADER:], rounded, layout.widths, factors)
    return key, _New(rounded, stored, checksum)


def _make_statistics(widths: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    # What is made under inference_mode refuses to change later.
    with torch.inference_mode(False):
        rounded = torch.empty(sum(widths), dtype=dtype, device="cpu")
        return rounded, list(torch.split(rounded, list(widths)))


def _fold(layout: Layout, reduced: Tensor, current: Sequence[Tensor], factors: Sequence[float]) -> _New:
    """The new statistics, from old ones and reduced sums: all channels of all layers at once."""
    n, update = _divide(layout, reduced)
    mean, variance = update.unbind()
    # As fold.cpp, each operation rounds by itself: ranks with and
    # without it get the same bits. addcmul and lerp may fuse two.
    # In place: fresh memory takes longer than the arithmetic.
    square = mean * mean
    # Rounding can leave a constant channel below zero.
    variance.sub_(square).clamp_min_(0)
    # n / (n - 1): running_var is unbiased, as nn.BatchNorm's.
    variance.mul_(n.div_(torch.sub(n, 1, out=square)))
    # Computed in float64, then rounded once.
    old = concatenate(current, reduced.device).to(torch.float64).view(2, -1)
    share = _spread_factors(factors, layout, reduced.device)
    new = old.mul_(1 - share).add_(update.mul_(share)).view(-1)
    rounded, stored = _round_as_stored(new, layout, current)
    # float32 at least: in float16 good values sum to Inf.
    checksum = rounded.sum(dtype=torch.promote_types(rounded.dtype, torch.float32)).item()
    return _New(rounded, stored, checksum)


def _divide(layout: Layout, reduced: Tensor) -> tuple[Tensor, Tensor]:
    """Values per channel, for each channel; and a row of means and one of mean squares, of the global batch."""
    _, at_count, at_sums = layout.indices(reduced.device)
    n = reduced.index_select(0, at_count)
    return n, reduced.index_select(0, at_sums).view(2, -1).div_(n)


def _close_windows(
    layers: Sequence[Accumulating], layout: Layout, reduced: Tensor, taken: Sequence[Taken] | None
) -> list[partial[Any]]:
    """The steps for layers under policy "window"."""
    having = [index for index, layer in enumerate(layers) if layer._accumulation.ledger is not None]
    if not having:
        return []
    n, moments = _divide(layout, reduced)
    rows = torch.cat((n.unsqueeze(0), moments))
    if len(having) < len(layers):
        pieces = torch.split(rows, list(layout.widths), 1)
        rows = torch.cat([pieces[index] for index in having], 1)
    states = [layers[index]._accumulation for index in having]
    parts = None if taken is None else [taken[index] for index in having]
    n, mean, mean_sq = rows.unbind()
    return steps_of_commit(states, [layers[index].eps for index in having], n, mean, mean_sq, parts)


def _round_as_stored(new: Tensor, layout: Layout, current: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The new statistics in the dtype of their buffers: once in one piece to judge, once for each buffer to copy."""
    sizes = list(layout.widths * 2)
    if len({buffer.dtype for buffer in current}) == 1:
        # The usual case: one cast for all.
        rounded = new.to(current[0].dtype)
        return rounded, list(torch.split(rounded, sizes))
    pieces = [piece.to(buffer.dtype) for piece, buffer in zip(torch.split(new, sizes), current, strict=True)]
    return torch.cat([piece.to(torch.float64) for piece in pieces]), pieces


def _judge_rounded(layout: Layout, members: Sequence[NamedLayer], current: Sequence[Tensor], new: _New) -> None:
    """Raise on new statistics that their dtype cannot hold.

    They come from reduced values and from running statistics. Both are equal on all ranks, so all decide alike.
    """
    if math.isfinite(new.checksum):
        return
    # The sum itself may be too large: now look at each layer.
    after = _find_non_finite(members, torch.split(new.rounded, list(layout.widths * 2)))
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


def _find_factors(layers: Sequence[Accumulating], layout: Layout, device: torch.device) -> Sequence[float]:
    """By layer, how much of the new statistics to take: momentum, or 1 / (batches so far, this one included)."""
    if None not in layout.momenta:
        return cast(tuple[float, ...], layout.momenta)
    shares = iter(_count_in([layer for layer, m in zip(layers, layout.momenta, strict=True) if m is None], device))
    return [next(shares) if m is None else m for m in layout.momenta]


def _spread_factors(factors: Sequence[float], layout: Layout, device: torch.device) -> Tensor | float:
    """A factor for each channel."""
    # One number for all needs no tensor on the device.
    if len(set(factors)) == 1:
        return factors[0]
    widths = torch.tensor(layout.widths, device=device)
    return torch.tensor(factors, dtype=torch.float64, device=device).repeat_interleave(widths)


def _count_in(layers: Sequence[Accumulating], device: torch.device) -> list[float]:
    """The share of the next batch in each cumulative average. Without a counter it is 0, as in nn.BatchNorm."""
    counters = [buffers_of(layer)["num_batches_tracked"] for layer in layers]
    given = [counter.reshape(1) for counter in counters if counter is not None]
    # One tolist() for all: each waits for a GPU.
    counts = iter(concatenate(given, device).tolist() if given else ())
    return [0.0 if counter is None else 1.0 / (next(counts) + 1) for counter in counters]


def concatenate(tensors: Sequence[Tensor], device: torch.device, memory: Tensor | None = None) -> Tensor:
    """torch.cat on ``device``. One transfer if all tensors are on one device, else one for each.

    Args:
        memory: where to put it, on ``device``.
    """
    home = tensors[0].device
    if all(tensor.device == home for tensor in tensors):
        return torch.cat(list(tensors), out=memory).to(device)
    return torch.cat([tensor.to(device) for tensor in tensors], out=memory)
