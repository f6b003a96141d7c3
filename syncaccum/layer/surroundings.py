"""What a forward and a commit must ask about where they run: is a lockstep here, is a join open?

`lockstep` and `join` import layers and commits, so these cannot import them. Both sides meet in this file: `lockstep`
and `join` leave a note here while they run, and layers and commits read it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from syncaccum.errors import CommitError
from syncaccum.layer.state import Accumulating
from syncaccum.torch_private import ddp_in_forward, join_settings, runs_in_backward


class Participant(Protocol):
    """One micro-batch on its way through the model, side by side with others."""

    def normalize(
        self,
        layer: Accumulating,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        *,
        counts: bool,
    ) -> Tensor:
        """Wait until all micro-batches have come to this layer; the output of this one. Collective.

        ``counts``: whether the layer has running statistics that this forward goes into.
        """


class Repeating(Participant, Protocol):
    """Who normalises in second forwards of a checkpoint, too."""

    def is_repeated_now(self) -> bool:
        """Whether the second forward that runs now repeats one of its first ones."""


class UnevenInputs(Protocol):
    """The open ``syncaccum.join``."""

    @property
    def model(self) -> nn.Module:
        """What was wrapped: the DistributedDataParallel."""

    def announce_commit(self, layers: Sequence[nn.Module], *, discards: bool) -> None:
        """Let ranks that have run out of inputs take part in the commit that comes. Collective.

        ``discards``: whether it drops a window with NaN or Inf rather than raise.
        """


# By thread: in lockstep each micro-batch runs in its own.
_here = threading.local()


def lockstep_here() -> Participant | None:
    """The micro-batch of a lockstep that this thread runs; None outside of lockstep."""
    return getattr(_here, "participant", None)


# By layer: a checkpoint's second forward comes in the backward,
# outside of what the user's code called, and maybe in a thread of torch.
_recomputed: weakref.WeakKeyDictionary[Accumulating, list[weakref.ref[Repeating]]] = weakref.WeakKeyDictionary()


def participant_for(layer: Accumulating) -> Participant | None:
    """Who normalises for a layer, here and now; None for the layer itself."""
    if not runs_in_backward():
        return lockstep_here()
    # A second forward: who did it in the first?
    references = _recomputed.get(layer, [])
    living = [participant for reference in references if (participant := reference()) is not None]
    return next((one for one in reversed(living) if one.is_repeated_now()), None)


def recompute_by(layers: Iterable[Accumulating], participant: Repeating) -> None:
    """Let a participant normalise in second forwards, too, for as long as anything holds it."""
    for layer in layers:
        others = [one for one in _recomputed.get(layer, []) if one() not in (None, participant)]
        _recomputed[layer] = [*others, weakref.ref(participant)]


def stop_recomputing(participant: Repeating) -> None:
    """It is over, although a graph may hold it for longer."""
    for layer, references in list(_recomputed.items()):
        if others := [one for one in references if one() not in (None, participant)]:
            _recomputed[layer] = others
        else:
            del _recomputed[layer]


class TakingPart:
    """This thread runs a micro-batch of a lockstep, between `enter` and `leave`."""

    def __init__(self, participant: Participant) -> None:
        self._participant = participant

    def enter(self) -> None:
        _here.participant = self._participant

    def leave(self) -> None:
        # Not what was before: a lockstep is never inside another.
        _here.participant = None


# Of the process: a commit may come from another thread.
_open_join: UnevenInputs | None = None


def open_join() -> UnevenInputs | None:
    """The ``syncaccum.join`` that this process is in, if any."""
    return _open_join


@contextmanager
def joining(uneven: UnevenInputs) -> Iterator[None]:
    """This process is in a ``syncaccum.join``."""
    global _open_join
    _open_join = uneven
    try:
        yield
    finally:
        # Not what was before: join refuses to be in another.
        _open_join = None


def refuse_ddps_own_join() -> None:
    """Raise in a forward under ``DistributedDataParallel.join()``: ranks without inputs would miss the commit.

    Such a rank waits in an all-reduce of one number, for the next forward of the others. If they commit instead, their
    longer message meets that number, and gloo aborts the process. Each forward asks, not the commit: so every rank
    learns of it in its first forward, before any has run out of inputs.
    """
    ddp = ddp_in_forward()
    if ddp is None:
        return
    settings = join_settings(ddp)
    # With early termination all ranks end together.
    if not settings.enable or settings.throw_on_early_termination:
        return
    # syncaccum.join uses DDP's own, and announces each commit.
    if _open_join is not None and _open_join.model is ddp:
        return
    raise CommitError(
        "under DistributedDataParallel.join() ranks that have run out of inputs would miss the next commit: use "
        "`with syncaccum.join(ddp):` instead, or give those ranks empty micro-batches (N = 0) and no join. "
        "DDP remembers that it was joined: for another kind of training afterwards wrap the model anew"
    )
