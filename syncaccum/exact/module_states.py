"""What a forward changes in other modules than ours, so that the first pass of a lookahead can be undone.

Spectral normalisation moves its vectors in each training forward, and some modules count their calls. The first pass
must leave no trace: the second changes them as ordinary accumulation does. Parametrized weights are computed from the
same state by every micro-batch, as in lockstep: the large batch computes them once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import ParametrizationList

from syncaccum.layer.state import Accumulating
from syncaccum.torch_private import buffers_of


class ModuleStates:
    """Buffers and attributes of the other modules in training, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        # Lazy modules become others in their first forward.
        modules = [m for m in model.modules() if m.training and not isinstance(m, (Accumulating, LazyModuleMixin))]
        self._attributes = {module: dict(vars(module)) for module in modules}
        self._plain = [(tensor, tensor.detach().clone()) for tensor in _find_plain_tensors(modules)]
        self._buffers = {module: _copy_buffers(module) for module in modules if buffers_of(module)}
        lists = (m for m in modules if isinstance(m, ParametrizationList))
        self._parametrizations = {part for weights in lists for part in weights.modules()}

    def enter(self) -> None:
        """Nothing: states are noted when this is made."""

    def leave(self) -> None:
        """Undo what has changed since. May be called twice."""
        for module, before in self._attributes.items():
            now = vars(module)
            for name in now.keys() - before.keys():
                del now[name]
            now.update(before)
        for tensor, values in self._plain:
            tensor.detach().copy_(values)
        for module, buffers in self._buffers.items():
            _restore_buffers(module, buffers)

    def restore_parametrizations(self) -> None:
        """Undo it where weights are computed: the next micro-batch computes the same ones."""
        for module in self._parametrizations & self._buffers.keys():
            _restore_buffers(module, self._buffers[module])


def _find_plain_tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Attributes that are neither parameters nor buffers. What was computed with a graph is computed anew."""
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is None:
                yield value


Copies = dict[str, tuple[Tensor | None, Tensor | None]]
"""By name, a buffer and a copy of its values."""


def _copy_buffers(module: nn.Module) -> Copies:
    return {name: (b, None if b is None else b.detach().clone()) for name, b in buffers_of(module).items()}


def _restore_buffers(module: Any, copies: Copies) -> None:
    buffers = buffers_of(module)
    for name, (buffer, values) in copies.items():
        buffers[name] = buffer
        if buffer is not None and values is not None:
            buffer.detach().copy_(values)
