"""What a forward and a commit must ask about where they run: is a lockstep here, is a join open?

A file of its own because layers and commits ask. `lockstep` and `join`, which know layers and commits, answer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from syncaccum.errors import CommitError
from syncaccum.layer.state import Accumulating
from syncaccum.torch_private import ddp_in_forward, join_settings


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


class UnevenInputs(Protocol):
    """The open ``syncaccum.join``."""

    @property
    def model(self) -> nn.Module:
        """What was wrapped: the DistributedDataParallel."""

    def announce_commit(self, layers: Sequence[nn.Module], *, discards: bool) -> None:
        """Let ranks that have run out of inputs take part in the commit that comes. Collective.

        ``discards``: whether it drops a window with NaN or Inf rather than raise.
        """


_here = threading.local()


def lockstep_here() -> Participant | None:
    """The micro-batch of a lockstep that this thread runs; None outside of lockstep."""
    return getattr(_here, "participant", None)


@contextmanager
def taking_part(participant: Participant) -> Iterator[None]:
    """This thread runs a micro-batch of a lockstep."""
    _here.participant = participant
    try:
        yield
    finally:
        _here.participant = None


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
        _open_join = None


def refuse_ddps_own_join() -> None:
    """Raise in a forward under ``DistributedDataParallel.join()``, whose joined ranks would miss the commit.

    They wait in an all-reduce of one number. A commit's message would meet it, and gloo would abort the process.
    Asked in the forward, every rank with inputs learns it in its first one, before any has run out.
    """
    ddp = ddp_in_forward()
    if ddp is None:
        return
    settings = join_settings(ddp)
    # With early termination all ranks end at once: nobody misses a commit.
    if not settings.enable or settings.throw_on_early_termination:
        return
    if _open_join is not None and _open_join.model is ddp:
        return
    raise CommitError(
        "under DistributedDataParallel.join() ranks that have run out of inputs would miss the next commit: use "
        "`with syncaccum.join(ddp):` instead, or give those ranks empty micro-batches (N = 0) and no join. "
        "DDP remembers that it was joined: for another kind of training afterwards wrap the model anew"
    )
