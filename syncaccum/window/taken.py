"""What a commit takes from the open windows: all that was in them when their sums were sent, and nothing since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from syncaccum.layer.accumulation import NEW_WINDOW, Accumulation
from syncaccum.torch_private import take_from_all
from syncaccum.window.uninterrupted import step_of_updates


class Taken(NamedTuple):
    """The content of a layer's window at one moment."""

    window: Tensor
    micro_batches: int
    squares: Tensor | None = None
    """This and what follows: the ledger's, where there is one."""
    samples: float = 0.0
    booked: float = 0.0
    """The ledger's micro-batches, those of compiled forwards included."""

    @classmethod
    def of(cls, state: Accumulation) -> Taken:
        """All of it. Tensors are the layer's own, and change with it."""
        return cls(state.window, state.micro_batches, *_books(state))

    @classmethod
    def keep(cls, state: Accumulation, window: Tensor) -> Taken:
        """It as it is now, with a copy of the window that somebody else made."""
        squares, *counts = _books(state) or (None,)
        return cls(window, state.micro_batches, None if squares is None else squares.clone(), *counts)


def _books(state: Accumulation) -> tuple[Tensor, float, float] | tuple[()]:
    ledger = state.ledger
    return () if ledger is None else (ledger.squares, ledger.samples, ledger.micro_batches)


def is_whole(state: Accumulation, taken: Taken) -> bool:
    """Whether the window was not dropped since, and nothing came in."""
    return state.is_sent and state.micro_batches == taken.micro_batches


def steps_of_rest(
    states: Sequence[Accumulation], taken: Sequence[Taken], changes: Mapping[str, Any]
) -> list[partial[Any]]:
    """The steps that leave in each window what came since it was sent, and make some more changes to its state."""
    # One that was dropped since has only what came later.
    sent = [(state.window, took.window) for state, took in zip(states, taken, strict=True) if state.is_sent]
    updates = [{**_rest_of(state, took), **changes} for state, took in zip(states, taken, strict=True)]
    return [*_steps_of_taking(sent), step_of_updates(states, updates)]


def _rest_of(state: Accumulation, taken: Taken) -> dict[str, Any]:
    if is_whole(state, taken):
        return NEW_WINDOW
    return {"micro_batches": state.micro_batches - taken.micro_batches, "is_sent": False} if state.is_sent else {}


def steps_of_rest_in_books(states: Sequence[Accumulation], taken: Sequence[Taken]) -> list[partial[Any]]:
    """The same for ledgers. Their books are closed later."""
    both = [(s.ledger, took) for s, took in zip(states, taken, strict=True) if s.is_sent and s.ledger is not None]
    sent = [(ledger.squares, took.squares) for ledger, took in both if took.squares is not None]
    updates = [
        {"samples": ledger.samples - took.samples, "micro_batches": ledger.micro_batches - took.booked}
        for ledger, took in both
    ]
    return [*_steps_of_taking(sent), step_of_updates([ledger for ledger, _ in both], updates)]


def _steps_of_taking(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[partial[Any]]:
    # x - x is 0 for all that a commit lets pass.
    if not pairs:
        return []
    # A layer may have moved since.
    return [partial(take_from_all, [t for t, _ in pairs], [part.to(t.device) for t, part in pairs])]
