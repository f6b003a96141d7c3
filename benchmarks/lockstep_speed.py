"""What does the exact mode cost over ordinary micro-batches with nn.BatchNorm?

ResNet-18, forward and backward of a window: K ordinary micro-batches with nn.BatchNorm, the same with the converted
model (policy renorm), and lockstep. They take turns; a ratio is the median over rounds of the ratio within a round.

    python -m benchmarks.lockstep_speed
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.report import Figure, publish
from benchmarks.resnet18 import build_resnet18
from syncaccum import convert_sync_accum, discard, lockstep

ROUNDS = 12
MICRO_BATCHES = 4
SHAPES = [(8, 1, 32, 32), (2, 1, 64, 64)]


def one_by_one(model: nn.Module, parts: Sequence[Tensor]) -> None:
    for x in parts:
        torch.autograd.backward(model(x).square().sum())


def side_by_side(model: nn.Module, parts: Sequence[Tensor], offload: str | None = None) -> None:
    losses = lockstep(model, lambda x: model(x).square().sum(), parts, offload=offload)
    torch.autograd.backward(torch.stack(losses).sum())
    discard(model)


def timed(function: Callable[[nn.Module, Sequence[Tensor]], None], model: nn.Module, parts: Sequence[Tensor]) -> float:
    start = time.perf_counter()
    function(model, parts)
    elapsed = time.perf_counter() - start
    model.zero_grad()
    return elapsed


def measure(shape: tuple[int, ...]) -> dict[str, list[float]]:
    plain, converted = build_resnet18(), convert_sync_accum(build_resnet18())
    parts = [torch.randn(shape) for _ in range(MICRO_BATCHES)]
    times: dict[str, list[float]] = {"ordinary": [], "renorm": [], "lockstep": []}
    for _ in range(ROUNDS + 1):
        times["ordinary"].append(timed(one_by_one, plain, parts))
        times["renorm"].append(timed(one_by_one, converted, parts))
        discard(converted)
        times["lockstep"].append(timed(side_by_side, converted, parts))
    return {name: seconds[1:] for name, seconds in times.items()}


def main() -> None:
    figures = []
    for shape in SHAPES:
        times = measure(shape)
        where = f"{MICRO_BATCHES} micro-batches of {'x'.join(map(str, shape))}"
        for name, target in (("lockstep", 1.15), ("renorm", None)):
            ratio = statistics.median(a / b for a, b in zip(times[name], times["ordinary"], strict=True))
            note = f"{statistics.median(times[name]) * 1e3:.0f} / {statistics.median(times['ordinary']) * 1e3:.0f} ms"
            figures.append(Figure(f"{name} / nn.BatchNorm, ResNet-18, {where}", ratio, target, note=note))
    publish("lockstep_speed", figures)


if __name__ == "__main__":
    main()
