"""What several files of unit tests run under: a process group, a signal, either kind of CPU passes."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from syncaccum.layer import native
from tests.unit.interrupts import raise_interrupt


@pytest.fixture
def group() -> Iterator[None]:
    """A default process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def interruptible() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, raise_interrupt)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.fixture(params=["compiled", "torch"])
def both_passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test with compiled passes, where they were built, and with torch's own."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_library", None)
    elif not native.which().startswith("compiled"):
        pytest.skip(f"CPU passes here: {native.which()}")
