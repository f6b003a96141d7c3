"""commit: verify the layout, reduce every layer's window once, apply all or nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, cast

import torch
from torch import Tensor, nn

from syncaccum import uneven
from syncaccum.batchnorm import SyncAccumBatchNorm
from syncaccum.errors import (
    CommitError,
    NoLayersError,
    NonFiniteStatisticsError,
    TooFewValuesError,
)
from syncaccum.layout import HEADER, Layout, NamedLayer, raise_layout_mismatch, verify_layout
from syncaccum.transport import Group, Transport, gather_objects, resolve_group, transport_over


@dataclass(frozen=True)
class CommitReport:
    """What a commit did.

    Attributes:
        layers: names of the layers whose running statistics took up the global batch, in module order.
        values: values per channel in the global batch, by layer; 0 for a layer that saw none and was left alone.
        ranks: how many ranks took part (the largest group, where layers have several).
        seconds: wall time of this call on this rank.
    """

    layers: tuple[str, ...]
    values: Mapping[str, int]
    ranks: int
    seconds: float


def commit(model: nn.Module, *, timeout: float | timedelta | None = None) -> CommitReport:
    r"""Fold the open windows of every layer, over all ranks, into the running statistics.

    Collective: every rank of each layer's group calls it, also one that saw no data. One SUM all-reduce of one
    float64 tensor per group, and on the first commit of a model or after its layers changed one more, which
    compares the layers of the ranks before any statistics are sent.

    With count n, sums :math:`S_1, S_2` over all micro-batches and ranks, f = momentum or 1/num_batches_tracked:

    .. math::
        m = S_1 / n, \quad v = S_2 / n - m^2, \quad
        \mu \leftarrow (1-f) \mu + f m, \quad \sigma^2 \leftarrow (1-f) \sigma^2 + f v \tfrac{n}{n-1}

    All layers of a group are updated or none, and all its ranks decide alike because they judge reduced values.
    A layer with a global count of 0 is left alone.

    Args:
        model: a module with SyncAccumBatchNorm layers, also inside DDP or torch.compile wrappers.
        timeout: seconds, or a timedelta, for which a commit waits for a peer before it fails, in each group; None
            leaves it to the group. Over gloo each of an all-reduce's messages may take so long, over a slow network
            all of them longer. A group that has timed out is of no more use, as after its own timeout. Over NCCL
            the limit is its watchdog's, which ends the process unless TORCH_NCCL_BLOCKING_WAIT is set.

    Raises:
        ValueError: the timeout is not a positive number.
        NoLayersError: the model has no SyncAccumBatchNorm that tracks statistics.
        LayoutMismatchError: layers differ between ranks in number, order, name, width, dtype, eps or momentum,
            or, when ranks meet in a new group, in the number of batches they have tracked.
        NonFiniteStatisticsError: NaN or Inf in some rank's window.
        TooFewValuesError: one value per channel globally; a ValueError.
        CommitError: a peer is gone, stuck or did not call commit until the timeout.

    After an error, running statistics are bit-unchanged and the window is as it was.
    """
    return commit_layers(tracking_layers(model), to_seconds(timeout))


def to_seconds(timeout: float | timedelta | None) -> float | None:
    """A commit's timeout; raises ValueError where it is no positive number."""
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"timeout is {timeout}: give a positive number of seconds, or None for the group's own")
    return seconds


def tracking_layers(model: nn.Module) -> list[NamedLayer]:
    """The named layers of a model that take part in its commits, in module order, each once."""
    layers = [(name, layer) for name, layer in named_layers(model) if layer.track_running_stats]
    if not layers:
        raise NoLayersError(f"no SyncAccumBatchNorm layer of {type(model).__name__} tracks statistics")
    return layers


def named_layers(model: nn.Module) -> list[NamedLayer]:
    """All SyncAccumBatchNorm layers of a model with their names, in module order, each once."""
    layers: list[NamedLayer] = []
    wrapped: set[str] = set()
    for name, module in model.named_modules():
        if type(module).__name__ in _WRAPPERS:
            wrapped.add(f"{name}.{_WRAPPERS[type(module).__name__]}".removeprefix("."))
        if isinstance(module, SyncAccumBatchNorm):
            layers.append((_unwrap_name(name, wrapped) or type(module).__name__, module))
    if not layers:
        raise NoLayersError(
            f"{type(model).__name__} has no SyncAccumBatchNorm layer: call convert_sync_accum(model) first "
            "(torch's SyncBatchNorm.convert_sync_batchnorm undoes it)"
        )
    return layers


