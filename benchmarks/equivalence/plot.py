"""The picture of the experiment: loss curves, distance of weights to the reference, accuracy over micro-batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from benchmarks.equivalence.cases import POLICIES, REFERENCE, Case
from benchmarks.equivalence.results import Result
from launch.files import write_atomically

_ROWS = ("resnet", "mlp")
_MICRO_BATCH = 4  # of the curves, where there is one: small enough to tell the policies apart
_SMOOTHING = 5  # steps; single batches jump more than the policies differ
_PALETTE = 128  # colours; eight lines, their crossings and blurred edges do with it
_HIGHEST_LOSS = 10.0  # of digits: four times that of guessing; what is above is on its way to infinity

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#E69F00", "#999999", "#D55E00", "#F0E442", "#0072B2", "#56B4E9", "#CC79A7", "#009E73")
_STYLES: dict[str, dict[str, Any]] = {
    policy: {"color": colour, "linewidth": 1.3, "marker": marker, "markersize": 4.5}
    for policy, colour, marker in zip(POLICIES, _COLOURS, "svXPoD^*", strict=True)
}
_REFERENCE_STYLE: dict[str, Any] = {"color": "black", "linewidth": 4, "alpha": 0.5}
_LABELS = {
    "batchnorm": "BatchNorm per micro-batch",
    "groupnorm": "GroupNorm",
    "renorm": "renorm (default)",
    "renorm-prior0": "renorm, prior 0",
    "renorm-ioffe": "renorm, prior 0, r 3, d 5",
    "exact": "exact (lockstep)",
    REFERENCE: "reference: BatchNorm, whole window",
}


def draw_plot(path: Path, results: Sequence[Result]) -> None:
    """A row of panels for each task that has one, of the first seed on one rank, as a PNG."""
    tasks = [task for task in _ROWS if any(r.case.task == task for r in results)] or [results[0].case.task]
    figure = Figure(figsize=(13, 0.9 + 3.4 * len(tasks)), layout="constrained")
    for row, task in zip(figure.subplots(len(tasks), 3, squeeze=False), tasks, strict=True):
        _draw_row(row, [r for r in results if r.case.task == task])
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    write_atomically(path, lambda file: save_png(figure, file))


def save_png(figure: Figure, file: IO[bytes]) -> None:
    """With a palette: a third of the bytes, for a file that a repository keeps."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba()))  # type: ignore[no-untyped-call]
    picture.convert("RGB").quantize(_PALETTE, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)


def _draw_row(row: Sequence[Axes], results: Sequence[Result]) -> None:
    shown = _choose_shown([r.case for r in results])
    alike = [r for r in results if (r.case.lr, r.case.seed, r.case.ranks) == (shown.lr, shown.seed, 1)]
    curves = [r for r in alike if r.case.steps == shown.steps and r.case.dtype == shown.dtype]
    permuted = [r for r in curves if r.case.permutation]
    curves = [r for r in curves if r.case.micro_batch in (shown.micro_batch, shown.reference.micro_batch)]
    curves = [r for r in curves if not r.case.permutation]
    precise = [r for r in alike if r.case.dtype != shown.dtype and r.case.policy == "exact"]
    _draw_losses(row[0], curves, permuted)
    _draw_distances(row[1], curves, permuted, precise)
    _draw_scores(row[2], [r for r in alike if r.case.dtype == shown.dtype])
    for axes in row[:2]:
        axes.set_title(f"{shown.task}, micro-batch {shown.micro_batch}, learning rate {shown.lr:g}", fontsize=10)
    row[2].set_title(f"{shown.task}, learning rate {shown.lr:g}", fontsize=10)


def _choose_shown(cases: Sequence[Case]) -> Case:
    """The setting whose curves are drawn; of several, the first in the plan."""
    accumulating = [case for case in cases if case.policy != REFERENCE and case.ranks == 1] or cases
    return max(accumulating, key=lambda case: (case.steps, case.micro_batch == _MICRO_BATCH))


def _draw_losses(axes: Axes, curves: Sequence[Result], permuted: Sequence[Result]) -> None:
    for result in permuted:
        axes.plot(_number(result.losses), _smooth(result.losses), color="black", linewidth=0.6, alpha=0.4)
    for result in curves:
        policy, losses = result.case.policy, _smooth(result.losses)
        if policy == REFERENCE:
            axes.plot(_number(losses), losses, label=_label(policy), **_REFERENCE_STYLE)
        else:
            axes.plot(_number(losses), losses, label=_label(policy), markevery=20, **_STYLES[policy])
        if result.outcome == "diverged":
            # At the upper edge, wherever the curve has left the picture.
            axes.plot(len(losses), 0.97, "x", color=_STYLES[policy]["color"], transform=axes.get_xaxis_transform())
    axes.set(xlabel="optimizer step", ylabel=f"training loss, mean of {_SMOOTHING} steps", yscale="log")
    axes.set_ylim(top=min(axes.get_ylim()[1], _HIGHEST_LOSS))


def _number(losses: Sequence[float]) -> range:
    return range(1, len(losses) + 1)


def _smooth(losses: Sequence[float]) -> list[float]:
    parts = [losses[max(0, end - _SMOOTHING) : end] for end in range(1, len(losses) + 1)]
    return [sum(part) / len(part) for part in parts]


def _draw_distances(
    axes: Axes, curves: Sequence[Result], permuted: Sequence[Result], precise: Sequence[Result]
) -> None:
    steps = sorted(set.intersection(*(set(r.distances) for r in permuted))) if permuted else []
    if steps:
        low, high = ([edge(r.distances[step] for r in permuted) for step in steps] for edge in (min, max))
        label = "reference, permuted inside batches"
        axes.fill_between(steps, low, high, color="black", alpha=0.25, linewidth=0, label=label)
    for result in curves:
        if result.case.policy != REFERENCE and result.distances:
            policy = result.case.policy
            axes.plot(list(result.distances), list(result.distances.values()), label=_label(policy), **_STYLES[policy])
    for result in precise[:1]:
        label = f"exact, {result.case.dtype}"
        style = {**_STYLES["exact"], "linestyle": "--"}
        axes.plot(list(result.distances), list(result.distances.values()), label=label, **style)
    axes.set(xlabel="optimizer step", ylabel="relative distance of weights to reference", xscale="log", yscale="log")


def _draw_scores(axes: Axes, results: Sequence[Result]) -> None:
    scores = [(r.case, r.score) for r in results if r.score is not None]
    references = [score for case, score in scores if case.policy == REFERENCE]
    if references:
        axes.axhspan(min(references), max(references), color="black", alpha=0.25, linewidth=0)
    for case, score in scores:
        if case == case.reference:
            axes.axhline(score, **_REFERENCE_STYLE)
    for policy in POLICIES:
        points = sorted((case.micro_batch, score) for case, score in scores if case.policy == policy)
        if points:
            axes.plot(*zip(*points, strict=True), label=_label(policy), **_STYLES[policy])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="micro-batch size", ylabel="test accuracy")
    if results[0].case.task == "denoise":
        axes.set_ylabel("test, dB")
    else:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _label(policy: str) -> str:
    return _LABELS.get(policy, policy)
