"""What accumulating adds to a BatchNorm: its settings and its open window, in one private attribute of the layer."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from syncaccum.layer.keys import make_key
from syncaccum.layer.ledger import Ledger
from syncaccum.layer.replay import Records
from syncaccum.layer.settings import check_settings
from syncaccum.ranks.groups import GroupHandle

NEW_WINDOW = {"micro_batches": 0, "is_open": False, "is_sent": False, "ran_untracked": False}
"""What an Accumulation knows of a window that has just begun, besides its sums."""


@dataclass
class Accumulation:
    """What accumulating adds to a BatchNorm: its settings and its open window."""

    handle: GroupHandle
    normalization: str
    r_max: float
    d_max: float
    prior_count: float
    # Not a buffer: DDP overwrites buffers with rank 0's.
    # FSDP and .half() cast them.
    window: Tensor
    """Packed moments, float64."""
    momentum: float | None
    """The layer's at the last forward that counted. A commit uses it for the window, even if the layer's changed."""
    always_counts: bool
    """Whether the layer had momentum 0 from the start. Else a forward under momentum 0 counts nothing."""
    is_open: bool = False
    """Whether any forward counted since the last commit."""
    is_sent: bool = False
    """Whether its sums went to the other ranks before the commit, see `overlap`. More may have come in since."""
    is_committed: bool = False
    """Whether there was a commit since the statistics were reset. One without any values is enough."""
    used_since: int | None = None
    """The number of the first training forward that used the running statistics as they are now; None before it."""
    home: Tensor | None = None
    """The layer's own running mean, as last seen: see `given`."""
    call_momentum: float | None = None
    """A subclass's own in its call of batch_norm, where the layer has another."""
    ran_untracked: bool = False
    """Whether a training forward since then had track_running_stats off. A checkpoint's second one must not count."""
    micro_batches: int = 0
    """How many are in the open window; those of compiled forwards aside, which run no Python."""
    locksteps: int = 0
    """How often one has added to the layer's windows. Not reset with them."""
    uncounted: int = 0
    """How many ``not_counted`` are open."""
    ledger: Ledger | None = None
    """Under policy "window": what is known besides the window."""
    name: str = ""
    """In the model that was converted; for messages."""
    normalises_itself: bool = False
    """Whether its forward calls no batch_norm, so that nothing is accumulated. Its first training forward tells."""
    said: set[str] = field(default_factory=set)
    """Warnings that were given. The layers of one conversion share it: one of them speaks for all."""

    owner: weakref.ref[nn.Module] | None = None
    """The layer; None in a copy."""
    key: Tensor = field(init=False)
    """Finds this from compiled code."""
    records: Records = field(init=False)
    """What statistics forwards used that a checkpoint may run again: see `notices`."""

    def __post_init__(self) -> None:
        check_settings(self.normalization, self.r_max, self.d_max, self.prior_count)
        self.match_ledger()
        self._begin_alone()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has a key of its own, and no graphs.
        return {name: value for name, value in vars(self).items() if name not in ("key", "owner", "records")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, owner=None)
        self._begin_alone()

    def _begin_alone(self) -> None:
        self.key, self.records = make_key(self), Records(spans_windows=True)

    def match_ledger(self) -> None:
        """Have a ledger of the window's width under policy "window", and none under others."""
        if self.normalization != "window":
            self.ledger = None
        elif self.ledger is None or self.ledger.prior.numel() != self.window.numel():
            self.ledger = Ledger.like(self.window)

    def drop(self) -> None:
        """Forget the open window."""
        self.window.zero_()
        if self.ledger is not None:
            self.ledger.discard()
        vars(self).update(NEW_WINDOW)

    def replace_statistics(self, *, is_committed: bool) -> None:
        """Start anew, because the running statistics came from elsewhere. The window belonged to those before."""
        self.drop()
        if self.ledger is not None:
            self.ledger.forget()
        self.is_committed = is_committed
        self.used_since = None
