r"""Balanced feedback: what a window's backward owes is spread over the micro-batches that are still to come.

nn.BatchNorm's gradient is :math:`\gamma s (dy - A - \hat x B)`, with A and B means of dy and :math:`dy\,\hat x` over
the whole batch. A micro-batch whose backward runs alone cannot know them. Its own means are noise, and without any
feedback training diverges. So each value pays what is owed as far as it is known, divided by the values that can still
pay. In total the window gets the feedback that it owes.

This file is arithmetic on sums per channel. It knows no layers, no data and no ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The last micro-batches would pay all that is left, however few they are.
# Without a floor training is unstable at one sample each.
_FLOOR = 0.1
"""The values that pay are taken for no fewer than this share of the window."""


def feedback_per_value(debt: Tensor, expected: Tensor, n: float, done: float, total: float) -> Tensor:
    r"""A and B for a micro-batch of ``n`` values.

    .. math:: \frac{\mathrm{debt} + (N - \mathrm{done} - n)\,P}{\max(N - \mathrm{done},\; 0.1\,N)}

    Args:
        debt: the sums of dy and :math:`dy\,\hat x` over the micro-batches up to and including this one, less what
            they have paid; per channel.
        expected: P, what the mean of each will be in the micro-batches to come.
        n, done, total: values per channel in this micro-batch, in those before it, and N of the whole window.
    """
    # A window may be longer than expected: nothing is to come then.
    to_come = max(total - done - n, 0.0)
    return spread(torch.add(debt, expected, alpha=to_come), n, done, total)


def spread(debt: Tensor, n: float, done: float, total: float) -> Tensor:
    """What each of n values pays, where those from ``done`` to ``total`` are to pay all of the debt."""
    # n: all of it, where a window is longer than expected.
    return debt / max(total - done, _FLOOR * total, n)
