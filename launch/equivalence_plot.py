"""The picture of the experiment: loss curves, accuracy over micro-batch size, distance of weights over steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from launch.equivalence_cases import POLICIES, REFERENCE, Case
from launch.equivalence_results import Result
from launch.files import write_atomically

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#E69F00", "#999999", "#D55E00", "#F0E442", "#0072B2", "#56B4E9", "#CC79A7", "#009E73")
_STYLES: dict[str, dict[str, Any]] = {
    policy: {"color": colour, "linewidth": 1.2, "marker": marker, "markersize": 4}
    for policy, colour, marker in zip(POLICIES, _COLOURS, "svXPoD^*", strict=True)
}
_SMOOTHING = 5  # steps; single batches jump more than the policies differ
_LABELS = {
    "batchnorm": "BatchNorm per micro-batch",
    "groupnorm": "GroupNorm",
    "renorm": "renorm (default)",
    "renorm-prior0": "renorm, prior 0",
    "renorm-ioffe": "renorm, prior 0, r 3, d 5",
    "exact": "exact (lockstep)",
}


def draw_plot(path: Path, results: Sequence[Result]) -> None:
    """Four panels of the first seed on one rank, as a PNG."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (left, right), (below_left, below_right) = figure.subplots(2, 2)
    shown = _choose_shown(results)
    curves = [result for result in results if _belongs(result.case, shown)]
    _draw_losses(left, shown, curves)
    _draw_distances(right, shown, curves)
    accuracies = [result for result in results if _same_but_policy(result.case, shown)]
    for axes, task in ((below_left, "resnet"), (below_right, "mlp")):
        _draw_accuracies(axes, task, [result for result in accuracies if result.case.task == task])
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    write_atomically(path, FigureCanvasAgg(figure).print_png)


def _choose_shown(results: Sequence[Result]) -> Case:
    """The setting whose curves are drawn: the ResNet with micro-batch 4 where there is one."""
    candidates = [r.case for r in results if r.case.policy != REFERENCE and r.case.ranks == 1]
    candidates = candidates or [r.case for r in results]
    return max(candidates, key=lambda case: (case.task == "resnet", case.steps, case.micro_batch == 4, -case.lr))


def _same_but_policy(case: Case, shown: Case) -> bool:
    return (case.lr, case.seed, case.dtype, case.ranks) == (shown.lr, shown.seed, "float32", 1)


def _belongs(case: Case, shown: Case) -> bool:
    """Cases on the network of the shown one; float64 ones with any micro-batch size, as few were run."""
    same = (case.task, case.lr, case.seed, case.steps) == (shown.task, shown.lr, shown.seed, shown.steps)
    fits = case.policy == REFERENCE or case.micro_batch == shown.micro_batch or case.dtype == "float64"
    return same and case.ranks == 1 and fits


def _draw_losses(axes: Axes, shown: Case, results: Sequence[Result]) -> None:
    for result in results:
        case = result.case
        if case.dtype != shown.dtype or case.permutation:
            continue
        steps, losses = range(1, len(result.losses) + 1), _smooth(result.losses)
        if case.policy == REFERENCE:
            label = "reference: BatchNorm on the whole window"
            axes.plot(steps, losses, color="black", linewidth=3.5, alpha=0.55, label=label, zorder=2)
        else:
            style = {**_STYLES[case.policy], "markevery": 20, "zorder": 3 if case.policy == "exact" else 1}
            axes.plot(steps, losses, label=_label(case.policy), **style)
            if result.outcome == "diverged" and losses:
                axes.annotate("diverged", (len(losses), losses[-1]), color=style["color"], fontsize=8)
    axes.set(xlabel="optimizer step", ylabel=f"training loss, mean of {_SMOOTHING} steps", yscale="log")
    axes.set_title(f"{shown.task}, micro-batch {shown.micro_batch}, lr {shown.lr:g}", fontsize=10)


def _smooth(losses: Sequence[float]) -> list[float]:
    parts = [losses[max(0, end - _SMOOTHING) : end] for end in range(1, len(losses) + 1)]
    return [sum(part) / len(part) for part in parts]


def _draw_distances(axes: Axes, shown: Case, results: Sequence[Result]) -> None:
    permuted = [result.distances for result in results if result.case.permutation and result.case.dtype == shown.dtype]
    steps = sorted(set.intersection(*(set(d) for d in permuted))) if permuted else []
    if steps:
        low, high = ([edge(d[step] for d in permuted) for step in steps] for edge in (min, max))
        label = "reference, order permuted inside batches"
        axes.fill_between(steps, low, high, color="black", alpha=0.25, linewidth=0, label=label)
    for result in results:
        case = result.case
        if case.policy == REFERENCE or not result.distances:
            continue
        style = _STYLES[case.policy]
        label = _label(case.policy)
        if case.dtype != shown.dtype:
            style, label = {**style, "linestyle": "--"}, f"{label}, {case.dtype}"
        axes.plot(list(result.distances), list(result.distances.values()), label=label, **style)
    axes.set(xlabel="optimizer step", ylabel="relative distance of weights to reference", xscale="log", yscale="log")
    axes.set_title(f"{shown.task}, micro-batch {shown.micro_batch}, lr {shown.lr:g}", fontsize=10)


def _draw_accuracies(axes: Axes, task: str, results: Sequence[Result]) -> None:
    scores = [(r.case, r.score) for r in results if r.score is not None and not r.case.permutation]
    for case, score in scores:
        if case.policy == REFERENCE:
            axes.axhline(score, color="black", linewidth=3.5, alpha=0.55)
    for policy in POLICIES:
        points = sorted((case.micro_batch, score) for case, score in scores if case.policy == policy)
        if points:
            axes.plot(*zip(*points, strict=True), label=_label(policy), **_STYLES[policy])
    axes.set_xscale("log", base=2)
    axes.set(xlabel="micro-batch size", ylabel="test accuracy")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title(task, fontsize=10)


def _label(policy: str) -> str:
    return _LABELS.get(policy, policy)
