"""Policy "window": a training forward that sees this window so far, and a backward that pays what the window owes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from syncaccum.layer.accumulate import bring_window_home
from syncaccum.layer.ledger import Ledger, pay
from syncaccum.layer.passes import normalize
from syncaccum.layer.policies import Window, ask_if_untrained, copy_committed
from syncaccum.layer.state import Accumulating, match_width
from syncaccum.moments import pack_statistics

# 16 was as good as any from 4 to 64 in training (docs/experiment.md).
_PRIOR_SAMPLES = 16.0
"""The last window's statistics count for so many samples."""

_UNTRAINED_SAMPLES = 1.0
"""Running statistics of 0 and 1 that nothing was ever folded into count for so many."""


def normalize_so_far(
    layer: Accumulating, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, counts: bool
) -> tuple[Tensor, Tensor]:
    """Normalise a micro-batch with values under policy "window"; also its packed moments."""
    match_width(layer)
    ledger = layer._accumulation.ledger
    assert ledger is not None
    n = x.numel() // x.shape[1]
    policy = Window(eps, _count_others(layer, ledger, x))
    balance = _Balance(ledger, n, ledger.window_number if counts else None, policy.others[0])
    return normalize(x, weight, bias, policy, balance)


def _count_others(layer: Accumulating, ledger: Ledger, x: Tensor) -> Tensor:
    """Packed moments of all that a micro-batch is counted together with: this window's earlier ones, and the prior."""
    bring_window_home(layer._accumulation, x.device)
    window = layer._accumulation.window
    # A sample has so many values per channel.
    values = x[0, 0].numel()
    if ledger.knows_last:
        return torch.add(window, ledger.last.to(x.device), alpha=_PRIOR_SAMPLES * values)
    untrained = ask_if_untrained(layer)
    if isinstance(untrained, Tensor):
        samples: Tensor | float = torch.where(untrained, _UNTRAINED_SAMPLES, _PRIOR_SAMPLES)
    else:
        samples = _UNTRAINED_SAMPLES if untrained else _PRIOR_SAMPLES
    return window + pack_statistics(samples * values, *copy_committed(layer))


@dataclass(frozen=True)
class _Balance:
    """From a micro-batch's sums of dy and dy*x_hat to A and B, what each value takes back."""

    ledger: Ledger
    n: int
    number: float | None
    """Of the window that the forward counts in; None if it does not count."""
    others: Tensor
    """How many values of others its statistics are of."""

    def __call__(self, sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        batch = torch.cat(sums)
        feedback = None
        if self.number is not None:
            feedback = pay(self.ledger.sums, self.ledger.counts, batch, self.n, self.number)
        if feedback is None:
            # Its own share in the statistics, as if the others were constants.
            feedback = batch / (self.others + self.n)
        first, second = feedback.chunk(2)
        return first, second
