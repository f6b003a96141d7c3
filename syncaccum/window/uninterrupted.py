"""Several changes that no signal handler can come between, so that what it raises leaves all of them or none."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from syncaccum.layer.state import Accumulation
from syncaccum.torch_private import without_torch_function, zero_all


def run_uninterrupted(steps: Sequence[partial[Any]]) -> None:
    """Call each of these, in order. They must be functions written in C, such as torch's operators and ``setattr``.

    Python runs signal handlers in between bytecodes. This is one, with all the steps in it.
    """
    with without_torch_function():
        deque(map(partial.__call__, steps), maxlen=0)


def steps_of_drop(states: Sequence[Accumulation]) -> list[partial[Any]]:
    """The steps that start a new window in each layer, as ``Accumulation.drop``."""
    return [
        partial(zero_all, [state.window for state in states]),
        *(partial(setattr, state, "micro_batches", 0) for state in states),
        *(partial(setattr, state, "is_open", False) for state in states),
    ]
