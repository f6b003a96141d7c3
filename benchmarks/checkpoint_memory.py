"""How much memory does lockstep take with a checkpoint around each block, next to the large batch with the same ones?

The peak is that of a process of its own, as in ``benchmarks.equivalence.memory``. Linux alone.

    python -m benchmarks.checkpoint_memory
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.equivalence.memory import ALLOCATOR, read_status
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
    torch.set_num_threads(1)
    blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
    parts = list(torch.randn(MICRO_BATCHES, SAMPLES, CHANNELS, SIDE, SIDE))
    saves, is_lockstep = "without" not in case, case.startswith("lockstep")
    if is_lockstep:
        convert_sync_accum(blocks)

    def forward(x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if saves else block(x)
        return x.square().mean()

    def step(micro_batches: list[Tensor]) -> None:
        if is_lockstep:
            loss = torch.stack(lockstep(blocks, forward, micro_batches)).sum()
        else:
            loss = forward(torch.cat(micro_batches))
        torch.autograd.backward(loss)
        blocks.zero_grad()

    # Libraries take what they keep in a first, small step.
    step([x[:1] for x in parts])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = read_status("VmRSS")
    step(parts)
    return read_status("VmHWM") - before


def measure(case: str) -> int:
    command = [sys.executable, "-m", "benchmarks.checkpoint_memory", case]
    done = subprocess.run(command, env={**os.environ, **ALLOCATOR}, check=True, stdout=subprocess.PIPE)
    return int(done.stdout)


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
