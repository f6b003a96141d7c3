"""What can go wrong between ranks and micro-batches, as exceptions. Every rank of a group raises the same."""

from __future__ import annotations


class CommitError(RuntimeError):
    """A commit did not happen: running statistics are bit-unchanged and the window is as it was."""


class LayoutMismatchError(CommitError):
    """The layers of this rank are not those of its peers, found before any statistics were sent."""


class NonFiniteStatisticsError(CommitError):
    """NaN or Inf in some rank's window, or in what statistics would become; the window is kept until ``discard``."""

    where: str = ""
    """Which layers on which ranks, for people to read."""


class TooFewValuesError(CommitError, ValueError):
    """A layer saw a single value per channel in the whole global batch, which has no variance."""


class NoLayersError(CommitError, ValueError):
    """The model has no SyncAccumBatchNorm that tracks statistics: it was never converted, or converted back."""


class LockstepError(RuntimeError):
    """The micro-batches of a lockstep cannot go side by side; no statistics were kept."""
