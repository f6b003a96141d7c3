r"""What a window under policy "window" starts with: the windows before it, counted for as many samples as they help.

The next window's mean is not the last one's, because weights have changed. If it drifts little, the last one's samples
are as good as its own, and many of them make its first micro-batches less noisy. If it drifts as far as single samples
lie apart, they are worth one. So after a window of mean m and variance v, whose own prior had mean :math:`m_p`:

.. math::
    p &= 1 \big/ \mathrm{clip}\bigl(D / \tau - 1/I,\; 1/16,\; 1\bigr), \\
    D &= \operatorname{mean}_c \frac{(m - m_p)^2}{v + \epsilon}, \qquad
    \tau = \operatorname{mean}_c \frac{\sum_k i_k (m_k - m)^2}{(K - I_0 / I)\,(v + \epsilon)}

D is how far the mean came from where the window started. :math:`\tau` is the same of two single samples, from the means
:math:`m_k` of this rank's K micro-batches of :math:`i_k` samples, :math:`I_0` in all; I are all ranks' samples, and
:math:`\tau / I` is the noise of m itself. The new prior is the window with its I samples and the old prior with p,
pooled, and it counts for p. A rank needs nothing of the others but m and v, which the commit has.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from syncaccum.layer.accumulation import Accumulation
from syncaccum.layer.ledger import NEW_WINDOW, Ledger
from syncaccum.moments import Moments
from syncaccum.torch_private import copy_all, zero_all
from syncaccum.window.taken import Taken, steps_of_rest_in_books
from syncaccum.window.uninterrupted import step_of_updates

_MOST, _AFTER_FIRST = 16.0, 4.0
"""A prior is worth so many samples at most; and so many after a first window, which tells nothing of the drift."""

_ROUNDING = 1e-12
"""Of a variance over a variance: less is none."""


def steps_of_commit(
    states: Sequence[Accumulation],
    eps: Sequence[float],
    n: Tensor,
    mean: Tensor,
    mean_sq: Tensor,
    taken: Sequence[Taken] | None = None,
) -> list[partial[Any]]:
    """The steps that make a prior of each open window, and start a new one. Its books are closed later.

    All channels of all layers at once: a few operations for each layer would take longer.

    Args:
        states: of layers under policy "window".
        eps: theirs.
        n, mean, mean_sq: of the global batch, for each channel of each of these layers.
        taken: this rank's part of it; None for all that is in the windows.
    """
    ledgers = [state.ledger for state in states if state.ledger is not None]
    layers = _find_layers(tuple(ledger.squares.numel() for ledger in ledgers), n.device)
    old = layers.join([ledger.prior for ledger in ledgers])
    variance = torch.addcmul(mean_sq, mean, mean, value=-1).clamp_min(0) + layers.spread(n.new_tensor(eps))
    here = _Here.of(taken or [Taken.of(state) for state in states], layers, n)
    drift = layers.average((mean - old.mean).square() / variance) / (here.tau(mean, variance, layers) + _ROUNDING)
    # A rank without samples cannot tell.
    worth = torch.where(here.samples > 0, 1 / (drift - 1 / here.everyones).clamp(1 / _MOST, 1), old.count)
    share = layers.spread(here.everyones / (here.everyones + torch.where(old.count > 0, worth, 0.0)))
    worth = torch.where(old.count > 0, worth, _AFTER_FIRST)
    wide = layers.spread(worth)
    rows = [torch.lerp(old.mean, mean, share) * wide, torch.lerp(old.mean_sq, mean_sq, share) * wide]
    priors = [Moments.unpack(ledger.prior) for ledger in ledgers]
    parts = [[prior.count for prior in priors], [prior.total for prior in priors], [prior.total_sq for prior in priors]]
    values = [worth.unbind(), *(torch.split(row, layers.widths) for row in rows)]
    return [
        # One call: a signal comes before or after it.
        partial(copy_all, list(itertools.chain(*parts)), list(itertools.chain(*values))),
        *(_steps_of_new_books(ledgers) if taken is None else steps_of_rest_in_books(states, taken)),
        step_of_updates(ledgers, [{"number": one.number + 1, "knows_prior": True} for one in ledgers]),
    ]


def _steps_of_new_books(ledgers: Sequence[Ledger]) -> list[partial[Any]]:
    return [
        partial(zero_all, [ledger.squares for ledger in ledgers]),
        step_of_updates(ledgers, itertools.repeat(NEW_WINDOW)),
    ]


@dataclass(frozen=True)
class _Here:
    """What this rank knows of its own micro-batches."""

    samples: Tensor
    """By layer; and so all else but the last two, which are by channel."""
    everyones: Tensor
    """The samples of all ranks."""
    freedom: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, taken: Sequence[Taken], layers: _Layers, n: Tensor) -> _Here:
        window = layers.join([one.window for one in taken])
        samples, micro_batches = n.new_tensor([[one.samples, one.booked] for one in taken]).unbind(1)
        n = n.index_select(0, layers.starts)
        everyones = torch.where(samples > 0, n * samples / window.count.clamp_min(1), n)
        # About the mean of all: K - 1 where all are here.
        freedom = (micro_batches - samples / everyones).clamp_min(1e-6)
        squares = torch.cat([one.squares for one in taken if one.squares is not None]).to(n.device)
        return cls(samples, everyones, freedom, window.mean, squares)

    def tau(self, mean: Tensor, variance: Tensor, layers: _Layers) -> Tensor:
        """How far single samples lie apart, of deviations squared."""
        # Sum of i (m_k - m)^2.
        apart = self.squares + (mean - 2 * self.mean) * mean * layers.spread(self.samples)
        return layers.average(apart / variance).clamp_min(0) / self.freedom


@dataclass(frozen=True)
class _Joined:
    """Moments of several layers: a count for each layer, the rest for each channel."""

    count: Tensor
    mean: Tensor
    mean_sq: Tensor


@dataclass(frozen=True)
class _Layers:
    """Which channel is whose, where all channels of all layers are in one vector."""

    widths: list[int]
    channels: Tensor
    """The widths again, in float64."""
    starts: Tensor
    of_channels: Tensor

    def join(self, packed: Sequence[Tensor]) -> _Joined:
        """Packed moments; the mean of nothing is 0."""
        moments = [Moments.unpack(one) for one in packed]
        count = torch.stack([one.count for one in moments]).to(self.starts.device)
        sums = torch.cat([one.total for one in moments] + [one.total_sq for one in moments]).to(count.device)
        mean, mean_sq = (sums.view(2, -1) / self.spread(torch.where(count > 0, count, 1.0))).unbind()
        return _Joined(count, mean, mean_sq)

    def spread(self, values: Tensor) -> Tensor:
        """One value for each layer, for each of its channels."""
        return values.index_select(0, self.of_channels)

    def average(self, values: Tensor) -> Tensor:
        """The mean over each layer's channels."""
        return values.new_zeros(len(self.widths)).index_add_(0, self.of_channels, values) / self.channels


# Remembered: it takes as long as all of the arithmetic.
@functools.lru_cache(maxsize=16)
def _find_layers(widths: tuple[int, ...], device: torch.device) -> _Layers:
    # Named, because a default device may be meta, and this is kept.
    home = torch.device("cpu")
    sizes = torch.tensor(widths, device=home)
    starts = torch.tensor([0, *itertools.accumulate(widths[:-1])], device=home)
    of_channels = torch.arange(len(widths), device=home).repeat_interleave(sizes)
    return _Layers(list(widths), sizes.to(device, torch.float64), starts.to(device), of_channels.to(device))
