"""What does a commit cost over the bare all-reduce of the same bytes, and over SyncBatchNorm's pattern?

The layers of ResNet-50 (53 layers, 26,560 channels) on two gloo ranks. Four things take turns in one run: the bare
all-reduce; the floor, which is that and a plain commit's tensor operations, on ready-made lists, in fresh memory and
with no check at all; a commit; and the 848 collectives of SyncBatchNorm's pattern for 8 micro-batches.

    python -m benchmarks.commit_speed
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.report import Figure, publish
from syncaccum import SyncAccumBatchNorm, commit
from syncaccum.ranks.agreement import HEADER
from syncaccum.window.layout import Layout
from tests.ranks import Rank, run_on_ranks

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


def timed(function: Callable[[], object], barrier: Callable[[], object] = dist.barrier) -> float:
    """Seconds of a call that all ranks begin together. Collective."""
    barrier()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Floor:
    """Gather the windows, reduce them, write the statistics, clear the windows: nothing else."""

    def __init__(self, widths: list[int]) -> None:
        self.widths = widths
        self.windows = [torch.ones(1 + 2 * width, dtype=torch.float64) for width in widths]
        self.statistics = [torch.zeros(width) for _ in range(2) for width in widths]
        self.counters = [torch.tensor(0) for _ in widths]
        _, self.at_count, self.at_sums = Layout.of(tuple((str(i), w) for i, w in enumerate(widths))).indices(
            torch.device("cpu")
        )
        self.header = torch.zeros(HEADER, dtype=torch.float64)

    def __call__(self) -> None:
        message = torch.cat([self.header, *self.windows])
        dist.all_reduce(message)
        n = message.index_select(0, self.at_count)
        update = message.index_select(0, self.at_sums).view(2, -1).div_(n)
        update[1].addcmul_(update[0], update[0], value=-1).mul_(n / (n - 1))
        old = torch.cat(self.statistics).to(torch.float64).view(2, -1)
        new = torch.lerp(old, update, 0.1).view(-1)
        torch._foreach_copy_(self.statistics, torch.split(new, self.widths * 2))
        torch._foreach_add_(self.counters, 1)
        torch._foreach_mul_(self.windows, 1.0)


def measure(rank: Rank) -> dict[str, list[float]]:
    widths = resnet50_widths()
    model, default = (
        nn.Sequential(*(SyncAccumBatchNorm(width, normalization=policy) for width in widths))
        for policy in ("renorm", "window")
    )
    windows = [torch.randn(2, width) + rank.index for width in widths]
    bare = torch.zeros(sum(1 + 2 * width for width in widths), dtype=torch.float64)
    small = [torch.zeros(1 + 2 * width) for width in widths]

    def sync_batch_norm_pattern() -> None:
        for _ in range(MICRO_BATCHES):
            for message in small:
                dist.all_reduce(message)  # forward
                dist.all_reduce(message)  # backward

    actions: dict[str, Callable[[], object]] = {
        "bare": lambda: dist.all_reduce(bare),
        "floor": Floor(widths),
        "commit": lambda: commit(model),
        # It also makes the next window's prior.
        "commit under window": lambda: commit(default),
    }
    times: dict[str, list[float]] = {name: [] for name in (*actions, "SyncBatchNorm pattern")}
    for _ in range(ROUNDS):
        with torch.no_grad():
            for layer, other, x in zip(model, default, windows, strict=True):
                layer(x)
                other(x)
        for name, action in actions.items():
            times[name].append(timed(action))
    for _ in range(5):
        times["SyncBatchNorm pattern"].append(timed(sync_batch_norm_pattern))
    return {name: seconds[len(seconds) // 10 :] for name, seconds in times.items()}


def main() -> None:
    times = run_on_ranks(measure, RANKS, patience=600.0)[0]
    milliseconds = {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()}

    def ratio(name: str, peer: str) -> float:
        pairs = zip(times[name], times[peer], strict=True)
        return float(statistics.median(a / b for a, b in pairs))

    notes = {name: f"{value:.2f} ms" for name, value in milliseconds.items()}
    publish(
        "commit_speed",
        [
            Figure("commit / bare all-reduce, ResNet-50, 2 ranks", ratio("commit", "bare"), 1.6, note=notes["commit"]),
            Figure(
                "commit under window / commit",
                ratio("commit under window", "commit"),
                note=notes["commit under window"],
            ),
            Figure("floor / bare all-reduce", ratio("floor", "bare"), note=f"{notes['floor']} / {notes['bare']}"),
            Figure("commit / floor", ratio("commit", "floor")),
            Figure(
                "SyncBatchNorm's pattern (848 collectives) / commit",
                milliseconds["SyncBatchNorm pattern"] / milliseconds["commit"],
                at_least=True,
                note=f"{milliseconds['SyncBatchNorm pattern']:.0f} ms",
            ),
        ],
        {"milliseconds": milliseconds, "widths": resnet50_widths(), "ranks": RANKS},
    )


if __name__ == "__main__":
    main()
