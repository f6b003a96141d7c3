"""Convert a model's BatchNorm layers in place, and revert them.

A layer keeps its identity and changes its class: parameters, buffers, hooks, flags, shared use and every
reference to it survive because nothing is copied.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any, TypeVar, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from syncaccum.batchnorm import SyncAccumBatchNorm
from syncaccum.transport import Group

M = TypeVar("M", bound=nn.Module)


def convert_sync_accum(module: M, process_group: Group = None, normalization: str = "renorm") -> M:
    """Turn every BatchNorm layer of a model into a SyncAccumBatchNorm, in place.

    BatchNorm1d/2d/3d, nn.SyncBatchNorm (which keeps its process group unless another is given) and their
    subclasses, the root itself included. Parameters and buffers stay the same objects, so an optimizer built
    before still works; shared layers stay shared; hooks, training flag, requires_grad, device, dtype and the check
    of input dimensions survive. A subclass with a forward of its own keeps it, and what it asks of
    ``F.batch_norm`` in there is accumulated and normalised under the policy. Converted layers are left as they
    are. Not collective.

    Args:
        module: a BatchNorm layer or any module that contains some, also inside DDP.
        process_group: see :class:`SyncAccumBatchNorm`.
        normalization: see :class:`SyncAccumBatchNorm`.

    Returns:
        The same module object.

    Raises:
        ValueError: for an unknown policy, a process group this rank is not in, or a lazy layer that has not seen
            data yet. Nothing was converted then.

    Warns:
        Once, naming the layers, where a subclass normalises without ``F.batch_norm``; they are left alone.
    """
    layers = [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, SyncAccumBatchNorm)
    ]
    lazy = [name or "the module itself" for name, layer in layers if _is_uninitialized(layer)]
    if lazy:
        raise ValueError(
            f"cannot convert lazy layers before they know their width: {', '.join(lazy)}. "
            "Run one forward on a sample batch first (model(sample)), then convert"
        )
    SyncAccumBatchNorm(1, process_group=process_group, normalization=normalization)  # refuse before any change
    left_alone = []
    for name, layer in layers:
        if not _is_convertible(type(layer)):
            left_alone.append(f"{name or 'the module itself'} ({type(layer).__name__})")
            continue
        _convert_layer(layer, process_group, normalization)
    if left_alone:
        warnings.warn(
            "these layers normalise in a forward of their own, without F.batch_norm, and stay as they are: "
            + ", ".join(left_alone),
            stacklevel=2,
        )
    return module


def revert_sync_accum(module: M) -> M:
    """Give every converted layer back the class it came from, in place. Not collective.

    Commit or discard first: an open window is dropped, with one warning. A layer built as SyncAccumBatchNorm
    directly came from no other class; it stays, with one warning.

    Returns:
        The same module object; a model that was converted and reverted equals one that never was.
    """
    dropped, left_alone = [], []
    for name, layer in module.named_modules():
        if not isinstance(layer, SyncAccumBatchNorm):
            continue
        if layer._made_from is None:
            left_alone.append(name or "the module itself")
            continue
        if layer.window.count > 0:
            dropped.append(name or "the module itself")
        _revert_layer(layer, layer._made_from[1])
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
    """The seed's call: ``AccumulateBatchNorm(nn.BatchNorm2d, 64)``, policy ``"running"``.

    A layer that checks its input as ``bn_class`` does, normalises with the committed statistics held constant,
    and on ``update_stats()`` takes up all it has seen since the last call, as if that had been one batch.

    Args:
        bn_class: nn.BatchNorm1d, 2d or 3d, nn.SyncBatchNorm, or a subclass.
        num_features, **bn_kwargs: what ``bn_class`` takes.

    Raises:
        ValueError: for a class that is not a BatchNorm, or is lazy, or normalises without ``F.batch_norm``.
    """

    def __new__(cls, bn_class: type[_BatchNorm], num_features: int, **bn_kwargs: Any) -> AccumulateBatchNorm:
        if not (isinstance(bn_class, type) and issubclass(bn_class, _BatchNorm)):
            raise ValueError(f"bn_class must be a BatchNorm class such as nn.BatchNorm2d, got {bn_class!r}")
        layer: Any = bn_class(num_features, **bn_kwargs)
        if _is_uninitialized(layer) or not _is_convertible(bn_class):
            raise ValueError(f"{bn_class.__name__} cannot accumulate: it is lazy, or normalises without F.batch_norm")
        _convert_layer(layer, None, "running", cls)
        return cast(AccumulateBatchNorm, layer)

    def __init__(self, bn_class: type[_BatchNorm], num_features: int, **bn_kwargs: Any) -> None:
        pass  # __new__ did it all


def make_instance(base: type[SyncAccumBatchNorm], source: type[_BatchNorm]) -> SyncAccumBatchNorm:
    """An empty converted layer, for unpickling and copying to fill."""
    return nn.Module.__new__(_make_class(base, source))  # past AccumulateBatchNorm's own __new__


def _is_uninitialized(layer: _BatchNorm) -> bool:
    return any(is_lazy(t) for t in (*layer.parameters(False), *layer.buffers(False)))


def _is_convertible(source: type[_BatchNorm]) -> bool:
    """Whether its forward comes down to F.batch_norm, judged by the names its code uses."""
    if source.forward in _FORWARDS_OF_TORCH:
        return True
    if issubclass(source, nn.SyncBatchNorm) or not hasattr(source.forward, "__code__"):
        return False
    names = {*source.forward.__code__.co_names, *source.forward.__code__.co_freevars}
    return "batch_norm" in names or {"forward", "__class__"} <= names  # the latter is super().forward


def _convert_layer(
    layer: Any, process_group: Group, normalization: str, base: type[SyncAccumBatchNorm] = SyncAccumBatchNorm
) -> None:
    source = type(layer)
    if isinstance(layer, nn.SyncBatchNorm):
        process_group = layer.process_group if process_group is None else process_group
        del layer.process_group
    layer.__class__ = _make_class(base, source)
    layer._adopt(process_group, normalization)


def _revert_layer(layer: Any, source: type[_BatchNorm]) -> None:
    group = layer.process_group
    layer._release()
    layer.__class__ = source
    if issubclass(source, nn.SyncBatchNorm):
        layer.process_group = group


_FORWARDS_OF_TORCH = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_made: dict[tuple[type, type], type[SyncAccumBatchNorm]] = {}


def _make_class(base: type[SyncAccumBatchNorm], source: type[_BatchNorm]) -> type[SyncAccumBatchNorm]:
    """``base``, with what instances of ``source`` bring along; the same class each time."""
    if (base, source) not in _made:
        body: dict[str, Any] = {
            "_made_from": (base, source),
            "_check_input_dim": source._check_input_dim,
            "__module__": base.__module__,
        }
        if source.forward not in _FORWARDS_OF_TORCH:
            body.update(_forward_through(source))
        # DDP and others ask whether a layer is a SyncBatchNorm, and then insist on a GPU.
        bases = (base,) if issubclass(source, nn.SyncBatchNorm) else (base, source)
        name = base.__name__ + source.__name__.removeprefix("BatchNorm")
        _made[base, source] = type(name, bases, body)
    return _made[base, source]


def _forward_through(source: type[_BatchNorm]) -> dict[str, Any]:
    """A subclass's own forward, with our accumulate-and-normalise where it calls F.batch_norm."""

    def forward(self: SyncAccumBatchNorm, *args: Any, **kwargs: Any) -> Any:
        if not self._takes_part():
            return source.forward(self, *args, **kwargs)
        with _RouteBatchNorm(self):
            return source.forward(self, *args, **kwargs)

    def get_tracking(self: SyncAccumBatchNorm) -> bool:
        # Copies of nn.BatchNorm's forward count batches themselves, unless they believe that nothing is tracked.
        return self.__dict__["track_running_stats"] and getattr(_routed, "layer", None) is not self

    def set_tracking(self: SyncAccumBatchNorm, value: bool) -> None:
        self.__dict__["track_running_stats"] = value

    return {"forward": forward, "track_running_stats": property(get_tracking, set_tracking)}


_routed = threading.local()  # by thread: in lockstep, several are inside the same layer


class _RouteBatchNorm(TorchFunctionMode):
    """Inside, F.batch_norm is the layer's accumulate-and-normalise."""

    def __init__(self, layer: SyncAccumBatchNorm) -> None:
        super().__init__()
        self._layer = layer

    def __enter__(self) -> _RouteBatchNorm:
        _routed.layer = self._layer
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        _routed.layer = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        return self._route(*args, **(kwargs or {}))

    def _route(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        self._layer._check_input(input)
        return self._layer._accumulate_and_normalize(input, weight, bias, eps)
