"""Several changes that no signal handler can come between: if it raises, all of them are made, or none."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from syncaccum.layer.accumulation import NEW_WINDOW, Accumulation
from syncaccum.layer.ledger import step_of_discard
from syncaccum.torch_private import without_torch_function, zero_all


def run_uninterrupted(steps: Sequence[partial[Any]]) -> None:
    """Call each of these, in order. They must be functions written in C, such as torch's operators and ``setattr``.

    Python runs signal handlers between two bytecodes. The deque runs all steps within one bytecode.
    """
    # A torch-function mode would run Python code in each step.
    with without_torch_function():
        # maxlen=0: it only walks. A list would keep results.
        deque(map(partial.__call__, steps), maxlen=0)


def steps_of_drop(states: Sequence[Accumulation]) -> list[partial[Any]]:
    """The steps that drop the window of each layer, as ``Accumulation.drop``."""
    ledgers = [state.ledger for state in states if state.ledger is not None]
    return [*steps_of_new_window(states), *map(step_of_discard, ledgers)]


def steps_of_new_window(
    states: Sequence[Accumulation], changes: Mapping[str, Any] = MappingProxyType({})
) -> list[partial[Any]]:
    """The steps that start a new window in each layer, ledgers aside, and make some more changes to its state."""
    return [
        partial(zero_all, [state.window for state in states]),
        step_of_updates(states, itertools.repeat({**NEW_WINDOW, **changes})),
    ]


def step_of_updates(states: Sequence[object], updates: Iterable[Mapping[str, Any]]) -> partial[Any]:
    """The step that changes some attributes of each state."""
    # One step for all layers: it walks, in C, too.
    return partial(deque, map(dict.update, map(vars, states), updates), 0)
