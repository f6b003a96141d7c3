"""Tests that run in every rank of a cluster at once: torchrun starts pytest, pytest joins the process group.

A rank whose test fails leaves (``pytest -x``), and its peers learn that in their next collective, so each failing rank
shows its own traceback. Started without a launcher there is no cluster, and nothing here is collected.
"""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Rank

if "WORLD_SIZE" not in os.environ:
    collect_ignore_glob = ["test_*.py"]

# A collective takes milliseconds; ranks reach one as far apart as their nodes' cores are busy with others' tests.
_GROUP_TIMEOUT = datetime.timedelta(seconds=60)


@pytest.fixture(scope="session", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", timeout=_GROUP_TIMEOUT)
    yield
    gc.collect()  # DDP's reference cycles keep gloo busy after the group is gone
    dist.destroy_process_group()


@pytest.fixture
def rank(process_group: None, tmp_path: Path) -> Rank:
    """This rank. Its folder is its own: nodes need not share a disk."""
    torch.manual_seed(0)
    return Rank(dist.get_rank(), dist.get_world_size(), tmp_path)


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dot for a test that passed: those of several ranks would run into each other."""
    if not report.passed:
        return None
    return ("passed" if report.when == "call" else ""), "", "PASSED"
