"""The drawing of lockstep in docs/exact.md: who is in which layer, as recorded in a small network's forwards.

python -m benchmarks.lockstep_picture
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, pairwise
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import syncaccum
from benchmarks.equivalence.plot import save_png
from benchmarks.report import RESULTS
from launch.files import write_atomically

MICRO_BATCHES = 4
# Okabe and Ito's, as in the experiment's pictures; read on white, which the file brings along.
_COLORS: dict[type[nn.Module], str] = {
    nn.Conv2d: "#56B4E9",
    nn.ReLU: "#F0E442",
    syncaccum.SyncAccumBatchNorm: "#D55E00",
}
_NAMES = ("convolution", "ReLU", "BatchNorm")
_SIZE = 12  # points


class Stay(NamedTuple):
    """A micro-batch in a layer, from the arrival to the departure; both are numbers of events in their order."""

    micro_batch: int
    layer: nn.Module
    arrival: int
    departure: int


def record(run: Callable[[nn.Module, Callable[[int], Tensor]], object]) -> list[Stay]:
    """Every stay in a layer while ``run(model, forward)`` calls ``forward`` with numbers of micro-batches."""
    model = _build()
    here = threading.local()  # in lockstep each micro-batch has a thread of its own
    with _watched(model, here) as stays:

        def forward(micro_batch: int) -> Tensor:
            here.micro_batch = micro_batch
            output: Tensor = model(torch.ones(1, 1, 4, 4))
            return output.sum()

        run(model, forward)
    return stays


def _build() -> nn.Sequential:
    widths = (1, 2, 2)
    blocks = [(nn.Conv2d(a, b, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)]
    model = nn.Sequential(*(layer for block in blocks for layer in block))
    return syncaccum.convert_sync_accum(model)


@contextmanager
def _watched(model: nn.Sequential, here: Any) -> Iterator[list[Stay]]:
    stays: list[Stay] = []
    arrivals: dict[tuple[int, nn.Module], int] = {}
    clock = count()

    def arrive(layer: nn.Module, _: object) -> None:
        arrivals[here.micro_batch, layer] = next(clock)

    def depart(layer: nn.Module, *_: object) -> None:
        stays.append(Stay(here.micro_batch, layer, arrivals[here.micro_batch, layer], next(clock)))

    hooks = [
        hook
        for layer in model
        for hook in (layer.register_forward_pre_hook(arrive), layer.register_forward_hook(depart))
    ]
    yield stays
    for hook in hooks:
        hook.remove()


def accumulate(model: nn.Module, forward: Callable[[int], Tensor]) -> None:
    for micro_batch in range(MICRO_BATCHES):
        torch.autograd.backward(forward(micro_batch))


def go_in_lockstep(model: nn.Module, forward: Callable[[int], Tensor]) -> None:
    torch.autograd.backward(syncaccum.lockstep(model, forward, range(MICRO_BATCHES)))


def draw_picture() -> Figure:
    figure = Figure(figsize=(9, 5.4), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _draw_stays(above, record(accumulate), "Accumulation: one micro-batch after the other")
    _draw_stays(below, record(go_in_lockstep), "Lockstep: side by side; all wait in each BatchNorm")
    below.set_xlabel("forward of the window, in order", fontsize=_SIZE)
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=_SIZE)
    return figure


def _draw_stays(axes: Axes, stays: list[Stay], title: str) -> None:
    for (kind, color), name in zip(_COLORS.items(), _NAMES, strict=True):
        chosen = [stay for stay in stays if isinstance(stay.layer, kind)]
        rows = [stay.micro_batch + 1 for stay in chosen]
        lengths = [stay.departure - stay.arrival for stay in chosen]
        axes.barh(rows, lengths, left=[stay.arrival for stay in chosen], color=color, label=name, height=0.6)
    axes.set_title(title, fontsize=_SIZE + 2, loc="left")
    axes.set_ylabel("micro-batch", fontsize=_SIZE)
    axes.set_yticks(range(1, MICRO_BATCHES + 1))
    axes.set_xticks([])
    axes.invert_yaxis()
    axes.tick_params(labelsize=_SIZE)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    figure = draw_picture()
    write_atomically(RESULTS / "lockstep.png", lambda file: save_png(figure, file))


if __name__ == "__main__":
    main()
