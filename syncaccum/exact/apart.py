"""A meeting under offload: the device holds one micro-batch at a time, also where all wait for each other.

One autograd node for all of them needs all inputs and outputs at once, and so all gradients. Here each micro-batch has
two nodes of its own, and all have a small one in common, which sees sums alone:

    x -> _Arrive -> token -> _Meet, of all -> token -> _Depart -> y

In the backward _Depart sums up dy, and sends it to the host. _Meet adds up over micro-batches and ranks. _Arrive brings
dy back, and has the gradient of x. A token has the sums for its gradient, and no values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from syncaccum.exact.meeting_point import Arrival, Meeting, make_arrival
from syncaccum.exact.offload import HostStore, Parked, WaitingRoom
from syncaccum.layer.compose import refuse_create_graph
from syncaccum.layer.measure import measure, measured_before
from syncaccum.layer.memory_order import match_order
from syncaccum.layer.state import Accumulating
from syncaccum.layer.steps import Steps

LEAD = 256
"""More nodes than a micro-batch makes between two layers, mostly. To make one takes 0.2 us."""

Normalize = Callable[[Meeting], Callable[[int], Tensor]]


@dataclass(frozen=True)
class _Waiting(Arrival):
    """A micro-batch whose input waits in host memory."""

    token: Tensor | None = None
    way: _Way | None = None
    bring_back: Callable[[], None] = lambda: None


@dataclass(eq=False)
class _Way:
    """What the two nodes of a micro-batch at a meeting tell each other."""

    store: HostStore
    steps: Steps | None = None
    """How the gradient is computed; known from the meeting on."""
    dy: Tensor | Parked | None = field(default=None)


class Apart:
    """The meetings of a lockstep with offload.

    Args:
        store: where what is saved goes.
        room: where what waits goes.
        otherwise: what to do at a meeting whose inputs do not wait in host memory.
    """

    def __init__(self, store: HostStore, room: WaitingRoom, otherwise: Normalize) -> None:
        self._store = store
        self._room = room
        self._otherwise = otherwise

    def arrive(
        self, layer: Accumulating, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, counts: bool
    ) -> Arrival:
        """An arrival; it is measured, and its input sent to the host."""
        arrival = make_arrival(layer, x, weight, bias, eps, counts)
        x = arrival.x
        # A checkpoint keeps no inputs, and has nodes of its own.
        if len(arrival.hooks) != 1 or not self._store.takes(x):
            return arrival
        with torch.no_grad():
            # Not a float32 copy of the values: all would wait with theirs.
            measured = measure(x)._replace(values=x)
        way = _Way(self._store)
        token: Tensor = _Arrive.apply(way, measured.mean, x)  # type: ignore[no-untyped-call]
        bring_back = self._room.park(x)
        return _Waiting(
            layer, x, weight, bias, eps, arrival.grad, counts, measured, arrival.hooks, token, way, bring_back
        )

    def meet(self, meeting: Meeting) -> Callable[[int], Tensor]:
        """What to do at a meeting."""
        waiting: list[Any] = list(meeting.arrivals)
        if not meeting.shares_parameters or not all(isinstance(one, _Waiting) for one in waiting):
            for one in waiting:
                if isinstance(one, _Waiting):
                    one.bring_back()
            return self._otherwise(meeting)
        first = waiting[0]
        steps = Steps(meeting.norm, first.weight, first.bias, meeting.vectors)
        tokens = _Meet.apply(steps, meeting.reduce_sums, first.weight, first.bias, *(one.token for one in waiting))  # type: ignore[no-untyped-call]
        # Not the meeting: it holds all inputs.
        center = meeting.norm.center
        is_far = any(m.origin is not None for m in meeting.measured)

        def take(index: int) -> Tensor:
            # Not kept: the output needs memory.
            one, waiting[index] = waiting[index], None
            one.bring_back()
            one.way.steps = steps
            measured = measured_before(one.x.detach(), center, is_far=is_far)
            y: Tensor = _Depart.apply(one.way, measured, one.x.detach(), tokens[index])  # type: ignore[no-untyped-call]
            return y

        return take


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, way, mean, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.way = way
        return mean.new_zeros(2, x.shape[1])

    @staticmethod
    def backward(ctx, sums):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        way = ctx.way
        dy, way.dy = way.dy, None
        if dy is None:  # no loss depends on this micro-batch's output
            dy = torch.zeros_like(x)
        return None, None, way.steps.apply_gradient(dy.take() if isinstance(dy, Parked) else dy, x, sums)


class _Meet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, steps, reduce_sums, weight, bias, *tokens):  # type: ignore[no-untyped-def]
        ctx.steps, ctx.reduce_sums = steps, reduce_sums
        return tuple(token.clone() for token in tokens)

    @staticmethod
    def backward(ctx, *sums):  # type: ignore[no-untyped-def]
        local = torch.stack(sums).sum(0)
        # From this process's sums: DDP adds up the others'.
        dweight, dbias = ctx.steps.parameter_gradients(local)
        everyones = ctx.steps.reduce(local, ctx.reduce_sums)
        wanted = ctx.needs_input_grad[2:4]
        return None, None, dweight if wanted[0] else None, dbias if wanted[1] else None, *[everyones] * len(sums)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, way, measured, x, token):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.way = way
        return way.steps.apply(x, measured)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            refuse_create_graph()
        (x,) = ctx.saved_tensors
        dy = match_order(dy, x)
        sums = ctx.way.steps.sum_up(dy, x)
        ctx.way.dy = ctx.way.store.keep(dy)
        return None, None, None, sums
