"""Settings of the whole process, or of a module, that locksteps in several threads need at the same time."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from syncaccum.torch_private import compile_stance, restore_compile_stance

R = TypeVar("R")

Action = Callable[[], object]


class Setting(Protocol):
    """What is otherwise for as long as a lockstep runs."""

    def enter(self) -> None:
        """Set it."""

    def leave(self) -> None:
        """Take it back. May be called twice, or where `enter` did not come to its end."""


def run_under(settings: Sequence[Setting], function: Callable[[], R]) -> R:
    """Call a function with each setting made, in this order, and taken back in the opposite one."""
    try:
        try:
            for setting in settings:
                setting.enter()
            return function()
        finally:
            _leave(settings)
    except BaseException:
        # Again, because a signal may have interrupted the first.
        _leave(settings)
        raise


def set_while_alive(setting: Setting, owner: object) -> None:
    """Make a setting, and take it back when nothing holds the owner any more."""
    weakref.finalize(owner, _leave_surely, setting).atexit = False
    setting.enter()


def _leave_surely(setting: Setting) -> None:
    try:
        setting.leave()
    except BaseException:
        setting.leave()
        raise


def _leave(settings: Sequence[Setting]) -> None:
    for setting in reversed(settings):
        setting.leave()


class SharedSetting:
    """A setting with users: the first to come makes it, the last to leave takes it back, in whatever order.

    Args:
        prepare: changes nothing; returns how to make the setting, and how to take it back, also a second time.
    """

    def __init__(self, prepare: Callable[[], tuple[Action, Action]]) -> None:
        self._prepare = prepare
        # Reentrant: a user may be collected, and leave, at any line in here.
        self._lock = threading.RLock()
        self._users: set[object] = set()
        self._undo: Action | None = None

    def enter(self, user: object) -> None:
        with self._lock:
            self._users.add(user)
            if self._undo is None:
                make, self._undo = self._prepare()
                make()

    def leave(self, user: object) -> None:
        with self._lock:
            self._users.discard(user)
            if not self._users and self._undo is not None:
                self._undo()
                self._undo = None


class Eager:
    """Runs compiled models as they were written: a compiled graph has no place to wait in."""

    def enter(self) -> None:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes seconds
            _eager_stance.enter(self)

    def leave(self) -> None:
        _eager_stance.leave(self)


def _prepare_eager() -> tuple[Action, Action]:
    before = compile_stance()
    return lambda: torch.compiler.set_stance("force_eager"), lambda: restore_compile_stance(before)


_eager_stance = SharedSetting(_prepare_eager)
