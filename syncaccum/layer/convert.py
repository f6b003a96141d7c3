"""Convert a model's BatchNorm layers in place, and revert them.

A layer keeps its identity and changes its class. Parameters, buffers, hooks, flags, shared use and every reference
to it survive, because nothing is copied.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from syncaccum.layer.batchnorm import SyncAccumBatchNorm
from syncaccum.layer.routing import call_through, forward_through
from syncaccum.layer.settings import DEFAULT_POLICY, check_momentum, check_settings
from syncaccum.layer.state import TRACED_AS, adopt, release
from syncaccum.ranks.groups import Group, GroupHandle
from syncaccum.torch_private import BatchNormBase, buffers_of, parameters_of, submodules_of

M = TypeVar("M", bound=nn.Module)


def convert_sync_accum(module: M, process_group: Group = None, normalization: str = DEFAULT_POLICY) -> M:
    """Turn every BatchNorm layer of a model into a SyncAccumBatchNorm, in place.

    BatchNorm1d/2d/3d, nn.SyncBatchNorm (which keeps its process group unless another is given) and their
    subclasses, the root itself included. Parameters and buffers stay the same objects, so an optimizer built
    before still works. Shared layers stay shared. Hooks, training flag, requires_grad, device, dtype and the check
    of input dimensions survive. Converted layers are left as they are. Not collective: convert alike on every rank.

    A subclass with a forward of its own keeps it. Where that calls ``F.batch_norm`` or ``torch.batch_norm`` in
    training with the layer's own running statistics, the layer accumulates and normalises under the policy. All
    other calls do what torch does. A subclass that normalises by itself is named in one warning by its first training
    forward; a commit leaves it alone. A forward that a tool has put on the instance, as accelerate's hooks do, is taken
    likewise.

    Args:
        module: a BatchNorm layer or any module that contains some, also inside DDP.
        process_group: see :class:`SyncAccumBatchNorm`.
        normalization: see :class:`SyncAccumBatchNorm`.

    Returns:
        The same module object.

    Raises:
        ValueError: for an unknown policy, a process group this rank is not in, a lazy layer that has not seen
            data yet, or a layer with momentum outside [0, 1]. Nothing was converted then.
    """
    # All that can be wrong is found before any layer changes.
    # The handle is thrown away: making it checks the group.
    check_settings(normalization)
    GroupHandle(process_group)
    layers = [
        (name or "the module itself", layer)
        for name, layer in module.named_modules()
        if isinstance(layer, BatchNormBase) and not isinstance(layer, SyncAccumBatchNorm)
    ]
    # Momentum and laziness of all of them, too.
    _check_convertible(layers)
    # Shared by all: one layer warns for the whole model.
    said: set[str] = set()
    for name, layer in layers:
        _convert_layer(layer, SyncAccumBatchNorm, process_group, normalization, name, said)
    return module


def revert_sync_accum(module: M) -> M:
    """Give every converted layer back the class it came from, in place. Not collective.

    Commit or discard first: an open window is dropped, with one warning. A layer built as SyncAccumBatchNorm
    directly came from no other class; it stays, with one warning.

    Returns:
        The same module object; a model that was converted and reverted equals one that never was.

    Raises:
        TypeError: a tool changed a layer's class after the conversion, and must be undone first. Nothing was reverted.
    """
    layers = [
        (name or "the module itself", m) for name, m in module.named_modules() if isinstance(m, SyncAccumBatchNorm)
    ]
    # Looked up for all layers before the first one changes.
    made = [(name, layer, _find_made(name, layer)) for name, layer in layers if layer._made_from is not None]
    left_alone = [name for name, layer in layers if layer._made_from is None]
    # Asked now: the window will be gone. [0] is its count.
    dropped = [name for name, layer, _ in made if layer._accumulation.window[0] > 0]
    for _, layer, its_class in made:
        _revert_layer(layer, its_class)
    if dropped:
        warnings.warn(
            f"dropped the open windows of {', '.join(dropped)}: commit(model) or discard(model) before reverting",
            stacklevel=2,
        )
    if left_alone:
        warnings.warn(
            f"built as SyncAccumBatchNorm, with no class to go back to: {', '.join(left_alone)}", stacklevel=2
        )
    return module


class AccumulateBatchNorm(SyncAccumBatchNorm):
    """A layer with the policy ``"running"``, made from a BatchNorm class and its arguments.

    It checks its input as ``bn_class`` does, and normalises with the committed statistics, held constant. No forward
    communicates. ``update_stats()`` is collective: it folds all that the ranks have seen since the last call into
    the running statistics, as if that had been one batch. Formulas, shapes and dtypes: :class:`SyncAccumBatchNorm`.

    Args:
        bn_class: nn.BatchNorm1d, 2d or 3d, nn.SyncBatchNorm, or a subclass.
        num_features, **bn_kwargs: what ``bn_class`` takes.

    Raises:
        ValueError: for a class that is not a BatchNorm, or is lazy, or a momentum outside [0, 1].

    Example::

        >>> layer = AccumulateBatchNorm(nn.BatchNorm2d, 64)
        >>> layer.normalization
        'running'
    """

    def __init__(self, bn_class: type[nn.Module], num_features: int, **bn_kwargs: Any) -> None:
        if not (isinstance(bn_class, type) and issubclass(bn_class, BatchNormBase)):
            raise ValueError(f"bn_class must be a BatchNorm class such as nn.BatchNorm2d, got {bn_class!r}")
        layer: Any = bn_class(num_features, **bn_kwargs)
        _check_convertible([(bn_class.__name__, layer)])
        _convert_layer(layer, AccumulateBatchNorm, None, "running", "", set())
        # This object becomes the converted layer: its class, its attributes.
        # So the constructor's result is like convert_sync_accum's.
        self.__class__ = type(layer)
        self.__dict__ = layer.__dict__


def _check_convertible(layers: list[tuple[str, Any]]) -> None:
    # A lazy layer changes its class at its first forward.
    # That would undo the conversion.
    lazy = [name for name, layer in layers if _is_uninitialized(layer)]
    if lazy:
        raise ValueError(
            f"cannot convert lazy layers before they know their width: {', '.join(lazy)}. "
            "Run one forward on a sample batch first (model(sample)), then convert"
        )
    for name, layer in layers:
        try:
            check_momentum(layer.momentum)
        except ValueError as error:
            raise ValueError(f"layer {name} cannot be converted: {error}") from None


def _is_uninitialized(layer: nn.Module) -> bool:
    return any(is_lazy(t) for t in (*layer.parameters(False), *layer.buffers(False)))


def _convert_layer(
    layer: Any,
    base: type[SyncAccumBatchNorm],
    process_group: Group,
    normalization: str,
    name: str,
    said: set[str],
) -> None:
    outer = type(layer)
    # parametrize puts a class of its own over the layer's.
    # Ours goes below: that one can still be taken off.
    source = outer.__bases__[0] if parametrize.is_parametrized(layer) else outer
    if issubclass(source, nn.SyncBatchNorm):
        process_group = layer.process_group if process_group is None else process_group
        # Our handle holds it from here on.
        # As an attribute it would keep the layer from being copied.
        del layer.process_group
    made = _make_class(base, source, _own_names(layer))
    layer.__class__ = made if source is outer else _rebase(outer, source, made)
    adopt(layer, process_group, normalization, name=name, said=said)


def _revert_layer(layer: Any, made: type[SyncAccumBatchNorm]) -> None:
    assert made._made_from is not None
    _, source, _ = made._made_from
    # Before release, which takes the handle away.
    group = layer._accumulation.handle.group
    release(layer)
    layer.__class__ = source if type(layer) is made else _rebase(type(layer), made, source)
    if issubclass(source, nn.SyncBatchNorm):
        # nn.SyncBatchNorm's forward asks for it.
        layer.process_group = group


def _find_made(name: str, layer: Any) -> type[SyncAccumBatchNorm]:
    """The class that conversion gave the layer, which may be below one that another tool made since."""
    outer = type(layer)
    # A tool's class has the one below as a base.
    for its_class in (outer, *outer.__bases__):
        if its_class in _made.values():
            return cast("type[SyncAccumBatchNorm]", its_class)
    raise TypeError(
        f"layer {name} cannot be reverted: its class {outer.__name__} was made from {outer.__bases__[0].__name__} by "
        "another tool after the conversion. Undo in the opposite order: first that tool, then revert_sync_accum(model)"
    )


def _rebase(outer: type, old: type, new: type) -> type:
    """A class as ``outer``, which torch's parametrize or FSDP made from ``old``, made from ``new`` instead."""
    bases = tuple(new if base is old else base for base in outer.__bases__)
    # Python makes these two slots anew for each class.
    body = {name: value for name, value in vars(outer).items() if name not in ("__dict__", "__weakref__")}
    return type(outer.__name__, bases, body)


