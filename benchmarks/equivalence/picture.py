"""The README's picture: test accuracy by micro-batch size, for a reader who has five seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from benchmarks.equivalence.cases import REFERENCE, WINDOW, Case
from benchmarks.equivalence.plot import save_png
from benchmarks.equivalence.results import Result
from launch.files import write_atomically

_TASK, _LR = "mlp", 0.1  # the setting whose every micro-batch size was tried
_LARGE, _SMALL = 15, 11.5  # points; a README shows the picture at about two thirds of its size
_PLAIN, _OURS, _WHOLE = "#D55E00", "#0072B2", "black"  # of Okabe and Ito, as in the full figure
_FLOOR = 0.08  # of the accuracy axis: where a cross stands for a training that there is not

Points = dict[int, float]
"""Accuracy by micro-batch size."""


def draw_picture(path: Path, results: Sequence[Result]) -> None:
    """Write a PNG, if plain BatchNorm, syncaccum and the large batch are among the results."""
    shown = [r for r in results if _is_shown(r.case)]
    whole, ours, plain = (average_scores(shown, policy) for policy in (REFERENCE, "renorm", "batchnorm"))
    if not (whole and ours and plain):
        return
    figure = Figure(figsize=(9, 5.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    _draw_lines(axes, whole, ours, plain)
    _draw_failures(axes, shown)
    _dress(axes, shown)
    figure.supxlabel(_describe(shown), fontsize=_SMALL, x=0.01, ha="left", color="dimgrey")
    write_atomically(path, lambda file: save_png(figure, file))


def _is_shown(case: Case) -> bool:
    return (case.task, case.lr, case.dtype, case.ranks, case.permutation) == (_TASK, _LR, "float32", 1, 0)


def average_scores(results: Sequence[Result], policy: str) -> Points:
    """Means over the seeds of each micro-batch size; no point where a training failed.

    The large batch is averaged over the same seeds, so that each point stands beside its own reference.
    """
    points = {}
    for size, seeds in _seeds_by_size(results).items():
        own_size = WINDOW if policy == REFERENCE else size
        cases = [r for r in results if (r.case.policy, r.case.micro_batch) == (policy, own_size)]
        scores = [r.score for r in cases if r.case.seed in seeds]
        trained = [score for score in scores if score is not None]
        if trained and len(trained) == len(scores):
            points[size] = mean(trained)
    return points


def _seeds_by_size(results: Sequence[Result]) -> dict[int, set[int]]:
    sizes = sorted({r.case.micro_batch for r in results if r.case.policy != REFERENCE})
    return {
        size: {r.case.seed for r in results if r.case.policy != REFERENCE and r.case.micro_batch == size}
        for size in sizes
    }


def _draw_lines(axes: Axes, whole: Points, ours: Points, plain: Points) -> None:
    axes.plot(*_split(plain), color=_PLAIN, linewidth=4, marker="o", markersize=9)
    axes.plot(*_split(ours), color=_OURS, linewidth=4, marker="o", markersize=9)
    axes.plot(*_split(whole), color=_WHOLE, linewidth=2, linestyle="--")
    _write(axes, (min(whole), max(whole.values())), (0, 8), "dashed: all 64 images at once", _WHOLE)
    lowest = min(ours, key=ours.__getitem__)
    _write(axes, (lowest, ours[lowest]), (-60, -28), f"syncaccum: {ours[lowest]:.0%}", _OURS, weight="bold")
    lowest = min(plain, key=plain.__getitem__)
    _write(axes, (lowest, plain[lowest]), (16, -6), f"plain BatchNorm: {plain[lowest]:.0%}", _PLAIN, weight="bold")


def _split(points: Points) -> tuple[list[int], list[float]]:
    return list(points), list(points.values())


def _write(
    axes: Axes, at: tuple[float, float], offset: tuple[float, float], text: str, colour: str, weight: str = "normal"
) -> None:
    """Text beside a point; ``offset`` is in points."""
    axes.annotate(
        text, at, offset, textcoords="offset points", color=colour, fontsize=_LARGE, fontweight=weight, clip_on=False
    )


def _draw_failures(axes: Axes, results: Sequence[Result]) -> None:
    """Where plain BatchNorm raises an error instead of training."""
    for size in {r.case.micro_batch for r in results if r.case.policy == "batchnorm" and r.outcome == "cannot"}:
        axes.plot(size, _FLOOR, "x", color=_PLAIN, markersize=13, markeredgewidth=4, clip_on=False)
        _write(axes, (size, _FLOOR), (16, -6), "plain BatchNorm: error", _PLAIN, weight="bold")


def _dress(axes: Axes, results: Sequence[Result]) -> None:
    seeds = _seeds_by_size(results)
    axes.set_title("Gradient accumulation, 64 images per step", fontsize=_LARGE + 3, loc="left", pad=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(seeds), [str(size) for size in seeds])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(ylim=(0, 1.1), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("images per micro-batch", fontsize=_LARGE)
    axes.set_ylabel("test accuracy", fontsize=_LARGE)
    axes.tick_params(labelsize=_LARGE)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _describe(results: Sequence[Result]) -> str:
    """The data behind the picture, in two lines."""
    sizes: dict[int, list[str]] = {}
    for size, seeds in _seeds_by_size(results).items():
        sizes.setdefault(len(seeds), []).append(str(size))
    means = [
        f"over {number} seed{'s' * (number > 1)} at {' and '.join(sizes[number])} images"
        for number in sorted(sizes, reverse=True)
    ]
    steps = max(r.case.steps for r in results)
    return (
        f"scikit-learn's digits, perceptron with 3 BatchNorm layers, SGD with learning rate {_LR}, {steps} steps.\n"
        f"Means {', '.join(means)} per micro-batch."
    )
