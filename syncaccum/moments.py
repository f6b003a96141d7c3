"""Moments: additive float64 sums of a channel's values. Pure: this file knows no ranks and no modules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


# eq=False: tensors compare element by element, which is no bool.
# frozen: several owners may share one.
@dataclass(frozen=True, eq=False)
class Moments:
    r"""Count, sum and sum of squares per channel, in float64.

    Adding two moments gives the moments of the two sets of values together. So any split of a batch into
    micro-batches and ranks gives the same sums, and one SUM all-reduce is the whole protocol:

    .. math:: n = \sum 1, \qquad S_1 = \sum x, \qquad S_2 = \sum x^2,
              \qquad m = S_1 / n, \qquad v = S_2 / n - m^2

    S_2/n - m^2 cancels: float64 loses about ``(mean/std)^2 * 1e-16`` of the variance: 1e-8 at mean/std 1e4, and all
    of it at 1e8. That is the limit of a window, and of the running variance that a commit makes of it; float32 data
    end at 1e7 by themselves. Counts below 2**53 are exact. Totals are in the unit of the values, squares in its
    square. No method is collective.

    *Packed*, moments are one flat tensor ``[count, total, total_sq]`` of length 1 + 2C: a window,
    or a part of a message.

    Args:
        count: values per channel; shape ``()``, float64.
        total: :math:`S_1`; shape ``(C,)``, float64.
        total_sq: :math:`S_2`; shape ``(C,)``, float64.

    Example::

        >>> first, second = torch.randn(3, 8), torch.randn(5, 8)
        >>> both = Moments.of(first) + Moments.of(second)  # as Moments.of(torch.cat([first, second]))
        >>> both.count
        tensor(8., dtype=torch.float64)
    """

    count: Tensor
    total: Tensor
    total_sq: Tensor

    @staticmethod
    def packed_size(channels: int) -> int:
        """How many numbers the packed moments of so many channels are."""
        return 1 + 2 * channels

    @classmethod
    def zeros(cls, channels: int, device: torch.device | str | None = None) -> Moments:
        """The moments of no values at all: the neutral element of the sum."""
        return cls.unpack(cls.zeros_packed(channels, device))

    @classmethod
    def zeros_packed(cls, channels: int, device: torch.device | str | None = None) -> Tensor:
        """The packed moments of no values: an empty window."""
        return torch.zeros(cls.packed_size(channels), dtype=torch.float64, device=device)

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """The moments of a tensor whose dimension 1 is the channel; shape ``(N, C, *)``, any real dtype."""
        # Wide before the squares: a float32 square has lost digits.
        # Detached: no gradient flows through a window.
        columns = values.detach().movedim(1, -1).reshape(-1, values.shape[1]).to(torch.float64)
        # On the sums' device: pack() joins them.
        count = torch.tensor(float(columns.shape[0]), dtype=torch.float64, device=values.device)
        return cls(count, columns.sum(0), columns.square().sum(0))

    @classmethod
    def unpack(cls, flat: Tensor) -> Moments:
        """Moments that are views into packed ones: they change with it."""
        channels = (flat.numel() - 1) // 2
        return cls(flat[0], flat[1 : 1 + channels], flat[1 + channels :])

    def pack(self) -> Tensor:
        """A new flat float64 tensor laid out as ``[count, total, total_sq]``."""
        return torch.cat([self.count.reshape(1), self.total, self.total_sq])

    def __add__(self, other: Moments) -> Moments:
        # New tensors: somebody may hold either side.
        return Moments(self.count + other.count, self.total + other.total, self.total_sq + other.total_sq)

    @property
    def mean(self) -> Tensor:
        """Mean per channel; NaN where the count is 0."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """Population variance per channel (divides by n); NaN where the count is 0."""
        # Rounding can leave a constant channel below zero.
        return (self.total_sq / self.count - self.mean.square()).clamp_min(0)


def drop_if_nonfinite(sums: Tensor) -> Tensor:
    """The sums, or zeros if one of them is NaN or infinite. A GPU is not waited for."""
    all_together = sums.sum()
    # NaN less itself is NaN, and so is infinity's.
    return torch.where(all_together - all_together == 0, sums, 0.0)


def pack_statistics(n: Tensor | float, mean: Tensor, variance: Tensor) -> Tensor:
    """Packed :class:`Moments` of n values per channel, from their float64 mean and population variance."""
    # S1 = n m, and S2 = n (v + m^2).
    # In this order: it costs three operations, one less than pack().
    return torch.cat((mean.new_ones(1), mean, torch.addcmul(variance, mean, mean))).mul_(n)
