"""What a layer under policy "window" keeps besides its window: the statistics that it starts with, and what it owes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from syncaccum.layer.balance import Due, pay_soon
from syncaccum.layer.following import follow
from syncaccum.layer.keys import make_key
from syncaccum.layer.replay import Record, Records

PACKED = ("last", "owed", "squares", "counts")
"""The parts of a ledger in a checkpoint."""


Paid = TypeVar("Paid")

Pay = Callable[[Due, Tensor], tuple[Paid, Tensor]]
"""From what is due, and what the window owes, to what each value pays, and what the window owes then."""

_books = threading.Lock()
"""Backward walks may run in several threads: those of several devices, or of DataParallel's replicas."""


@dataclass(eq=False)
class Ledger:
    """The windows before, and the books of balanced feedback. Vectors are float64.

    A window has a number; so a backward knows whether its own is still open. The first backward in a window closes the
    books of the one before.
    """

    prior: Tensor
    """Packed moments of the windows before, counted for as many samples as they are worth, see `prior`."""
    owed: Tensor
    """Sums of dy and dy*x_hat: what the window owes. In a first window, nothing is taken off for what was paid."""
    squares: Tensor
    """Sum of i m^2 over the open window's micro-batches, of i samples and mean m each."""
    knows_prior: bool = False
    samples: float = 0.0
    """In the open window."""
    micro_batches: float = 0.0
    """In the open window."""
    expected: float = 0.0
    """How many values per channel this window will see in its backward walks; 0 if nobody knows.

    The longer of the last two windows: an epoch's rest says nothing of the window after it."""
    latest: float = 0.0
    """How many the last window saw."""
    done: float = 0.0
    """How many the window of the books has seen."""
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
        self.key = make_key(self)

    @classmethod
    def like(cls, window: Tensor) -> Ledger:
        """That of a layer which knows of no window before, for windows of this width."""
        # Tensors made in inference mode refuse to change later.
        with torch.inference_mode(False):
            sums = window.new_zeros(window.numel() - 1)
            return cls(torch.zeros_like(window), sums, sums.new_zeros(sums.numel() // 2))

    def __getstate__(self) -> dict[str, Any]:
        # A copy has a key of its own, and no graphs.
        return {name: value for name, value in vars(self).items() if name not in ("key", "records", "paid_at")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()

    def forget(self) -> None:
        """Know of no window before."""
        self.prior.zero_()
        vars(self).update(self.emptied() | {"expected": 0.0, "latest": 0.0, "knows_prior": False})

    def discard(self) -> None:
        """Drop what the open window owes and has seen. It is expected to be as long as it was expected to be."""
        step_of_discard(self)()

    def follow(self, fn: Any) -> None:
        """Go where a layer goes, see `follow`."""
        self.owed, self.squares, prior = (follow(v, fn) for v in (self.owed, self.squares, self.prior))
        # It is worth a sample at least. Without, its values were lost.
        if prior.is_meta or prior[0] == 0:
            self.knows_prior = False
        self.prior = prior

    def note(self, mean: Tensor, samples: int) -> None:
        """A micro-batch goes into the window."""
        mean = mean.to(self.squares.device)
        with _books:
            self.squares.addcmul_(mean, mean, value=samples)
        self.note_samples(samples)

    def note_samples(self, samples: int) -> None:
        """A micro-batch goes into the window, and `squares` has its mean."""
        with _books:
            self.samples += samples
            self.micro_batches += 1

    def pack(self) -> dict[str, Tensor]:
        """All of it as additive sums, each as long as a window: those of several ranks may be added."""
        self.settle()
        last, owed, squares, counts = (torch.zeros_like(self.prior) for _ in PACKED)
        # The first of `last` counts the ranks that know one.
        if self.knows_prior:
            last.copy_(self.prior)[0] = 1.0
            squares[-1] = self.prior[0]
        owed[0], owed[1:] = self.latest, self.owed
        squares[0] = self.samples
        squares[1 : 1 + self.squares.numel()] = self.squares
        counts[:3] = counts.new_tensor([self.expected, self.done, self.micro_batches])
        return dict(zip(PACKED, (last, owed, squares, counts), strict=True))

    def unpack(self, state: Mapping[str, Tensor], ranks: int) -> None:
        """Be as `pack` said; each of so many ranks takes an equal part of what they saw and owe together."""
        last, owed, squares, counts = (state[name].detach().to(self.prior.device) for name in PACKED)
        expected, done, micro_batches = (counts[:3] / ranks).tolist()
        # The mean over those that knew one: its sums and its worth.
        self.prior.copy_(torch.cat((squares[-1:], last[1:])) / last[0].clamp_min(1))
        vars(self).update(
            self.emptied()
            | {
                "latest": owed[0].item() / ranks,
                "owed": owed[1:] / ranks,
                "squares": squares[1 : 1 + self.squares.numel()] / ranks,
                "expected": expected,
                "done": done,
                "samples": squares[0].item() / ranks,
                "micro_batches": micro_batches,
                "knows_prior": bool(last[0] > 0),
            }
        )

    def recall(self, own: Tensor, name: str) -> Record:
        """What the first forward of a micro-batch used, whose second one a checkpoint runs.

        Raises:
            RuntimeError: there was no such forward, or nothing holds its record any more.
        """
        if (record := self.records.find(own)) is None:
            raise RuntimeError(
                f"torch.utils.checkpoint runs the forward of layer {name} again, but there was no such forward: its "
                "data is not the same as the first time, or a window has ended and the next one has begun since. Call "
                'backward() before commit, pass use_reentrant=False, or use normalization="batch"'
            )
        return record

    def take_back(self, batch: Tensor, samples: int, of_sample: int, record: Record) -> Tensor:
        """A and B, what each value takes back, for the sums of dy and dy*x_hat over a micro-batch, in one vector.

        Args:
            batch: the sums.
            samples: the micro-batch's.
            of_sample: values per channel in each.
            record: what its forward used.
        """
        with _books:
            due = self._ask(samples * of_sample, of_sample, record)
            self._book(due, batch, samples * of_sample, record)
        return due.feedback(batch)

    def pay(self, samples: int, of_sample: int, record: Record, pay: Pay[Paid]) -> Paid | None:
        """`take_back` with an arithmetic of its own; None if the micro-batch does not count, or its window is over."""
        n = samples * of_sample
        with _books:
            if not self._is_booked(record):
                return None
            due = self._ask(n, of_sample, record)
            paid, owed = pay(due, self.owed)
            self._close(due, owed, n, record)
            return paid

    def ask(self, samples: int, of_sample: int, record: Record) -> Due:
        """`take_back` before the sums are known. `book` follows."""
        with _books:
            return self._ask(samples * of_sample, of_sample, record)

    def book(self, due: Due, batch: Tensor, n: int, record: Record) -> None:
        """A micro-batch of n values and these sums has paid what was due."""
        with _books:
            self._book(due, batch, n, record)

    def _ask(self, n: int, of_sample: int, record: Record) -> Due:
        if not self._is_booked(record):
            # No books: its own share, as if the others were constants.
            return Due(None, record.others[0] + n)
        self._settle()
        paid_at = self.paid_at.get(record.forward)
        # Walked again: its sums come to those of the first walk.
        owed, before = (self.owed, self.done) if paid_at is None else (None, paid_at)
        if self.expected:
            payers = pay_soon(n, before, self.expected, of_sample)
            return Due(owed, payers, n / payers)
        # Nobody knows how long it will be: the mean of what came.
        return Due(owed, before + n + of_sample)

    def _book(self, due: Due, batch: Tensor, n: int, record: Record) -> None:
        if self._is_booked(record):
            self._close(due, due.close(self.owed, batch), n, record)

    def _close(self, due: Due, owed: Tensor, n: int, record: Record) -> None:
        is_first = due.owed is not None
        if is_first:
            self.paid_at[record.forward] = self.done
        # One call: a signal comes before or after it.
        vars(self).update(owed=owed.to(self.owed.device), done=self.done + n if is_first else self.done)

    def _is_booked(self, record: Record) -> bool:
        return record.counts and record.number == self.number

    def settle(self) -> None:
        """Close the books of a window that is over, if no backward has done so."""
        with _books:
            self._settle()

    def _settle(self) -> None:
        if self.booked == self.number:
            return
        vars(self).update(
            owed=torch.zeros_like(self.owed),
            # Without a backward: expect what was expected.
            expected=max(self.done, self.latest) if self.done else self.expected,
            latest=self.done or self.latest,
            done=0.0,
            booked=self.number,
            paid_at={},
        )

    def emptied(self) -> dict[str, Any]:
        """Its attributes with an empty window and empty books. Graphs from before find their window over."""
        zeros = {"owed": torch.zeros_like(self.owed), "squares": torch.zeros_like(self.squares)}
        number = self.number + 1
        return {**NEW_WINDOW, **zeros, "done": 0.0, "number": number, "booked": number, "paid_at": {}}


NEW_WINDOW: dict[str, Any] = {"samples": 0.0, "micro_batches": 0.0}
"""What a ledger knows of a window that starts, besides sums."""


def step_of_discard(ledger: Ledger) -> partial[None]:
    """The step that drops what the open window owes and has seen."""
    # The books may still be those of the window before.
    ledger.settle()
    return partial(vars(ledger).update, ledger.emptied())
