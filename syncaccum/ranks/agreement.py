"""How ranks find out that they mean the same by a message: by fingerprints in it. And what a group has agreed on."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Every message begins with a header: [new, a, a^2, b, b^2, c, c^2].
# new is 1 where the sender proposes a layout, else 0.
# a, b and c are the three pieces of a fingerprint.
# Headers are summed over the ranks, as the whole message is.
# Equal pieces of R ranks give R a and R a^2.
# Unequal ones never give both: their squares sum to more.
# 20 bits: squares of 4,096 ranks sum to 2^52 at most,
# which float64 holds exactly.
# Three pieces, 60 bits: chance makes no equals.
_PIECES = 3
_PIECE_BITS = 20
HEADER = 1 + 2 * _PIECES
"""Numbers at the start of every message."""

# A momentum on a schedule makes a new layout for each commit.
# Keeping all of these would be a leak.
_REMEMBERED = 16
"""How many agreements a group keeps: those of a few models that take turns."""


class Fingerprint(NamedTuple):
    """What a message is about, as a few numbers. Ranks compare them by a sum, so that it costs no message."""

    pieces: tuple[int, ...]

    @classmethod
    def of(cls, *about: Any) -> Fingerprint:
        """Of values with a stable ``repr``."""
        # Not hash(): Python salts it anew in each process.
        digest = int.from_bytes(hashlib.sha256(repr(about).encode()).digest(), "little")
        return cls(tuple((digest >> _PIECE_BITS * i) % (1 << _PIECE_BITS) for i in range(_PIECES)))

    def also(self, *about: Any) -> Fingerprint:
        """That of the same and something more."""
        return Fingerprint.of(self.pieces, *about)

    def header(self, *, new: bool = False) -> list[float]:
        """What a message starts with."""
        return [float(new), *(float(v) for h in self.pieces for v in (h, h * h))]

    def agrees(self, reduced_header: Sequence[float], ranks: int, *, new: bool = False) -> bool:
        """Whether every rank sent this header: a sum and a sum of squares both fit only if all were equal."""
        # Whole numbers, summed exactly: no tolerance.
        return list(reduced_header) == [ranks * v for v in self.header(new=new)]


@dataclass
class Agreement:
    """What the ranks of a group have agreed on; the same on all of them."""

    message_size: int = HEADER
    """The length of every message of the group: gloo aborts, or gives wrong sums, where lengths differ."""
    keys: OrderedDict[Any, None] = field(default_factory=OrderedDict)
    locksteps: int = 0
    """How many have begun since the ranks were last at odds in one."""
    at_odds: int = 0
    """How often ranks were at odds in a lockstep. All of them notice it together, and count anew together."""

    def begin_lockstep(self) -> tuple[int, int]:
        """A number for the next lockstep, the same on all ranks."""
        self.locksteps += 1
        return self.at_odds, self.locksteps

    def end_at_odds(self) -> None:
        """Count locksteps anew: ranks found that they were in different ones, or at different layers."""
        self.at_odds += 1
        self.locksteps = 0

    def remember(self, key: Any, message_size: int) -> None:
        """Keep what the ranks have just found equal. All of them keep and forget the same, in the same order."""
        # Never shorter: a peer may still send the longest one.
        self.message_size = max(self.message_size, message_size)
        self.keys[key] = None
        if len(self.keys) > _REMEMBERED:
            self.keys.popitem(last=False)


def agreement_of(group: Any) -> Agreement:
    """The agreement of a resolved group, empty at first."""
    return _agreements.setdefault(group, Agreement())


# By identity: a new group has agreed on nothing yet.
_agreements: weakref.WeakKeyDictionary[Any, Agreement] = weakref.WeakKeyDictionary()
