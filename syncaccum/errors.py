"""The exceptions of commits, of other collective calls, and of lockstep.

What the ranks judge together, they raise together: layouts, NaN and Inf in windows, single values. A lost peer, a wrong
argument or a model without layers may show on one rank only.
"""

from __future__ import annotations


class CommitError(RuntimeError):
    """A commit did not happen: running statistics are bit-unchanged and the window is as it was.

    Also raised by the other calls that talk to the ranks of a group or ask which ranks there are: they changed nothing
    either. Where the layers have several groups, this holds for the layers that the message names as unchanged.
    """


class LayoutMismatchError(CommitError):
    """The layers of this rank are not those of its peers, or its call is another; found before anything changed."""


class NonFiniteStatisticsError(CommitError):
    """NaN or Inf in some rank's window, or in what the statistics would become. The window is kept for ``discard``."""

    where: str = ""
    """Which layers on which ranks, for people to read."""


# A ValueError, too: nn.BatchNorm raises that for one value.
class TooFewValuesError(CommitError, ValueError):
    """A layer saw one value per channel in the whole global batch. One value has no unbiased variance."""


# A ValueError, too: the model is a wrong argument.
class NoLayersError(CommitError, ValueError):
    """The model has no SyncAccumBatchNorm that tracks statistics: it was never converted, or converted back."""


class LockstepError(RuntimeError):
    """The micro-batches of a lockstep cannot go side by side, or ranks are at different layers.

    Raised in the forward, no window has changed. Raised in the backward, the windows hold the sums of the forward.
    """
