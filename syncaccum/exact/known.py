"""What micro-batches found at a meeting, and how a second forward normalises with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from syncaccum.exact.meeting_point import Arrival, Meeting
from syncaccum.layer.gpu import Vectors
from syncaccum.layer.measure import Measured, measure, measured_before
from syncaccum.layer.memory_order import make_dense
from syncaccum.layer.passes import normalize_together
from syncaccum.layer.policies import Normalizer, ReduceSums
from syncaccum.layer.samples import distance, take_sample
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
    shares_parameters: bool
    """Whether all have the same weight and bias."""
    wants_gradient: bool
    """Whether its outputs have a graph."""
    vectors: Vectors | None
    """Of the meeting."""

    @classmethod
    def of(cls, meeting: Meeting, samples: Sequence[Tensor]) -> KnownVisit:
        """What was found at a meeting."""
        norm = meeting.norm._replace(feedback=1.0)
        is_far = any(m.origin is not None for m in meeting.measured)
        counts = [m.n for m in meeting.measured]
        return cls(
            meeting.arrivals[0].layer,
            meeting.name,
            norm,
            is_far,
            meeting.count,
            counts,
            samples,
            meeting.shares_parameters,
            meeting.wants_gradient,
            meeting.vectors,
        )

    def equals(self, other: KnownVisit) -> bool:
        """Whether both normalise alike."""
        pairs = zip((self.norm.center, self.norm.scale), (other.norm.center, other.norm.scale), strict=True)
        return all(torch.equal(*pair) for pair in pairs)

    def measured(self, x: Tensor) -> Measured:
        """A dense micro-batch, about to be normalised with it."""
        return measured_before(x, self.norm.center, is_far=self.is_far)

    def normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, pay: ReduceSums | None = None) -> Tensor:
        """The output of one micro-batch. ``pay`` turns its two sums of the backward into what each value pays."""
        x = make_dense(x)
        (y,) = normalize_together([x], [self.measured(x)], weight, bias, self.norm, pay)
        return y


def find_again(visits: Sequence[KnownVisit], layer: Accumulating, x: Tensor, index: int) -> tuple[int, Tensor]:
    """The visit to a layer that a micro-batch repeats, and how far it is from it.

    Of several it is the one whose values these are. Of equals it is the first.
    """
    numbers = [number for number, visit in enumerate(visits) if visit.layer is layer]
    distances = torch.stack([distance(x, visits[number].samples[index]) for number in numbers])
    # With one there is no need to wait for a GPU.
    nearest = 0 if len(numbers) == 1 else int(distances.argmin())
    return numbers[nearest], distances[nearest]


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
        park = self._park(x)
        return _Waiting(layer, x, weight, bias, eps, grad, counts, measured, sample=sample, bring_back=park)

    def note(self, meeting: Meeting) -> Callable[[int], Tensor]:
        """What to do at a meeting."""
        waiting: list[Any] = list(meeting.arrivals)
        visit = KnownVisit.of(meeting, [one.sample for one in waiting])
        self.visits.append(visit)

        def take(index: int) -> Tensor:
            # Not kept: the output needs memory.
            one, waiting[index] = waiting[index], None
            one.bring_back()
            return visit.normalize(one.x, one.weight, one.bias)

        return take
