"""commit: verify the layout, reduce every layer's window once, apply all or nothing."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NoReturn, get_args

import torch
from torch import Tensor, nn

from syncaccum.errors import NonFiniteStatisticsError, TooFewValuesError
from syncaccum.layer import surroundings
from syncaccum.layer.state import Accumulating
from syncaccum.ranks.agreement import HEADER
from syncaccum.ranks.connect import connect, gather_texts
from syncaccum.ranks.groups import Group
from syncaccum.ranks.transport import Transport
from syncaccum.window.fold import apply, apply_to_some
from syncaccum.window.layers import NamedLayer, for_each_group, tracking_layers
from syncaccum.window.layout import Layout
from syncaccum.window.message import Message
from syncaccum.window.overlap import CALL, Overlap, drop_what_was_sent
from syncaccum.window.uninterrupted import run_uninterrupted, steps_of_drop

OnNonFinite = Literal["raise", "discard"]
"""What a commit does with NaN or Inf in a window."""


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

    def as_dict(self, prefix: str = "syncaccum/") -> dict[str, float]:
        """The report as numbers under short names, for TensorBoard, Weights & Biases and Lightning's loggers.

        ``layers`` and ``left_alone``: how many took up the global batch, and how many saw none. ``min_values`` and
        ``max_values``: the values per channel of the former. ``ranks``, ``seconds``.

        Args:
            prefix: comes before each name.

        Example::

            >>> model = syncaccum.convert_sync_accum(model)
            >>> x, y = micro_batches[0]
            >>> loss_fn(model(x), y).backward()
            >>> sorted(commit(model).as_dict(prefix=""))
            ['layers', 'left_alone', 'max_values', 'min_values', 'ranks', 'seconds']
        """
        seen = [count for count in self.values.values() if count > 0]
        numbers = {
            "layers": len(self.layers),
            "left_alone": len(self.values) - len(seen),
            "min_values": min(seen, default=0),
            "max_values": max(seen, default=0),
            "ranks": self.ranks,
            "seconds": self.seconds,
        }
        return {f"{prefix}{name}": number for name, number in numbers.items()}


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
        NonFiniteStatisticsError: NaN or Inf in some rank's window, or new statistics beyond the range of their dtype
            (float16 ends at 65,504). The latter is judged with this rank's running statistics. They are equal on all
            ranks; where somebody changed those of one, it may raise alone, and is one commit behind.
        TooFewValuesError: one value per channel globally; a ValueError.
        CommitError: a peer is gone, stuck or did not call commit until the timeout.

    After an error, running statistics are bit-unchanged and the window is as it was, in each group that failed. What a
    signal handler raises, such as KeyboardInterrupt, leaves all layers of a group as they were, or all committed.

    Sums, mean and variance are float64; only the result is rounded to the dtype of the running statistics.

    Source: the update of nn.BatchNorm, with the global batch in the place of its batch.
    """
    return commit_layers(tracking_layers(model), to_seconds(timeout))


def to_seconds(timeout: float | timedelta | None) -> float | None:
    """A timeout in seconds, None for the group's own. Raises ValueError where it is no positive number."""
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"timeout is {timeout}: give a positive number of seconds, or None for the group's own")
    return seconds


def check_on_nonfinite(policy: str) -> None:
    """Raise ValueError for a policy that there is not."""
    if policy not in get_args(OnNonFinite):
        raise ValueError(f"on_nonfinite must be one of {', '.join(map(repr, get_args(OnNonFinite)))}, got {policy!r}")


def commit_layers(
    layers: Sequence[NamedLayer],
    timeout: float | None = None,
    on_nonfinite: OnNonFinite = "raise",
    overlap: Overlap | None = None,
) -> CommitReport:
    """Commit these layers, whatever module they are in. Collective.

    A window that ``on_nonfinite="discard"`` drops is reported as one without values.

    Args:
        overlap: what may have sent some of the windows already.
    """
    start = time.perf_counter()
    # Ranks without inputs wait for word of what comes.
    if (join := surroundings.open_join()) is not None:
        join.announce_commit([layer for _, layer in layers], discards=on_nonfinite == "discard")
        # Those would not know of it.
        overlap = None
    drop_what_was_sent(layers, but=overlap)
    values: dict[str, int] = {}
    ranks: list[int] = []
    discarded: list[str] = []

    def commit_group(group: Group, members: Sequence[NamedLayer]) -> None:
        transport = connect(group, timeout)
        try:
            counts = _commit_group(group, transport, members, overlap)
        except NonFiniteStatisticsError as error:
            if on_nonfinite == "raise":
                raise
            # All ranks of the group have this error, and do this.
            run_uninterrupted(steps_of_drop([layer._accumulation for _, layer in members]))
            discarded.append(error.where)
            counts = [0] * len(members)
        values.update((name, n) for (name, layer), n in zip(members, counts, strict=True) if n > 0 or _is_ours(layer))
        ranks.append(transport.size)

    try:
        for_each_group(layers, commit_group)
    finally:
        # Last: a warning may be an error.
        # Earlier, peers of the next group would wait.
        if discarded:
            _warn_of_discarded(discarded)
        if overlap is not None:
            overlap.end()
    applied = tuple(name for name, count in values.items() if count > 0)
    return CommitReport(applied, values, max(ranks), time.perf_counter() - start)


