"""Several calls that take turns: each in a thread, one running at a time, always in the same order.

A thread for each, because a user's function can only wait by not returning. The first runs in the caller's own.
Python raises what a signal brings, as KeyboardInterrupt, between any two lines of the main thread, which may be the
caller's: no call runs on behind it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from syncaccum.errors import LockstepError
from syncaccum.exact.thread_state import ThreadState

_POLL = 1e-3
"""Seconds between looks at threads that were cancelled."""
_LOOK = 0.05
"""Seconds of a wait. A signal that comes just before one is seen after it."""
_ENDING = 1.0
"""Seconds at most for Python to take a thread off its list, after the last line of ours."""


class _Cancelled(BaseException):
    """Unwinds a call that waits while another has failed; a BaseException, to get past ``except Exception``."""


class Turns:
    """``count`` calls, which run in order until each gives way or ends.

    Args:
        count: how many.
        on_turn: called with the index of a call whenever its turn begins, in its thread; may raise.
        on_finish: called with the index of a call that has ended well, still in its turn; may raise.
    """

    def __init__(self, count: int, on_turn: Callable[[int], None], on_finish: Callable[[int], None]) -> None:
        self.count = count
        self._on_turn = on_turn
        self._on_finish = on_finish
        self._gates = [threading.Lock() for _ in range(count)]  # held: must wait
        self._alive = [True] * count
        self._started: set[int] = set()
        self._ended: set[int] = set()
        self._cancelled = False
        # Of several failures the first is told: the others follow from it.
        self._failure: BaseException | None = None
        for gate in self._gates:
            gate.acquire()

    def run(self, call: Callable[[int], None]) -> None:
        """Run ``call(index)`` for each index to its end. Raises what the first to fail raised, as it was.

        Also where that is an interrupt: then the others are cancelled at their next turn, and waited for.
        """
        threads = self._make_threads(call)
        interrupt: BaseException | None = None
        while True:
            try:
                if interrupt is None:
                    self._run_all(threads, call)
                else:
                    self._fail(interrupt)
                    self._await_cancelled(threads)
                break
            except BaseException as error:  # no more threads to be had, or an interrupt
                interrupt = error  # no call here: a second interrupt finds no gap
        if self._failure is not None:
            try:
                raise self._failure
            finally:
                self._failure = None  # its traceback holds this frame

    def give_way(self, index: int) -> None:
        """Let the others run until it is this call's turn again; called by the call itself."""
        self._hand_on(index)
        self._await_turn(index)

    def _make_threads(self, call: Callable[[int], None]) -> list[threading.Thread]:
        state = ThreadState()

        def work(index: int) -> None:
            try:
                state.run(lambda: self._take_part(index, call))
            except BaseException as error:  # the state cannot be entered
                self._fail(error)
            finally:
                self._ended.add(index)

        return [
            threading.Thread(target=work, args=(index,), name=f"syncaccum-lockstep-{index}")
            for index in range(1, self.count)
        ]

    def _run_all(self, threads: Sequence[threading.Thread], call: Callable[[int], None]) -> None:
        for index, thread in enumerate(threads, start=1):
            try:
                thread.start()
            except RuntimeError as error:
                raise LockstepError(
                    f"{self.count} micro-batches need {len(threads)} threads, and the system refuses the {index}th: "
                    "raise its limit of processes (ulimit -u; pids in a container), or give lockstep fewer and larger "
                    "micro-batches"
                ) from error
            self._started.add(index)
        self._open(0)
        self._take_part(0, call)
        for thread in threads:
            while thread.is_alive():
                thread.join(_LOOK)

    def _await_cancelled(self, threads: Sequence[threading.Thread]) -> None:
        """By looking: Python takes a thread for ended when its join is interrupted."""
        while not self._started <= self._ended:
            time.sleep(_POLL)
        end = time.monotonic() + _ENDING
        while time.monotonic() < end and not set(threads).isdisjoint(threading.enumerate()):
            time.sleep(_POLL)

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
        # With a limit, because a signal is seen between two waits.
        while not self._gates[index].acquire(timeout=_LOOK):
            pass
        if self._cancelled:
            raise _Cancelled
        self._on_turn(index)

    def _hand_on(self, index: int) -> None:
        # The last step comes back to this call: it may be alone.
        for step in range(1, self.count + 1):
            following = (index + step) % self.count
            if self._alive[following]:
                self._open(following)
                return

    def _fail(self, error: BaseException) -> None:
        """Cancel all calls. Safe to be called again, where it was interrupted."""
        if self._failure is None:
            self._failure = error
        self._cancelled = True
        for index, alive in enumerate(self._alive):
            if alive:
                self._open(index)

    def _open(self, index: int) -> None:
        with suppress(RuntimeError):  # it is open
            self._gates[index].release()
