"""Whether all ranks build the same layers from a model factory that the user names."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from torch import nn

from syncaccum.errors import LayoutMismatchError
from syncaccum.layer.batchnorm import SyncAccumBatchNorm
from syncaccum.layer.convert import convert_sync_accum
from syncaccum.layout import NamedLayer, verify_layout
from syncaccum.transport import Group, gather_objects, transport_over
from syncaccum.window.commit import tracking_layers


@dataclass(frozen=True)
class Layers:
    """What a rank's model has, or why it and its peers' cannot be committed together."""

    count: int = 0
    channels: int = 0
    own_error: str = ""
    """Why this rank has no model."""
    mismatch: str = ""
    """The first layer that differs, and on which ranks; the same on all of them."""


def compare_layers(factory: str, group: Group) -> Layers:
    """Build the model on every rank and compare its layers. Collective.

    Args:
        factory: ``package.module:function``; called without arguments, it returns the model.
        group: a resolved group.

    Raises:
        CommitError: a peer left in the meantime.
    """
    layers: list[NamedLayer] = []
    error = ""
    try:
        layers = _build_layers(factory)
    except Exception as failure:  # whatever the user's code raises; peers wait in the next line
        error = f"{type(failure).__name__}: {failure}"
    transport = transport_over(group)
    mismatch = ""
    if not any(gather_objects(transport, error)):
        try:
            verify_layout(group, transport, layers)
        except LayoutMismatchError as difference:
            mismatch = str(difference)
    return Layers(len(layers), sum(layer.num_features for _, layer in layers), error, mismatch)


def _build_layers(factory: str) -> list[NamedLayer]:
    module, _, function = factory.partition(":")
    model = getattr(importlib.import_module(module), function)()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{factory} returned a {type(model).__name__}, not a torch.nn.Module")
    if not any(isinstance(layer, SyncAccumBatchNorm) for layer in model.modules()):
        convert_sync_accum(model)
    return tracking_layers(model)
