"""The layout of a commit's message, and the check that all ranks have the same one before they send sums."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from syncaccum.errors import LayoutMismatchError
from syncaccum.layer.state import Accumulating, commit_momentum
from syncaccum.moments import Moments
from syncaccum.ranks.agreement import HEADER, Fingerprint, agreement_of
from syncaccum.ranks.connect import gather_texts
from syncaccum.ranks.groups import Group, resolve_group
from syncaccum.ranks.transport import Transport
from syncaccum.torch_private import buffers_of
from syncaccum.window.layers import NamedLayer

Key = tuple[tuple[Any, ...], ...]
"""What all ranks must agree on: for each layer its name, width, dtype, eps, momentum and policy."""


@dataclass(frozen=True)
class Layout:
    """What a message is made of: a header, then each layer's packed moments. Zeros may follow."""

    key: Key
    fingerprint: Fingerprint
    widths: tuple[int, ...]

    @classmethod
    def of(cls, key: Key) -> Layout:
        return cls(key, Fingerprint.of(key), tuple(width for _, width, *_ in key))

    # Each of these is asked for in every commit.
    @functools.cached_property
    def sizes(self) -> list[int]:
        """Of the header and of each layer's moments."""
        return [HEADER, *map(Moments.packed_size, self.widths)]

    @functools.cached_property
    def size(self) -> int:
        """Of all of them."""
        return sum(self.sizes)

    @functools.cached_property
    def momenta(self) -> tuple[float | None, ...]:
        """By layer; None where it averages over all batches."""
        return tuple(momentum for _, _, _, _, momentum, _ in self.key)

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Where in a message: each layer's count; each channel's count; each channel's total, then its total_sq."""
        return _find_indices(self.widths, device)


