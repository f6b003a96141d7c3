"""Modules besides our layers that a training forward changes: K micro-batches change them K times.

The large batch changes them once. Nothing can be done about it here but to say so.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from syncaccum.layer.state import Accumulating
from syncaccum.torch_private import BatchNormBase, buffers_of, version_of

_OURS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers of our layers that only commits change."""
_AT_MOST = 5
"""Names in a message."""

Written = dict[str, tuple[Tensor | None, int]]


class Bystanders:
    """The other modules of a model, watched while micro-batch 1 runs.

    Micro-batch 0 changes buffers rightly: as the large batch does, and where DDP broadcasts them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._watched = {name: m for name, m in _others(model) if any(True for _ in _foreign_buffers(m))}
        self._changed: dict[str, nn.Module] = {
            name: module for name, module in model.named_modules() if _normalises_alone(module)
        }
        self._before: dict[str, Written] = {}

    def begin_turn(self, index: int) -> None:
        """A micro-batch goes on, and the one before it has stopped."""
        self.end_turn()
        if index == 1:
            self._before = {name: _written(module) for name, module in self._watched.items()}

    def end_turn(self) -> None:
        for name, before in self._before.items():
            if _differ(before, _written(self._watched[name])):
                self._changed[name] = self._watched[name]
        self._before = {}

    def tell(self, count: int) -> None:
        """Warn of those that changed, each once."""
        new = {name: module for name, module in self._changed.items() if module not in _told}
        if not new or count == 1:
            return
        _told.update(new.values())
        named = [f"{name or 'the model itself'} ({type(module).__name__})" for name, module in new.items()]
        more = f" and {len(named) - _AT_MOST} more" if len(named) > _AT_MOST else ""
        warnings.warn(
            f"lockstep is exact for SyncAccumBatchNorm layers, but {', '.join(named[:_AT_MOST])}{more} normalise by "
            f"micro-batch, or have buffers that their forward changes: {count} micro-batches change them {count} "
            "times, one large batch once. Convert BatchNorm layers with convert_sync_accum, use "
            "torch.nn.utils.parametrizations.spectral_norm in place of torch.nn.utils.spectral_norm, and put other "
            "modules into eval mode",
            stacklevel=3,
        )


# Each module once in a process, however many locksteps run.
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _others(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but parametrizations, which run once for all."""
    shared = {m for weights in model.modules() if isinstance(weights, ParametrizationList) for m in weights.modules()}
    return ((name, module) for name, module in model.named_modules() if module not in shared)


def _normalises_alone(module: nn.Module) -> bool:
    """Whether it is a BatchNorm with the statistics of each micro-batch, and no buffer to tell."""
    return isinstance(module, BatchNormBase) and not isinstance(module, Accumulating) and module.running_mean is None


def _foreign_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    ours = _OURS if isinstance(module, Accumulating) else ()
    return ((name, buffer) for name, buffer in buffers_of(module).items() if name not in ours)


def _written(module: nn.Module) -> Written:
    return {n: (b, 0 if b is None else version_of(b)) for n, b in _foreign_buffers(module)}


def _differ(before: Written, now: Written) -> bool:
    return before.keys() != now.keys() or any(
        before[name][0] is not buffer or before[name][1] != version for name, (buffer, version) in now.items()
    )
