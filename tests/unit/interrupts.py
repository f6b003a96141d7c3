"""A signal that raises in the main thread, for tests of what is left then; the fixture `interruptible` sets it up."""

from __future__ import annotations

import threading
from typing import Any


class Interrupt(BaseException):
    """As KeyboardInterrupt, but nobody else's."""


arrived = threading.Event()


def raise_interrupt(*_: Any) -> None:
    arrived.set()
    raise Interrupt