# Our forward takes the place of these. All others are routed.
_FORWARDS_OF_TORCH = (BatchNormBase.forward, nn.SyncBatchNorm.forward)
# What we add. A subclass may use such a name itself.
_PUBLIC = (
    "process_group", "normalization", "r_max", "d_max", "prior_count", "window", "_window", "update_stats", "discard",
)  # fmt: skip
# Made once for each kind of layer, not for each layer.
# Weak: a class goes when its last layer has gone.
_made: weakref.WeakValueDictionary[tuple[Any, ...], type[SyncAccumBatchNorm]] = weakref.WeakValueDictionary()


def _own_names(layer: Any) -> frozenset[str]:
    """Names of ours that the instance uses for something of its own."""
    own: set[str] = set(vars(layer)).union(buffers_of(layer), parameters_of(layer), submodules_of(layer))
    # "forward" for one that a tool has put on the instance.
    names = own.intersection((*_PUBLIC, "forward"))
    # A SyncBatchNorm's group is not its own: ours replaces it.
    return frozenset(names) - ({"process_group"} if isinstance(layer, nn.SyncBatchNorm) else set())


def _make_class(base: type[SyncAccumBatchNorm], source: type, own_names: frozenset[str]) -> type[SyncAccumBatchNorm]:
    """``base``, with what instances of ``source`` bring along; the same class each time."""
    key = base, source, own_names
    made = _made.get(key)
    if made is None:
        body: dict[str, Any] = {
            "_made_from": key,
            "__reduce_ex__": _reduce,
            # BatchNorm2d still refuses 3D input.
            "_check_input_dim": source._check_input_dim,  # type: ignore[attr-defined]
            "__module__": TRACED_AS,
        }
        # What the subclass or its instance has wins over ours.
        body.update({name: _OwnAttribute(name) for name in own_names - {"forward"}})
        body.update({name: inspect.getattr_static(source, name) for name in _PUBLIC if hasattr(source, name)})
        if source.forward not in _FORWARDS_OF_TORCH:  # type: ignore[attr-defined]
            body["forward"] = _make_forward(source)
        if "forward" in own_names:
            body["__call__"] = _call
        # DDP asks for SyncBatchNorm, and then insists on a GPU.
        bases = (base,) if issubclass(source, nn.SyncBatchNorm) else (base, source)
        # BatchNorm2d becomes SyncAccumBatchNorm2d.
        name = base.__name__ + source.__name__.removeprefix("BatchNorm")
        made = _made[key] = type(name, bases, body)
    return made


