r"""Who has paid what: balanced feedback over the micro-batches of a window, on all ranks.

nn.BatchNorm's gradient needs the sums of dy and :math:`dy\,\hat x` over the whole window. A micro-batch's backward has
those of the micro-batches so far, and `balance` says what each value pays then. With several ranks, a micro-batch of
each is a *round*. After it the ranks add up their sums, in one message for all layers. Within a round a rank knows its
own only. For the others' it takes a share of its own:

.. math::
    w = \frac{i}{i + 2} \cdot \frac{1}{\mathrm{left}}, \qquad T = G + S + n_o\,w \frac{S}{n}

S are its sums, of n values from i samples; G those of all rounds before; :math:`n_o` the others' values in this round;
left the rounds to come, with this one. Before the last round nothing need be settled. So w is small there: a rank's
own sums go with its own values, which shrinks the gradient. In the last round what is not settled is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncaccum.exact.known import KnownVisit
from syncaccum.layer.balance import spread

# The best share is n h^2 / (n h^2 + var h) for inputs h:
# i / (i + var/mean^2), and that is about 2 for ReLU's outputs.
_OWN = 2.0


class Account:
    """What one visit of a layer owes and has paid, on this rank.

    Args:
        visit: of the first pass.
        total: N, values per channel of all ranks.
    """

    def __init__(self, visit: KnownVisit, total: float) -> None:
        center = visit.norm.center
        self._counts = visit.counts
        self._total = total
        self._mine = float(sum(visit.counts))
        self._applied = torch.zeros(2 * center.numel(), dtype=torch.float64, device=center.device)
        self._everyones = torch.zeros_like(self._applied)
        self._done = 0.0
        self._done_here = 0.0
        self._mine_now = torch.zeros_like(self._applied)
        self._paid_now = torch.zeros_like(self._applied)

    def pay(self, index: int, samples: int, left: int, sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What each value of a micro-batch pays, from its sums of dy and of dy x_hat."""
        n = float(self._counts[index])
        self._mine_now += torch.cat(sums).to(torch.float64)
        if n == 0:
            return torch.zeros_like(sums[0]), torch.zeros_like(sums[1])
        debt = self._owed(n, samples, left) * (self._mine / self._total) - self._applied
        # Less what an earlier walk of the same result has paid.
        each = spread(debt, n, self._done_here, self._mine) - self._paid_now
        self._paid_now += each
        first, second = each.chunk(2)
        return first, second

    def _owed(self, n: float, samples: int, left: int) -> Tensor:
        """T, what the whole window owes as far as it is known here."""
        # What is left of the others, in equal rounds.
        theirs = (self._total - self._done) - (self._mine - self._done_here)
        others = min(max(theirs, 0.0) / left, max(self._total - self._done - n, 0.0))
        own = samples / (samples + _OWN) / left
        return torch.add(self._everyones, self._mine_now, alpha=1 + others * own / n)

    def packed(self, index: int | None) -> Tensor:
        """This rank's part of a round: its values and its sums; of none, where it sits the round out."""
        n = 0 if index is None else self._counts[index]
        return torch.cat((self._mine_now.new_full((1,), n), self._mine_now))

    def close_round(self, index: int | None, everyones: Tensor, count: float) -> None:
        """Take up the sums and the count of all ranks."""
        self._everyones += everyones
        self._done += count
        n = 0 if index is None else self._counts[index]
        self._done_here += n
        self._applied.add_(self._paid_now, alpha=n)
        self._mine_now.zero_()
        self._paid_now.zero_()

    @property
    def size(self) -> int:
        """How many numbers its part of a round is."""
        return 1 + self._mine_now.numel()
