"""A model's open windows in checkpoints: save, gather, load. Not in state_dict, whose keys are nn.BatchNorm's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from syncaccum.layer.ledger import PACKED
from syncaccum.layer.state import Accumulating
from syncaccum.ranks.connect import connect
from syncaccum.ranks.groups import Group, resolve_group
from syncaccum.torch_private import copy_all
from syncaccum.window.layers import NamedLayer, for_each_group, tracking_layers
from syncaccum.window.message import reduce_for
from syncaccum.window.uninterrupted import run_uninterrupted, step_of_updates


def window_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The open windows of this rank, for a checkpoint that each rank has a file of its own in. Not collective.

    Loaded by the same ranks they go on bit for bit. For other numbers of ranks, and for a checkpoint that all ranks
    share, such as ``torch.distributed.checkpoint``'s, where their keys would clash: ``gather_window_state_dict``.

    Returns:
        By layer name, a float64 tensor of shape ``(1 + 2C,)``: count, total, total_sq. A layer under policy
        ``"window"`` has four more of this shape, as ``"NAME/last"``: its last window, and the books of its feedback.
        All are sums and additive: the states of several ranks may be added, and loaded on any one of them, or stacked,
        and loaded on all.

    Raises:
        NoLayersError: the model has no SyncAccumBatchNorm that tracks statistics.
    """
    layers = tracking_layers(model)
    windows = {name: layer._accumulation.window.clone() for name, layer in layers}
    ledgers = [(name, ledger) for name, layer in layers if (ledger := layer._accumulation.ledger) is not None]
    return windows | {f"{name}/{part}": value for name, ledger in ledgers for part, value in ledger.pack().items()}


def gather_window_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The open windows of all ranks in one state, alike on every rank, for a checkpoint that any one of them writes.

    Collective: every rank of each layer's group calls it, also one that saw no data. Costs what a commit does. The
    windows stay open. Where layers have groups of their own, a rank's state is that of the groups it is in, so one
    rank of each writes.

    Returns:
        By layer name, a float64 tensor of shape ``(1, 1 + 2C)``: one share, to be dealt out by
        ``load_window_state_dict`` over any number of ranks. Its size does not depend on how many there are.

    Raises:
        NoLayersError: the model has no SyncAccumBatchNorm that tracks statistics.
        LayoutMismatchError: layers differ between ranks, or some ranks commit while others gather.
        CommitError: a peer is gone, stuck or did not call this until the group's timeout; or this is one of several
            ranks, and the process group is yet to be initialised.

    Example::

        >>> import torch.distributed.checkpoint
        >>> model = syncaccum.convert_sync_accum(model)
        >>> state = {"model": model.state_dict(), "windows": gather_window_state_dict(model)}
        >>> written = torch.distributed.checkpoint.save(state, checkpoint_id=folder)
        >>> # ... later, on as many ranks as there are then; load fills the tensors it is given
        >>> state = {"model": model.state_dict(), "windows": gather_window_state_dict(model)}
        >>> torch.distributed.checkpoint.load(state, checkpoint_id=folder)
        >>> model.load_state_dict(state["model"])
        <All keys matched successfully>
        >>> load_window_state_dict(model, state["windows"])
    """
    layers = tracking_layers(model)
    by_group = for_each_group(layers, _gather_group)
    return {key: value for state in by_group for key, value in state.items()}


def _gather_group(group: Group, members: Sequence[NamedLayer]) -> dict[str, Tensor]:
    names = [name for name, _ in members]
    state = dict(zip(names, reduce_for(_GATHER, group, members), strict=True))
    # Policies are a part of the layout: all ranks have the same ledgers.
    ledgers = [(name, ledger) for name, layer in members if (ledger := layer._accumulation.ledger) is not None]
    if ledgers:
        parts = {f"{name}/{part}": value for name, ledger in ledgers for part, value in ledger.pack().items()}
        state.update(_sum_over_ranks(group, parts))
    # clone: a view would keep the whole message in memory.
    return {key: value.clone().unsqueeze(0) for key, value in state.items()}


_GATHER = "gather_window_state_dict"


def _sum_over_ranks(group: Group, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In one message. Collective; all ranks must be here, and know it: it may have any length."""
    transport = connect(group, call=_GATHER)
    home = next(iter(parts.values())).device
    message = torch.cat(list(parts.values())).to(transport.choose_device(home))
    transport.all_reduce(message)
    sums = torch.split(message.to(home), [part.numel() for part in parts.values()])
    return dict(zip(parts, sums, strict=True))


