"""How much memory does lockstep take with a checkpoint around each block, next to the large batch with the same ones?

Each case runs in a process of its own. On a CPU its peak is the largest resident set since the forward began: torch's
profiler does not see the threads of lockstep. On a GPU it is what torch's allocator says.

    python -m benchmarks.checkpoint_memory
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.report import Figure, publish
from syncaccum import convert_sync_accum, lockstep

BLOCKS, MICRO_BATCHES, SAMPLES, CHANNELS, SIDE = 12, 8, 8, 32, 28
CASES = ("large batch", "lockstep", "large batch without checkpoints", "lockstep without checkpoints")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS),
            nn.ReLU(inplace=True),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + x)


def run(case: str) -> int:
    """Forward and backward of one window; the peak in bytes, less what was there before."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blocks = nn.ModuleList(Block() for _ in range(BLOCKS)).to(device)
    parts = list(torch.randn(MICRO_BATCHES, SAMPLES, CHANNELS, SIDE, SIDE, device=device))
    saves = "without" not in case

    def forward(x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if saves else block(x)
        return x.square().mean()

    if case.startswith("lockstep"):
        convert_sync_accum(blocks)
    # Libraries take their own memory in the first convolution.
    forward(parts[0][:1]).backward()
    blocks.zero_grad()
    if device == "cpu":
        before = _resident_bytes()
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    if case.startswith("lockstep"):
        torch.stack(lockstep(blocks, forward, parts)).sum().backward()
    else:
        forward(torch.cat(parts)).backward()
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return torch.cuda.max_memory_allocated() - before


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def measure(case: str) -> int:
    # Every tensor is mapped on its own and given back at once: so the
    # peak has no gaps between tensors in it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.checkpoint_memory", case]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    peaks = {case: measure(case) for case in CASES}
    figures = []
    for what, target in (("checkpoints", 1.15), ("without checkpoints", None)):
        ending = " without checkpoints" if target is None else ""
        mine, its = peaks[f"lockstep{ending}"], peaks[f"large batch{ending}"]
        figures.append(
            Figure(f"peak of lockstep / large batch, {what}", mine / its, target, note=f"{mine} / {its} bytes")
        )
    saved = peaks["lockstep"] / peaks["lockstep without checkpoints"]
    figures.append(Figure("peak of lockstep with checkpoints / without", saved))
    publish("checkpoint_memory", figures)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(run(sys.argv[1]))
    else:
        main()
