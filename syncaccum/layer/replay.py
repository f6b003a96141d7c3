"""A checkpoint's second forward under policy "window" uses what the first one used, although the window has gone on.

Both see the same data. So the first forward leaves a record with a few of its sums, and the second finds it by them.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from syncaccum.moments import Moments

# Sums of so many channels tell micro-batches apart.
_CHANNELS = 8

# A second forward on a GPU may round otherwise: 1e-6 of a deviation,
# in bfloat16 1e-4. Two micro-batches of a million values each
# differ by 1e-3 of a deviation in some channel.
_TOLERANCE = 3e-4

# Forwards without gradients that no commit ever follows leave
# records, too.
_MOST = 1000


_forwards = itertools.count()


def number_forward() -> int:
    """A number that no other forward of this process has."""
    return next(_forwards)


@dataclass(eq=False)
class Record:
    """What a forward used."""

    others: Tensor
    """Packed moments of what it was counted together with."""
    number: int
    """Of its window."""
    forward: int
    """Its own number, see `number_forward`."""
    counts: bool
    """Whether it went into the window."""
    sample: Moments | None = None
    """The micro-batch's own sums, of a few channels, where it may run again."""
    uses: int = 0
    """How often it ran again."""


class Records:
    """Of the forwards in the open window and of those whose graph lives, oldest first."""

    def __init__(self) -> None:
        self._held: list[Record] = []
        self._live: list[weakref.ref[Record]] = []

    def add(self, record: Record, own: Tensor, *, hold: bool) -> None:
        """Keep the record of a forward with these packed moments: while others hold it, or until the next window."""
        record.sample = _sample(own)
        if self._held and self._held[0].number != record.number:
            self._held.clear()
        if hold:
            self._held = [*self._held, record][-_MOST:]
        self._live = [ref for ref in self._live if ref() is not None]
        self._live.append(weakref.ref(record))

    def find(self, own: Tensor) -> Record | None:
        """The record of the forward that had these packed moments, or almost these; None if none had."""
        sample = _sample(own)
        live = [record for ref in reversed(self._live) if (record := ref()) is not None]
        distances = [_distance(record.sample, sample) for record in live]
        if not distances or min(distances) > _TOLERANCE:
            return None
        nearest = [record for record, d in zip(live, distances, strict=True) if d == min(distances)]
        # The same data more than once: the last forward is first.
        found = min(nearest, key=lambda record: record.uses)
        found.uses += 1
        return found


def _sample(own: Tensor) -> Moments:
    """Some channels of a micro-batch's packed moments."""
    moments = Moments.unpack(own)
    step = -(-moments.total.numel() // _CHANNELS)
    packed = Moments(moments.count, moments.total[::step], moments.total_sq[::step]).pack()
    return Moments.unpack(packed)


def _distance(first: Moments | None, second: Moments) -> float:
    """How many deviations two means are apart at most, or how much two variances differ."""
    if first is None or first.total.shape != second.total.shape or first.count != second.count:
        return float("inf")
    means, variances = (first.mean - second.mean).abs(), (first.variance - second.variance).abs()
    # NaN is no distance: such a micro-batch equals itself.
    if torch.equal(first.pack().nan_to_num(), second.pack().nan_to_num()):
        return 0.0
    # Constant channels have no deviation.
    tiny = torch.finfo(torch.float32).tiny
    spread = torch.maximum(first.variance, second.variance).clamp_min(tiny)
    return torch.maximum(means / spread.sqrt(), variances / spread).max().item()
