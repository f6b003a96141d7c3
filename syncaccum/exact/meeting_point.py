"""Where micro-batches meet: what a BatchNorm layer does once all of them have come to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from syncaccum.errors import LockstepError
from syncaccum.exact.exchange import Exchange
from syncaccum.exact.shards import Gate
from syncaccum.layer import fused
from syncaccum.layer.accumulate import accumulate_together
from syncaccum.layer.gpu import Vectors
from syncaccum.layer.measure import Measured, measure, merge
from syncaccum.layer.memory_order import make_dense, per_channel
from syncaccum.layer.passes import normalize_together
from syncaccum.layer.policies import Normalizer, ReduceSums
from syncaccum.layer.state import Accumulating
from syncaccum.moments import pack_statistics
from syncaccum.ranks.groups import Group, resolve_group
from syncaccum.torch_private import Hooks, all_saved_tensor_hooks, count_node
from syncaccum.window.layers import named_layers


@dataclass(frozen=True)
class Arrival:
    """A micro-batch at a layer, and all that its normalisation depends on."""

    layer: Accumulating
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    grad: bool
    counts: bool
    measured: Measured | None = None
    """Mean and variance, where they were measured on arrival."""
    hooks: Sequence[Hooks] = ()
    """What saves for the backward in its thread, in place of autograd itself; behind it what that covers."""


@dataclass(frozen=True)
class Meeting:
    """All micro-batches of this rank at one layer, and what everyone's have in common there."""

    name: str
    arrivals: Sequence[Arrival]
    measured: Sequence[Measured]
    count: Tensor | int
    """Values per channel of all ranks; a scalar."""
    norm: Normalizer
    """From the moments of all ranks' micro-batches."""
    reduce_sums: ReduceSums | None
    """What a backward over all of them sums with; None where this process is alone."""
    give_up: Callable[[], None]
    """What a backward calls in place of ``reduce_sums`` to tell the other ranks that it fails. Collective."""
    vectors: Vectors | None = None
    """The normalizer with their weight and bias, where a kernel has made them."""

    @property
    def shares_parameters(self) -> bool:
        """Whether all micro-batches have the same weight and bias, and not each its own."""
        return _share_parameters(self.arrivals)

    @property
    def wants_gradient(self) -> bool:
        """Whether the node that normalises them is to be walked backward."""
        first = self.arrivals[0]
        parameters = (first.weight, first.bias) if self.shares_parameters else ()
        return first.grad and any(
            v is not None and v.requires_grad for v in (*(a.x for a in self.arrivals), *parameters)
        )


def _share_parameters(arrivals: Sequence[Arrival]) -> bool:
    return all(a.weight is arrivals[0].weight and a.bias is arrivals[0].bias for a in arrivals)


Normalize = Callable[[Meeting], Callable[[int], Tensor]]
"""What to do at a meeting: gives a function from the index of a micro-batch to its output, to be called once."""


@dataclass(frozen=True)
class Mode:
    """What tells one call apart from another in which micro-batches meet.

    Args:
        call: its name, for messages.
        normalize: what to do at a meeting.
        make_arrival: of layer, x, weight, bias, eps and whether it counts; called in the micro-batch's thread.
        check_layer: called with a layer's name at each meeting; may raise.
        begin_turn: called with the index of a micro-batch whenever it goes on, in its thread; may raise.
        lead: by how many autograd nodes each is ahead of the next one. A backward walks those with the highest numbers
            first: with a lead it walks one micro-batch from layer to layer, and then the next.
    """

    call: str
    normalize: Normalize
    make_arrival: Callable[[Accumulating, Tensor, Tensor | None, Tensor | None, float, bool], Arrival]
    check_layer: Callable[[str], None]
    begin_turn: Callable[[int], None]
    lead: int = 0


