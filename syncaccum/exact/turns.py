"""Several calls that take turns: each in a thread, one running at a time, always in the same order.

A thread for each, because a user's function can only wait by not returning. The first runs in the caller's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from syncaccum.exact.thread_state import ThreadState


class _Cancelled(BaseException):
    """Unwinds a call that waits while another has failed; a BaseException, to get past ``except Exception``."""


class Turns:
    """``count`` calls, which run in order until each gives way or ends.

    Args:
        count: how many.
        on_finish: called with the index of a call that has ended well, still in its turn; may raise.
    """

    def __init__(self, count: int, on_finish: Callable[[int], None]) -> None:
        self.count = count
        self.on_turn: Callable[[int], None] = _do_nothing
        self._on_finish = on_finish
        self._gates = [threading.Lock() for _ in range(count)]  # held: must wait
        self._alive = [True] * count
        self._failure: BaseException | None = None
        for gate in self._gates:
            gate.acquire()

    def run(self, call: Callable[[int], None]) -> None:
        """Run ``call(index)`` for each index to its end. Raises what the first to fail raised, as it was."""
        state = ThreadState()

        def start(index: int) -> Callable[[], None]:
            return lambda: self._take_part(index, call)

        threads = [
            threading.Thread(target=state.run, args=(start(index),), name=f"syncaccum-lockstep-{index}")
            for index in range(1, self.count)
        ]
        started = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
            self._gates[0].release()
            self._take_part(0, call)
        except BaseException as error:  # no more threads to be had, or an interrupt
            self._fail(error)
        for thread in started:
            thread.join()
        if self._failure is not None:
            try:
                raise self._failure
            finally:
                self._failure = None  # its traceback holds this frame

    def give_way(self, index: int) -> None:
        """Let the others run until it is this call's turn again; called by the call itself."""
        self._hand_on(index)
        self._await_turn(index)

    def _take_part(self, index: int, call: Callable[[int], None]) -> None:
        try:
            self._await_turn(index)
            call(index)
            self._on_finish(index)
            self._alive[index] = False
            self._hand_on(index)
        except _Cancelled:
            self._alive[index] = False
        except BaseException as error:
            self._alive[index] = False
            self._fail(error)

    def _await_turn(self, index: int) -> None:
        self._gates[index].acquire()
        if self._failure is not None:
            raise _Cancelled
        self.on_turn(index)

    def _hand_on(self, index: int) -> None:
        for step in range(1, self.count + 1):
            following = (index + step) % self.count
            if self._alive[following]:
                self._gates[following].release()
                return

    def _fail(self, error: BaseException) -> None:
        if self._failure is not None:
            return
        self._failure = error
        for gate, alive in zip(self._gates, self._alive, strict=True):
            if alive and gate.locked():
                gate.release()


def _do_nothing(index: int) -> None:
    pass
