"""OpenMP's threads: a team for each thread that computes, and so for each micro-batch.

32 micro-batches on 16 cores keep 480 threads, most of which wait. Where the system allows fewer, GNU's OpenMP ends
the process. There, a micro-batch sends its team away before it gives way, so that one team lives at a time.
"""

from __future__ import annotations

import _thread
import ctypes
import functools
import threading
import time
from collections.abc import Callable

import torch
from torch import nn

from syncaccum.errors import LockstepError

_POLL = 1e-4
"""Seconds between looks at threads that end."""
_SOFT = 1
"""omp_pause_soft, of omp_pause_resource_all (OpenMP 5.0): settings stay."""


class Teams:
    """The OpenMP teams of a lockstep's micro-batches."""

    def __init__(self, model: nn.Module, count: int) -> None:
        self._count = count
        self._computes_here = any(p.device.type == "cpu" for p in model.parameters())
        self._one_at_a_time = True

    def enter(self) -> None:
        """Find out what the system allows, before OpenMP does. On a GPU there are no teams to speak of."""
        others = torch.get_num_threads() - 1
        if others == 0 or not self._computes_here:
            return
        # All teams at once, besides the threads of the micro-batches.
        self._one_at_a_time = not _can_start(self._count - 1 + self._count * others)
        # One team at a time.
        needed = self._count - 1 + others
        if self._one_at_a_time and not _can_start(needed):
            raise LockstepError(
                f"{self._count} micro-batches with {others + 1} OpenMP threads (torch.get_num_threads()) need {needed} "
                "more threads, and the system refuses some: raise its limit of processes (ulimit -u; pids in a "
                "container), call torch.set_num_threads with less, or give lockstep fewer and larger micro-batches"
            )

    def leave(self) -> None:
        """Nothing: teams end with the threads of their micro-batches."""

    def release(self) -> None:
        """Send this thread's team away, as its micro-batch stops for now. Only if needed: a new team costs time."""
        if self._one_at_a_time:
            for pause in _find_pauses():
                pause(_SOFT)


def _can_start(count: int) -> bool:
    """Whether so many more threads can run at the same time. They have ended when this returns."""
    started = 0
    ended: list[None] = []
    gate = threading.Lock()

    def wait() -> None:
        with gate:
            ended.append(None)

    with gate:
        try:
            while started < count:
                _thread.start_new_thread(wait, ())
                started += 1
        except RuntimeError:
            pass
    while len(ended) < started:
        time.sleep(_POLL)
    return started == count


@functools.lru_cache(maxsize=1)
def _find_pauses() -> list[Callable[[int], int]]:
    """omp_pause_resource_all of each GNU OpenMP in this process; others share their threads."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "libgomp" in line}
    except OSError:  # no Linux
        return []
    libraries = [ctypes.CDLL(path) for path in sorted(paths)]
    return [lib.omp_pause_resource_all for lib in libraries if hasattr(lib, "omp_pause_resource_all")]