def _warn_of_discarded(where: Sequence[str]) -> None:
    warnings.warn(
        f"NaN or Inf in the window ({'; '.join(where)}): it was discarded on all ranks, as on_nonfinite='discard' "
        "says, and running statistics are unchanged",
        stacklevel=2,
    )


def _is_ours(layer: Accumulating) -> bool:
    """Whether the report has a layer without values. One that normalises by itself had nothing to commit."""
    return not layer._accumulation.normalises_itself


def _commit_group(
    group: Group, transport: Transport, members: Sequence[NamedLayer], overlap: Overlap | None
) -> list[int]:
    # Not in no_grad: a signal may leave it in force.
    # Nothing here requires gradients.
    message = None if overlap is None else overlap.take(group, members)
    if message is None:
        message = Message(group, transport, members, *(() if overlap is None else (CALL,)))
    reduced = message.receive(transport)
    header, counts, checksum = _read(message.layout, reduced)
    # First: sums of different layers mean nothing.
    if not message.agrees(header, transport.size):
        message.raise_at_odds(transport)
    if overlap is not None:
        overlap.note_agreed(group)
    _judge(transport, message, counts, checksum)
    _apply(message, counts, reduced)
    message.end()
    return [int(count) for count in counts]


def _apply(message: Message, counts: Sequence[float], reduced: Tensor) -> None:
    seen = [index for index, count in enumerate(counts) if count > 0]
    # The usual case. The other one builds a smaller message first.
    if len(seen) == len(counts):
        apply(message.layout, message.members, reduced, message.taken)
    elif seen:
        apply_to_some(message.layout, seen, message.members, reduced, message.taken)
    if len(seen) < len(counts):
        for _, layer in message.members:
            # Also of layers without values: a commit there was.
            layer._accumulation.is_committed = True


def _read(layout: Layout, reduced: Tensor) -> tuple[list[float], list[float], float]:
    """The header, the values per channel by layer, and a sum that is finite where all sums are."""
    at, *_ = layout.indices(reduced.device)
    # One tolist() for all: each waits for a GPU.
    # NaN and Inf survive the sum of everything: no mask is needed.
    *numbers, checksum = torch.cat([reduced[:HEADER], reduced.index_select(0, at), reduced.sum().reshape(1)]).tolist()
    return numbers[:HEADER], numbers[HEADER:], checksum


def _judge(transport: Transport, message: Message, counts: Sequence[float], checksum: float) -> None:
    """Raise on what no rank may apply, from reduced values: all ranks raise or none."""
    if not math.isfinite(checksum):
        _raise_non_finite(transport, message)
    # n / (n - 1) has no value for one.
    lonely = [name for (name, _), count in zip(message.members, counts, strict=True) if count == 1]
    if lonely:
        raise TooFewValuesError(
            f"one value per channel in the whole global batch has no variance, in {', '.join(lonely)}: "
            "accumulate more micro-batches before a commit, or discard(model)"
        )


def _raise_non_finite(transport: Transport, message: Message) -> NoReturn:
    """Name the layers and ranks. Collective."""
    # Ranks know only their own windows: each names its layers.
    pairs = zip(message.members, message.windows, strict=True)
    ours = [name for (name, _), window in pairs if not window.isfinite().all()]
    by_rank = gather_texts(transport, ours)
    where = "; ".join(f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(by_rank) if names)
    # Finite windows may add up to Inf.
    where = where or "only in the sum over ranks"
    error = NonFiniteStatisticsError(
        f"NaN or Inf in the window ({where}); running statistics are unchanged and "
        "the window is kept: find the bad micro-batch, or discard(model) and go on"
    )
    error.where = where
    raise error
