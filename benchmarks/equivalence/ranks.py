"""What the experiment measures on several ranks of this machine, which meet over gloo and a file."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.equivalence.cases import Case
from benchmarks.equivalence.gradients import Fidelity
from benchmarks.equivalence.training import Trace
from launch.placement import Placement

_Measured = TypeVar("_Measured", Trace, Fidelity)


def run_on_ranks(measure: Callable[[Case, Placement], _Measured], case: Case) -> _Measured:
    """Measure here for one rank, else in ``case.ranks`` new processes; what rank 0 found."""
    if case.ranks == 1:
        return measure(case, Placement())
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run_rank, (measure, case, folder), case.ranks)  # type: ignore[no-untyped-call]
        found: _Measured = torch.load(_path_of_found(folder), weights_only=False)
    return found


def _run_rank(rank: int, measure: Callable[[Case, Placement], object], case: Case, folder: str) -> None:
    torch.set_num_threads(1)
    store = Path(folder) / "store"
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=case.ranks)
    try:
        found = measure(case, Placement(rank, case.ranks, rank, case.ranks, True))
    finally:
        gc.collect()  # as in launch/processes.py
        dist.destroy_process_group()
    if rank == 0:
        torch.save(found, _path_of_found(folder))


def _path_of_found(folder: str) -> Path:
    return Path(folder) / "found.pt"
