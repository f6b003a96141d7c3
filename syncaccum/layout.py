"""What a commit's message looks like, and how ranks find out that they mean the same layers by it."""

from __future__ import annotations

import functools
import hashlib
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from syncaccum.batchnorm import SyncAccumBatchNorm
from syncaccum.errors import LayoutMismatchError
from syncaccum.transport import Group, Transport, gather_objects, resolve_group

NamedLayer = tuple[str, SyncAccumBatchNorm]
Indices = tuple[Tensor, Tensor, Tensor]

# A message starts with [new, h, h^2, h, h^2, h, h^2]: whether its sender's layers are yet to be agreed on, and their
# fingerprint in pieces so small that sums of squares over 4,096 ranks are exact in float64.
_PIECES = 3
_PIECE_BITS = 20
HEADER = 1 + 2 * _PIECES

# Layouts that a group remembers: those of a few models that take turns. More is only a waste, when momentum follows a
# schedule and every commit has a layout of its own.
_REMEMBERED = 16


@dataclass(frozen=True)
class Layout:
    """What a message of these layers says, and what all ranks must agree on."""

    key: tuple[tuple[Any, ...], ...]
    pieces: tuple[int, ...]
    widths: tuple[int, ...]

    @classmethod
    def describe(cls, key: tuple[tuple[Any, ...], ...], *also: Any) -> Layout:
        """The layout of these layers; its fingerprint covers whatever else is given."""
        digest = int.from_bytes(hashlib.sha256(repr((key, *also)).encode()).digest(), "little")
        pieces = tuple((digest >> _PIECE_BITS * i) % (1 << _PIECE_BITS) for i in range(_PIECES))
        return cls(key, pieces, tuple(width for _, width, *_ in key))

    @property
    def message_size(self) -> int:
        return HEADER + len(self.widths) + 2 * sum(self.widths)

    def header(self, *, new: bool) -> list[float]:
        return [float(new), *(float(v) for h in self.pieces for v in (h, h * h))]

    def agrees(self, reduced_header: Sequence[float], ranks: int, *, new: bool) -> bool:
        """Whether every rank sent this header: a sum and a sum of squares both fit only if all were equal."""
        return list(reduced_header) == [ranks * v for v in self.header(new=new)]

    def indices(self, device: torch.device) -> Indices:
        """Where in a message: each layer's count; each channel's count; each channel's total, then its total_sq."""
        return _indices(self.widths, device)


@functools.lru_cache(maxsize=_REMEMBERED)
def _indices(widths: tuple[int, ...], device: torch.device) -> Indices:
    counts: list[int] = []
    repeated: list[int] = []
    totals: list[int] = []
    squares: list[int] = []
    at = HEADER
    for width in widths:
        counts.append(at)
        repeated += [at] * width
        totals += range(at + 1, at + 1 + width)
        squares += range(at + 1 + width, at + 1 + 2 * width)
        at += 1 + 2 * width
    return cast(Indices, tuple(torch.tensor(i, device=device) for i in (counts, repeated, totals + squares)))


@dataclass
class _Agreement:
    """What the ranks of a group have agreed on; the same on all of them."""

    message_size: int = HEADER
    layouts: OrderedDict[tuple[tuple[Any, ...], ...], Layout] = field(default_factory=OrderedDict)

    def remember(self, layout: Layout) -> None:
        self.message_size = max(self.message_size, layout.message_size)
        self.layouts[layout.key] = layout
        if len(self.layouts) > _REMEMBERED:
            self.layouts.popitem(last=False)


# By identity of the group: a new one has made no agreement yet, and its ranks may be new processes.
_agreements: weakref.WeakKeyDictionary[Any, _Agreement] = weakref.WeakKeyDictionary()


def verify_layout(group: Group, transport: Transport, members: Sequence[NamedLayer]) -> tuple[Layout, int]:
    """This rank's layout, once all ranks are known to have the same, and the size of the group's messages.

    gloo aborts the process or returns wrong sums when ranks send different sizes. So all messages of a group are as
    long as the longest agreed on so far, also the one that proposes a new layout, and ranks at odds find it in the
    header. Collective where the layout is new to the group; then the ranks must also have tracked equally many batches,
    as those that were together when a peer died in mid-commit may not have.
    """
    key = _describe_layers(members)
    if group is None:
        layout = _alone_layout(key)
        return layout, layout.message_size
    agreement = _agreements.setdefault(group, _Agreement())
    if key not in agreement.layouts:
        proposal = Layout.describe(key, _batches_tracked(group, members))
        device = transport.choose_device(members[0][1]._window.device)
        message = torch.zeros(agreement.message_size, dtype=torch.float64, device=device)
        message[:HEADER] = torch.tensor(proposal.header(new=True), dtype=torch.float64)
        transport.all_reduce(message)
        if not proposal.agrees(message[:HEADER].tolist(), transport.size, new=True):
            raise_layout_mismatch(group, transport, members)
        agreement.remember(Layout.describe(key))
    return agreement.layouts[key], agreement.message_size


@functools.lru_cache(maxsize=_REMEMBERED)
def _alone_layout(key: tuple[tuple[Any, ...], ...]) -> Layout:
    return Layout.describe(key)


def _describe_layers(members: Sequence[NamedLayer]) -> tuple[tuple[Any, ...], ...]:
    return tuple(_describe_layer(name, layer) for name, layer in members)


def _describe_layer(name: str, layer: SyncAccumBatchNorm) -> tuple[Any, ...]:
    running_mean = layer._buffers["running_mean"]
    dtype = None if running_mean is None else running_mean.dtype
    momentum = layer.momentum
    return name, layer.num_features, dtype, float(layer.eps), momentum if momentum is None else float(momentum)


def _batches_tracked(group: Group, members: Sequence[NamedLayer]) -> dict[str, int]:
    """num_batches_tracked of the layers that the group commits; others may be at odds over it."""
    own = {name: layer.num_batches_tracked for name, layer in members if resolve_group(layer.process_group) is group}
    return {name: int(tracked) for name, tracked in own.items() if tracked is not None}


def raise_layout_mismatch(group: Group, transport: Transport, members: Sequence[NamedLayer]) -> NoReturn:
    """Name the first difference. Collective."""
    everyones = gather_objects(transport, (_describe_layers(members), _batches_tracked(group, members)))
    first_layers, first_tracked = everyones[0]
    for rank, (layers, _) in enumerate(everyones):
        for index, (first, other) in enumerate(itertools.zip_longest(first_layers, layers)):
            if first != other:
                raise LayoutMismatchError(
                    f"layer {index} differs between ranks: rank 0 has {_render_layer(first)}, rank {rank} has "
                    f"{_render_layer(other)}. Build and convert the same model on every rank; nothing was sent"
                )
    for rank, (_, tracked) in enumerate(everyones):
        for name, batches in tracked.items():
            if batches != first_tracked[name]:
                raise LayoutMismatchError(
                    f"layer {name!r} has tracked {first_tracked[name]} batches on rank 0 and {batches} on rank {rank}: "
                    "give every rank the same checkpoint. Ranks that lost a peer in mid-commit may be one commit "
                    "apart: take the statistics of one that is ahead, and discard(model) on those that are behind"
                )
    raise LayoutMismatchError(
        "some ranks have committed these layers before and some have not, or some gather their windows meanwhile: "
        "call the same function on every rank, for the same models in the same order"
    )


def _render_layer(described: tuple[Any, ...] | None) -> str:
    if described is None:
        return "no such layer"
    name, width, dtype, eps, momentum = described
    return f"{name!r} ({width} channels, {dtype}, eps {eps}, momentum {momentum})"
