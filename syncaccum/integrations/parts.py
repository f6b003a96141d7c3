"""Several optimizers of one model: which layers are committed after whose steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from syncaccum.layer.state import Accumulating, has_statistics
from syncaccum.window.step_hook import CommitHandle, commit_on_step


def commit_parts_on_steps(model: nn.Module, optimizers: Sequence[Optimizer], **settings: Any) -> list[CommitHandle]:
    """``commit_on_step`` for each part of a model with the optimizer that has its weights.

    Where several optimizers have them, or none, a commit follows when each has stepped.

    Args:
        model: with SyncAccumBatchNorm layers.
        optimizers: all of the model's.
        settings: of ``commit_on_step``.

    Raises:
        NoLayersError: the model has no SyncAccumBatchNorm that tracks statistics.
    """
    if len(optimizers) == 1:
        return [commit_on_step(model, optimizers[0], **settings)]
    owners = {
        id(p): index for index, one in enumerate(optimizers) for group in one.param_groups for p in group["params"]
    }
    parts: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, layer in model.named_modules():
        if isinstance(layer, Accumulating) and has_statistics(layer):
            parts[_find_owners(model, name, owners)].append(name)
    if not parts:
        return [commit_on_step(model, optimizers, **settings)]
    return [
        commit_on_step(_take_part(model, names), [optimizers[i] for i in who or range(len(optimizers))], **settings)
        for who, names in parts.items()
    ]


def _find_owners(model: nn.Module, name: str, owners: Mapping[int, int]) -> tuple[int, ...]:
    """The optimizers of a layer, or else of the smallest module around it that has any."""
    while True:
        found = {owners[id(p)] for p in model.get_submodule(name).parameters() if id(p) in owners}
        if found or not name:
            return tuple(sorted(found))
        name = name.rpartition(".")[0]


def _take_part(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A module with these layers of a model alone, under their names."""
    part = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        here = part
        for parent in parents:
            if parent not in dict(here.named_children()):
                here.add_module(parent, nn.Module())
            here = here.get_submodule(parent)
        here.add_module(last, model.get_submodule(name))
    return part
