"""Calls that end in time, also those that heed no timeout."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")


def within(seconds: float, function: Callable[[], T]) -> T:
    """``function()`` in a thread of its own.

    torch's TCPStore waits without limit for a peer that accepts a connection and never answers. After a TimeoutError
    the thread is still stuck in there; the process should end before long.

    Raises:
        TimeoutError: it did not return within so many seconds.
        Exception: what it raised.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, seconds))
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if "error" in outcome:
        raise outcome["error"]
    return cast(T, outcome["result"])
