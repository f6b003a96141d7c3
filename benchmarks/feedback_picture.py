"""The drawing of balanced feedback in docs/policies.md: one channel of one window, drawn from a seeded generator.

python -m benchmarks.feedback_picture
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.equivalence.plot import save_png
from benchmarks.report import RESULTS
from launch.files import write_atomically
from syncaccum.layer.balance import spread

MICRO_BATCHES, VALUES = 16, 4
_MEAN, _DEVIATION = 1.0, 2.0
# Okabe and Ito's, as in the experiment's pictures; read on white, which the file brings along.
_OWN, _PAID, _OWED = "#E69F00", "#0072B2", "black"
_SIZE = 12  # points


@dataclass(frozen=True)
class Window:
    """By micro-batch: its sum of dy, and what each of its values pays."""

    sums: Tensor
    each: Tensor

    @property
    def paid(self) -> Tensor:
        return (VALUES * self.each).cumsum(0)


def pay(sums: Tensor) -> Window:
    """Balanced feedback over a window of equal micro-batches."""
    debt, each = torch.zeros(()), []
    for index, one in enumerate(sums):
        debt = debt + one
        each.append(spread(debt, VALUES, index * VALUES, len(sums) * VALUES))
        debt = debt - VALUES * each[-1]
    return Window(sums, torch.stack(each))


def draw_window() -> Window:
    dy = _MEAN + _DEVIATION * torch.randn(MICRO_BATCHES, VALUES, generator=torch.Generator().manual_seed(2))
    return pay(dy.sum(1))


def draw_picture(window: Window) -> Figure:
    figure = Figure(figsize=(9, 6.6), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _draw_sums(above, window)
    _draw_means(below, window)
    for axes in (above, below):
        axes.tick_params(labelsize=_SIZE)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    below.set_xticks(range(1, MICRO_BATCHES + 1))
    below.set_xlabel("micro-batch of the window, in order", fontsize=_SIZE)
    return figure


def _draw_sums(axes: Axes, window: Window) -> None:
    numbers = range(MICRO_BATCHES + 1)
    owed, paid = ([0.0, *values.tolist()] for values in (window.sums.cumsum(0), window.paid))
    line: dict[str, Any] = {"linewidth": 2.5, "marker": "o", "markersize": 4}
    axes.fill_between(numbers, owed, paid, color=_PAID, alpha=0.15, label="debt")
    axes.plot(numbers, owed, color=_OWED, label="sum of dy so far", **line)
    axes.plot(numbers, paid, color=_PAID, label="paid so far", **line)
    axes.set_title("The window's debt: it is paid when the window ends", fontsize=_SIZE + 2, loc="left")
    axes.legend(fontsize=_SIZE, loc="upper left")


def _draw_means(axes: Axes, window: Window) -> None:
    numbers = torch.arange(1, MICRO_BATCHES + 1)
    own, mean = window.sums / VALUES, window.sums.sum().item() / (MICRO_BATCHES * VALUES)
    axes.bar(numbers - 0.2, own, 0.4, color=_OWN, label="its own mean of dy")
    axes.bar(numbers + 0.2, window.each, 0.4, color=_PAID, label="A, what each of its values pays")
    axes.axhline(mean, color=_OWED, linestyle="--", linewidth=2, label="the large batch's mean of dy")
    axes.set_title("A for each micro-batch", fontsize=_SIZE + 2, loc="left")
    # Room for the legend above the bars.
    axes.set_ylim(top=1.4 * own.max().item())
    axes.legend(fontsize=_SIZE, loc="upper right")


def main() -> None:
    figure = draw_picture(draw_window())
    write_atomically(RESULTS / "feedback.png", lambda file: save_png(figure, file))


if __name__ == "__main__":
    main()
