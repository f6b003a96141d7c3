"""What every benchmark prints and writes: its figures next to their targets, and where they were measured."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """One measured number. ``target`` is an upper limit, or a lower one where ``at_least``; None is no target."""

    what: str
    value: float
    target: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        met = self.value >= self.target if self.at_least else self.value <= self.target
        return "met" if met else "MISSED"


def describe_machine() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def publish(question: str, figures: list[Figure], details: Any = None) -> None:
    """Print a table and write ``results/<question>.json``."""
    machine = describe_machine()
    table = Table(title=f"{question}\n{', '.join(f'{k} {v}' for k, v in machine.items())}", title_justify="left")
    for column in ("what", "value", "target", "", "note"):
        table.add_column(column)
    for f in figures:
        limit = "" if f.target is None else f"{'>=' if f.at_least else '<='} {f.target:g}"
        table.add_row(f.what, f"{f.value:.4g}", limit, f.verdict, f.note)
    Console(width=160).print(table)
    RESULTS.mkdir(exist_ok=True)
    written = {
        "question": question,
        "machine": machine,
        "figures": [{**asdict(f), "verdict": f.verdict} for f in figures],
    }
    if details is not None:
        written["details"] = details
    (RESULTS / f"{question}.json").write_text(json.dumps(written, indent=1) + "\n")


def read_figures(path: Path) -> list[Figure]:
    """What `publish` wrote there; nothing where there is no such file."""
    if not path.exists():
        return []
    written = json.loads(path.read_text())["figures"]
    return [Figure(**{key: value for key, value in one.items() if key != "verdict"}) for one in written]
