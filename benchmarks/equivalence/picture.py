"""The README's picture: what each mode scores, and the memory that it takes, for a reader who has five seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.equivalence.cases import REFERENCE, TASKS
from benchmarks.equivalence.memory import Peak
from benchmarks.equivalence.plot import save_png
from benchmarks.equivalence.summary import Group, Summary, find_summary
from launch.files import write_atomically

_TASK = "segment"  # held out, and the case that people write about
_LARGE, _SMALL = 15, 11.5  # points; a README shows the picture at about two thirds of its size
_LABEL_HEIGHT = 0.1  # of the axes, with some air
_LABEL_GAP = 0.02  # of the axes, from a point to its label
_MIB = 2**20

# Name and colour of each mode, of Okabe and Ito's; ours are blue and green.
_MODES = {
    "batchnorm": ("plain BatchNorm", "#D55E00"),
    "renorm": ("renorm", "#56B4E9"),
    "window": ("window", "#0072B2"),
    "lookahead": ("lookahead", "#009E73"),
    "exact": ("lockstep", "#CC79A7"),
    REFERENCE: ("large batch", "black"),
}


@dataclass(frozen=True)
class Point:
    """A mode: score in the task's unit, its spread over seeds, peak of a step's memory in MiB."""

    policy: str
    score: float
    spread: float
    mib: float


def draw_picture(path: Path, summaries: Sequence[Summary], memory: Sequence[Peak]) -> None:
    """Write a PNG, if plain BatchNorm and the large batch are among the results."""
    size = choose_size(memory)
    points = collect_points(summaries, memory, size)
    if not {"batchnorm", REFERENCE} <= {point.policy for point in points}:
        return
    figure = Figure(figsize=(9, 5.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    _dress(axes, points, size)
    _draw_points(axes, points)
    figure.supxlabel(_describe(summaries), fontsize=_SMALL, x=0.01, ha="left", color="dimgrey")
    write_atomically(path, lambda file: save_png(figure, file))


def choose_size(memory: Sequence[Peak]) -> int:
    """The smallest micro-batch that all modes were tried at."""
    sizes: dict[int, int] = {}
    for peak in memory:
        if peak.case.task == _TASK and peak.case.policy in _MODES and peak.case.policy != REFERENCE:
            sizes[peak.case.micro_batch] = sizes.get(peak.case.micro_batch, 0) + 1
    return min(sizes, key=lambda size: (-sizes[size], size), default=0)


def collect_points(summaries: Sequence[Summary], memory: Sequence[Peak], size: int) -> list[Point]:
    """Modes of which both score and memory are known; exact has the large batch's score, if its own was not run."""
    peaks = {
        peak.case.policy: peak.bytes / _MIB
        for peak in memory
        if peak.case.task == _TASK and (peak.case.policy == REFERENCE or peak.case.micro_batch == size)
    }
    points = []
    for policy in _MODES:
        summary = find_summary(summaries, _find_setting(summaries), policy, size)
        if policy == "exact" and summary is None:
            summary = find_summary(summaries, _find_setting(summaries), REFERENCE, size)
        if policy in peaks and summary is not None and summary.mean is not None:
            points.append(Point(policy, summary.mean, summary.spread or 0.0, peaks[policy]))
    return points


def _find_setting(summaries: Sequence[Summary]) -> Group:
    own = TASKS[_TASK]
    settings = [s.group.setting for s in summaries if s.group.task == _TASK and s.group.is_own]
    return settings[0] if settings else Group(_TASK, own.lr, own.window, own.steps, 1, REFERENCE, own.window)


def _draw_points(axes: Axes, points: Sequence[Point]) -> None:
    """Points at the left may lie close together: their labels stand at their right, apart from each other."""
    middle = max(point.mib for point in points) / 2
    lowest, highest = axes.get_ylim()
    free = -1.0
    for point in sorted(points, key=lambda point: point.score):
        label, colour = _MODES[point.policy]
        axes.errorbar(point.mib, point.score, point.spread, color=colour, marker="o", markersize=13, elinewidth=2)
        text: dict[str, Any] = {"color": colour, "fontsize": _LARGE, "fontweight": "bold"}
        words = f"{label}: {point.score:.0f} %"
        if point.mib > middle:
            # The large batch's label above, lockstep's below: they score alike.
            offset = (-12, 14 if point.policy == REFERENCE else -24)
            axes.annotate(words, (point.mib, point.score), offset, textcoords="offset points", ha="right", **text)
            continue
        free = max(free, (point.score - lowest) / (highest - lowest))
        line: dict[str, Any] = {"arrowstyle": "-", "color": colour, "alpha": 0.5}
        place: dict[str, Any] = {"textcoords": "axes fraction", "va": "center", "arrowprops": line}
        beside = point.mib / axes.get_xlim()[1] + _LABEL_GAP
        axes.annotate(words, (point.mib, point.score), (beside, free), **place, **text)
        free += _LABEL_HEIGHT


def _dress(axes: Axes, points: Sequence[Point], size: int) -> None:
    images = "image" if size == 1 else "images"
    title = f"Segmentation, {TASKS[_TASK].window} images per step, {size} {images} at a time"
    axes.set_title(title, fontsize=_LARGE + 3, loc="left", pad=10)
    axes.set_xlim(0, 1.15 * max(point.mib for point in points))
    lowest, highest = (edge(p.score + sign * p.spread for p in points) for edge, sign in ((min, -1), (max, 1)))
    margin = 0.1 * max(highest - lowest, 1.0)
    axes.set_ylim(lowest - margin, highest + 2 * margin)
    axes.set_xlabel("memory of a step, MiB (left is better)", fontsize=_LARGE)
    axes.set_ylabel("overlap, % (up is better)", fontsize=_LARGE)
    axes.tick_params(labelsize=_LARGE)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _describe(summaries: Sequence[Summary]) -> str:
    setting = _find_setting(summaries)
    seeds = max(s.seeds for s in summaries if s.group.setting == setting)
    return (
        f"Mosaics of photographs inside scikit-image, network with 8 BatchNorm layers, SGD, {setting.steps} steps.\n"
        f"Means over up to {seeds} seed{'s' * (seeds > 1)}; lines are standard deviations over them."
    )
