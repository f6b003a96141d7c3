"""Which layers of a model take part in its commits, under which names, and in which groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

from syncaccum.errors import CommitError, NoLayersError
from syncaccum.layer.state import Accumulating, has_statistics, match_width
from syncaccum.ranks.groups import Group, resolve_group
from syncaccum.torch_private import submodules_of

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
    for named in named_layers(model):
        if has_statistics(named[1]):
            by_window.setdefault(id(named[1]._accumulation), named)
    layers = list(by_window.values())
    if not layers:
        raise NoLayersError(f"no SyncAccumBatchNorm layer of {type(model).__name__} tracks statistics")
    for _, layer in layers:
        match_width(layer)
    return layers


def named_layers(model: nn.Module) -> list[NamedLayer]:
    """All SyncAccumBatchNorm layers of a model with their names, in module order, each once."""
    layers: list[NamedLayer] = []
    _visit(model, "", layers, set())
    if not layers:
        raise NoLayersError(
            f"{type(model).__name__} has no SyncAccumBatchNorm layer: call convert_sync_accum(model) first "
            "(torch's SyncBatchNorm.convert_sync_batchnorm undoes it)"
        )
    return layers


def _visit(module: nn.Module, name: str, layers: list[NamedLayer], seen: set[int]) -> None:
    """Add the layers in a module that has a name, in the order of ``named_modules``.

    That gives the names with the wrappers in them, and takes three times as long. A commit feels that.
    """
    seen.add(id(module))
    if isinstance(module, Accumulating):
        layers.append((name or type(module).__name__, module))
    if not (children := submodules_of(module)):
        return
    hidden = _WRAPPERS.get(type(module).__name__)
    for key, child in children.items():
        if child is not None and id(child) not in seen:
            inner = name if key == hidden else f"{name}.{key}" if name else key
            _visit(child, inner, layers, seen)


def for_each_group(layers: Sequence[NamedLayer], act: Callable[[Group, Sequence[NamedLayer]], R]) -> list[R]:
    """Do something collective with the layers of each group, one group after the other.

    What fails in one group is raised after the last group. Raised at once, it would keep this rank from the next
    group's all-reduce, where peers wait for it.

    Raises:
        CommitError: of the first group that failed. Where others did not, it names the layers of both.
    """
    done: list[R] = []
    failed: list[tuple[Sequence[NamedLayer], CommitError]] = []
    for group, members in by_group(layers).items():
        try:
            done.append(act(group, members))
        except CommitError as error:
            failed.append((members, error))
    if failed:
        # The cause stays the one of the first error.
        raise _name_parts(layers, failed) from failed[0][1].__cause__
    return done


def by_group(layers: Sequence[NamedLayer]) -> dict[Group, list[NamedLayer]]:
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
