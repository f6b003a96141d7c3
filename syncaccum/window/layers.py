"""Which layers of a model take part in its commits, under which names, and in which groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

from syncaccum.errors import CommitError, NoLayersError
from syncaccum.layer.state import Accumulating, has_statistics, match_width
from syncaccum.ranks.groups import Group, resolve_group

NamedLayer = tuple[str, Accumulating]
R = TypeVar("R")

# Wrappers, and the name they hold the real module by.
# Layers are named without them, because ranks may wrap differently,
# and so may the program that loads a checkpoint.
# By class name: the classes need not be imported.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}


def tracking_layers(model: nn.Module) -> list[NamedLayer]:
    """The named layers of a model that take part in its commits, in module order, each window once.

    A layer and its ``copy.copy`` are two modules with one window and the same buffers.
    """
    by_window: dict[int, NamedLayer] = {}
    for name, layer in named_layers(model):
        if has_statistics(layer):
            by_window.setdefault(id(layer._accumulation), (name, layer))
    layers = list(by_window.values())
    if not layers:
        raise NoLayersError(f"no SyncAccumBatchNorm layer of {type(model).__name__} tracks statistics")
    for _, layer in layers:
        match_width(layer)
    return layers


def named_layers(model: nn.Module) -> list[NamedLayer]:
    """All SyncAccumBatchNorm layers of a model with their names, in module order, each once."""
    layers: list[NamedLayer] = []
    wrapped: set[str] = set()
    for name, module in model.named_modules():
        # named_modules comes to a wrapper before what is in it.
        if type(module).__name__ in _WRAPPERS:
            wrapped.add(f"{name}.{_WRAPPERS[type(module).__name__]}".removeprefix("."))
        if isinstance(module, Accumulating):
            layers.append((_unwrap_name(name, wrapped) or type(module).__name__, module))
    if not layers:
        raise NoLayersError(
            f"{type(model).__name__} has no SyncAccumBatchNorm layer: call convert_sync_accum(model) first "
            "(torch's SyncBatchNorm.convert_sync_batchnorm undoes it)"
        )
    return layers


def _unwrap_name(name: str, wrapped: set[str]) -> str:
    """A layer's name without the parts that wrappers put into it."""
    if not wrapped:
        return name
    parts = name.split(".")
    return ".".join(part for i, part in enumerate(parts) if ".".join(parts[: i + 1]) not in wrapped)


def for_each_group(layers: Sequence[NamedLayer], act: Callable[[Group, Sequence[NamedLayer]], R]) -> list[R]:
    """Do something collective with the layers of each group, one group after the other.

    What fails in one group is raised after the last group. Raised at once, it would keep this rank from the next
    group's all-reduce, where peers wait for it.

    Raises:
        CommitError: of the first group that failed. Where others did not, it names the layers of both.
    """
    done: list[R] = []
    failed: list[tuple[Sequence[NamedLayer], CommitError]] = []
    for group, members in _by_group(layers).items():
        try:
            done.append(act(group, members))
        except CommitError as error:
            failed.append((members, error))
    if failed:
        # The cause stays the one of the first error.
        raise _name_parts(layers, failed) from failed[0][1].__cause__
    return done


def _by_group(layers: Sequence[NamedLayer]) -> dict[Group, list[NamedLayer]]:
    """Layers by resolved group, both in module order: so all ranks come to their common groups in the same order."""
    by_group: dict[Group, list[NamedLayer]] = {}
    default = resolve_group(None)  # once, for some hundred layers
    for named in layers:
        group = named[1]._accumulation.handle.group
        by_group.setdefault(default if group is None else resolve_group(group), []).append(named)
    return by_group


def _name_parts(
    layers: Sequence[NamedLayer], failed: Sequence[tuple[Sequence[NamedLayer], CommitError]]
) -> CommitError:
    """The first error. If other groups did not fail, it also names the layers that are done and those that are not."""
    first = failed[0][1]
    unchanged = [name for members, _ in failed for name, _ in members]
    done = [name for name, _ in layers if name not in unchanged]
    if not done:
        return first
    # Callers catch the kinds of CommitError: keep the kind.
    return type(first)(
        f"{first}. The layers have several process groups, and each is all or nothing: unchanged are "
        f"{', '.join(unchanged)}; done are {', '.join(done)}"
    )
