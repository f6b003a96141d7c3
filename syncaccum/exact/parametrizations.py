"""Parametrized weights: computed once for all micro-batches, as one forward of the large batch does.

spectral_norm changes its buffers at each evaluation. ``torch.nn.utils.parametrize.cached()`` does not do: a user's
forward may run the model twice, and it would give both runs one weight; and it would serve other threads. So here the
first evaluations of all micro-batches share one value, the second ones share another.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from syncaccum.errors import LockstepError
from syncaccum.exact.checkpoints import has_checkpoint
from syncaccum.exact.process_state import Action, SharedSetting
from syncaccum.torch_private import all_saved_tensor_hooks


class SharedWeights:
    """The parametrized weights of a model, in one lockstep."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {m: name for name, m in model.named_modules() if isinstance(m, ParametrizationList)}
        self._values: dict[ParametrizationList, list[tuple[bool, Tensor]]] = {m: [] for m in self._names}

    def enter(self) -> None:
        for weights in self._names:
            _setting_of(weights).enter(self)

    def leave(self) -> None:
        for weights in self._names:
            _setting_of(weights).leave(self)

    @contextmanager
    def for_one(self) -> Iterator[None]:
        """This thread runs a micro-batch."""
        _here.reader = _Reader(self)
        try:
            yield
        finally:
            _here.reader = None

    def value(self, weights: ParametrizationList, number: int) -> Tensor:
        """What evaluation ``number`` of each micro-batch gives."""
        if has_checkpoint(all_saved_tensor_hooks()):
            raise LockstepError(
                f"the weight {self._names[weights]} is computed under torch.utils.checkpoint, which would compute it "
                "again for each micro-batch: keep modules with parametrizations outside of checkpoints"
            )
        values = self._values[weights]
        # The first micro-batch to ask computes, the others take.
        if number == len(values):
            values.append((torch.is_grad_enabled(), ParametrizationList.forward(weights)))
        grad, value = values[number]
        if grad != torch.is_grad_enabled():
            raise LockstepError(
                f"micro-batches compute the weight {self._names[weights]} with and without gradients: "
                "let all of them do alike"
            )
        return value

    def __contains__(self, weights: ParametrizationList) -> bool:
        return weights in self._values


class _Reader:
    """How often one micro-batch has asked for each weight."""

    def __init__(self, shared: SharedWeights) -> None:
        self.shared = shared
        self._asked: dict[ParametrizationList, int] = {}

    def read(self, weights: ParametrizationList) -> Tensor:
        number = self._asked.get(weights, 0)
        self._asked[weights] = number + 1
        return self.shared.value(weights, number)


_here = threading.local()


def _forward(weights: ParametrizationList) -> Tensor:
    """In the place of ``ParametrizationList.forward``."""
    reader: _Reader | None = getattr(_here, "reader", None)
    if reader is None or weights not in reader.shared:
        return ParametrizationList.forward(weights)
    return reader.read(weights)


def _setting_of(weights: ParametrizationList) -> SharedSetting:
    with _lock:
        return _settings.setdefault(weights, SharedSetting(functools.partial(_prepare, weakref.ref(weights))))


def _prepare(reference: weakref.ref[ParametrizationList]) -> tuple[Action, Action]:
    weights = reference()
    assert weights is not None  # its user holds it
    attributes = vars(weights)
    ours = functools.partial(_forward, weights)
    return lambda: attributes.update(forward=ours), lambda: attributes.pop("forward", None)


_lock = threading.Lock()
_settings: weakref.WeakKeyDictionary[ParametrizationList, SharedSetting] = weakref.WeakKeyDictionary()
