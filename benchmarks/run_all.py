"""Run every benchmark, one after the other, and say what got worse than the stored results.

Each prints its figures next to their targets and writes them to ``results``. All that have a target are in
``results/all.png``, and in ``results/all.json`` is how long each took and what got worse. What 15 minutes do not
suffice for is stopped, and keeps its stored results.

    python -m benchmarks.run_all
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.report import RESULTS, Figure, read_figures

LIMIT = 15 * 60.0
MARGIN = 1.15
"""Two runs of one benchmark differ by a tenth."""


@dataclass(frozen=True)
class Run:
    """One benchmark. ``result`` is what it writes; ``costs`` says whether its figures are times or bytes."""

    question: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    result: str = ""
    costs: bool = True

    @property
    def name(self) -> str:
        return self.result or self.question


_TORCH = {"SYNCACCUM_NATIVE": "0"}
# Short ones first: the limit concerns the last.
RUNS = [
    Run("precision", costs=False),
    Run("checkpoint_gradients", costs=False),
    Run("memory"),
    Run("checkpoint_memory"),
    Run("commit_speed"),
    Run("overlap"),
    Run("lockstep_speed"),
    Run("layer_speed"),
    Run("layer_speed", environment=_TORCH, result="layer_speed_torch"),
    Run("lookahead_cost"),
    Run("commit_scaling"),
    Run("training", costs=False),
    Run("layer_speed", ("--processor-time",), result="layer_speed_processor_time"),
    Run("layer_speed", ("--processor-time",), _TORCH, result="layer_speed_torch_processor_time"),
]


def run_one(run: Run, seconds: float) -> str:
    """How it ended: ``done``, ``failed`` or ``stopped``, after so many seconds."""
    command = [sys.executable, "-m", f"benchmarks.{run.question}", *run.arguments]
    # A session of its own: its ranks end with it.
    with subprocess.Popen(command, env={**os.environ, **run.environment}, start_new_session=True) as process:
        try:
            return "failed" if process.wait(max(seconds, 0.0)) else "done"
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Change:
    """A figure that got worse."""

    result: str
    what: str
    before: float
    now: float
    why: str


def find_worse(run: Run, before: Iterable[Figure], now: Iterable[Figure]) -> list[Change]:
    """Costs that grew by more than runs differ, and targets that were met and are not."""
    stored = {figure.what: figure for figure in before}
    pairs = [(stored[figure.what], figure) for figure in now if figure.what in stored]
    reasons = [(old, new, _judge(run, old, new)) for old, new in pairs]
    return [Change(run.name, new.what, old.value, new.value, why) for old, new, why in reasons if why]


def _judge(run: Run, old: Figure, new: Figure) -> str:
    if (old.verdict, new.verdict) == ("met", "MISSED"):
        return "its target is missed now"
    better, worse = (new.value, old.value) if new.at_least else (old.value, new.value)
    return f"{worse / better:.2f} times" if run.costs and better > 0 and worse > MARGIN * better else ""


def draw(by_result: Mapping[str, Sequence[Figure]], before: Mapping[str, Sequence[Figure]], path: Path) -> None:
    """Every figure that has a target, as a share of it, and what was stored before."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [(name, figure) for name, figures in by_result.items() for figure in figures if figure.target]
    stored = {(name, figure.what): figure for name, figures in before.items() for figure in figures}
    shares = [_share(figure) for _, figure in rows]
    earlier = [_share(stored.get((name, figure.what), figure)) for name, figure in rows]
    canvas, axes = plt.subplots(figsize=(10, 1 + 0.2 * len(rows)), layout="constrained")
    places = range(len(rows))
    axes.scatter(shares, places, c=["C0" if share <= 1 else "C3" for share in shares], s=16, label="now")
    axes.plot(earlier, places, "k|", label="stored before")
    axes.axvline(1.0, color="gray", lw=1, label="target")
    axes.set_yticks(places, [f"{name}: {figure.what}" for name, figure in rows], fontsize=6)
    axes.invert_yaxis()
    axes.set(
        xscale="log",
        xlim=(_LEAST, 10),
        ylim=(len(rows) - 0.5, -0.5),
        xlabel="share of the target; right of 1 is missed",
    )
    axes.legend(fontsize=7)
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


_LEAST = 1e-2
"""Errors are many times smaller than their targets."""


def _share(figure: Figure) -> float:
    assert figure.target is not None
    value, target = (figure.target, figure.value) if figure.at_least else (figure.value, figure.target)
    share = value / target if target else math.inf
    return min(max(share, _LEAST), 10.0) if math.isfinite(share) else 10.0


def main(runs: Sequence[Run] = RUNS, limit: float = LIMIT, folder: Path = RESULTS) -> int:
    begin = time.monotonic()
    console = Console()
    before = {run.name: read_figures(folder / f"{run.name}.json") for run in runs}
    ends: dict[str, Any] = {}
    for run in runs:
        start = time.monotonic()
        end = run_one(run, begin + limit - start)
        ends[run.name] = {"end": end, "seconds": round(time.monotonic() - start, 1)}
    done = [run for run in runs if ends[run.name]["end"] == "done"]
    now = {run.name: read_figures(folder / f"{run.name}.json") for run in done}
    worse = [change for run in done for change in find_worse(run, before[run.name], now[run.name])]
    draw(now, before, folder / "all.png")
    written = {"runs": ends, "seconds": round(time.monotonic() - begin, 1), "worse": [asdict(c) for c in worse]}
    (folder / "all.json").write_text(json.dumps(written, indent=1) + "\n")
    for name, end in ends.items():
        console.print(f"{name}: {end['end']} after {end['seconds']} s", highlight=False)
    for change in worse:
        console.print(f"WORSE {change.result}: {change.what}: {change.before:.4g} -> {change.now:.4g}, {change.why}")
    if not worse:
        console.print("nothing got worse than the stored results")
    return 0 if len(done) == len(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
