"""Both kinds of CPU passes, for the tests that are to hold with either."""

from __future__ import annotations

import pytest

from syncaccum.layer import native


@pytest.fixture(params=["compiled", "torch"])
def both_passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test with compiled passes, where they were built, and with torch's own."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_library", None)
    elif not native.which().startswith("compiled"):
        pytest.skip(f"CPU passes here: {native.which()}")
