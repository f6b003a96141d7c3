"""What all tests share: which worker runs them."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)  # the hook is there only with xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadgroup``, keep the multi-rank tests on one worker: each would start a pool of ranks.

    By a scheduler, because pytest 9.2 ignores the mark ``xdist_group`` (pytest-dev/pytest-xdist#1386).
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class OnePool(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ranks" if "tests/distributed/" in nodeid else super()._split_scope(nodeid)

    return OnePool(config, log)