# Remembered: a few operations for each layer add up.
@functools.lru_cache(maxsize=16)
def _find_indices(widths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    # Named, because a default device may be meta, and this is kept.
    home = torch.device("cpu")
    ends = list(itertools.accumulate(map(Moments.packed_size, widths), initial=HEADER))
    # Unpacked positions in place of values: Moments alone knows
    # where in a packed tensor what is.
    positions = [Moments.unpack(torch.arange(start, end, device=home)) for start, end in itertools.pairwise(ends)]
    counts = torch.stack([p.count for p in positions])
    # Each channel gets its layer's count, for one division of all.
    of_channels = counts.repeat_interleave(torch.tensor(widths, device=home))
    sums = torch.cat([p.total for p in positions] + [p.total_sq for p in positions])
    return counts.to(device), of_channels.to(device), sums.to(device)


def verify_layout(group: Group, transport: Transport, members: Sequence[NamedLayer]) -> tuple[Layout, int]:
    """This rank's layout, once all ranks are known to have the same, and the length of the group's messages.

    When ranks send messages of different lengths, gloo aborts the process or returns wrong sums. So a group has one
    length for all its messages: that of the longest layout agreed on so far. A message that proposes a new layout has
    this length, too: it is a header and zeros. So it may safely meet another message, and both senders find in
    the summed header that they are at odds. Only after all ranks have agreed does the length grow.

    Collective where the layout is new to the group. Then ``num_batches_tracked`` must be the same on all ranks, too:
    if a peer died during a commit, some of the others may have finished that commit, and some not.
    """
    layout = describe_layout(members)
    if (agree := propose_if_new(group, transport, members, layout)) is not None:
        agree(transport)
    return layout, message_size(group, layout)


def describe_layout(members: Sequence[NamedLayer]) -> Layout:
    """This rank's own."""
    return _recall_layout(_describe_layers(members))


def message_size(group: Group, layout: Layout) -> int:
    """The length of every message of a group, now that its ranks have agreed on the layout."""
    return layout.size if group is None else agreement_of(group).message_size


def propose_if_new(
    group: Group, transport: Transport, members: Sequence[NamedLayer], layout: Layout, call: str = "commit"
) -> Callable[[Transport], None] | None:
    """Begin to compare a layout that is new to the group, as `verify_layout` says; None for one that is not.

    What is returned waits for the end, and takes a transport for what follows. Both are collective where there is
    something to compare.
    """
    if group is None or layout.key in agreement_of(group).keys:
        return None
    # First time in this group: compare before any sums are sent.
    proposal = Fingerprint.of(layout.key, _batches_tracked(group, members))
    device = transport.choose_device(members[0][1]._accumulation.window.device)
    message = torch.zeros(agreement_of(group).message_size, dtype=torch.float64, device=device)
    message[:HEADER] = torch.tensor(proposal.header(new=True), dtype=torch.float64)
    wait = transport.start_all_reduce(message)

    def agree(transport: Transport) -> None:
        wait()
        if not proposal.agrees(message[:HEADER].tolist(), transport.size, new=True):
            raise_layout_mismatch(group, transport, members, call)
        agreement_of(group).remember(layout.key, layout.size)

    return agree


# Remembered: a fingerprint of some hundred layers takes a while.
_recall_layout = functools.lru_cache(maxsize=16)(Layout.of)


def _describe_layers(members: Sequence[NamedLayer]) -> Key:
    return tuple(_describe_layer(name, layer) for name, layer in members)


def _describe_layer(name: str, layer: Accumulating) -> tuple[Any, ...]:
    running_mean = buffers_of(layer)["running_mean"]
    dtype = None if running_mean is None else running_mean.dtype
    momentum = commit_momentum(layer)
    # float(): a NumPy number has another repr, and so another
    # fingerprint.
    momentum = None if momentum is None else float(momentum)
    state = layer._accumulation
    policy = state.normalization, state.r_max, state.d_max, state.prior_count
    return name, layer.num_features, dtype, float(layer.eps), momentum, policy


def _render_layer(described: tuple[Any, ...]) -> str:
    name, width, dtype, eps, momentum, (policy, r_max, d_max, prior_count) = described
    if policy == "renorm":
        policy += f" with r_max {r_max}, d_max {d_max}, prior_count {prior_count}"
    return f"{name!r} ({width} channels, {dtype}, eps {eps}, momentum {momentum}, {policy})"


def _batches_tracked(group: Group, members: Sequence[NamedLayer]) -> list[str]:
    """num_batches_tracked of those layers that this group commits. Over others its ranks may well be at odds."""
    tracked = (
        layer.num_batches_tracked if resolve_group(layer._accumulation.handle.group) is group else None
        for _, layer in members
    )
    return ["" if batches is None else str(int(batches)) for batches in tracked]


def raise_layout_mismatch(
    group: Group, transport: Transport, members: Sequence[NamedLayer], call: str = "commit"
) -> NoReturn:
    """Name the first difference between the ranks' calls, layers, or batches tracked. Collective."""
    if group is not None:
        agreement_of(group).end_at_odds()  # as peers in a lockstep do
    # All ranks see the same texts, and raise the same.
    everyones = gather_texts(transport, [call, *map(_render_layer, _describe_layers(members))], at_least=1)
    _compare_calls([texts[0] for texts in everyones])
    for rank, theirs in enumerate(everyones):
        for index, (first, other) in enumerate(itertools.zip_longest(everyones[0], theirs, fillvalue="no such layer")):
            if first != other:
                raise LayoutMismatchError(
                    f"layer {index - 1} differs between ranks: rank 0 has {first}, rank {rank} has {other}. "
                    "Build and convert the same model on every rank; nothing has changed"
                )
    # Layers are equal: is it the batches tracked?
    everyones = gather_texts(transport, _batches_tracked(group, members))
    for rank, theirs in enumerate(everyones):
        for (name, _), first, other in zip(members, everyones[0], theirs, strict=False):
            if first != other:
                raise LayoutMismatchError(
                    f"layer {name!r} has tracked {first} batches on rank 0 and {other} on rank {rank}: "
                    "give every rank the same checkpoint. Ranks that lost a peer in mid-commit may be one commit "
                    "apart: take the statistics of one that is ahead, and discard(model) on those that are behind"
                )
    raise LayoutMismatchError(
        "some ranks have committed these layers before and some have not: "
        "call the same function on every rank, for the same models in the same order"
    )


def _compare_calls(calls: Sequence[str]) -> None:
    if len(set(calls)) > 1:
        where = ", ".join(f"rank {rank} {call}" for rank, call in enumerate(calls))
        raise LayoutMismatchError(
            f"ranks make different calls: {where}. Some have skipped or repeated one: call the same function on every "
            "rank, for the same models in the same order. Running statistics are unchanged and the window is kept"
        )
