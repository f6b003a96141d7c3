"""What does a commit cost over the bare all-reduce of the same bytes, and over SyncBatchNorm's pattern?

The layers of ResNet-50 (53 layers, 26,560 channels) on two gloo ranks. Commit, bare all-reduce and the 848
collectives that SyncBatchNorm's pattern needs for 8 micro-batches take turns in one run.

    python -m benchmarks.commit_speed
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.processes import run_on_ranks
from benchmarks.report import Figure, publish
from syncaccum import SyncAccumBatchNorm, commit

RANKS = 2
ROUNDS = 400
MICRO_BATCHES = 8


def resnet50_widths() -> list[int]:
    """Channels of each BatchNorm of ResNet-50, in order."""
    widths = [64]
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        widths += [width, width, 4 * width, 4 * width]  # the first block has a projection
        widths += [width, width, 4 * width] * (blocks - 1)
    return widths


def timed(function: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(rank: int) -> dict[str, list[float]]:
    widths = resnet50_widths()
    model = nn.Sequential(*(SyncAccumBatchNorm(width) for width in widths))
    windows = [torch.randn(2, width) + rank for width in widths]
    bare = torch.zeros(sum(1 + 2 * width for width in widths), dtype=torch.float64)
    small = [torch.zeros(1 + 2 * width) for width in widths]

    def sync_batch_norm_pattern() -> None:
        for _ in range(MICRO_BATCHES):
            for message in small:
                dist.all_reduce(message)  # forward
                dist.all_reduce(message)  # backward

    actions: dict[str, Callable[[], object]] = {"bare": lambda: dist.all_reduce(bare), "commit": lambda: commit(model)}
    times: dict[str, list[float]] = {name: [] for name in (*actions, "SyncBatchNorm pattern")}
    for _ in range(ROUNDS):
        with torch.no_grad():
            for layer, x in zip(model, windows, strict=True):
                layer(x)
        for name, action in actions.items():
            times[name].append(timed(action))
    for _ in range(5):
        times["SyncBatchNorm pattern"].append(timed(sync_batch_norm_pattern))
    return {name: seconds[len(seconds) // 10 :] for name, seconds in times.items()}


def main() -> None:
    times = run_on_ranks(measure, RANKS)
    milliseconds = {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["commit"], times["bare"], strict=True))
    publish(
        "commit_speed",
        [
            Figure("commit / bare all-reduce, ResNet-50, 2 ranks", ratio, 1.5, note=f"{milliseconds['commit']:.2f} ms"),
            Figure(
                "SyncBatchNorm's pattern (848 collectives) / commit",
                milliseconds["SyncBatchNorm pattern"] / milliseconds["commit"],
                note=f"{milliseconds['SyncBatchNorm pattern']:.0f} ms",
            ),
        ],
        {"milliseconds": milliseconds, "widths": resnet50_widths(), "ranks": RANKS},
    )


if __name__ == "__main__":
    main()
