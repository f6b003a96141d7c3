"""What a layer under policy "window" keeps besides its window: the last one's statistics, and what this one owes.

Vectors are float64 and of length C. Counters are on the CPU, so that nothing waits for a GPU to read them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from syncaccum.layer.balance import feedback_per_value
from syncaccum.layer.following import follow
from syncaccum.moments import Moments
from syncaccum.torch_private import add_to_all, copy_all, zero_all

# Where in `Ledger.counts` what is.
_EXPECTED, _DONE, _OF, _WINDOW, _KNOWN = range(5)


@dataclass(eq=False)
class Ledger:
    """The books of a layer under policy "window". A window's books are closed by the first backward after it."""

    last: Tensor
    """Packed moments of the last window's global batch, as if it had been one value."""
    sums: Tensor
    """Rows of 2C: what is owed, what was seen, and P of `feedback_per_value`; each for dy and for dy*x_hat."""
    counts: Tensor
    """Values per channel: expected in a window, and done in that of the books. Then the number of the window of the
    books, the number of the open one, and 1 if ``last`` is known."""

    @classmethod
    def like(cls, window: Tensor) -> Ledger:
        """That of a layer which knows of no window before, for windows of this width."""
        # Tensors made in inference mode refuse to change later.
        with torch.inference_mode(False):
            last = torch.zeros_like(window)
            # A default device may be another one.
            counts = torch.zeros(5, dtype=torch.float64, device="cpu")
            return cls(last, last.new_zeros(3, window.numel() - 1), counts)

    @property
    def window_number(self) -> float:
        """The open window's."""
        return self.counts[_WINDOW].item()

    @property
    def knows_last(self) -> bool:
        """Whether there was a window whose statistics are known."""
        return self.counts[_KNOWN].item() != 0

    def forget(self) -> None:
        """Know of no window before. Graphs from before this must not find their window open: the number goes on."""
        self.last.zero_()
        self.sums.zero_()
        number = self.window_number + 1
        self.counts.copy_(self.counts.new_tensor([0, 0, number, number, 0]))

    def discard(self) -> None:
        """Drop what the open window owes and has seen. What was expected of it is expected of the next."""
        for step in steps_of_discard([self]):
            step()

    def follow(self, fn: Any) -> None:
        """Go where a layer goes, see `follow`."""
        self.sums, last = follow(self.sums, fn), follow(self.last, fn)
        # A last window has a count of 1. Without, its values were lost.
        if last.is_meta or last[0] == 0:
            self.counts[_KNOWN] = 0
        self.last = last

    def settle(self) -> None:
        """Close the books of a window that is over, if no backward has done so."""
        with _books:
            expected, done, of, window, known = self.counts.tolist()
            if of != window:
                books, expected, done = _close(self.sums, expected, done)
                copy_all(
                    [self.sums, self.counts], [books, self.counts.new_tensor([expected, done, window, window, known])]
                )


def steps_of_discard(ledgers: Sequence[Ledger]) -> list[partial[Any]]:
    """The steps that drop what the open windows owe and have seen. What was expected of them, the next one expects."""
    if not ledgers:
        return []
    for ledger in ledgers:
        # The books may be of the window before: those are kept.
        ledger.settle()
    numbers = [ledger.counts[_WINDOW] for ledger in ledgers]
    gone = [view for ledger in ledgers for view in (ledger.sums[:2], ledger.counts[_DONE])]
    return [partial(zero_all, gone), partial(add_to_all, numbers, 1)]


def steps_of_commit(
    ledgers: Sequence[Ledger], means: Sequence[Tensor], mean_squares: Sequence[Tensor]
) -> list[partial[Any]]:
    """The steps that make the open windows the last ones. Their books are closed later."""
    if not ledgers:
        return []
    numbers = [ledger.counts[_WINDOW] for ledger in ledgers]
    lasts = [Moments.unpack(ledger.last) for ledger in ledgers]
    known = [ledger.counts[_KNOWN] for ledger in ledgers] + [last.count for last in lasts]
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return [
        partial(add_to_all, numbers, 1),
        partial(copy_all, [last.total for last in lasts] + [last.total_sq for last in lasts], [*means, *mean_squares]),
        partial(copy_all, known, [one] * len(known)),
    ]


_books = threading.Lock()
"""Backward walks may run in several threads: those of several devices, or of DataParallel's replicas."""


def pay(sums: Tensor, counts: Tensor, batch: Tensor, n: int, number: float) -> Tensor | None:
    """A and B for a micro-batch, booked; None if its window is over. Changes the ledger's ``sums`` and ``counts``.

    Args:
        sums, counts: of the ledger.
        batch: the micro-batch's own sums of dy and dy*x_hat, in one vector.
        n: its values per channel.
        number: of its window.
    """
    with _books:
        expected, done, of, window, known = counts.tolist()
        if number != window:
            return None
        books = sums
        if of != window:
            books, expected, done = _close(sums, expected, done)
        owed, seen = batch + books[:2]
        # In a first window nobody knows how long it will be.
        total = expected or done + n
        feedback = feedback_per_value(owed, books[2], n, done, total)
        after = torch.stack((owed.sub_(feedback, alpha=n), seen, books[2]))
        # One call: a signal comes before or after it.
        copy_all([sums, counts], [after, counts.new_tensor([expected, done + n, window, window, known])])
        return feedback


def _close(sums: Tensor, expected: float, done: float) -> tuple[Tensor, float, float]:
    """The books of a new window: what the last one saw is what this one expects."""
    books = torch.zeros_like(sums)
    if not done:
        # It had no backward, or was discarded.
        books[2] = sums[2]
        return books, expected, 0.0
    # An overflow under GradScaler would spoil this window, too.
    books[2] = (sums[1] / done).nan_to_num_(0.0, 0.0, 0.0)
    return books, done, 0.0