class MeetingPoint:
    """The layers of a model, as the micro-batches of this rank come to them one after the other.

    Args:
        model: with the layers.
        size: how many micro-batches.
        check_surroundings: called with a layer and its name at each meeting; raises where it cannot be exact.
        mode: what they meet for.
    """

    def __init__(
        self,
        model: nn.Module,
        size: int,
        check_surroundings: Callable[[Accumulating, str], None],
        mode: Mode,
    ) -> None:
        self._layers = named_layers(model)
        self._names = {layer: name for name, layer in self._layers}
        self._check_surroundings = check_surroundings
        self._mode = mode
        self._size = size
        self._waiting: list[Any] = []
        self._place: object = None
        self._place_name = ""
        self._anyone_finished = False
        self._exchanges: dict[Group, Exchange] = {}
        self.statistics: dict[Accumulating, Tensor] = {}
        """By layer, what all micro-batches of this rank add to its window."""
        self.anyone_met = False
        self._take: Callable[[int], Any] | None = None
        self._nodes = 0

    def arrive(self, index: int, arrival: Arrival) -> None:
        """A micro-batch has come to a layer. The last one to come computes for all; then collective."""
        name = self._name(arrival.layer)
        if not self._waiting:
            self._check_surroundings(arrival.layer, name)
        self._wait(index, arrival.layer, f"layer {name}", arrival, partial(self._meet, name))

    def arrive_at_gate(self, index: int, gate: Gate, value: Any) -> None:
        """A micro-batch has come to a gate. The last one to come opens it."""
        self._wait(index, gate, gate.name, (torch.is_grad_enabled(), value), gate.open)

    def _wait(
        self, index: int, place: object, name: str, arrival: Any, meet: Callable[[list[Any]], Callable[[int], Any]]
    ) -> None:
        if self._anyone_finished:
            raise LockstepError(f"micro-batch {index} meets {name}, but another has finished without")
        if self._waiting and self._place is not place:
            raise LockstepError(f"micro-batch {index} meets {name}, but the others wait for it at {self._place_name}")
        self._place, self._place_name = place, name
        self._waiting.append(arrival)
        if len(self._waiting) == self._size:
            waiting, self._waiting = self._waiting, []
            self._take = meet(waiting)
            self._nodes = count_node()

    def take(self, index: int) -> Any:
        """What comes out of the last meeting for one micro-batch, on its turn and in its thread."""
        assert self._take is not None  # it has met the others
        # Nodes are numbered by thread. A backward walks those with the highest numbers first.
        # What comes after a meeting must come before it there, with any number of micro-batches:
        # else ranks with other numbers would meet in another order.
        while count_node() < self._nodes + self._mode.lead * (self._size - 1 - index):
            pass
        return self._take(index)

    def check_finish(self, index: int) -> None:
        """A micro-batch has been through the whole forward."""
        self._anyone_finished = True
        if self._waiting:
            raise LockstepError(f"micro-batch {index} has finished, but the others wait for it at {self._place_name}")

    def keep_statistics(self) -> None:
        """Add what the layers have seen to their windows, now that every micro-batch came through."""
        accumulate_together(self.statistics)

    def _name(self, layer: Accumulating) -> str:
        if layer not in self._names:
            raise LockstepError(f"{layer} is not part of the model passed to lockstep: pass the module that holds it")
        return self._names[layer]

    def _meet(self, name: str, arrivals: Sequence[Arrival]) -> Callable[[int], Tensor]:
        first = arrivals[0]
        if len({(a.grad, a.eps, a.counts) for a in arrivals}) > 1:
            raise LockstepError(
                f"micro-batches meet layer {name} with and without gradients, with different eps, or some of them "
                "inside not_counted"
            )
        self.anyone_met = True
        exchange = self.exchange_of(first.layer)
        with torch.no_grad():
            measured = [a.measured or measure(a.x) for a in arrivals]
            meeting = self._meet_alone(name, arrivals, measured, exchange)
            if meeting is None:
                meeting = self._meet_all(name, arrivals, measured, exchange)
        return self._mode.normalize(meeting)

    def _meet_all(
        self, name: str, arrivals: Sequence[Arrival], measured: Sequence[Measured], exchange: Exchange
    ) -> Meeting:
        first = arrivals[0]
        count, mean, variance = merge(measured)
        visit, total, center, spread = exchange.statistics(first.layer, name, count, mean, variance)
        self._count(first, pack_statistics(count, mean, variance))
        # 1/n of all values: the feedback of the global batch.
        norm = Normalizer(center, torch.rsqrt(spread + first.eps), None, None, 1 / total)
        return Meeting(
            name, arrivals, measured, total, norm, exchange.sums_of(visit), partial(exchange.give_up, visit.number)
        )

    def _meet_alone(
        self, name: str, arrivals: Sequence[Arrival], measured: Sequence[Measured], exchange: Exchange
    ) -> Meeting | None:
        """A meeting that one kernel on a GPU prepares; None where it cannot."""
        first = arrivals[0]
        if not (exchange.is_alone and _share_parameters(arrivals)):
            return None
        if (merged := fused.merge(measured, first.weight, first.bias, first.eps)) is None:
            return None
        packed, vectors = merged
        count = sum(part.n for part in measured)
        give_up = partial(exchange.give_up, exchange.visit_alone(name, count).number)
        self._count(first, packed)
        return Meeting(name, arrivals, measured, count, vectors.norm, None, give_up, vectors)

    def _count(self, arrival: Arrival, sums: Tensor) -> None:
        if arrival.counts:
            before = self.statistics.get(arrival.layer)
            self.statistics[arrival.layer] = sums if before is None else before + sums

    def exchange_of(self, layer: Accumulating) -> Exchange:
        """The collectives of this call over a layer's group."""
        group = resolve_group(layer._accumulation.handle.group)
        if group not in self._exchanges:
            self._exchanges[group] = Exchange(group, self._layers, self._mode.call)
        return self._exchanges[group]


def make_arrival(
    layer: Accumulating, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, counts: bool
) -> Arrival:
    """An arrival. Made in the thread of its micro-batch, which alone knows whether gradients are wanted."""
    grad, hooks = torch.is_grad_enabled(), all_saved_tensor_hooks()
    return Arrival(layer, make_dense(x), weight, bias, eps, grad, counts, hooks=hooks)


def normalize_side_by_side(meeting: Meeting) -> Callable[[int], Tensor]:
    """One autograd node for all micro-batches of the rank, whose backward takes their sums together."""
    arrivals: list[Any] = list(meeting.arrivals)
    xs, first = [a.x for a in arrivals], arrivals[0]
    weight, bias = (first.weight, first.bias) if meeting.shares_parameters else (None, None)
    together = xs, meeting.measured, weight, bias, meeting.norm, meeting.reduce_sums, meeting.vectors
    outputs: list[Any] = list(normalize_together(*together))
    shares = meeting.shares_parameters

    def take(index: int) -> Tensor:
        # Kept no longer than they are needed.
        y, outputs[index] = outputs[index], None
        arrival, arrivals[index] = arrivals[index], None
        # In the micro-batch's own thread, where its checkpoint sees it.
        return y if shares else apply_parameters(y, arrival.weight, arrival.bias)

    return take


def apply_parameters(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Apply a weight and bias that one micro-batch has for itself. A subclass may compute them from its data."""
    z = y
    if weight is not None:
        z = z * per_channel(weight, z)
    if bias is not None:
        z = z + per_channel(bias, z)
    return z.to(y.dtype)
