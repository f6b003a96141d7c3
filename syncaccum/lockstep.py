"""lockstep: the exact mode. All micro-batches of a window go through the model side by side.

Each BatchNorm layer is a meeting point: when all micro-batches have come to it their sums are reduced over the ranks
once, one autograd node normalises them all with the statistics of the whole global batch, and they go on. `turns`
makes them wait for each other; this file knows what happens where they meet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncaccum import meeting, uneven
from syncaccum.batchnorm import SyncAccumBatchNorm
from syncaccum.commit import named_layers
from syncaccum.errors import LockstepError, TooFewValuesError
from syncaccum.layout import verify_layout
from syncaccum.measure import measure
from syncaccum.memory_order import make_dense, per_channel
from syncaccum.moments import Moments
from syncaccum.normalization import Normalizer
from syncaccum.offload import HostStore
from syncaccum.passes import ReduceSums, normalize_together
from syncaccum.transport import Group, Transport, gather_objects, resolve_group, transport_over
from syncaccum.turns import Turns

T = TypeVar("T")
R = TypeVar("R")


def lockstep(
    model: nn.Module, forward: Callable[[T], R], micro_batches: Iterable[T], *, offload: str | None = None
) -> list[R]:
    r"""Run ``forward`` on all micro-batches side by side, every BatchNorm normalising with the whole global batch.

    The results, joined in one graph, are those of one forward on ``torch.cat`` of the micro-batches of all ranks
    with nn.BatchNorm, and so are the gradients of ``sum(losses).backward()``, up to rounding. Per channel, with n
    values :math:`x` in all micro-batches of all ranks, m their mean and v their population variance:

    .. math::
        \hat x = \frac{x - m}{\sqrt{v + \epsilon}}, \qquad y = \hat x \gamma + \beta, \qquad
        \frac{\partial L}{\partial x} = \frac{\gamma}{\sqrt{v + \epsilon}}
            \Bigl(dy - \frac{1}{n} \bigl(\textstyle\sum dy + \hat x \sum dy\, \hat x\bigr)\Bigr)

    Collective: every rank calls it, with at least one micro-batch, which may be empty (N = 0); numbers and sizes may
    differ between ranks. Each layer communicates once in forward and once in backward, however many micro-batches.
    Each rank's sums go to its layers' windows: ``commit`` stays what closes the window.

    Args:
        model: what ``forward`` calls, with SyncAccumBatchNorm layers (their policy does not matter here). Pass the
            DistributedDataParallel wrapper if there is one: its gradients come out as DDP's average over ranks.
        forward: called with each micro-batch, once, in order, but not to the end: it takes turns with the others.
            Returns anything. Must come to the same layers in the same order for each.
        micro_batches: this rank's part of the window.
        offload: ``"cpu"`` lets saved activations wait for the backward in pinned host memory.

    Returns:
        What ``forward`` returned for each micro-batch, in order.

    Raises:
        LockstepError: no micro-batches; a lockstep inside another, or inside ``join``; ``torch.utils.checkpoint``
            around a layer; layers that differ between micro-batches or ranks; DistributedDataParallel that was not
            passed as ``model``.
        TooFewValuesError: one value per channel in the whole global batch; a ValueError.
        NoLayersError: the model has no SyncAccumBatchNorm.
        CommitError: a peer is gone or stuck, at the group's timeout.
        Whatever ``forward`` raises for one micro-batch, as it was; the others are cancelled, and no window changes.

    Example::

        >>> model = syncaccum.convert_sync_accum(model)
        >>> examples = sum(len(y) for _, y in micro_batches)
        >>> forward = lambda batch: loss_fn(model(batch[0]), batch[1], reduction="sum") / examples
        >>> losses = lockstep(model, forward, micro_batches)
        >>> sum(losses).backward()
        >>> optimizer.step()
        >>> report = syncaccum.commit(model)
    """
    batches = list(micro_batches)
    if not batches:
        raise LockstepError("no micro-batches: a rank without data passes one that is empty (N = 0)")
    if meeting.current() is not None:
        raise LockstepError("lockstep inside lockstep: call it once, with all micro-batches of the window")
    if uneven.current() is not None:
        raise LockstepError("lockstep inside join: give ranks without data an empty micro-batch (N = 0), and no join")
    if offload not in (None, "cpu"):
        raise ValueError(f"offload must be None or 'cpu', got {offload!r}")
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    window = _Window(model, wrappers, len(batches))
    turns = Turns(len(batches), window.check_finish)
    results: list[Any] = [None] * len(batches)

    def run(index: int) -> None:
        meeting.take_part(_Participant(index, window, turns))
        try:
            results[index] = forward(batches[index])
        finally:
            meeting.take_part(None)

    with _eager(), _one_forward_of_ddp(wrappers, turns), HostStore().hooks() if offload else nullcontext():
        turns.run(run)
    window.keep_statistics()
    return results


@dataclass(frozen=True)
class _Participant:
    """One micro-batch, as its layers see it."""

    index: int
    window: _Window
    turns: Turns

    def normalize(
        self, layer: SyncAccumBatchNorm, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        arrival = _Arrival(layer, make_dense(x), weight, bias, eps, torch.is_grad_enabled())
        self.window.arrive(self.index, arrival)
        self.turns.give_way(self.index)
        return self.window.outputs[self.index]


@dataclass(frozen=True)
class _Arrival:
    layer: SyncAccumBatchNorm
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    grad: bool


class _Window:
    """The micro-batches of this rank, and what they share at each layer."""

    def __init__(self, model: nn.Module, wrappers: Sequence[DistributedDataParallel], size: int) -> None:
        self._layers = named_layers(model)
        self._names = {layer: name for name, layer in self._layers}
        self._numbers = {layer: number for number, (_, layer) in enumerate(self._layers)}
        self._wrappers = wrappers
        self._size = size
        self._arrivals: list[_Arrival] = []
        self._anyone_finished = False
        self._exchanges: dict[Group, _Exchange] = {}
        self._statistics: list[tuple[SyncAccumBatchNorm, Tensor]] = []
        self.outputs: Sequence[Tensor] = ()

    def arrive(self, index: int, arrival: _Arrival) -> None:
        """A micro-batch has come to a layer; the last one to come computes for all. Then collective."""
        name = self._name(arrival.layer)
        _refuse_surroundings(name, self._wrappers)
        if self._anyone_finished:
            raise LockstepError(f"micro-batch {index} meets layer {name}, but another has finished without")
        if self._arrivals and self._arrivals[0].layer is not arrival.layer:
            waiting = self._name(self._arrivals[0].layer)
            raise LockstepError(f"micro-batch {index} meets layer {name}, but the others wait for it at {waiting}")
        self._arrivals.append(arrival)
        if len(self._arrivals) == self._size:
            arrivals, self._arrivals = self._arrivals, []
            self.outputs = self._meet(arrivals)

    def check_finish(self, index: int) -> None:
        """A micro-batch has been through the whole forward."""
        self._anyone_finished = True
        if self._arrivals:
            waiting = self._name(self._arrivals[0].layer)
            raise LockstepError(f"micro-batch {index} has finished, but the others wait for it at layer {waiting}")

    def keep_statistics(self) -> None:
        """Add what the layers have seen to their windows, now that every micro-batch came through."""
        for layer, sums in self._statistics:
            layer._accumulate(sums)

    def _name(self, layer: SyncAccumBatchNorm) -> str:
        if layer not in self._names:
            raise LockstepError(f"{layer} is not part of the model passed to lockstep: pass the module that holds it")
        return self._names[layer]

    def _meet(self, arrivals: Sequence[_Arrival]) -> Sequence[Tensor]:
        first = arrivals[0]
        name = self._name(first.layer)
        if len({(a.grad, a.eps) for a in arrivals}) > 1:
            raise LockstepError(f"micro-batches meet layer {name} with and without gradients, or with different eps")
        exchange = self._exchange_of(first.layer)
        visit = self._numbers[first.layer], name
        with torch.no_grad():
            measured = [measure(a.x) for a in arrivals]
            mine = torch.stack([m.sums() for m in measured]).sum(0)
            everyones = exchange.moments(visit, mine, sum(m.n for m in measured))
            # Past the property of layers that route their own forward: it says no while they do.
            if first.layer.training and first.layer.__dict__["track_running_stats"]:
                self._statistics.append((first.layer, mine))
            to = Normalizer(
                everyones.mean, torch.rsqrt(everyones.variance + first.eps), None, None, 1 / everyones.count
            )
        xs = [a.x for a in arrivals]
        if all(a.weight is first.weight and a.bias is first.bias for a in arrivals):
            return normalize_together(xs, measured, first.weight, first.bias, to, exchange.sums_of(visit))
        plain = normalize_together(xs, measured, None, None, to, exchange.sums_of(visit))
        return [_apply_parameters(y, a) for y, a in zip(plain, arrivals, strict=True)]

    def _exchange_of(self, layer: SyncAccumBatchNorm) -> _Exchange:
        group = resolve_group(layer.process_group)
        if group not in self._exchanges:
            transport = transport_over(group)
            # The size below must be the same everywhere, so the layers must be.
            verify_layout(group, transport, self._layers)
            self._exchanges[group] = _Exchange(transport, 1 + 2 * max(layer.num_features for _, layer in self._layers))
        return self._exchanges[group]


Visit = tuple[int, str]


class _Exchange:
    """Sums over the ranks of a group, in messages of one size.

    Ranks that come to different layers would send different sizes, which gloo answers with an abort or wrong sums.
    So all messages are as long as the widest layer's, and begin with the layer's number and its square: the two
    sums fit a multiple of one number only if all ranks sent the same.
    """

    def __init__(self, transport: Transport, size: int) -> None:
        self._transport = transport
        self._size = size

    def moments(self, visit: Visit, mine: Tensor, count: int) -> Moments:
        """Everyone's moments, from this rank's packed ones. Collective."""
        everyones = Moments.unpack(self._reduce(visit, mine))
        # Asking the device costs a wait, and a rank that has two values itself need not.
        if count < 2 and everyones.count == 1:
            raise TooFewValuesError(f"one value per channel in the whole global batch has no variance, in {visit[1]}")
        return replace(everyones, count=everyones.count.clamp_min(1))  # no value at all: nothing is divided

    def sums_of(self, visit: Visit) -> ReduceSums | None:
        """What a layer's backward sums with; None where this process is alone."""
        if self._transport.size == 1:
            return None

        def reduce_sums(sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            first, second = self._reduce(visit, torch.cat(sums).to(torch.float64)).chunk(2)
            return first, second

        return reduce_sums

    def _reduce(self, visit: Visit, values: Tensor) -> Tensor:
        if self._transport.size == 1:
            return values
        number, name = visit
        device = self._transport.choose_device(values.device)
        message = torch.zeros(2 + self._size, dtype=torch.float64, device=device)
        message[:2] = torch.tensor([number, number**2], dtype=torch.float64)
        message[2 : 2 + values.numel()] = values
        self._transport.all_reduce(message)
        ranks = self._transport.size
        if message[:2].tolist() != [ranks * number, ranks * number**2]:
            theirs = gather_objects(self._transport, name)
            where = ", ".join(f"rank {rank} {layer}" for rank, layer in enumerate(theirs))
            raise LockstepError(f"ranks meet different layers: {where}. The forward must take the same way on all")
        return message[2 : 2 + values.numel()].to(values.device)


def _apply_parameters(y: Tensor, arrival: _Arrival) -> Tensor:
    """weight and bias of one micro-batch's own, which a subclass may have computed for it."""
    if arrival.weight is not None:
        y = y * per_channel(arrival.weight, y)
    if arrival.bias is not None:
        y = y + per_channel(arrival.bias, y)
    return y.to(arrival.x.dtype)


def _refuse_surroundings(name: str, wrappers: Sequence[DistributedDataParallel]) -> None:
    """Raise where a layer's caller would break the lockstep without a sign; found by looking at the stack."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            raise LockstepError(
                f"layer {name} runs under torch.utils.checkpoint, whose second forward would meet nobody: "
                "switch checkpointing off inside lockstep, or use offload='cpu' to save memory"
            )
        if frame.f_code is DistributedDataParallel.forward.__code__ and frame.f_locals["self"] not in wrappers:
            raise LockstepError("the forward calls a DistributedDataParallel: pass that as lockstep's model")


@contextmanager
def _one_forward_of_ddp(wrappers: Sequence[DistributedDataParallel], turns: Turns) -> Iterator[None]:
    """Let DDP take the K forwards for one: it broadcasts buffers in the first, and gets its reducer ready in the last.

    Otherwise each forward would do both, and ranks with different numbers of micro-batches would wait forever.
    """
    before = [(ddp.require_forward_param_sync, ddp.require_backward_grad_sync) for ddp in wrappers]

    def set_flags(index: int) -> None:
        for ddp, (forward_sync, backward_sync) in zip(wrappers, before, strict=True):
            ddp.require_forward_param_sync = forward_sync and index == 0
            ddp.require_backward_grad_sync = backward_sync and index == turns.count - 1

    turns.on_turn = set_flags
    try:
        yield
    finally:
        for ddp, (forward_sync, backward_sync) in zip(wrappers, before, strict=True):
            ddp.require_forward_param_sync = forward_sync
            ddp.require_backward_grad_sync = backward_sync


def _eager() -> Any:
    """Run compiled models as they were written: a compiled graph has no place to wait in."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
