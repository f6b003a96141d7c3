"""A model's open windows in checkpoints: save, gather, load. Not in state_dict, whose keys are nn.BatchNorm's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from syncaccum.layer.ledger import Ledger
from syncaccum.layer.state import Accumulating
from syncaccum.ranks.connect import connect
from syncaccum.ranks.groups import Group, resolve_group
from syncaccum.torch_private import copy_all
from syncaccum.window.commit import reduce_for
from syncaccum.window.layers import NamedLayer, for_each_group, tracking_layers


def window_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The open windows of this rank, for a checkpoint that each rank has a file of its own in. Not collective.

    Loaded by the same ranks they go on bit for bit. For other numbers of ranks, and for a checkpoint that all ranks
    share, such as ``torch.distributed.checkpoint``'s, where their keys would clash: ``gather_window_state_dict``.

    Returns:
        By layer name, a float64 tensor of shape ``(1 + 2C,)``: count, total, total_sq. Sums are additive: the
        states of several ranks may be added, and loaded on any one of them, or stacked, and loaded on all. A layer
        under policy "window" has a second tensor, ``<name>.ledger`` of shape ``(5 + 8C,)``: the last window's
        statistics and the books of its feedback. That is each rank's own.

    Raises:
        NoLayersError: the model has no SyncAccumBatchNorm that tracks statistics.
    """
    layers = tracking_layers(model)
    windows = {name: layer._accumulation.window.clone() for name, layer in layers}
    return {**windows, **{key: ledger.to_state() for key, ledger in _ledgers(layers)}}


def _ledgers(layers: Iterable[NamedLayer]) -> Iterator[tuple[str, Ledger]]:
    """By their keys in a state."""
    for name, layer in layers:
        if (ledger := layer._accumulation.ledger) is not None:
            yield f"{name}.ledger", ledger


def gather_window_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The open windows of all ranks in one state, alike on every rank, for a checkpoint that any one of them writes.

    Collective: every rank of each layer's group calls it, also one that saw no data. Costs what a commit does. The
    windows stay open. Where layers have groups of their own, a rank's state is that of the groups it is in, so one
    rank of each writes.

    Returns:
        By layer name, a float64 tensor of shape ``(1, 1 + 2C)``: one share, to be dealt out by
        ``load_window_state_dict`` over any number of ranks. Its size does not depend on how many there are. A layer
        under policy "window" has a second tensor, ``<name>.ledger``: the last window's statistics, without the books
        of the open one, which are each rank's own.

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
    windows = {name: windows[name] for name, _ in layers for windows in by_group if name in windows}
    return {**windows, **{key: ledger.last_to_state() for key, ledger in _ledgers(layers)}}


def _gather_group(group: Group, members: Sequence[NamedLayer]) -> dict[str, Tensor]:
    sums = reduce_for("gather_window_state_dict", group, members)
    # clone: a view would keep the whole message in memory.
    return {name: window.clone().unsqueeze(0) for (name, _), window in zip(members, sums, strict=True)}


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
    # States from before, and of another policy, have none.
    ledgers = {key: ledger for key, ledger in _ledgers(layers.items()) if key in state}
    others = {f"{name}.ledger" for name in layers}
    missing, unknown = layers.keys() - state.keys(), state.keys() - layers.keys() - others
    if missing or unknown:
        raise ValueError(
            f"the window state does not fit the model: missing {sorted(missing)}, unknown {sorted(unknown)}. "
            "Build and convert the model as when it was saved, or go on with empty windows: discard(model)"
        )
    for name, layer in layers.items():
        _check_fit(name, layer, state[name])
    for key, ledger in ledgers.items():
        _check_ledger(key, ledger, state[key])
    # All are checked and computed before the first is replaced.
    windows = [_take_share(layer, state[name]) for name, layer in layers.items()]
    copy_all([layer._accumulation.window for layer in layers.values()], [window.detach() for window in windows])
    for key, ledger in ledgers.items():
        ledger.load_state(state[key].detach())


def _check_ledger(key: str, ledger: Ledger, saved: Tensor) -> None:
    expected = ledger.to_state()
    if saved.shape != expected.shape or saved.dtype != torch.float64 or not saved.isfinite().all():
        raise ValueError(
            f"the window state does not fit {key}: expected finite float64 of shape {tuple(expected.shape)}, got "
            f"{saved.dtype} of shape {tuple(saved.shape)}. Leave it out to go on without"
        )


def _check_fit(name: str, layer: Accumulating, saved: Tensor) -> None:
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
    whole = counts.isfinite() & (counts >= 0) & (counts == counts.floor())
    if not whole.all():
        raise ValueError(
            f"the window state of layer {name} is damaged: its count is {counts.tolist()}, expected a whole number "
            "from 0 on. Take another checkpoint, or go on with empty windows: discard(model)"
        )


def _take_share(layer: Accumulating, saved: Tensor) -> Tensor:
    if saved.dim() == 1:
        return saved
    transport = connect(resolve_group(layer._accumulation.handle.group))
    # Shares dealt out like cards: each goes to exactly one rank.
    # A rank without any gets a sum of none: zeros.
    return saved[transport.rank :: transport.size].sum(0)