class _OwnAttribute:
    """Hides one of our public names, where the instance has something of its own under that name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, layer: Any, owner: type) -> Any:
        # Plain attributes come before this, as always in Python.
        # Here come parameters, buffers and submodules alone.
        return self if layer is None else nn.Module.__getattr__(layer, self._name)


def _make_forward(source: type) -> Any:
    def forward(self: SyncAccumBatchNorm, *args: Any, **kwargs: Any) -> Any:
        return forward_through(self, source, args, kwargs)

    return forward


def _call(self: SyncAccumBatchNorm, *args: Any, **kwargs: Any) -> Any:
    return call_through(self, args, kwargs)


def _reduce(self: SyncAccumBatchNorm, protocol: Any) -> Any:
    """How a layer is pickled and copied: by what its class was made from, because made classes cannot be imported."""
    if "_made_from" not in vars(type(self)):  # a tool's class on top has its own way
        return super(SyncAccumBatchNorm, self).__reduce_ex__(protocol)
    # Before Python 3.11 only a class that leaves something out has it.
    own_state = getattr(self, "__getstate__", None)
    return make_instance, self._made_from, self.__dict__ if own_state is None else own_state()


def make_instance(base: type[SyncAccumBatchNorm], source: type, own_names: frozenset[str]) -> Any:
    """A converted layer without attributes; pickle and copy fill them in. So its constructor must not run."""
    made = _make_class(base, source, own_names)
    return made.__new__(made)