def load_window_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace the open windows of this rank by saved ones. Not collective.

    A tensor of shape ``(1 + 2C,)``, from ``window_state_dict``, is this rank's window. One of shape
    ``(shares, 1 + 2C)``, from ``gather_window_state_dict`` or stacked from the states of several ranks, holds the
    windows of all: every rank loads the same state, and rank r of the R ranks in the layer's group takes the shares r,
    r + R, r + 2R and so on. So nothing is lost and nothing counted twice, on any number of ranks, but each must
    load it, after the process group is initialised.

    Sums that are NaN or Inf are loaded as they were saved: a commit names their layer, and ``discard`` is the remedy.

    Raises:
        ValueError: a layer is missing, unknown, or of another width or dtype, or a count is none; then nothing was
            loaded.
        NoLayersError: the model has no SyncAccumBatchNorm that tracks statistics.
        CommitError: shares are to be dealt out, this is one of several ranks, and the process group is yet to be
            initialised.
    """
    layers = dict(tracking_layers(model))
    parts = {f"{name}/{part}" for name in layers for part in PACKED}
    missing, unknown = layers.keys() - state.keys(), state.keys() - layers.keys() - parts
    if missing or unknown:
        raise ValueError(
            f"the window state does not fit the model: missing {sorted(missing)}, unknown {sorted(unknown)}. "
            "Build and convert the model as when it was saved, or go on with empty windows: discard(model)"
        )
    for name, layer in layers.items():
        _check_fit(name, layer, state[name], is_window=True)
        for key in _keys_of_ledger(name, state):
            _check_fit(key, layer, state[key], is_window=False)
    # All are checked and computed before the first is replaced.
    windows = [_take_share(layer, state[name]) for name, layer in layers.items()]
    accumulations = [layer._accumulation for layer in layers.values()]
    run_uninterrupted(
        [
            partial(copy_all, [one.window for one in accumulations], [window.detach() for window in windows]),
            # What may be on its way to the other ranks was another window.
            step_of_updates(accumulations, itertools.repeat({"is_sent": False})),
        ]
    )
    for name, layer in layers.items():
        _load_ledger(name, layer, state)


def _keys_of_ledger(name: str, state: Mapping[str, Tensor]) -> list[str]:
    """The keys of a layer's ledger; none in a checkpoint from before there were any, or of another policy."""
    keys = [f"{name}/{part}" for part in PACKED]
    return keys if all(key in state for key in keys) else []


def _load_ledger(name: str, layer: Accumulating, state: Mapping[str, Tensor]) -> None:
    ledger = layer._accumulation.ledger
    if ledger is None:
        return
    if not (keys := _keys_of_ledger(name, state)):
        # A start without it: as in a first window.
        ledger.forget()
        return
    saved, ranks = [state[key] for key in keys], 1
    if saved[0].dim() == 2:
        transport = connect(resolve_group(layer._accumulation.handle.group))
        if saved[0].shape[0] % transport.size == 0:
            # A rank's own, or as many for each.
            saved = [s[transport.rank :: transport.size].sum(0) for s in saved]
        else:
            saved, ranks = [s.sum(0) for s in saved], transport.size
    ledger.unpack(dict(zip(PACKED, saved, strict=True)), ranks)


def _check_fit(name: str, layer: Accumulating, saved: Tensor, *, is_window: bool) -> None:
    size = layer._accumulation.window.numel()
    if saved.dim() not in (1, 2) or saved.shape[-1] != size or saved.dtype != torch.float64:
        raise ValueError(
            f"the window state does not fit layer {name}: expected float64 of shape ({size},), or (shares, {size}), "
            f"got {saved.dtype} of shape {tuple(saved.shape)}. Build the model as when it was saved and keep float64, "
            "or go on with empty windows: discard(model)"
        )
    # A negative count would cancel data of other ranks, unseen.
    # Sums may be NaN: a commit names their layer.
    counts = saved[..., 0]
    good = counts.isfinite() & (counts >= 0)
    # Ranks that shared a ledger each have a part of its counts.
    if not (good & (counts == counts.floor()) if is_window else good).all():
        raise ValueError(
            f"the window state of layer {name} is damaged: its count is {counts.tolist()}, expected a "
            f"{'whole ' if is_window else ''}number from 0 on. Take another checkpoint, or go on with empty windows: "
            "discard(model)"
        )


def _take_share(layer: Accumulating, saved: Tensor) -> Tensor:
    if saved.dim() == 1:
        return saved
    transport = connect(resolve_group(layer._accumulation.handle.group))
    # Shares dealt out like cards: each goes to exactly one rank.
    # A rank without any gets a sum of none: zeros.
    return saved[transport.rank :: transport.size].sum(0)
