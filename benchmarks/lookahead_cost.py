"""What do look-ahead and lockstep cost over ordinary gradient accumulation, in time and in memory?

ResNet-18, forward and backward of a window of 32 images: ordinary micro-batches with nn.BatchNorm, the same with the
converted model (policy renorm), look-ahead, and lockstep; these two also with ``offload="cpu"``. For time they take
turns; a ratio is the median over rounds of the ratio within a round. Memory is what a GPU would hold above the start,
as `device_memory` counts it. Offload copies from memory to memory here: its time says nothing of a GPU's.

    python -m benchmarks.lookahead_cost
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.device_memory import parking_outside, peak_bytes
from benchmarks.lockstep_speed import one_by_one, side_by_side
from benchmarks.report import Figure, publish
from benchmarks.resnet18 import build_resnet18
from syncaccum import SyncAccumBatchNorm, convert_sync_accum, discard, lookahead

ROUNDS = 4
WINDOW = 32
MICRO_BATCHES = (1, 4)
SIDE, LARGE_SIDE = 32, 64
_TARGETS = {"time": {"lookahead": 1.45}, "peak": {"lookahead, offload": 1.2}}

Walk = Callable[[nn.Module, Sequence[Tensor]], None]


def look_ahead(model: nn.Module, parts: Sequence[Tensor], offload: str | None = None) -> None:
    for loss in lookahead(model, lambda x: model(x).square().sum(), parts, offload=offload):
        torch.autograd.backward(loss)
        # The loop variable is alive while the next forward runs.
        del loss


def offloaded(walk: Callable[[nn.Module, Sequence[Tensor], str], None]) -> Walk:
    def run(model: nn.Module, parts: Sequence[Tensor]) -> None:
        with parking_outside():
            walk(model, parts, "cpu")

    return run


def make_walks() -> dict[str, tuple[Walk, nn.Module]]:
    """Ways through a window, each with its model; the first is what the others are compared with."""
    plain, converted = build_resnet18(), convert_sync_accum(build_resnet18())
    return {
        "nn.BatchNorm": (one_by_one, plain),
        "renorm": (one_by_one, converted),
        "lookahead": (look_ahead, converted),
        "lookahead, offload": (offloaded(look_ahead), converted),
        "lockstep": (side_by_side, converted),
        "lockstep, offload": (offloaded(side_by_side), converted),
    }


def time_all(walks: dict[str, tuple[Walk, nn.Module]], parts: Sequence[Tensor]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in walks}
    for _ in range(ROUNDS + 1):
        for name, (walk, model) in walks.items():
            start = time.perf_counter()
            walk(model, parts)
            times[name].append(time.perf_counter() - start)
            _clear(model)
    # The first round warms up.
    return {name: seconds[1:] for name, seconds in times.items()}


def measure_peaks(walks: dict[str, tuple[Walk, nn.Module]], parts: Sequence[Tensor]) -> dict[str, float]:
    """MiB."""
    peaks = {}
    for name, (walk, model) in walks.items():
        peaks[name] = peak_bytes(partial(walk, model, parts)) / 2**20
        _clear(model)
    return peaks


def _clear(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)
    if any(isinstance(module, SyncAccumBatchNorm) for module in model.modules()):
        discard(model)


def compare(what: str, values: Mapping[str, Sequence[float]], unit: str, parts: Sequence[Tensor]) -> list[Figure]:
    """Each way's ratio to the first one's."""
    (_, base), *others = values.items()
    where = f"ResNet-18, {len(parts)} micro-batches of {'x'.join(map(str, parts[0].shape))}"
    figures = []
    for name, mine in others:
        ratio = statistics.median(a / b for a, b in zip(mine, base, strict=True))
        note = f"{statistics.median(mine):.4g} / {statistics.median(base):.4g} {unit}"
        target = _TARGETS[what].get(name)
        figures.append(Figure(f"{what} of {name} / nn.BatchNorm, {where}", ratio, target, note=note))
    return figures


def main() -> None:
    figures = []
    walks = make_walks()
    for micro_batch in MICRO_BATCHES:
        parts = torch.split(torch.randn(WINDOW, 1, SIDE, SIDE), micro_batch)
        times = {name: [1e3 * s for s in seconds] for name, seconds in time_all(walks, parts).items()}
        figures += compare("time", times, "ms", parts)
        for side in (SIDE, LARGE_SIDE):
            parts = torch.split(torch.randn(WINDOW, 1, side, side), micro_batch)
            peaks = {name: [peak] for name, peak in measure_peaks(walks, parts).items()}
            figures += compare("peak", peaks, "MiB", parts)
    publish("lookahead_cost", figures)


if __name__ == "__main__":
    main()
