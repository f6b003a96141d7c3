r"""Balanced feedback: what a window's backward owes is spread over the micro-batches that are still to come.

nn.BatchNorm's gradient is :math:`\gamma s (dy - A - \hat x B)`, with A and B means of dy and :math:`dy\,\hat x` over
the whole batch. A micro-batch whose backward runs alone cannot know them. Its own means are noise, and without any
feedback training diverges. So each value pays what is owed so far, divided by the values that can still pay. In total
the window gets the feedback that it owes.

What the micro-batches to come will owe is taken for nothing: the last window's means, which one might expect of them,
change their sign from window to window, and make the gradient worse.

Where the window may end early, only those that surely come can pay: `pay_soon`.

This file is arithmetic on sums per channel. It knows no layers, no data and no ranks.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from syncaccum.moments import drop_if_nonfinite

# The last micro-batches would pay all that is left, however few they are.
# Without a floor training is unstable at one sample each.
_FLOOR = 0.1
"""The values that pay are taken for no fewer than this share of the window."""

# At 1 sample each, the last ones of a window pay the noise of all.
_LEAST = 4
"""The same, in samples, where N is a guess."""


def spread(debt: Tensor, n: float, done: float, total: float) -> Tensor:
    r"""A and B: what each of ``n`` values pays, where those from ``done`` to ``total`` are to pay all of the debt.

    .. math:: \frac{\mathrm{debt}}{\max(N - \mathrm{done},\; 0.1\,N,\; n)}

    Args:
        debt: the sums of dy and :math:`dy\,\hat x` over the micro-batches up to and including this one, less what
            they have paid; per channel.
        n, done, total: values per channel in this micro-batch, in those before it, and N of the whole window.
    """
    # n: all of it, where a window is longer than expected.
    return debt / max(total - done, _FLOOR * total, n)


# In samples. With fewer, a perceptron's gradient at 1 sample each
# is worse; with more, that of a window that ends early.
_SOON = 12


def pay_soon(n: float, done: float, total: float, of_sample: float) -> float:
    """How many values pay, where the window has perhaps ``total`` values, and may end after any micro-batch.

    Those of the next 12 samples pay, or of this micro-batch and one like it. So of a window that ends early only the
    last samples' debt is left. The last ones of all pay what is left.

    Args:
        n, done, total: as in `spread`.
        of_sample: values per channel in each sample.
    """
    soon = min(total - done, max(_SOON * of_sample, 2 * n))
    return max(soon, _FLOOR * total, _LEAST * of_sample, n)


class Due(NamedTuple):
    """What a micro-batch is to pay, before the sums of its backward are known: an equal part of all that is owed."""

    owed: Tensor | None
    """By those before it, of the same window; None if it pays for itself alone."""
    payers: Tensor | float
    """How many values pay that, and what it owes itself."""
    share: float = 0.0
    """What part of it the books take off for this micro-batch."""

    def feedback(self, sums: Tensor) -> Tensor:
        """A and B, what each of its values pays, for its sums of dy and dy*x_hat, in one vector."""
        debt = sums if self.owed is None else sums + self.owed.to(sums.device)
        return debt / self.payers

    def close(self, owed: Tensor, sums: Tensor) -> Tensor:
        """What the window owes afterwards, if it owes so much now."""
        left = owed.add(sums.to(owed.device), alpha=1 - self.share)
        if self.owed is not None and self.share:
            left.sub_(self.owed, alpha=self.share)
        # Infinite gradients, as under a scaler, spoil no later ones.
        return drop_if_nonfinite(left)
