"""recalibrate: running statistics computed anew over a whole data set, in one pass and one commit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from syncaccum.errors import CommitError
from syncaccum.layer.state import Accumulating
from syncaccum.torch_private import buffers_of
from syncaccum.window.commit import CommitReport, commit_layers
from syncaccum.window.layers import NamedLayer, for_each_group, tracking_layers
from syncaccum.window.message import reduce_for


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any] | None = None) -> CommitReport:
    """Replace the running statistics by those of a whole data set, over all ranks.

    After weights changed without training steps: weight averaging (SWA, EMA), schedule-free optimizers, pruning, a new
    domain. Each layer gets the mean and the unbiased variance of every value that it sees, as if all batches of all
    ranks were one, in whatever way they are split. ``torch.optim.swa_utils.update_bn`` averages over batches instead,
    and knows no ranks.

    All modules are in training mode meanwhile, as in ``update_bn``, and each batch is normalised with its own
    statistics. No gradient is recorded. Open windows are dropped. ``num_batches_tracked`` becomes 1. ``momentum``,
    policies and training flags are afterwards what they were.

    Collective: every rank calls it, also one without batches. It costs one commit: one all-reduce.

    Args:
        model: a module with SyncAccumBatchNorm layers, also inside DDP; pass the module inside if ranks have
            different numbers of batches, because DDP's own forward may communicate.
        batches: this rank's part of the data, for example a DataLoader.
        forward: called with each batch. None calls the model: with the first item of a list or tuple, with the
            items of a mapping as keywords, with anything else as it is.

    Returns:
        The commit's report. A layer that no rank has fed keeps its old statistics, and is not in ``layers``.

    Raises:
        NoLayersError: the model has no SyncAccumBatchNorm that tracks statistics.
        CommitError: as :func:`syncaccum.commit`, or another rank's forward failed.
        ValueError: one value per channel in some batch, as nn.BatchNorm.
        Whatever ``batches`` and ``forward`` raise, on that rank. All statistics are then what they were.

    Source: Izmailov et al. 2018 (arXiv:1803.05407), which does so after averaging weights.

    Example::

        >>> averaged = torch.optim.swa_utils.AveragedModel(syncaccum.convert_sync_accum(model))
        >>> averaged.update_parameters(model)
        >>> report = recalibrate(averaged, micro_batches)
    """
    layers = tracking_layers(model)
    with _training(model), _measuring([layer for _, layer in layers]):
        try:
            for batch in batches:
                _call(model, batch) if forward is None else forward(batch)
        # Not BaseException: an interrupt should end this rank at once.
        except Exception:
            _tell_peers(layers)
            raise
        return commit_layers(layers)


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, (list, tuple)):
        model(batch[0])
    elif hasattr(batch, "keys"):
        model(**batch)
    else:
        model(batch)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    # One flag for each module: users may have some in eval mode.
    flags = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def _measuring(layers: Sequence[Accumulating]) -> Iterator[None]:
    """Each layer starts from nothing, and goes back to what it was if it is not committed."""
    before = [_Before(layer) for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        # A cumulative average: the first commit replaces all.
        layer.momentum = None
        # As in update_bn. The committed statistics are gone meanwhile.
        layer._accumulation.normalization = "batch"
        # A layer that is paused with momentum 0 is measured, too.
        layer._accumulation.always_counts = True
    try:
        yield
    finally:
        for one in before:
            one.restore()


class _Before:
    """A layer's settings and statistics before, and the way back to them."""

    def __init__(self, layer: Accumulating) -> None:
        state = layer._accumulation
        self._layer = layer
        self._momentum = layer.momentum
        self._is_committed = state.is_committed
        self._ledger = copy.deepcopy(state.ledger)
        self._settings = {name: getattr(state, name) for name in ("normalization", "always_counts", "uncounted")}
        self._buffers = {name: b.clone() for name, b in buffers_of(layer).items() if b is not None}
        # Also inside of not_counted: this data is to be counted.
        state.uncounted = 0

    def restore(self) -> None:
        layer, state = self._layer, self._layer._accumulation
        layer.momentum = self._momentum
        for name, value in self._settings.items():
            setattr(state, name, value)
        # Still 0, so there was no commit.
        if not _tensor_of(layer, "num_batches_tracked"):
            state.drop()
            state.is_committed = self._is_committed
            state.ledger = self._ledger
            for name, value in self._buffers.items():
                _tensor_of(layer, name).copy_(value)


def _tensor_of(layer: nn.Module, name: str) -> Tensor:
    buffer = buffers_of(layer)[name]
    assert buffer is not None
    return buffer


def _tell_peers(layers: Sequence[NamedLayer]) -> None:
    """End the commit that peers wait in, after a failure on this rank. Collective, together with their commit.

    This rank sends a message of the right length with another fingerprint. So the peers raise, and need no timeout.
    """

    # Peers agree with it only if their forward has failed, too.
    fail = partial(reduce_for, "recalibrate, whose forward failed")
    with suppress(CommitError):  # the forward's own error is what this rank raises
        for_each_group(layers, fail)
