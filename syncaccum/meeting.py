"""Who a layer's forward meets: the participant of a lockstep that runs in this thread, if any.

A file of its own because layers ask, and `lockstep`, which knows layers, answers.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from syncaccum.batchnorm import SyncAccumBatchNorm


class Participant(Protocol):
    """One micro-batch on its way through the model, side by side with others."""

    def normalize(
        self, layer: SyncAccumBatchNorm, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """Wait until all micro-batches have come to this layer; the output of this one. Collective."""


_here = threading.local()


def current() -> Participant | None:
    """The participant that this thread runs; None outside of lockstep."""
    return getattr(_here, "participant", None)


def take_part(participant: Participant | None) -> None:
    """Make this thread run a participant; None for no longer."""
    _here.participant = participant
