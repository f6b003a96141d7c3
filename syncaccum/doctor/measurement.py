"""What only a group can show: whether it forms, whether a commit is right, and whether all ranks have one model."""

from __future__ import annotations

import os
import pkgutil
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncaccum import LayoutMismatchError, SyncAccumBatchNorm, commit, convert_sync_accum, discard
from syncaccum.doctor.launcher import GRACE, within
from syncaccum.doctor.rank import Rank
from syncaccum.integrations import mpi
from syncaccum.window.layers import tracking_layers

TOLERANCE = 1e-10
"""Relative, of float64 sums of values whose mean and std are alike: rounding of 1e-16, over at most some 1e4 values."""


def measure(us: Rank, backend: str, store: dist.Store, timeout: float, factory: str | None) -> None:
    """Enters what it finds into ``us``. Collective; each thing that the ranks do takes ``timeout`` seconds at most."""
    what = "the ranks met at the store, but could not connect to each other"
    remedy = "set GLOO_SOCKET_IFNAME to the interface that reaches the others, and open all ports between the nodes"
    remedy = f"{remedy}; this one listens: {us.host} on {us.address} ({us.interface})"
    try:
        if us.launcher != "alone":
            _form_group(us, backend, dist.PrefixStore("group", store), timeout)
        what = "the group broke while it was measured"
        remedy = "see what the other ranks print: one of them died, hangs, or is cut off"
        device = torch.device("cuda" if backend != "gloo" and us.gpus >= us.local_size else "cpu")
        _check_commit(us, backend, None, device, timeout)
        if us.launcher == "mpi":
            _check_commit(us, "mpi", mpi.world(), device, timeout)
        if factory is not None:
            _compare_layers(us, factory, timeout)
    except (TimeoutError, RuntimeError) as error:
        why = str(error.__cause__ or error).partition("\n")[0]
        us.add(f"{what}: {why}", remedy)


def _form_group(us: Rank, backend: str, store: dist.Store, timeout: float) -> None:
    if backend == "nccl":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(us.local_rank)
        # NCCL's watchdog otherwise ends the process when a peer hangs, before anything can be said about it.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    start, limit = dist.init_process_group, timedelta(seconds=timeout)
    # gloo heeds no timeout where its peers cannot be reached.
    within(timeout + GRACE, lambda: start(backend, store=store, rank=us.rank, world_size=us.size, timeout=limit))


def _check_commit(us: Rank, transport: str, group: Any, device: torch.device, timeout: float) -> None:
    error = us.commit_errors[transport] = measure_commit_error(group, us.rank, us.size, device, timeout)
    what = f"a commit over {transport} is wrong: running statistics are off by {error:.1e} of their value"
    if error > TOLERANCE:
        us.add(what, "try gloo (CUDA_VISIBLE_DEVICES=) and NCCL_P2P_DISABLE=1; report what this prints with --json")


def measure_commit_error(group: Any, rank: int, size: int, device: torch.device, timeout: float) -> float:
    """The largest relative error of running statistics after two commits of unequal windows. Collective."""
    layer = SyncAccumBatchNorm(8, process_group=group, device=device, dtype=torch.float64, affine=False)
    reference = nn.BatchNorm1d(8, dtype=torch.float64, affine=False)
    for step in range(2):
        windows = [_draw_window(peer, step) for peer in range(size)]
        for start in range(0, len(windows[rank]), 3):
            layer(windows[rank][start : start + 3].to(device))
        commit(layer, timeout=timeout)
        reference(torch.cat(windows))
    pairs = zip(layer.buffers(), reference.buffers(), strict=True)
    errors = torch.stack([((ours.cpu() - right) / right).abs().max().double() for ours, right in pairs])
    # NaN and Inf count as the largest number: JSON cannot say Inf.
    return errors.nan_to_num(nan=torch.finfo(torch.float64).max).max().item()


def _draw_window(rank: int, step: int) -> Tensor:
    """What a rank sees, in content and size its own; every third sees nothing. All ranks can draw it."""
    generator = torch.Generator().manual_seed(1_000_000 * step + rank)
    return 3 * torch.randn((5, 8, 0)[rank % 3], 8, generator=generator, dtype=torch.float64) + 1 + rank % 5


def _compare_layers(us: Rank, factory: str, timeout: float) -> None:
    """Build the model on every rank, and let an empty commit compare its layers. Collective."""
    failed, model = torch.zeros(1), nn.Module()
    try:
        model = pkgutil.resolve_name(factory)()
        if not any(isinstance(layer, SyncAccumBatchNorm) for layer in model.modules()):
            convert_sync_accum(model)
        discard(model)
        widths = [layer.num_features for _, layer in tracking_layers(model)]
        us.layers = {"count": len(widths), "channels": sum(widths)}
    except Exception as error:  # whatever the user's code raises: the others wait below
        failed += 1
        remedy = "give --model as package.module:function, of a function that takes no arguments and returns the model"
        us.add(f"{factory} built no model: {type(error).__name__}: {error}", remedy)
    if dist.is_initialized():
        dist.all_reduce(failed)
    try:
        if not failed:
            commit(model, timeout=timeout)
    except LayoutMismatchError as error:
        remedy = "look for what the factory takes from its rank, its environment or its files"
        us.add(f"{factory} builds different models: {error}", remedy)
