"""A layer's settings, and which values they may have."""

from __future__ import annotations

import math
from typing import Any

POLICIES = ("renorm", "batch", "running", "window")
"""The names of the normalization policies; `policies` says what they are."""

DEFAULT_POLICY = "window"
"""What a layer gets that asks for none."""


class Setting:
    """An attribute of a layer that lives in its accumulation, checked when it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: Any, owner: type) -> Any:
        return self if layer is None else getattr(layer._accumulation, self._name)

    def __set__(self, layer: Any, value: Any) -> None:
        state = layer._accumulation
        # The check takes all four; three are as they were.
        settings = {n: getattr(state, n) for n in ("normalization", "r_max", "d_max", "prior_count")}
        check_settings(**{**settings, self._name: value})
        setattr(state, self._name, value)
        state.match_ledger()


def check_settings(normalization: str, r_max: float = 1.5, d_max: float = 0.5, prior_count: float = 1.0) -> None:
    """Raise ValueError for a setting out of range."""
    # With `not` and >=, rather than <: NaN must fail.
    if normalization not in POLICIES:
        raise ValueError(f"normalization must be one of {', '.join(map(repr, POLICIES))}, got {normalization!r}")
    # Below 1 the range from 1/r_max to r_max is empty.
    if not r_max >= 1:
        raise ValueError(f"r_max must be at least 1, got {r_max}")
    if not d_max >= 0:
        raise ValueError(f"d_max must be at least 0, got {d_max}")
    # With inf the micro-batch would have no share at all.
    if not 0 <= prior_count < math.inf:
        raise ValueError(f"prior_count must be finite and at least 0, got {prior_count}")


def check_momentum(momentum: float | None) -> None:
    """Raise ValueError for a momentum that makes no average. nn.BatchNorm itself takes any number."""
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], or None for the cumulative average, got {momentum}")
