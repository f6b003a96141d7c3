"""What the experiment leaves behind: tables on the console, equivalence.json, equivalence.png and readme.png."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console

from benchmarks.equivalence.gradients import Fidelity
from benchmarks.equivalence.memory import Peak
from benchmarks.equivalence.picture import draw_picture
from benchmarks.equivalence.plot import draw_plot
from benchmarks.equivalence.results import Result, Results
from benchmarks.equivalence.spread import Spread, measure_spreads
from benchmarks.equivalence.summary import Summary, list_settings, summarize
from benchmarks.equivalence.tables import (
    build_gap_table,
    build_gradient_table,
    build_memory_table,
    build_spread_table,
)
from launch.files import write_atomically

_WIDTH = 200  # of the tables, also where stdout is a file


class _Entry(Protocol):
    def to_json(self) -> str: ...


def report(results: Results, folders: Sequence[Path]) -> None:
    """Print the tables; write equivalence.json and the pictures to each folder."""
    spreads, summaries = measure_spreads(results.trainings), summarize(results.trainings)
    console = Console(width=_WIDTH)
    for setting in list_settings(summaries):
        console.print(build_gap_table(summaries, setting))
    if results.gradients:
        console.print(build_gradient_table(results.gradients))
    if results.memory:
        console.print(build_memory_table(results.memory))
    if spreads:
        console.print(build_spread_table(spreads))
    content = _describe(results, summaries, spreads)
    for folder in folders:
        write_atomically(folder / "equivalence.json", lambda file: file.write(content.encode()))
        _draw(folder, summaries, results.gradients, results.memory)
    console.print(f"equivalence.json and its pictures are in {', '.join(map(str, folders))}")


def redraw(folder: Path) -> None:
    """Draw the pictures anew from the folder's equivalence.json."""
    content = json.loads((folder / "equivalence.json").read_text())
    _draw(
        folder,
        [Summary.from_content(entry) for entry in content["summaries"]],
        [Fidelity.from_content(entry) for entry in content["gradients"]],
        [Peak.from_content(entry) for entry in content["memory"]],
    )


def _draw(folder: Path, summaries: Sequence[Summary], gradients: Sequence[Fidelity], memory: Sequence[Peak]) -> None:
    draw_plot(folder / "equivalence.png", summaries, gradients)
    draw_picture(folder / "readme.png", summaries, memory)


def _describe(results: Results, summaries: Sequence[Summary], spreads: Sequence[Spread]) -> str:
    """The content of equivalence.json, a line for each entry, so that two runs can be compared by diff."""
    machine = {"torch": torch.__version__, "machine": platform.machine(), "device": "cpu", "threads": 1}
    parts: dict[str, Iterable[_Entry]] = {
        "summaries": summaries,
        "gradients": results.gradients,
        "memory": results.memory,
        "spreads": spreads,
        "cases": map(_drop_losses, results.trainings),
    }
    lists = [f'"{name}": [\n' + ",\n".join(x.to_json() for x in entries) + "\n]" for name, entries in parts.items()]
    return f'{{"machine": {json.dumps(machine)},\n' + ",\n".join(lists) + "}\n"


def _drop_losses(result: Result) -> Result:
    """All but the last ten, whose mean is the final loss: the others would make most of the file."""
    return dataclasses.replace(result, losses=[float(f"{loss:.6g}") for loss in result.losses[-10:]])
