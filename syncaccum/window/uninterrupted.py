"""Several changes that no signal handler can come between: if it raises, all of them are made, or none."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from syncaccum.layer.accumulation import NEW_WINDOW, Accumulation
from syncaccum.layer.ledger import Ledger
from syncaccum.torch_private import copy_all, without_torch_function, zero_all


def run_uninterrupted(steps: Sequence[partial[Any]]) -> None:
    """Call each of these, in order. They must be functions written in C, such as torch's operators and ``setattr``.

    Python runs signal handlers between two bytecodes. The deque runs all steps within one bytecode.
    """
    # A torch-function mode would run Python code in each step.
    with without_torch_function():
        # maxlen=0: it only walks. A list would keep results.
        deque(map(partial.__call__, steps), maxlen=0)


def steps_of_drop(states: Sequence[Accumulation]) -> list[partial[Any]]:
    """The steps that start a new window in each layer, as ``Accumulation.drop``."""
    return [
        partial(zero_all, [state.window for state in states]),
        *(partial(vars(state).update, NEW_WINDOW) for state in states),
    ]


def steps_of_discard(states: Sequence[Accumulation]) -> list[partial[Any]]:
    """The steps that drop a window that was not committed, and what policy "window" has in its books of it."""
    ledgers = [state.ledger for state in states if state.ledger is not None]
    return [*steps_of_drop(states), *_steps_of_counting(ledgers, [ledger.counts_after_discard() for ledger in ledgers])]


def steps_of_closing(ledgers: Sequence[Ledger], last: Sequence[Tensor]) -> list[partial[Any]]:
    """The steps that close the books of windows that were committed. ``last``: their packed moments, by ledger."""
    if not ledgers:
        return []
    known = partial(copy_all, [ledger.last for ledger in ledgers], list(last))
    return [known, *_steps_of_counting(ledgers, [ledger.counts_after_commit() for ledger in ledgers])]


def _steps_of_counting(ledgers: Sequence[Ledger], counts: list[Tensor]) -> list[partial[Any]]:
    return [partial(copy_all, [ledger.counts for ledger in ledgers], counts)] if ledgers else []
