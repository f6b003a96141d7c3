"""Train what is not finished yet, one case after the other, behind a progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from benchmarks.equivalence.cases import Case
from benchmarks.equivalence.ranks import train_on_ranks
from benchmarks.equivalence.results import Result, Store
from benchmarks.equivalence.training import Trace, train
from launch.placement import Placement


def run_cases(cases: Sequence[Case], output: Path) -> list[Result]:
    """Results of all cases, in order; those that the output folder has are not trained again."""
    store = Store(output)
    results = {case: result for case in cases if (result := store.load(case)) is not None}
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    # On stderr: stdout has the tables.
    with Progress(*columns, console=Console(stderr=True)) as bars:
        if results:
            bars.console.print(f"{len(results)} of {len(cases)} trainings were finished before, in {output}")
        missing = [case for case in cases if case not in results]
        task = bars.add_task("", total=sum(case.steps for case in missing))
        behind = 0
        for case in missing:
            bars.update(task, description=case.name)
            results[case] = store.keep(case, _train(case, bars, task, behind))
            behind += case.steps
            bars.update(task, completed=behind)  # also where the case ended early
    return [results[case] for case in cases]


def _train(case: Case, bars: Progress, task: TaskID, behind: int) -> Trace:
    if case.ranks > 1:
        return train_on_ranks(case)
    return train(case, Placement(), lambda step: bars.update(task, completed=behind + step))
