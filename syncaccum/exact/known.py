"""What the first pass of a lookahead found, and how the second normalises with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from syncaccum.exact.meeting_point import Arrival, Meeting
from syncaccum.layer.measure import measure, measured_before
from syncaccum.layer.memory_order import make_dense
from syncaccum.layer.passes import normalize_together
from syncaccum.layer.policies import Normalizer, ReduceSums
from syncaccum.layer.samples import take_sample
from syncaccum.layer.state import Accumulating


@dataclass(frozen=True)
class KnownVisit:
    """One time that every micro-batch comes to a layer."""

    layer: Accumulating
    name: str
    norm: Normalizer
    """From the moments of all ranks' micro-batches. ``feedback`` is 1: books say what each value pays."""
    is_far: bool
    """Whether the mean is so large that values are taken less it."""
    total: Tensor | int
    """Values per channel in all of them, on all ranks; a scalar."""
    counts: Sequence[int]
    """Values per channel in each of this rank's."""
    samples: Sequence[Tensor]
    """A few values of each of this rank's, to know them again by."""

    def normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, pay: ReduceSums | None = None) -> Tensor:
        """The output of one micro-batch. ``pay`` turns its two sums of the backward into what each value pays."""
        x = make_dense(x)
        measured = measured_before(x, self.norm.center, is_far=self.is_far)
        (y,) = normalize_together([x], [measured], weight, bias, self.norm, pay)
        return y


@dataclass(frozen=True)
class _Waiting(Arrival):
    """A micro-batch that waits at a layer in a first pass."""

    sample: Tensor | None = None
    bring_back: Callable[[], None] = lambda: None


class Record:
    """The visits of a first pass, in order. It normalises each micro-batch on its own turn: one output at a time.

    Args:
        park: called with each input that is to wait; returns what brings it back.
    """

    def __init__(self, park: Callable[[Tensor], Callable[[], None]]) -> None:
        self.visits: list[KnownVisit] = []
        self._park = park

    def arrive(
        self, layer: Accumulating, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, counts: bool
    ) -> Arrival:
        """An arrival. It keeps x alone, and no float32 copy of it: all micro-batches wait with theirs."""
        x = make_dense(x)
        measured = measure(x)._replace(values=x)
        sample = take_sample(x)
        grad = torch.is_grad_enabled()
        return _Waiting(layer, x, weight, bias, eps, grad, counts, measured, sample, self._park(x))

    def note(self, meeting: Meeting) -> Callable[[int], Tensor]:
        """What to do at a meeting."""
        waiting: list[Any] = list(meeting.arrivals)
        visit = KnownVisit(
            waiting[0].layer,
            meeting.name,
            meeting.norm._replace(feedback=1.0),
            any(m.origin is not None for m in meeting.measured),
            meeting.count,
            [m.n for m in meeting.measured],
            [one.sample for one in waiting],
        )
        self.visits.append(visit)

        def take(index: int) -> Tensor:
            # Not kept: the output needs memory.
            one, waiting[index] = waiting[index], None
            one.bring_back()
            return visit.normalize(one.x, one.weight, one.bias)

        return take
