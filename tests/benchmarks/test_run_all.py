"""make bench: what got worse is found, a run has a limit, and all figures with a target are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks.report as report
import benchmarks.run_all as run_all
from benchmarks.report import Figure, publish
from benchmarks.run_all import Change, Run, find_worse, main, run_one


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        (Figure("time", 1.0), Figure("time", 1.2), "1.20 times"),
        (Figure("time", 1.0), Figure("time", 1.1), ""),
        (Figure("time", 1.2), Figure("time", 1.0), ""),
        (Figure("gain", 1.0, at_least=True), Figure("gain", 0.5, at_least=True), "2.00 times"),
        (Figure("gain", 1.0, at_least=True), Figure("gain", 2.0, at_least=True), ""),
        (Figure("time", 0.99, 1.0), Figure("time", 1.01, 1.0), "its target is missed now"),
        (Figure("time", 1.01, 1.0), Figure("time", 1.02, 1.0), ""),
        (Figure("time", 1.0), Figure("another", 9.0), ""),
    ],
)
def test_what_is_worse_than_runs_differ_is_found(before: Figure, now: Figure, why: str) -> None:
    expected = [Change("memory", now.what, before.value, now.value, why)] if why else []
    assert find_worse(Run("memory"), [before], [now]) == expected


def test_errors_are_judged_by_their_targets_alone() -> None:
    before, now = Figure("error", 1e-16, 1e-12), Figure("error", 1e-15, 1e-12)
    assert find_worse(Run("precision", costs=False), [before], [now]) == []


def test_a_run_ends_or_is_stopped(no_thread_is_left: None) -> None:
    assert run_one(Run("report"), 600.0) == "done"
    assert run_one(Run("no_such_benchmark"), 600.0) == "failed"
    assert run_one(Run("training"), 0.0) == "stopped"


def test_all_results_are_compared_with_those_stored_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    publish("first", [Figure("time", 1.0, 2.0), Figure("accuracy", 90.0, 80.0, at_least=True)])
    publish("second", [Figure("time", 1.0, 2.0)])

    def run(one: Run, seconds: float) -> Any:
        if one.question == "second":
            return "stopped"
        publish(one.question, [Figure("time", 1.5, 2.0), Figure("accuracy", 95.0, 80.0, at_least=True)])
        return "done"

    monkeypatch.setattr(run_all, "run_one", run)
    assert main([Run("first"), Run("second")], folder=tmp_path) == 1
    printed = capsys.readouterr().out
    assert "WORSE first: time: 1 -> 1.5, 1.50 times" in printed
    assert "second: stopped" in printed
    written = json.loads((tmp_path / "all.json").read_text())
    assert [change["what"] for change in written["worse"]] == ["time"]
    assert (tmp_path / "all.png").stat().st_size > 1000


def test_each_benchmark_of_the_list_is_there() -> None:
    for run in run_all.RUNS:
        assert (Path(run_all.__file__).parent / f"{run.question}.py").exists()
