"""Run a function on several gloo ranks of this machine and collect what rank 0 returns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def run_on_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> Any:
    """``function(rank, *args)`` on each rank, one thread each; rank 0's result."""
    results: SimpleQueue[Any] = get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _run, (function, ranks, str(Path(folder) / "store"), results, args), nprocs=ranks, start_method="spawn"
        )  # type: ignore[no-untyped-call]
    return results.get()


def _run(rank: int, function: Callable[..., Any], ranks: int, store: str, results: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    result = function(rank, *args)
    if rank == 0:
        results.put(result)
    dist.destroy_process_group()
