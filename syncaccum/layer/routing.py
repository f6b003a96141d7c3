"""Runs a subclass's own forward, with our training forward in the place of its call of batch_norm.

The arguments of a call decide. A training call with the layer's own statistics is ours. Every other call does what
torch does: that of a frozen layer, one with a second pair of statistics, one of another layer inside.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from syncaccum.errors import LockstepError
from syncaccum.layer import surroundings
from syncaccum.layer.batchnorm import is_together, normalize_and_accumulate
from syncaccum.layer.given import has_given_statistics
from syncaccum.layer.notices import note_uncounted_forward
from syncaccum.layer.state import Accumulating, tracks
from syncaccum.torch_private import BatchNormBase, buffers_of


class _Call(NamedTuple):
    """A call of F.batch_norm, by its names and defaults."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


def _of_torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> _Call:
    """A call of torch.batch_norm, whose arguments come in another order."""
    return _Call(input, running_mean, running_var, weight, bias, training, momentum, eps)


# A subclass may call either. Outermost counts: F's calls torch's.
_ENTRANCES: dict[Any, Callable[..., _Call]] = {F.batch_norm: _Call, torch.batch_norm: _of_torch_batch_norm}


def forward_through(layer: Any, source: type, args: Any, kwargs: Any) -> Any:
    """``source.forward(layer, ...)``, whose own training calls of batch_norm are the layer's accumulating forward."""
    # A mode reaches this thread only. Replacing F.batch_norm itself
    # would reach other threads, and other layers.
    with _Route(layer) as route:
        output = source.forward(_seen_as(layer, source), *args, **kwargs)  # type: ignore[attr-defined]
    if not torch.compiler.is_compiling():
        note_uncounted_forward(layer)
        if layer.training and not route.met_own_statistics:
            _tell_if_it_normalises_itself(layer, source)
    return output


def call_through(layer: Any, args: Any, kwargs: Any) -> Any:
    """A call of a layer on whose instance a tool has put a forward: its training calls of batch_norm are ours, too.

    Tools put the bound forward of the layer's first class there, as accelerate's hooks do, and take it out again.
    """
    with _Route(layer) if "forward" in vars(layer) else nullcontext():
        return nn.Module.__call__(layer, *args, **kwargs)


class _Route(TorchFunctionMode):
    """Inside, the layer's own training calls of batch_norm go to us."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._layer = layer
        self._batches = _Counter(layer)
        self._taken = False
        self.met_own_statistics = False
        """Whether any call had statistics of the layer's: then it does not normalise by itself."""

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        # Some forwards count before the call, others after it.
        # If nothing was ours, their count is right.
        if self._taken:
            self._batches.restore()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # The mode is off in here: our calls do not return.
        if func not in _ENTRANCES:
            return func(*args, **kwargs)
        call = _ENTRANCES[func](*args, **kwargs)
        if not self._is_own(call):
            return func(*args, **kwargs)
        # Now, and not later: in a lockstep others now take their turn
        # at this layer, and must find the count as it was.
        self._batches.restore()
        self._taken = True
        # Momentum 0 is how a forward says: do not average this.
        counts = call.running_mean is not None and call.momentum != 0
        if counts:
            # None is a cumulative average, whose factor the call has.
            own = self._layer.momentum
            self._layer._accumulation.call_momentum = call.momentum if own not in (None, call.momentum) else None
        output = normalize_and_accumulate(self._layer, call.input, call.weight, call.bias, call.eps, counts=counts)
        # That was no window's: it counted at once.
        if not torch.compiler.is_compiling() and has_given_statistics(self._layer):
            self._batches = _Counter(self._layer)
        return output

    def _is_own(self, call: _Call) -> bool:
        buffers = buffers_of(self._layer)
        of_layer = call.running_mean is buffers["running_mean"] and call.running_var is buffers["running_var"]
        of_batch = call.running_mean is None and call.running_var is None
        # Any statistics of its own count here, also in eval calls.
        self.met_own_statistics |= of_batch or any(call.running_mean is own for own in buffers.values())
        if not call.training:
            return False
        # A layer without running statistics has None, as the call has.
        if of_layer and not of_batch:
            return True
        # Statistics of the batch: lockstep makes them the global batch's.
        return of_batch and is_together(self._layer)


class _Counter:
    """Keeps num_batches_tracked as it was before a forward.

    Many subclasses have a copy of nn.BatchNorm's forward, which adds 1 in each training forward. The commit adds 1 for
    the whole window. So what the forward has added must go.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._buffer = buffers_of(layer)["num_batches_tracked"]
        self._value = None if self._buffer is None else self._buffer.clone()

    def restore(self) -> None:
        if self._buffer is not None and self._value is not None:
            # Some forwards do not add in place, but assign a new tensor.
            buffers_of(self._layer)["num_batches_tracked"] = self._buffer
            self._buffer.copy_(self._value)


def _tell_if_it_normalises_itself(layer: Any, source: type) -> None:
    if not tracks(layer):
        return
    state = layer._accumulation
    where = f"layer {state.name or 'of its own'} ({source.__name__})"
    # Lockstep promises exactness. Elsewhere the layer trains as before.
    if surroundings.lockstep_here() is not None:
        raise LockstepError(f"{where} normalises by itself, without batch_norm, so lockstep would not be exact")
    # Said once for each layer. Commit reports leave it out, too.
    if state.normalises_itself:
        return
    state.normalises_itself = True
    warnings.warn(
        f"{where} normalises by itself in training, without F.batch_norm or torch.batch_norm: nothing of it is "
        "accumulated, and a commit leaves it alone. Use nn.BatchNorm there, or call F.batch_norm with its own "
        "running_mean and running_var",
        stacklevel=2,
    )


class _WithoutSync(nn.SyncBatchNorm):
    """Last in line for a subclass's ``super().forward``: calls F.batch_norm, and does not communicate."""

    forward = BatchNormBase.forward


def _seen_as(layer: Accumulating, source: type) -> Any:
    """The layer as its own forward must see it.

    DDP insists on a GPU for every nn.SyncBatchNorm, so a converted layer is none. But a subclass's forward may call
    ``super().forward`` or ask for its class. So it gets another object, of that class, with the same attributes.
    """
    if not issubclass(source, nn.SyncBatchNorm):
        return layer
    view_class = _views.get(source) or _views.setdefault(source, type(source.__name__, (source, _WithoutSync), {}))
    # No constructor, and one dict for both: a change shows in both.
    view: Any = object.__new__(view_class)
    object.__setattr__(view, "__dict__", layer.__dict__)
    return view


# Never emptied: few programs have two such classes.
_views: dict[type, type] = {}
