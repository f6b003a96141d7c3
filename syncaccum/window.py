"""A model's open windows: discard, save, load."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from syncaccum.commit import tracking_layers


def discard(model: nn.Module) -> None:
    """Drop the open window of every layer; running statistics stay as they are.

    For a window that must not count: after an out-of-memory retry, a skipped batch, a NaN. Not collective, but
    the ranks should agree: each drops its own part of the global batch.

    Raises:
        NoLayersError: the model has no SyncAccumBatchNorm that tracks statistics.
    """
    for _, layer in tracking_layers(model):
        layer.discard()


def window_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The open windows of this rank, for a checkpoint in the middle of one. Not collective.

    Returns:
        By layer name, a float64 tensor of shape ``(1 + 2C,)``: count, total, total_sq. Sums are additive: the
        states of several ranks may be added, and loaded on any one of them.

    Raises:
        NoLayersError: the model has no SyncAccumBatchNorm that tracks statistics.
    """
    return {name: layer._window.clone() for name, layer in tracking_layers(model)}


def load_window_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace the open windows of this rank by saved ones. Not collective.

    Raises:
        ValueError: a layer is missing, unknown, or of another width or dtype; then nothing was loaded.
        NoLayersError: the model has no SyncAccumBatchNorm that tracks statistics.
    """
    layers = dict(tracking_layers(model))
    missing, unknown = layers.keys() - state.keys(), state.keys() - layers.keys()
    if missing or unknown:
        raise ValueError(
            f"the window state does not fit the model: missing {sorted(missing)}, unknown {sorted(unknown)}"
        )
    for name, layer in layers.items():
        saved = state[name]
        if saved.shape != layer._window.shape or saved.dtype != torch.float64:
            raise ValueError(
                f"the window state does not fit layer {name}: expected float64 of shape "
                f"{tuple(layer._window.shape)}, got {saved.dtype} of shape {tuple(saved.shape)}"
            )
    for name, layer in layers.items():
        layer._window.copy_(state[name])
