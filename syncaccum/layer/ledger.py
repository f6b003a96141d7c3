"""What a layer under policy "window" keeps besides its window: the last window's statistics, and what this one owes."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from syncaccum.layer.balance import feedback_per_value
from syncaccum.layer.following import follow
from syncaccum.layer.replay import Record, Records
from syncaccum.moments import Moments
from syncaccum.torch_private import copy_all

PACKED = ("last", "expected", "seen", "owed")
"""The parts of a ledger in a checkpoint."""

_ledgers: weakref.WeakValueDictionary[int, Ledger] = weakref.WeakValueDictionary()
_keys = itertools.count()

_books = threading.Lock()
"""Backward walks may run in several threads: those of several devices, or of DataParallel's replicas."""


def ledger_of(key: Tensor) -> Ledger:
    """The ledger with this key: operators of compiled code take tensors alone."""
    return _ledgers[int(key)]


@dataclass(eq=False)
class Ledger:
    """The last window's statistics, and the books of balanced feedback. Vectors are float64.

    A window has a number; so a backward knows whether its own is still open. The first backward in a window closes the
    books of the one before.
    """

    last: Tensor
    """Packed moments of the last window's global batch, as if it had been one value."""
    books: Tensor
    """Sums of dy and dy*x_hat, rows of 2C: what the window owes, what it has seen, what the last one saw."""
    knows_last: bool = False
    expected: float = 0.0
    """How many values per channel the last window saw in its backward walks; 0 if there was none."""
    done: float = 0.0
    """The same of the window of the books."""
    number: int = 0
    """Of the open window."""
    booked: int = 0
    """The number of the window of the books."""
    key: Tensor = field(init=False)
    """Finds this ledger from compiled code."""
    records: Records = field(init=False)
    """What forwards used that a checkpoint may run again."""
    paid_at: dict[int, float] = field(init=False)
    """By forward: what was done when it first paid. It may be walked backward again."""

    def __post_init__(self) -> None:
        self.records, self.paid_at = Records(), {}
        number = next(_keys)
        # A default device may be another one.
        self.key = torch.tensor(number, device="cpu")
        _ledgers[number] = self

    @classmethod
    def like(cls, window: Tensor) -> Ledger:
        """That of a layer which knows of no window before, for windows of this width."""
        # Tensors made in inference mode refuse to change later.
        with torch.inference_mode(False):
            return cls(torch.zeros_like(window), window.new_zeros(3, window.numel() - 1))

    def __getstate__(self) -> dict[str, Any]:
        # A copy has a key of its own, and no graphs.
        return {name: value for name, value in vars(self).items() if name not in ("key", "records", "paid_at")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()

    def forget(self) -> None:
        """Know of no window before."""
        self.last.zero_()
        self._turn(torch.zeros_like(self.books), expected=0.0, knows_last=False)

    def discard(self) -> None:
        """Drop what the open window owes and has seen. What was expected of it is expected of the next."""
        step_of_discard(self)()

    def follow(self, fn: Any) -> None:
        """Go where a layer goes, see `follow`."""
        self.books, last = follow(self.books, fn), follow(self.last, fn)
        # A last window has a count of 1. Without, its values were lost.
        if last.is_meta or last[0] == 0:
            self.knows_last = False
        self.last = last

    def pack(self) -> dict[str, Tensor]:
        """All of it as additive sums, each as long as a window: those of several ranks may be added."""
        self.settle()
        head = self.last.new_tensor([[float(self.knows_last)], [self.expected], [self.done], [0.0]])
        rows = torch.stack((self.last[1:] * head[0], self.books[2], self.books[1], self.books[0]))
        return dict(zip(PACKED, torch.cat((head, rows), 1), strict=True))

    def unpack(self, state: Mapping[str, Tensor], ranks: int) -> None:
        """Be as `pack` said; each of so many ranks takes an equal part of what they saw and owe together."""
        last, *parts = (state[name].detach().to(self.last.device) for name in PACKED)
        parts = [part / ranks for part in parts]
        expected, done, _ = (part[0].item() for part in parts)
        self.last.copy_(last / last[0].clamp_min(1))
        books = torch.stack([part[1:] for part in reversed(parts)])
        self._turn(books, expected=expected, done=done, knows_last=bool(last[0] > 0))

    def recall(self, own: Tensor, name: str) -> Record:
        """What the first forward of a micro-batch used, whose second one a checkpoint runs.

        Raises:
            RuntimeError: this window has had no such forward.
        """
        if (record := self.records.find(own, self.number)) is None:
            raise RuntimeError(
                f"torch.utils.checkpoint runs the forward of layer {name} again, but this window has had no such "
                "forward: its window was committed or discarded since, or its data is not the same as the first time. "
                'Call backward() before commit, or use normalization="batch"'
            )
        return record

    def take_back(self, batch: Tensor, n: int, record: Record) -> Tensor:
        """A and B, what each of n values takes back, for the sums of dy and dy*x_hat over them, in one vector."""
        feedback = self._pay(batch, n, record.number, record.forward) if record.counts else None
        if feedback is None:
            # No books: its own share, as if the others were constants.
            feedback = batch / (record.others[0] + n)
        return feedback

    def _pay(self, batch: Tensor, n: int, number: int, forward: int) -> Tensor | None:
        """A and B for a micro-batch, booked; None if its window is over.

        Args:
            batch: its own sums of dy and dy*x_hat, in one vector.
            n: its values per channel.
            number, forward: of its window, and of its forward.
        """
        with _books:
            if number != self.number:
                return None
            self._settle()
            books = self.books.to(batch.device)
            owed, seen = batch + books[:2]
            done = self.paid_at.get(forward)
            if done is None:
                done = self.done
                after = done + n
                # P is the last window's mean, or what this one's is so far.
                mean = books[2] / self.expected if self.expected else seen / after
                # In a first window as much is to come as has come.
                # Its gradient was best so (benchmarks: cosine .95 against
                # .90 if all is paid at once, and .71 without feedback).
                feedback = feedback_per_value(owed, mean, n, done, self.expected or 2 * after)
            else:
                # Walked again: with the first walk as if in one.
                after = self.done
                nothing = torch.zeros_like(batch)
                feedback = feedback_per_value(batch, nothing, n, done, self.expected or 2 * (done + n))
            self.paid_at[forward] = done
            after_books = torch.stack((owed.sub_(feedback, alpha=n), seen, books[2])).to(self.books.device)
            # One call: a signal comes before or after it.
            vars(self).update(books=after_books, done=after)
            return feedback

    def settle(self) -> None:
        """Close the books of a window that is over, if no backward has done so."""
        with _books:
            self._settle()

    def _settle(self) -> None:
        if self.booked == self.number:
            return
        books = torch.zeros_like(self.books)
        # Without a backward, or discarded: expect what was expected.
        # An overflow under GradScaler must not spoil the next window.
        books[2] = self.books[1].nan_to_num(0.0, 0.0, 0.0) if self.done else self.books[2]
        vars(self).update(
            books=books,
            expected=self.done or self.expected,
            done=0.0,
            booked=self.number,
            paid_at={},
        )

    def _turn(self, books: Tensor, **changes: Any) -> None:
        """Go on with other books. Graphs from before find their window over."""
        changes = {"done": 0.0, **changes}
        number = self.number + 1
        vars(self).update(books=books, number=number, booked=number, paid_at={}, **changes)


def step_of_discard(ledger: Ledger) -> partial[None]:
    """The step that drops what the open window owes and has seen. What was expected of it is expected of the next."""
    # The books may still be those of the window before.
    ledger.settle()
    books = torch.zeros_like(ledger.books)
    books[2] = ledger.books[2]
    number = ledger.number + 1
    changes = {"books": books, "done": 0.0, "number": number, "booked": number, "paid_at": {}}
    return partial(vars(ledger).update, changes)


def steps_of_commit(
    ledgers: Sequence[Ledger], means: Sequence[Tensor], mean_squares: Sequence[Tensor]
) -> list[partial[Any]]:
    """The steps that make the open windows the last ones. Their books are closed later."""
    if not ledgers:
        return []
    lasts = [Moments.unpack(ledger.last) for ledger in ledgers]
    one = torch.ones((), dtype=torch.float64, device=ledgers[0].last.device)
    to = [vector for last in lasts for vector in (last.count, last.total, last.total_sq)]
    values = [vector for pair in zip(means, mean_squares, strict=True) for vector in (one, *pair)]
    turns = (partial(vars(ledger).update, {"number": ledger.number + 1, "knows_last": True}) for ledger in ledgers)
    return [partial(copy_all, to, values), *turns]
