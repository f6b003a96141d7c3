"""lockstep: the exact mode. All micro-batches of a window go through the model side by side.

Each BatchNorm layer is a meeting point. When all micro-batches have come to it, their sums are reduced over the ranks
once, and one autograd node normalises them all with the statistics of the whole global batch. Then they go on.
`turns` makes them wait for each other. `meeting_point` knows what happens where they meet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch.utils.checkpoint
from torch import Tensor, nn

from syncaccum.errors import LockstepError
from syncaccum.exact.apart import LEAD, Apart
from syncaccum.exact.attendance import Attendance, refuse_unfinished
from syncaccum.exact.bystanders import Bystanders
from syncaccum.exact.checkpoints import Checkpoints, has_checkpoint
from syncaccum.exact.ddp import Wrappers
from syncaccum.exact.meeting_point import MeetingPoint, Mode, make_arrival
from syncaccum.exact.offload import HostStore, WaitingRoom, shared_tensors
from syncaccum.exact.openmp import Teams
from syncaccum.exact.parametrizations import SharedWeights
from syncaccum.exact.process_state import Eager, run_under
from syncaccum.exact.shards import Gate, Shards
from syncaccum.exact.streams import Asides
from syncaccum.exact.turns import Turns
from syncaccum.layer import surroundings
from syncaccum.layer.state import Accumulating
from syncaccum.torch_private import all_saved_tensor_hooks, without_dispatch_modes

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

    Alone, a process is as accurate as nn.BatchNorm in float64 at any mean. Ranks send sums of x less the running mean,
    in float64, which lose ``((mean - running mean)/std)^2 * 1e-16`` of the variance: 1e-8 where that ratio is 1e4. What
    goes to the windows has the limit of :class:`Moments`.

    Args:
        model: what ``forward`` calls, with SyncAccumBatchNorm layers (their policy does not matter here). Pass the
            DistributedDataParallel wrapper if there is one, or the root under ``fully_shard``: gradients come out as
            their average over ranks.
        forward: called with each micro-batch, once, in order, but not to the end: it takes turns with the others.
            Returns anything. Must come to the same layers in the same order for each.
        micro_batches: this rank's part of the window.
        offload: ``"cpu"`` lets saved activations wait for the backward in pinned host memory, and at each layer the
            inputs of all micro-batches and their gradients. What else a waiting forward holds, such as the input of a
            residual block, stays on the device, as do inputs of a layer that are part of ``micro_batches``.

    Returns:
        What ``forward`` returned for each micro-batch, in order.

    Raises:
        LockstepError: no micro-batches; a lockstep inside another, inside ``join`` or under
            ``torch.utils.checkpoint``; a reentrant checkpoint around a layer, or any around parametrized weights;
            layers, or modules under ``fully_shard``, that differ between micro-batches or ranks;
            DistributedDataParallel, or such a module around a layer, that was not passed as ``model``, or that a
            lockstep in another thread goes through; a forward that comes to no layer of a model in training, or
            returns a generator or a coroutine; fewer threads to be had than needed.
        TooFewValuesError: one value per channel in the whole global batch; a ValueError.
        NoLayersError: the model has no SyncAccumBatchNorm.
        ValueError: ``offload`` is neither None nor ``"cpu"``.
        CommitError: a peer is gone or stuck, at the group's timeout.
        Whatever ``forward`` raises for one micro-batch, as it was, or a signal's handler, as KeyboardInterrupt; the
            others are cancelled and waited for, and no window changes.
        The backward raises LockstepError and CommitError, too: it communicates, and second forwards of checkpoints
            may differ from the first ones. Windows have their sums by then.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), with the global batch as the batch.

    Note:
        Parametrized weights, as of ``parametrizations.spectral_norm``, are computed once for all micro-batches. One
        warning names other modules whose training forward changes their buffers: K micro-batches change them K times.

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
    refuse_call("lockstep", len(batches), offload)
    _refuse_around()
    checkpoints = Checkpoints()
    mode = Mode("lockstep", checkpoints.meet, make_arrival, _refuse_reentrant, lambda index: None)
    hooks: AbstractContextManager[Any] = nullcontext()
    if offload:
        store = HostStore()
        hooks = store.hooks()
        apart = Apart(store, WaitingRoom(shared_tensors(model, batches), store), checkpoints.meet)
        mode = replace(mode, normalize=apart.meet, make_arrival=apart.arrive, lead=LEAD)
    with hooks:
        results, meeting = run_side_by_side(mode, model, forward, batches)
    meeting.keep_statistics()
    checkpoints.await_backward()
    return results


def refuse_call(call: str, count: int, offload: str | None) -> None:
    """Raise where there is nothing to run, or no way to run it here."""
    if count == 0:
        raise LockstepError("no micro-batches: a rank without data passes one that is empty (N = 0)")
    if surroundings.lockstep_here() is not None:
        raise LockstepError(f"{call} inside lockstep: call it once, with all micro-batches of the window")
    if surroundings.open_join() is not None:
        raise LockstepError(f"{call} inside join: give ranks without data an empty micro-batch (N = 0), and no join")
    if offload not in (None, "cpu"):
        raise ValueError(f"offload must be None or 'cpu', got {offload!r}")


def run_side_by_side(
    mode: Mode, model: nn.Module, forward: Callable[[T], R], batches: Sequence[T]
) -> tuple[list[R], MeetingPoint]:
    """Run ``forward`` on all micro-batches side by side; what it returned, and where they met. Collective.

    The statistics are at the meeting point, and in no window yet.
    """
    wrappers = Wrappers(model, len(batches))
    weights = SharedWeights(model)
    bystanders = Bystanders(model)
    attendance = Attendance(model, mode.call)
    teams = Teams(model, len(batches))
    asides = Asides(model)
    shards = Shards(model, mode.call)

    def check_surroundings(layer: Accumulating, name: str) -> None:
        mode.check_layer(name)
        wrappers.refuse_others(layer)
        shards.refuse_others(name)

    def begin_turn(index: int) -> None:
        wrappers.begin_turn(index)
        bystanders.begin_turn(index)
        mode.begin_turn(index)

    # Micro-batches meet in layers; turns say who runs meanwhile.
    meeting = MeetingPoint(model, len(batches), check_surroundings, mode)
    turns = Turns(len(batches), begin_turn, meeting.check_finish)
    results: list[Any] = [None] * len(batches)

    def run(index: int) -> None:
        participant = _Participant(index, mode, meeting, turns, teams, asides)

        def run_one() -> None:
            with weights.for_one(), shards.for_one(participant.pass_gate):
                results[index] = refuse_unfinished(forward(batches[index]))

        run_under([surroundings.TakingPart(participant)], run_one)
        teams.release()

    def run_all() -> None:
        turns.run(run)
        wrappers.end()
        shards.end()

    run_under([teams, Eager(), weights, attendance, asides, wrappers, shards], run_all)
    # It ran well. Was it exact? Only then the windows may change.
    bystanders.end_turn()
    attendance.check(met=meeting.anyone_met)
    bystanders.tell(len(batches))
    return results, meeting


@dataclass(frozen=True)
class _Participant:
    """One micro-batch, as its layers see it."""

    index: int
    mode: Mode
    meeting: MeetingPoint
    turns: Turns
    teams: Teams
    asides: Asides

    def normalize(
        self, layer: Accumulating, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, counts: bool
    ) -> Tensor:
        arrival = self.mode.make_arrival(layer, x, weight, bias, eps, counts)
        is_repeated = has_checkpoint(arrival.hooks)
        with _unseen(is_repeated):
            self.meeting.arrive(self.index, arrival)
        del arrival  # the meeting alone holds it
        y: Tensor = self._wait(is_repeated)
        return y

    def pass_gate(self, gate: Gate, value: Any) -> Any:
        """What a gate gives for what this micro-batch comes with, once all have come. Collective."""
        is_repeated = torch.is_grad_enabled() and has_checkpoint(all_saved_tensor_hooks())
        with _unseen(is_repeated):
            self.meeting.arrive_at_gate(self.index, gate, value)
        del value
        return self._wait(is_repeated)

    def _wait(self, is_repeated: bool) -> Any:
        self.teams.release()
        with self.asides.while_waiting() if is_repeated else nullcontext():
            self.turns.give_way(self.index)
        return self.meeting.take(self.index)


def _unseen(is_repeated: bool) -> AbstractContextManager[Any]:
    """Where micro-batches meet. A selective checkpoint counts operators, to know them again: these it does not see."""
    return without_dispatch_modes() if is_repeated else nullcontext()


def _refuse_around() -> None:
    """Raise where lockstep itself runs under a checkpoint."""
    if any(code.co_filename == torch.utils.checkpoint.__file__ for code in _codes_on_stack()):
        raise LockstepError(
            "lockstep runs under torch.utils.checkpoint, which would run all of it a second time: use checkpoints "
            "inside of forward"
        )


def _refuse_reentrant(layer: str) -> None:
    """Raise where a layer runs under such a checkpoint. Only the stack tells, so it is asked once for each meeting."""
    if torch.utils.checkpoint.CheckpointFunction.forward.__code__ in _codes_on_stack():
        raise LockstepError(
            f"layer {layer} runs under torch.utils.checkpoint with use_reentrant=True, which walks each micro-batch "
            "backward on its own: call checkpoint(..., use_reentrant=False)"
        )


def _codes_on_stack() -> Iterator[CodeType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back
