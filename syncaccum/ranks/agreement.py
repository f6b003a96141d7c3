"""How ranks find out that they mean the same by a message: fingerprints, and what a group has agreed on."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# A header is [new, h, h^2, h, h^2, h, h^2]: new says that its sender proposes, the h are pieces of a fingerprint.
# 20 bits each: sums of squares over 4,096 ranks stay exact in float64.
_PIECES = 3
_PIECE_BITS = 20
HEADER = 1 + 2 * _PIECES
"""Numbers at the start of every message."""

_REMEMBERED = 16
"""Of agreements in a group: those of a few models that take turns."""


class Fingerprint(NamedTuple):
    """What a message is about, in a few numbers that ranks can compare by summing them."""

    pieces: tuple[int, ...]

    @classmethod
    def of(cls, *about: Any) -> Fingerprint:
        """Of values with a stable ``repr``."""
        digest = int.from_bytes(hashlib.sha256(repr(about).encode()).digest(), "little")
        return cls(tuple((digest >> _PIECE_BITS * i) % (1 << _PIECE_BITS) for i in range(_PIECES)))

    def header(self, *, new: bool = False) -> list[float]:
        """What a message starts with."""
        return [float(new), *(float(v) for h in self.pieces for v in (h, h * h))]

    def agrees(self, reduced_header: Sequence[float], ranks: int, *, new: bool = False) -> bool:
        """Whether every rank sent this header: a sum and a sum of squares both fit only if all were equal."""
        return list(reduced_header) == [ranks * v for v in self.header(new=new)]


@dataclass
class Agreement:
    """What the ranks of a group have agreed on; the same on all of them."""

    message_size: int = HEADER
    """Of all messages of the group. gloo aborts, or gives wrong sums, where sizes differ."""
    keys: OrderedDict[Any, None] = field(default_factory=OrderedDict)
    locksteps: int = 0
    """Begun since ranks were last at odds in one."""
    at_odds: int = 0
    """How often. All ranks notice together, so both numbers are equal again afterwards."""

    def begin_lockstep(self) -> tuple[int, int]:
        """A number for the next lockstep, the same on all ranks."""
        self.locksteps += 1
        return self.at_odds, self.locksteps

    def end_at_odds(self) -> None:
        """Ranks found that they were in different locksteps, or at different layers: count anew."""
        self.at_odds += 1
        self.locksteps = 0

    def remember(self, key: Any, message_size: int) -> None:
        self.message_size = max(self.message_size, message_size)
        self.keys[key] = None
        if len(self.keys) > _REMEMBERED:
            self.keys.popitem(last=False)


def agreement_of(group: Any) -> Agreement:
    """The agreement of a resolved group, empty at first."""
    return _agreements.setdefault(group, Agreement())


# By identity: a new group has agreed on nothing yet.
_agreements: weakref.WeakKeyDictionary[Any, Agreement] = weakref.WeakKeyDictionary()
