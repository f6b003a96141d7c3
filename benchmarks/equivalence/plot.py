"""The full picture: the score of every policy by micro-batch, for each task; gradients; windows; learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.equivalence.cases import ANOTHER_WINDOW, FROM_SAMPLES, POLICIES, REFERENCE, TASKS
from benchmarks.equivalence.gradients import Fidelity
from benchmarks.equivalence.summary import Group, Summary, find_summary, list_settings, list_sizes
from launch.files import write_atomically

_COLUMNS = 3
_PALETTE = 255  # colours; lines, their crossings and blurred edges do with it
_DEEPEST = 3.0  # of quartile ranges below the middle that an axis shows

# Okabe and Ito's colours, which the colour-blind can tell apart; settings of one policy share a colour.
_STYLES: dict[str, dict[str, Any]] = {
    "batchnorm": {"color": "#D55E00", "marker": "s"},
    "groupnorm": {"color": "#999999", "marker": "v"},
    "online": {"color": "#999999", "marker": "d", "linestyle": "--"},
    "mabn": {"color": "#F0E442", "marker": "P"},
    "running": {"color": "#E69F00", "marker": "X"},
    "batch": {"color": "#D55E00", "marker": "x", "linestyle": ":"},
    "renorm": {"color": "#56B4E9", "marker": "D"},
    "renorm-prior2": {"color": "#56B4E9", "marker": "<", "linestyle": "--"},
    "renorm-prior4": {"color": "#56B4E9", "marker": ">", "linestyle": ":"},
    "renorm-ioffe": {"color": "#56B4E9", "marker": "^", "linestyle": "-."},
    "window": {"color": "#0072B2", "marker": "o"},
    "lookahead": {"color": "#009E73", "marker": "*"},
    "exact": {"color": "#CC79A7", "marker": "h", "linestyle": "--"},
}
_LABELS = {
    "batchnorm": "BatchNorm per micro-batch",
    "groupnorm": "GroupNorm",
    "online": "Online Normalization",
    "mabn": "MABN's averages",
    "renorm-prior2": "renorm, prior 2",
    "renorm-prior4": "renorm, prior 4",
    "renorm-ioffe": "renorm, prior 0, r 3, d 5",
    "exact": "exact (lockstep)",
}
_Points = list[tuple[float, float, float]]
"""Where, how much, and its standard deviation."""


def draw_plot(path: Path, summaries: Sequence[Summary], gradients: Sequence[Fidelity]) -> None:
    """A panel for each task; then gradients, window lengths and learning rates where they were measured."""
    own = [setting for setting in list_settings(summaries) if setting.is_own]
    gradients = [fidelity for fidelity in gradients if fidelity.case.ranks == 1]
    with_gradients = list(dict.fromkeys(fidelity.case.task for fidelity in gradients))
    others = [setting for setting in list_settings(summaries) if not setting.is_own and setting.ranks == 1]
    by_window = list(dict.fromkeys(s.task for s in others if s.window != TASKS[s.task].window))
    by_rate = list(dict.fromkeys(s.task for s in others if s.lr != TASKS[s.task].lr))
    panels = len(own) + len(with_gradients) + len(by_window) + len(by_rate)
    rows = math.ceil(panels / _COLUMNS)
    figure = Figure(figsize=(13, 0.9 + 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for setting in own:
        _draw_scores(next(axes), summaries, setting)
    for task in with_gradients:
        _draw_gradients(next(axes), [fidelity for fidelity in gradients if fidelity.case.task == task])
    for task in by_window:
        _draw_extremes(next(axes), summaries, task, "window")
    for task in by_rate:
        _draw_extremes(next(axes), summaries, task, "lr")
    for unused in axes:
        unused.set_axis_off()
    _add_legend(figure)
    write_atomically(path, lambda file: save_png(figure, file))


def _add_legend(figure: Figure) -> None:
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def save_png(figure: Figure, file: IO[bytes]) -> None:
    """With a palette: a third of the bytes, for a file that a repository keeps."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba()))  # type: ignore[no-untyped-call]
    few = picture.convert("RGB").quantize(_PALETTE, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(file, "PNG", optimize=True)


def _draw_scores(axes: Axes, summaries: Sequence[Summary], setting: Group) -> None:
    task, sizes = TASKS[setting.task], list_sizes(summaries, setting)
    whole = find_summary(summaries, setting, REFERENCE, setting.window)
    if whole is not None and whole.mean is not None:
        spread = whole.spread or 0.0
        axes.axhspan(whole.mean - spread, whole.mean + spread, color="black", alpha=0.15, linewidth=0)
        axes.axhline(whole.mean, color="black", linewidth=2, label="large batch, and its spread over seeds")
    for policy in POLICIES:
        found = [(size, find_summary(summaries, setting, policy, size)) for size in sizes]
        _draw_line(axes, policy, [(x, s.mean, s.spread or 0.0) for x, s in found if s and s.mean is not None])
    origin = "settings chosen on it" if task.chosen_on else "held out"
    _dress(axes, f"{setting.task} ({origin}), lr {setting.lr:g}", "micro-batch size", f"test score, {task.unit}")


def _draw_gradients(axes: Axes, fidelities: Sequence[Fidelity]) -> None:
    for fidelity in fidelities:
        if fidelity.case.policy == ANOTHER_WINDOW and fidelity.cosine is not None:
            axes.axhline(fidelity.cosine, color="black", linestyle=":", label="another window's gradient")
    sizes = {f.case.micro_batch for f in fidelities if f.case.policy not in (ANOTHER_WINDOW, *FROM_SAMPLES)}
    for policy in POLICIES:
        points = [
            (size, f.cosine, 0.0)
            for f in fidelities
            for size in (sorted(sizes) if policy in FROM_SAMPLES else [f.case.micro_batch])
            if f.case.policy == policy and f.cosine is not None
        ]
        _draw_line(axes, policy, sorted(points))
    _dress(axes, f"{fidelities[0].case.task}: gradient", "micro-batch size", "cosine to the large batch's")


def _draw_extremes(axes: Axes, summaries: Sequence[Summary], task: str, name: str) -> None:
    """Gap to the large batch over window or learning rate, at the micro-batch that most settings have."""
    own = TASKS[task]
    fixed = "lr" if name == "window" else "window"
    shown = [
        s
        for s in summaries
        if s.group.task == task
        and (s.group.ranks, s.group.rest) == (1, 0)
        and getattr(s.group, fixed) == getattr(own, fixed)
    ]
    tried = [s for s in shown if not s.group.is_own and s.group.policy not in (REFERENCE, *FROM_SAMPLES)]
    size = max(s.group.micro_batch for s in tried)
    for policy in POLICIES:
        mine = [s for s in shown if s.group.policy == policy and s.group.micro_batch == size and s.gap is not None]
        points = [(getattr(s.group, name), s.gap or 0.0, 0.0) for s in mine]
        if len(points) > 1:
            _draw_line(axes, policy, sorted(points))
    axes.axhline(0, color="black", linewidth=2)
    label = "window, samples" if name == "window" else "learning rate"
    unit = "points" if own.unit == "%" else own.unit
    _dress(axes, f"{task}, micro-batch {size}", label, f"gap to the large batch, {unit}")


def _draw_line(axes: Axes, policy: str, points: _Points) -> None:
    if points:
        x, y, spread = zip(*points, strict=True)
        style = {"linewidth": 1.3, "markersize": 4.5, "elinewidth": 0.7, **_STYLES[policy]}
        axes.errorbar(x, y, spread, label=_LABELS.get(policy, policy), **style)


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=x, ylabel=y)
    axes.margins(y=0.1)
    _cut_outliers(axes, [value for line in axes.lines for value in np.asarray(line.get_ydata(), dtype=float)])


def _cut_outliers(axes: Axes, values: Iterable[float]) -> None:
    """A policy that failed would flatten all others: the axis begins three quartile ranges below the middle."""
    low, middle, high = np.quantile(list(values), (0.25, 0.5, 0.75))
    bottom = middle - _DEEPEST * max(high - low, 1e-3)
    if axes.get_ylim()[0] < bottom:
        axes.set_ylim(bottom=bottom)