# Modules that stand for another one, and the name they hold it by. Ranks and checkpoints may wrap differently.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}


def _unwrap_name(name: str, wrapped: set[str]) -> str:
    """A layer's name without the parts that wrappers put into it."""
    if not wrapped:
        return name
    parts = name.split(".")
    return ".".join(part for i, part in enumerate(parts) if ".".join(parts[: i + 1]) not in wrapped)


def commit_layers(layers: Sequence[NamedLayer], timeout: float | None = None) -> CommitReport:
    """Commit these layers, whatever module they are in. Collective."""
    start = time.perf_counter()
    if (open_join := uneven.current()) is not None:
        open_join.announce_commit(layers)
    applied: list[str] = []
    values: dict[str, int] = {}
    ranks = 1

    def commit_group(group: Group, members: Sequence[NamedLayer]) -> None:
        nonlocal ranks
        counts, size = _commit_group(group, members, timeout)
        ranks = max(ranks, size)
        for (name, _), count in zip(members, counts, strict=True):
            values[name] = count
            if count > 0:
                applied.append(name)

    for_each_group(layers, commit_group)
    return CommitReport(tuple(applied), values, ranks, time.perf_counter() - start)


def for_each_group(layers: Sequence[NamedLayer], act: Callable[[Group, Sequence[NamedLayer]], None]) -> None:
    """Do something collective with the layers of each group; raises the first CommitError after the last group.

    A failure in one group must not keep this rank from the next group's all-reduce: its peers wait there.
    """
    first_error: CommitError | None = None
    for group, members in _group_layers(layers).items():
        try:
            act(group, members)
        except CommitError as error:
            first_error = first_error or error
    if first_error is not None:
        raise first_error


def _group_layers(layers: Sequence[NamedLayer]) -> dict[Group, list[NamedLayer]]:
    """Layers by resolved group, both in module order, which is the same on all ranks."""
    by_group: dict[Group, list[NamedLayer]] = {}
    default = resolve_group(None)  # once: this runs at every commit, for some hundred layers
    for named in layers:
        group = named[1].process_group
        by_group.setdefault(default if group is None else resolve_group(group), []).append(named)
    return by_group


@torch.no_grad()
def _commit_group(group: Group, members: Sequence[NamedLayer], timeout: float | None) -> tuple[list[int], int]:
    transport = transport_over(group, timeout)
    layout, message_size = verify_layout(group, transport, members)
    windows = [layer._window for _, layer in members]
    reduced = reduce_windows(transport, layout, message_size, windows)
    counts = _judge(group, transport, layout, members, reduced)
    seen = [layer for (_, layer), count in zip(members, counts, strict=True) if count > 0]
    if len(seen) == len(members):
        _apply(layout, seen, reduced)
    elif seen:
        _apply_to_some(layout, counts, seen, reduced)
    return counts, transport.size


def reduce_windows(transport: Transport, layout: Layout, message_size: int, windows: Sequence[Tensor]) -> Tensor:
    """The message of ``layout`` summed over the ranks, header included, where the windows live. Collective."""
    home = windows[0].device
    header = torch.tensor(layout.header(new=False), dtype=torch.float64, device=home)
    padding = header.new_zeros(message_size - layout.message_size)
    message = _concatenate([header, *windows, padding], transport.choose_device(home))
    transport.all_reduce(message)
    return message[: layout.message_size].to(home)


