"""What a commit's message looks like, and how ranks find out that they mean the same layers by it."""

from __future__ import annotations

import functools
import hashlib
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from syncaccum.batchnorm import SyncAccumBatchNorm
from syncaccum.errors import LayoutMismatchError
from syncaccum.transport import Group, Transport

NamedLayer = tuple[str, SyncAccumBatchNorm]
Indices = tuple[Tensor, Tensor, Tensor]

# A message starts with [changed, h, h^2, h, h^2, h, h^2]: whether its sender's layers have changed since the last
# commit, and their fingerprint in pieces so small that sums of squares over 4,096 ranks are exact in float64.
_PIECES = 3
_PIECE_BITS = 20
HEADER = 1 + 2 * _PIECES


@dataclass(frozen=True)
class Layout:
    """What a message of these layers looks like, and what all ranks must agree on."""

    key: tuple[tuple[Any, ...], ...]
    pieces: tuple[int, ...]
    widths: list[int]
    _indices: dict[torch.device, Indices] = field(default_factory=dict)

    @classmethod
    def describe(cls, key: tuple[tuple[Any, ...], ...]) -> Layout:
        digest = int.from_bytes(hashlib.sha256(repr(key).encode()).digest(), "little")
        pieces = tuple((digest >> _PIECE_BITS * i) % (1 << _PIECE_BITS) for i in range(_PIECES))
        return cls(key, pieces, [width for _, width, *_ in key])

    @property
    def message_size(self) -> int:
        return HEADER + sum(1 + 2 * width for width in self.widths)

    def header(self, *, changed: bool) -> list[float]:
        return [float(changed), *(float(v) for h in self.pieces for v in (h, h * h))]

    def agrees(self, reduced_header: Sequence[float], ranks: int, *, changed: bool) -> bool:
        """Whether every rank sent this header: a sum and a sum of squares both fit only if all were equal."""
        return list(reduced_header) == [ranks * v for v in self.header(changed=changed)]

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Where in a message: each layer's count; each channel's count; each channel's total, then its total_sq."""
        if device not in self._indices:
            counts: list[int] = []
            repeated: list[int] = []
            totals: list[int] = []
            squares: list[int] = []
            at = HEADER
            for width in self.widths:
                counts.append(at)
                repeated += [at] * width
                totals += range(at + 1, at + 1 + width)
                squares += range(at + 1 + width, at + 1 + 2 * width)
                at += 1 + 2 * width
            where = (counts, repeated, totals + squares)
            self._indices[device] = cast(Indices, tuple(torch.tensor(i, device=device) for i in where))
        return self._indices[device]


# The layout that all ranks of a group agreed on when this module was last committed. By identity of both, so that
# neither a copy of the model nor a new process group inherits an agreement it never made.
_agreed: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[Any, Layout]] = weakref.WeakKeyDictionary()


def verify_layout(root: nn.Module, group: Group, transport: Transport, members: Sequence[NamedLayer]) -> Layout:
    """This rank's layout, once all ranks are known to have the same.

    gloo aborts the process or returns wrong sums when ranks send different sizes. So a rank whose layers changed
    since the last commit says so in a message of the old size, which is what its peers send if theirs did not.
    """
    key = tuple(_describe_layer(name, layer) for name, layer in members)
    if group is None:
        return _alone_layout(key)
    agreed = _agreed.setdefault(root, weakref.WeakKeyDictionary())
    last = agreed.get(group)
    if last is not None and last.key == key:
        return last
    layout = Layout.describe(key)
    size = HEADER if last is None else last.message_size
    device = transport.choose_device(members[0][1]._window.device)
    message = torch.zeros(size, dtype=torch.float64, device=device)
    message[:HEADER] = torch.tensor(layout.header(changed=True), dtype=torch.float64)
    transport.all_reduce(message)
    if not layout.agrees(message[:HEADER].tolist(), transport.size, changed=True):
        raise_layout_mismatch(transport, layout)
    agreed[group] = layout
    return layout


@functools.lru_cache(maxsize=16)
def _alone_layout(key: tuple[tuple[Any, ...], ...]) -> Layout:
    return Layout.describe(key)


def _describe_layer(name: str, layer: SyncAccumBatchNorm) -> tuple[Any, ...]:
    running_mean = cast(Tensor, layer._buffers["running_mean"])
    return name, layer.num_features, running_mean.dtype, layer.eps, layer.momentum


def raise_layout_mismatch(transport: Transport, layout: Layout) -> NoReturn:
    """Name the first difference. Collective."""
    ours = transport.gather_objects(layout.key)
    for rank, theirs in enumerate(ours):
        for index, (first, other) in enumerate(itertools.zip_longest(ours[0], theirs)):
            if first != other:
                raise LayoutMismatchError(
                    f"layer {index} differs between ranks: rank 0 has {_render_layer(first)}, rank {rank} has "
                    f"{_render_layer(other)}. Build and convert the same model on every rank; nothing was sent"
                )
    raise LayoutMismatchError("ranks disagree on whether their layers changed since the last commit")


def _render_layer(described: tuple[Any, ...] | None) -> str:
    if described is None:
        return "no such layer"
    name, width, dtype, eps, momentum = described
    return f"{name!r} ({width} channels, {dtype}, eps {eps}, momentum {momentum})"
