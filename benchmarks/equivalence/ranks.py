"""A training of the experiment on several ranks of this machine, which meet over gloo and a file."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.equivalence.cases import Case
from benchmarks.equivalence.training import Trace, train
from launch.placement import Placement


def train_on_ranks(case: Case) -> Trace:
    """Train in ``case.ranks`` new processes; the trace is rank 0's."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run_rank, (case, folder), case.ranks)  # type: ignore[no-untyped-call]
        trace: Trace = torch.load(_trace_path(folder), weights_only=False)
    return trace


def _run_rank(rank: int, case: Case, folder: str) -> None:
    torch.set_num_threads(1)
    store = Path(folder) / "store"
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=case.ranks)
    try:
        trace = train(case, Placement(rank, case.ranks, rank, case.ranks, True))
    finally:
        gc.collect()  # as in launch/processes.py
        dist.destroy_process_group()
    if rank == 0:
        torch.save(trace, _trace_path(folder))


def _trace_path(folder: str) -> Path:
    return Path(folder) / "trace.pt"
