"""Memory of a commit, kept for the next one: the first touch of fresh memory takes longer than the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

# A message and statistics each, for a few models that take turns.
_MOST = 8

_spare: dict[Hashable, Any] = {}


def take(key: Hashable, make: Callable[[], Any]) -> Any:
    """What was given back under this key, or else what ``make`` makes. No two commits have the same at a time."""
    # pop: another thread may commit another model.
    kept = _spare.pop(key, None)
    return make() if kept is None else kept


def give_back(key: Hashable, kept: Any) -> None:
    """Keep it for the next commit. Not after an error: a lost all-reduce may still write to its memory."""
    _spare[key] = kept
    # A list: another thread may change the dict.
    for oldest in list(_spare)[:-_MOST]:
        _spare.pop(oldest, None)
