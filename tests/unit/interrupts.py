"""Interrupts, for tests of what is left then: by a signal, which `interruptible` sets up, or before a given line."""

from __future__ import annotations

import linecache
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Interrupt(BaseException):
    """As KeyboardInterrupt, but nobody else's."""


arrived = threading.Event()


def raise_interrupt(*_: Any) -> None:
    arrived.set()
    raise Interrupt


class Line(NamedTuple):
    """A line of the exact mode, and how often it had run before."""

    file: str
    number: int
    runs: int


def _trace(arrive: Callable[[Line], None]) -> Callable[..., Any]:
    """A tracer that calls `arrive` before each line of the exact mode."""
    runs: Counter[tuple[str, int]] = Counter()

    def trace_line(frame: Any, event: str, argument: Any) -> Any:
        place = frame.f_code.co_filename, frame.f_lineno
        # Python lets no signal in between the end of a `with` and its exit; a tracer could.
        if event == "line" and not linecache.getline(*place).strip().startswith("with "):
            runs[place] += 1
            arrive(Line(*place, runs[place] - 1))
        return trace_line

    def trace(frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        return trace_line if "syncaccum/exact/" in name or name.endswith("syncaccum/layer/state.py") else None

    return trace


@contextmanager
def traced_lines(arrive: Callable[[Line], None]) -> Iterator[None]:
    """Call `arrive` before each line of the exact mode that runs here."""
    tracer = sys.gettrace()
    sys.settrace(_trace(arrive))
    try:
        yield
    finally:
        sys.settrace(tracer)


def interrupt_at(line: Line) -> Callable[[Line], None]:
    """For `traced_lines`: raises before this line."""

    def arrive(at: Line) -> None:
        if at == line:
            raise Interrupt

    return arrive
