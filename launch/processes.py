"""This process's share of the machine, and its process group."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launch.placement import Placement
from syncaccum.integrations import mpi


def choose_device(placement: Placement) -> torch.device:
    """A GPU of its own for every rank of this machine, or the CPU for all of them."""
    if torch.cuda.is_available() and torch.cuda.device_count() >= placement.local_size:
        return torch.device("cuda", placement.local_rank)
    return torch.device("cpu")


def limit_threads(placement: Placement) -> None:
    """Divide this machine's cores among its ranks, unless the user has chosen a number of threads."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // placement.local_size))


def _join(placement: Placement, backend: str, timeout: float) -> None:
    try:
        if placement.mpi:
            mpi.init_process_group(backend=backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (ValueError, RuntimeError) as error:
        # Only the first line: C++ frames follow.
        problem = str(error).splitlines()[0]
        remedy = "check MASTER_ADDR and MASTER_PORT; -m syncaccum.doctor, started in this script's place, tells more"
        placement.stop(f"train.py: error: the ranks did not meet ({problem}); {remedy}", 1)


@contextmanager
def process_group(placement: Placement, device: torch.device, timeout: float) -> Iterator[None]:
    """Join the other ranks, over NCCL for GPUs and gloo for CPUs; nothing where no launcher started us."""
    if not placement.launched:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _join(placement, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout)
    try:
        yield
    finally:
        # DDP is in reference cycles and keeps gloo's threads alive; one that still frees a message's tensor when
        # the interpreter shuts down aborts the process ("terminate called without an active exception").
        gc.collect()
        dist.destroy_process_group()


def from_rank_zero(value: Any, placement: Placement) -> Any:
    """Rank 0's value, on every rank. Collective."""
    values = [value]
    if placement.launched:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def from_every_rank(value: Any, placement: Placement) -> list[Any]:
    """Every rank's value, in rank order. Collective."""
    values = [value] * placement.size
    if placement.launched:
        dist.all_gather_object(values, value)
    return values


def sum_over_ranks(values: list[float], placement: Placement, device: torch.device) -> list[float]:
    """Elementwise sums over the ranks, in float64. Collective."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if placement.launched:
        dist.all_reduce(total)
    summed: list[float] = total.tolist()
    return summed
