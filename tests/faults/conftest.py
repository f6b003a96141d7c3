"""The table that `make faults` prints: a row for each fault at each moment, what must hold, and what was seen."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.report import describe_machine
from tests.faults.crew import Crew, open_crew

# These tests make networks and break them; tests/faults/run.sh gives them a network namespace of their own.
if "SYNCACCUM_FAULTS" not in os.environ:
    collect_ignore_glob = ["test_*.py"]

_RANKS = 4
_COMMITS = 5


@dataclass
class Row:
    """One line of the table; the verdict is the test's."""

    fault: str = ""
    moment: str = ""
    must_hold: str = ""
    seen: list[str] = field(default_factory=list)

    def try_out(self, fault: str, moment: str, must_hold: str) -> None:
        self.fault, self.moment, self.must_hold = fault, moment, must_hold

    def saw(self, what: str) -> None:
        self.seen.append(what)


@pytest.fixture
def row(record_property: Callable[[str, object], None]) -> Row:
    row = Row()
    record_property("row", row)
    return row


@pytest.fixture(scope="session")
def _crew() -> Iterator[Crew]:
    with open_crew(_RANKS) as crew:
        yield crew


@pytest.fixture
def crew(_crew: Crew) -> Crew:
    """Four ranks on four nodes, in good weather; whatever a test has done to them, the next finds them well."""
    _crew.restore()
    return _crew


@pytest.fixture(scope="session")
def undisturbed(_crew: Crew) -> list[dict[str, Tensor]]:
    """Statistics, counters and windows after 1, 2, 3 and more commits that nothing disturbed."""
    _crew.restore()
    _crew.start(timeout=20.0, commits=0)
    states = []
    for step in range(_COMMITS):
        assert not any(outcome.error for outcome in _crew.ask("step", step))
        states.append(_crew.ranks[0].ask("state"))
    return states


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-json", type=Path, help="also write the table to this file")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = [r for outcome in ("passed", "failed", "skipped") for r in terminalreporter.stats.get(outcome, [])]
    rows = [
        {**asdict(row), "verdict": report.outcome, "seconds": round(report.duration, 1)}
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, row in report.user_properties
        if name == "row" and isinstance(row, Row)
    ]
    table = Table("fault", "moment", "must hold", "seen", "verdict", title="faults", show_lines=True)
    for r in rows:
        table.add_row(r["fault"], r["moment"], r["must_hold"], "\n".join(r["seen"]), r["verdict"])
    Console(width=160).print(table)
    path = config.getoption("--faults-json")
    if path is not None:
        path.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
