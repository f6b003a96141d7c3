"""Measure what is not finished yet, one case after the other, behind a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.equivalence.cases import Case
from benchmarks.equivalence.gradients import Fidelity, compare_gradients
from benchmarks.equivalence.memory import Peak, measure_peak
from benchmarks.equivalence.plan import Plan, add_references
from benchmarks.equivalence.ranks import run_on_ranks
from benchmarks.equivalence.results import Result, Results, Store
from benchmarks.equivalence.training import train


def run(plan: Plan, output: Path) -> Results:
    """All of the plan, in order; what the output folder has is not measured again."""
    store, trainings = Store(output), add_references(plan.trainings)
    done = sum(store.load(case) is not None for case in trainings)
    done += sum(store.find(Fidelity, case) is not None for case in plan.gradients)
    done += sum(store.find(Peak, case) is not None for case in plan.memory)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # On stderr: stdout has the tables.
    with Progress(*columns, console=Console(stderr=True)) as bars:
        total = len(trainings) + len(plan.gradients) + len(plan.memory)
        if done:
            bars.console.print(f"{done} of {total} cases were finished before, in {output}")
        bar = bars.add_task("", total=total)

        def show(what: str, case: Case) -> None:
            bars.update(bar, advance=bool(bars.tasks[bar].description), description=f"{what} {case.name}")

        results = Results(
            [_train(store, case, show) for case in trainings],
            [_compare(store, case, show) for case in plan.gradients],
            [_measure(store, case, show) for case in plan.memory],
        )
        bars.update(bar, completed=total)
    return results


Show = Callable[[str, Case], None]


def _train(store: Store, case: Case, show: Show) -> Result:
    show("training", case)
    finished = store.load(case)
    return finished or store.keep(case, run_on_ranks(train, case))


def _compare(store: Store, case: Case, show: Show) -> Fidelity:
    show("gradients", case)
    return store.measure(Fidelity, case, partial(run_on_ranks, compare_gradients))


def _measure(store: Store, case: Case, show: Show) -> Peak:
    show("memory", case)
    return store.measure(Peak, case, measure_peak)
