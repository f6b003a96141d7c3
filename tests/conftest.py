"""What all tests share: which worker runs them, and the random numbers that they draw."""

from __future__ import annotations

import gc
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Tests share the cores: with several threads each, they would mostly wait for threads that do not get to run.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Without pytest-timeout, as in `make test-fast`, its setting in pyproject.toml is known and does nothing."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds for each test, where pytest-timeout is installed")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: a full collection, which tests of what is left ask for, need not walk it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Some packages report what is not collected when Python ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """A test draws the same numbers on any worker, after any other test; each test draws its own."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.hookimpl(optionalhook=True)  # the hook is there only with xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadgroup``, keep tests that share rank processes (by folder), or runs (by file), on one worker.

    Long ones come first, as folders are sorted by name, and single unit tests last, which leaves no worker idle at the
    end. xdist would start with what has most tests, and so end with a few that train for a minute.

    By a scheduler, because pytest 9.2 ignores the mark ``xdist_group`` (pytest-dev/pytest-xdist#1386).
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class ByWhatTheyShare(LoadGroupScheduling):  # type: ignore[misc] # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            if "tests/distributed/" in nodeid:
                return "tests/distributed/"
            if any(f"tests/{folder}/" in nodeid for folder in ("benchmarks", "docs", "launch", "mpi", "packages")):
                return nodeid.split("::")[0]
            return super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return ByWhatTheyShare(config, log)
