"""lookahead: the global batch's statistics, in the memory of one micro-batch.

A first pass takes all micro-batches forward side by side, as lockstep does, but keeps nothing for a backward. It finds
the statistics. In the second pass each goes forward and backward on its own, and `books` says what feedback it pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from syncaccum.exact.attendance import refuse_unfinished
from syncaccum.exact.ddp import Wrappers
from syncaccum.exact.known import Record
from syncaccum.exact.lockstep import refuse_call, run_side_by_side
from syncaccum.exact.meeting_point import MeetingPoint, Mode
from syncaccum.exact.module_states import ModuleStates
from syncaccum.exact.offload import WaitingRoom, shared_tensors, stay
from syncaccum.exact.process_state import Eager, run_under
from syncaccum.exact.second_pass import SecondPass
from syncaccum.exact.shards import refuse_around, start_over
from syncaccum.exact.streams import Streams
from syncaccum.exact.thread_state import NoGraph
from syncaccum.layer import surroundings
from syncaccum.torch_private import is_fully_sharded, version_of

T = TypeVar("T")
R = TypeVar("R")


def lookahead(
    model: nn.Module, forward: Callable[[T], R], micro_batches: Iterable[T], *, offload: str | None = None
) -> Iterator[R]:
    r"""Yield ``forward``'s result for each micro-batch, every BatchNorm normalising with the whole global batch.

    The forward is exact: statistics, outputs and losses are those of one forward on ``torch.cat`` of the micro-batches
    of all ranks with nn.BatchNorm, up to rounding. The gradient is not, but close: nn.BatchNorm's

    .. math:: \frac{\partial L}{\partial x} = \frac{\gamma}{\sqrt{v + \epsilon}} \bigl(dy - A - \hat x B\bigr)

    has the means A and B of dy and :math:`dy\,\hat x` over the global batch. No micro-batch's backward can know them.
    Here each pays what the window owes so far, spread over the values still to come (*balanced feedback*), so that in
    total the window gets what it owes. Memory is that of one micro-batch's activations, and in the first pass one input
    of one layer for each micro-batch. Time is one more forward.

    Collective: every rank calls it, with at least one micro-batch, which may be empty (N = 0); numbers and sizes may
    differ between ranks. Each layer communicates once, in the first ``next()``. Then there is one message for each
    micro-batch but the last, which is on its way during the next one's forward, and a short one when the iterator ends.
    Statistics go to the windows in the first ``next()``: ``commit`` stays what closes them.

    Args:
        model: what ``forward`` calls, with SyncAccumBatchNorm layers (their policy does not matter here). Pass the
            DistributedDataParallel wrapper if there is one: buffers are broadcast once, gradients are reduced in the
            last micro-batch's backward. ``no_sync()`` is not needed. Or pass the root under ``fully_shard``: all ranks
            need equally many micro-batches then, and each backward reduces gradients.
        forward: called twice with each micro-batch, first under ``no_grad``. Must do the same both times. Random
            numbers are the same in both: those of torch, Python and NumPy, and of generators that are attributes of
            modules. Buffers and attributes of other modules are put back after the first pass.
        micro_batches: this rank's part of the window.
        offload: ``"cpu"`` lets the inputs that wait at a layer in the first pass do so in pinned host memory. What else
            a waiting forward holds, such as the input of a residual block, stays on the device.

    Yields:
        What ``forward`` returns for each micro-batch, in order, to be walked backward before the next is taken.

    Raises:
        LockstepError: no micro-batches; inside lockstep or ``join``; unequal numbers of them under ``fully_shard``; a
            result that was not walked backward before the next was taken; layers that differ between micro-batches,
            ranks or passes; a forward whose values differ between passes on any rank, when the iterator ends; a peer
            that gave up.
        TooFewValuesError: one value per channel in the whole global batch; a ValueError.
        NoLayersError: the model has no SyncAccumBatchNorm.
        ValueError: ``offload`` is neither None nor ``"cpu"``.
        CommitError: a peer is gone or stuck, at the group's timeout.
        Whatever ``forward`` raises. An iterator that is left before its last result was walked puts the windows
            back as they were.

    Source: ours; Chiley et al. 2019 (arXiv:1905.05894) take errors of the feedback back from later samples, too.

    Note:
        Compiled functions run as they were written until the iterator ends, those of the loop's body, too: a compiled
        graph has no place to wait in, and a checkpoint runs its block again in the backward.

    Example::

        >>> model = syncaccum.convert_sync_accum(model)
        >>> examples = sum(len(y) for _, y in micro_batches)
        >>> forward = lambda batch: loss_fn(model(batch[0]), batch[1], reduction="sum") / examples
        >>> for loss in lookahead(model, forward, micro_batches):
        ...     loss.backward()
        >>> optimizer.step()
        >>> report = syncaccum.commit(model)
    """
    batches = list(micro_batches)
    refuse_call("lookahead", len(batches), offload)
    return _walk(model, forward, batches, shared_tensors(model, batches) if offload else None)


def _walk(
    model: nn.Module, forward: Callable[[T], R], batches: Sequence[T], shared: Sequence[Tensor] | None
) -> Iterator[R]:
    streams, states = Streams(model, len(batches)), ModuleStates(model)
    record = Record(stay if shared is None else WaitingRoom(shared).park)
    mode = Mode("lookahead", record.note, record.arrive, lambda name: None, streams.begin_turn)
    wrappers = Wrappers(model, 1)

    def run_first() -> MeetingPoint:
        wrappers.refuse_around()
        refuse_around()
        return run_side_by_side(mode, model, forward, batches)[1]

    meeting = run_under([states, streams, NoGraph()], run_first)
    # Until the end: a checkpoint runs its block in the user's backward.
    eager = Eager()
    # Weights cast under no_grad would have no gradient.
    torch.clear_autocast_cache()
    is_sharded = any(is_fully_sharded(module) for module in model.modules())
    second = SecondPass(record.visits, len(batches), meeting.exchange_of, in_step=is_sharded)
    surroundings.recompute_by([visit.layer for visit in record.visits], second)
    windows = _Windows(meeting)
    wrappers.prepare_to_go_alone()
    try:
        eager.enter()
        for index, batch in enumerate(batches):
            second.check_walked()
            second.begin(index)
            result = _run_alone(forward, batch, second, wrappers, streams, states)
            second.end_forward()
            if is_sharded or (second.is_last and wrappers.reduce_in_backward):
                second.begin_reduction()
            yield result
            # Gone before the next one needs memory.
            del result
        eager.leave()
        second.end()
    except BaseException as error:
        eager.leave()
        surroundings.stop_recomputing(second)
        if is_sharded and not isinstance(error, GeneratorExit):
            start_over(model.modules())
        # The user's loop was left. After the last result, all is well.
        is_well = isinstance(error, GeneratorExit) and second.is_complete
        try:
            if is_well:
                second.end()
        except BaseException:
            is_well = False
            raise
        finally:
            if not is_well:
                windows.take_back()
                second.give_up()
        raise
    # The last result may still be walked, and is known again then.
    if second.is_complete:
        surroundings.stop_recomputing(second)


def _run_alone(
    forward: Callable[[T], R],
    batch: T,
    second: SecondPass,
    wrappers: Wrappers,
    streams: Streams,
    states: ModuleStates,
) -> R:
    """One micro-batch's forward in the second pass."""

    def run() -> R:
        wrappers.go_alone(last=second.is_last)
        streams.begin_turn(second.index)
        states.restore_parametrizations()
        return refuse_unfinished(forward(batch))

    return run_under([wrappers, streams, surroundings.TakingPart(second)], run)


class _Windows:
    """The windows before and after the first pass has added its statistics, and the way back."""

    def __init__(self, meeting: MeetingPoint) -> None:
        states = [layer._accumulation for layer in meeting.statistics]
        before = [(state.window.clone(), {name: getattr(state, name) for name in _COUNTED}) for state in states]
        meeting.keep_statistics()
        self._all = [(s, s.window, version_of(s.window), *b) for s, b in zip(states, before, strict=True)]

    def take_back(self) -> None:
        """Put them back, unless there was a commit or another forward since."""
        for state, window, version, values, counted in self._all:
            if state.window is window and version_of(window) == version and window.shape == values.shape:
                window.copy_(values)
                vars(state).update(counted)


_COUNTED = ("is_open", "micro_batches", "locksteps")
"""What a layer knows of its window, besides the sums."""
