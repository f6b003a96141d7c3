"""Checks that the forward ran the model's layers, and ran them side by side only: else it is silently not exact."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from syncaccum.errors import LockstepError
from syncaccum.layer import surroundings
from syncaccum.layer.batchnorm import SyncAccumBatchNorm
from syncaccum.layer.state import Accumulating
from syncaccum.window.layers import named_layers

T = TypeVar("T")


class Attendance:
    """The layers of a model during one ``call``: lockstep, or lookahead's first pass."""

    def __init__(self, model: nn.Module, call: str) -> None:
        self._call = call
        self._layers = named_layers(model)
        self._alone_before = self._count_alone()
        self._came = False
        self._hooks: list[RemovableHandle] = []

    def enter(self) -> None:
        """Begin to note which layers are called. A subclass may have frozen itself: it rightly meets nobody."""
        for _, layer in self._layers:
            if type(layer).forward is not SyncAccumBatchNorm.forward:
                self._hooks.append(layer.register_forward_pre_hook(self._note))

    def leave(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, layer: nn.Module, args: Any) -> None:
        self._came |= surroundings.lockstep_here() is not None

    def check(self, *, met: bool) -> None:
        """Raise where the forward was not with us, once it is over."""
        # Those that normalise with the batch must have met the others.
        waiting = [name for name, layer in self._layers if layer.training or layer.running_mean is None]
        if waiting and not met and not self._came:
            more = f" and {len(waiting) - 1} more" if len(waiting) > 1 else ""
            raise LockstepError(
                f"no micro-batch came to a layer, although {waiting[0]}{more} normalise with the batch: forward calls "
                "another model, or runs this one in another thread. Let it call the model that was passed to "
                f"{self._call}; a forward without BatchNorm needs no {self._call}"
            )
        # A window counts lockstep's micro-batches apart from others.
        for (name, _), before, now in zip(self._layers, self._alone_before, self._count_alone(), strict=True):
            if now != before:
                raise LockstepError(
                    f"layer {name} ran in another thread meanwhile, outside of {self._call}, and normalised alone: let "
                    "forward itself call the model, and discard(model)"
                )

    def _count_alone(self) -> list[int]:
        return [_count_forwards_alone(layer) for _, layer in self._layers]


def _count_forwards_alone(layer: Accumulating) -> int:
    return layer._accumulation.micro_batches - layer._accumulation.locksteps


def refuse_unfinished(result: T) -> T:
    """What forward returned, if there is nothing left to run in it."""
    if isinstance(result, (Iterator, AsyncIterator, Awaitable)):
        raise LockstepError(
            f"forward returned a {type(result).__name__}, which runs the model later, one micro-batch after the other: "
            "let forward return what comes out in the end, as a list"
        )
    return result
