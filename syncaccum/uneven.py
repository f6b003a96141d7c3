"""Whether ranks may run out of inputs before others do: what a commit and a forward must know of it.

A file of its own because commits and layers ask, and `join`, which knows both, answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncaccum.errors import CommitError

if TYPE_CHECKING:
    from syncaccum.layout import NamedLayer


class UnevenInputs(Protocol):
    """The open ``join``."""

    @property
    def model(self) -> nn.Module:
        """What was wrapped: the DistributedDataParallel."""

    def announce_commit(self, layers: Sequence[NamedLayer]) -> None:
        """Let ranks that have run out of inputs take part in the commit that comes. Collective."""


_open: UnevenInputs | None = None


def current() -> UnevenInputs | None:
    """The ``join`` that this process is in, if any."""
    return _open


def enter(uneven: UnevenInputs | None) -> None:
    """Be in a ``join`` from now on, or in none."""
    global _open
    _open = uneven


def refuse_ddps_own_join() -> None:
    """Raise in a forward under ``DistributedDataParallel.join()``, whose joined ranks would miss the commit.

    They wait in an all-reduce of one number, which a commit's message would meet: gloo then aborts the process.
    Asking in the forward tells every rank with inputs in its first one, before any has run out. torch has no public
    way to ask; a test fails when these two names change.
    """
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None:
        return
    config = ddp._join_config
    # One that throws on early termination ends on all ranks at once, so nobody misses a commit.
    if not config.enable or config.throw_on_early_termination or (_open is not None and _open.model is ddp):
        return
    raise CommitError(
        "under DistributedDataParallel.join() ranks that have run out of inputs would miss the next commit: use "
        "`with syncaccum.join(ddp):` instead, or give those ranks empty micro-batches (N = 0) and no join. "
        "DDP remembers that it was joined: for another kind of training afterwards wrap the model anew"
    )
