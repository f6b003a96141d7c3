"""What the experiment leaves behind: tables on the console, equivalence.json, equivalence.png and readme.png."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.equivalence.picture import draw_picture
from benchmarks.equivalence.plot import draw_plot
from benchmarks.equivalence.results import Result
from benchmarks.equivalence.spread import Spread, measure_spreads
from benchmarks.equivalence.tables import build_case_table, build_overview, build_spread_table
from launch.files import write_atomically

_WIDTH = 160  # of the tables, also where stdout is a file


def report(results: Sequence[Result], folders: Sequence[Path]) -> None:
    """Print the tables; write equivalence.json and the pictures to each folder."""
    spreads = measure_spreads(results)
    console = Console(width=_WIDTH)
    for task in dict.fromkeys(result.case.task for result in results):
        of_task = [r for r in results if r.case.task == task and not r.case.permutation]
        console.print(build_case_table(task, of_task))
    console.print(build_overview(results))
    if spreads:
        console.print(build_spread_table(spreads))
    content = _describe(results, spreads)
    for folder in folders:
        write_atomically(folder / "equivalence.json", lambda file: file.write(content.encode()))
        _draw(folder, results)
    console.print(f"equivalence.json and its pictures are in {', '.join(map(str, folders))}")


def redraw(folder: Path) -> None:
    """Draw the pictures anew from the folder's equivalence.json."""
    content = json.loads((folder / "equivalence.json").read_text())
    _draw(folder, [Result.from_content(case) for case in content["cases"]])


def _draw(folder: Path, results: Sequence[Result]) -> None:
    draw_plot(folder / "equivalence.png", results)
    draw_picture(folder / "readme.png", results)


def _describe(results: Sequence[Result], spreads: Sequence[Spread]) -> str:
    """The content of equivalence.json, a line for each case, so that two runs can be compared by diff."""
    machine = {"torch": torch.__version__, "machine": platform.machine(), "device": "cpu", "threads": 1}
    cases = ",\n".join(_round_losses(result).to_json() for result in results)
    judged = ",\n".join(spread.to_json() for spread in spreads)
    return f'{{"machine": {json.dumps(machine)},\n"spreads": [\n{judged}\n],\n"cases": [\n{cases}\n]}}\n'


def _round_losses(result: Result) -> Result:
    """More digits would double the file; where they matter, `spreads` has been computed with all of them."""
    return dataclasses.replace(result, losses=[float(f"{loss:.6g}") for loss in result.losses])
