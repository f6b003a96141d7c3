"""What a layer under policy "window" keeps besides its window: the last one's statistics, and what this one owes.

Vectors are float64 and of length C. Counters are on the CPU, so that nothing waits for a GPU to read them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncaccum.layer.balance import feedback_per_value
from syncaccum.layer.following import follow
from syncaccum.torch_private import copy_all

# Where in `Ledger.counts` what is.
_EXPECTED, _DONE, _OF, _WINDOW, _KNOWN = range(5)


class Record(NamedTuple):
    """A forward that a checkpoint may run again, when the window has moved on."""

    number: float
    """Of its window."""
    sample: Tensor
    """A few of its values, to know it again by."""
    others: Tensor


@dataclass(eq=False)
class Ledger:
    """The books of a layer under policy "window". A window's books are closed by the first backward after it."""

    last: Tensor
    """Packed moments of the last window's global batch, as if it had been one value."""
    sums: Tensor
    """Rows of 2C: what is owed, what was seen, and P of `feedback_per_value`; each for dy and for dy*x_hat."""
    counts: Tensor
    """On the CPU. Values per channel: expected in a window, and done in that of the books. Then the number of the
    books' window, the number of the open one, and 1 if ``last`` is known."""
    records: list[Record] = field(default_factory=list)
    """What forwards under a checkpoint were normalised with, for their second run."""

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
        self.records.clear()
        number = self.window_number + 1
        self.counts.copy_(self.counts.new_tensor([0, 0, number, number, 0]))

    def counts_after_discard(self) -> Tensor:
        """What ``counts`` are when the open window was dropped: what was expected of it is expected of the next."""
        expected, _, of, window, known = self.counts.tolist()
        return self.counts.new_tensor([expected, 0, of, window + 1, known])

    def counts_after_commit(self) -> Tensor:
        """What ``counts`` are when the open window was committed, and ``last`` is known."""
        expected, done, of, window, _ = self.counts.tolist()
        return self.counts.new_tensor([expected, done, of, window + 1, 1])

    def to_state(self) -> Tensor:
        """All of it in one float64 tensor, for a checkpoint. The open window has number 0 there."""
        expected, done, of, window, known = self.counts.tolist()
        counts = self.last.new_tensor([expected, done, float(of == window), known])
        return torch.cat([counts, self.last, self.sums.flatten()])

    def last_to_state(self) -> Tensor:
        """The part that is the same on all ranks."""
        state = torch.zeros_like(self.to_state())
        state[3] = self.counts[_KNOWN].item()
        state[4 : 4 + self.last.numel()] = self.last
        return state

    def load_state(self, state: Tensor) -> None:
        """Take up what `to_state` gave. Graphs from before this must not find their window open."""
        expected, done, is_open, known = state[:4].tolist()
        number = self.window_number + 1
        self.counts.copy_(self.counts.new_tensor([expected, done, number if is_open else number - 1, number, known]))
        end = 4 + self.last.numel()
        self.last.copy_(state[4:end])
        self.sums.copy_(state[end:].view_as(self.sums))
        self.records.clear()

    def follow(self, fn: Any) -> None:
        """Go where a layer goes, see `follow`."""
        self.sums, last = follow(self.sums, fn), follow(self.last, fn)
        # A last window has a count of 1. Without, its values were lost.
        if last.is_meta or last[0] == 0:
            self.counts[_KNOWN] = 0
        self.last = last


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
    here = batch.device  # a replica's of DataParallel may be another one
    batch = batch.to(sums.device)
    with _books:
        expected, done, of, window, known = counts.tolist()
        if number != window:
            return None
        books = sums
        if of != window:
            books, expected, done = _close(sums, expected, done)
        owed, seen = books[:2] + batch
        # In a first window nobody knows how long it will be.
        total = expected or done + n
        feedback = feedback_per_value(owed, books[2], n, done, total)
        after = torch.stack((owed.sub_(feedback, alpha=n), seen, books[2]))
        # One call: a signal comes before or after it.
        copy_all([sums, counts], [after, counts.new_tensor([expected, done + n, window, window, known])])
        return feedback.to(here)


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
