"""How much memory a training step takes at its peak, above what is there before it. Linux alone.

The peak is the process's resident memory, which counts every thread: lockstep's micro-batches run in their own, and
torch's profiler sees one thread. A process of its own, whose allocator gives back at once what is freed, makes the
figure one of the step alone.

    python -m benchmarks.equivalence.memory CASE_AS_JSON
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.equivalence.cases import Case

_WARM_STEPS = 2  # allocate what stays: momentum, workspaces
_LIMIT_S = 600  # ResNet-18 takes 20
# Of glibc: all but the smallest blocks go back to the system when freed, and threads have no heaps of their own.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Peak:
    """Of one training step, in bytes."""

    case: Case
    bytes: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> Peak:
        return cls(Case(**content["case"]), content["bytes"])


def measure_peak(case: Case) -> Peak:
    """In a process of its own."""
    command = [sys.executable, "-m", "benchmarks.equivalence.memory", json.dumps(dataclasses.asdict(case))]
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=_LIMIT_S)
    return Peak(case, int(done.stdout))


def _measure(case: Case) -> int:
    import torch

    from benchmarks.equivalence.training import Training
    from launch.placement import Placement

    torch.set_num_threads(1)
    training = Training(case, Placement())
    for step in range(_WARM_STEPS):
        training.step(step)
    # A step begins by dropping the last gradients: they are not there before it.
    training.model.zero_grad()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = read_status("VmRSS")
    training.step(_WARM_STEPS)
    return read_status("VmHWM") - before


def read_status(name: str) -> int:
    """Bytes; the file has kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(value) * 1024


if __name__ == "__main__":
    print(_measure(Case(**json.loads(sys.argv[1]))))