def _concatenate(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """torch.cat on ``device``, in one transfer where the tensors share another one."""
    home = tensors[0].device
    if all(tensor.device == home for tensor in tensors):
        return torch.cat(list(tensors)).to(device)
    return torch.cat([tensor.to(device) for tensor in tensors])


def _judge(
    group: Group, transport: Transport, layout: Layout, members: Sequence[NamedLayer], reduced: Tensor
) -> list[int]:
    """Values per channel by layer; raises on what no rank may apply. Reduced values only, so all ranks agree."""
    at, *_ = layout.indices(reduced.device)
    # One transfer: on a GPU each would wait for the device. NaN and Inf survive a sum, which is the fastest look.
    *verdict, checksum = torch.cat([reduced[:HEADER], reduced[at], reduced.sum().reshape(1)]).tolist()
    header, counts = verdict[:HEADER], verdict[HEADER:]
    if not layout.agrees(header, transport.size, new=False):
        raise_layout_mismatch(group, transport, members)
    if not math.isfinite(checksum):
        _raise_non_finite(transport, members)
    lonely = [name for (name, _), count in zip(members, counts, strict=True) if count == 1]
    if lonely:
        raise TooFewValuesError(
            f"one value per channel in the whole global batch has no variance, in {', '.join(lonely)}: "
            "accumulate more micro-batches before a commit, or discard(model)"
        )
    return [int(count) for count in counts]


def _raise_non_finite(transport: Transport, members: Sequence[NamedLayer]) -> NoReturn:
    ours = [name for name, layer in members if not layer._window.isfinite().all()]
    by_rank = gather_objects(transport, ours)
    where = "; ".join(f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(by_rank) if names)
    raise NonFiniteStatisticsError(
        f"NaN or Inf in the window ({where or 'only in the sum over ranks'}); running statistics are unchanged and "
        "the window is kept: find the bad micro-batch, or discard(model) and go on"
    )


def _apply_to_some(layout: Layout, counts: Sequence[int], seen: Sequence[SyncAccumBatchNorm], reduced: Tensor) -> None:
    """Apply, leaving out the layers that no rank has seen data for."""
    sizes = [HEADER, *(1 + 2 * width for width in layout.widths)]
    header, *sums = torch.split(reduced, sizes)
    kept = [s for s, count in zip(sums, counts, strict=True) if count > 0]
    key = tuple(k for k, count in zip(layout.key, counts, strict=True) if count > 0)
    _apply(Layout.describe(key), seen, torch.cat([header, *kept]))


def _apply(layout: Layout, layers: Sequence[SyncAccumBatchNorm], reduced: Tensor) -> None:
    """Fold the reduced sums into the running statistics, and start a new window.

    All channels of all layers at once: per-layer operations would take longer than the all-reduce.
    """
    _, at_count, at_sums = layout.indices(reduced.device)
    n = reduced.index_select(0, at_count)
    update = reduced.index_select(0, at_sums).view(2, -1).div_(n)  # mean, and mean of squares
    mean, variance = update.unbind()
    variance.addcmul_(mean, mean, value=-1).clamp_min_(0).mul_(n / (n - 1))
    factor = _factors(layers, layout, reduced.device)
    # Straight from the dict: nn.Module looks attributes up in four places, which adds up over some hundred.
    current = [cast(Tensor, layer._buffers[name]) for name in ("running_mean", "running_var") for layer in layers]
    old = _concatenate(current, reduced.device).to(torch.float64).view(2, -1)
    new = torch.lerp(old, update, factor).view(-1)
    torch._foreach_copy_(current, torch.split(new, list(layout.widths * 2)))
    torch._foreach_add_([cast(Tensor, layer._buffers["num_batches_tracked"]) for layer in layers], 1)
    torch._foreach_zero_([layer._window for layer in layers])
    for layer in layers:
        layer._count_open_micro_batches(0)


def _factors(layers: Sequence[SyncAccumBatchNorm], layout: Layout, device: torch.device) -> Tensor | float:
    """How much of the new statistics to take: momentum, or 1 / (batches so far, this one included)."""
    momenta = {layer.momentum for layer in layers}
    if len(momenta) == 1 and None not in momenta:
        return cast(float, momenta.pop())
    factors = [
        layer.momentum if layer.momentum is not None else 1.0 / (int(cast(Tensor, layer.num_batches_tracked)) + 1)
        for layer in layers
    ]
    widths = torch.tensor(layout.widths, device=device)
    return torch.tensor(factors, dtype=torch.float64, device=device).repeat_interleave(widths)
