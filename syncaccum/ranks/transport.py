"""What a transport is: the collectives of one group. Also what all transports share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from syncaccum.errors import CommitError

SHORTEST = 1e-3
"""The shortest limit, in seconds: gloo counts milliseconds, and takes 0 for no limit."""


class Transport(Protocol):
    """The collectives a commit needs, over one group."""

    rank: int
    size: int
    call: str
    """What its collectives are for: commit, lockstep. Error messages name it."""

    def choose_device(self, device: torch.device) -> torch.device:
        """Where a tensor must live to be reduced; ``device`` itself where the group can reach it."""

    def all_reduce(self, flat: Tensor) -> None:
        """Sum a float64 tensor over the group, in place. Collective."""

    def start_all_reduce(self, flat: Tensor) -> Callable[[], None]:
        """Begin to; what is returned waits for the end. Collective."""


class Alone:
    """A group of this process only. Its sums are this rank's own."""

    rank = 0
    size = 1
    call = "commit"

    def choose_device(self, device: torch.device) -> torch.device:
        return device

    def all_reduce(self, flat: Tensor) -> None:
        return

    def start_all_reduce(self, flat: Tensor) -> Callable[[], None]:
        self.all_reduce(flat)
        return lambda: None


def count_down(timeout: float | None) -> Callable[[], float] | None:
    """A function that says how many of ``timeout`` seconds are left, from now on; None for no timeout."""
    if timeout is None:
        return None
    # A wall clock may be set back while we wait.
    end = time.monotonic() + timeout
    return lambda: max(SHORTEST, end - time.monotonic())


def lost_peer(transport: Transport) -> CommitError:
    """The error of an all-reduce that did not come to its end."""
    call = transport.call
    return CommitError(
        f"rank {transport.rank} of {transport.size}: the all-reduce of a {call} failed, because a peer is gone, is "
        f"stuck or did not call {call}; running statistics are unchanged and the window is kept"
    )
