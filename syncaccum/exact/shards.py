"""fully_shard inside lockstep: FSDP sees one forward, with the inputs and outputs of all micro-batches.

At the beginning of a module's forward FSDP gathers its weights, at the end it gives them up, and again so in the
backward, where it reduces gradients. If each micro-batch did that, the first would take the weights from the others.
So both are gates: a micro-batch waits there for all others, and FSDP's hook runs once for all. Then nothing that FSDP
sends depends on how many micro-batches a rank has.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from syncaccum.errors import LockstepError
from syncaccum.torch_private import begin_anew, belongs_to_fully_shard, forward_hooks_of, is_fully_sharded, map_tensors

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a forward is called with."""
Hook = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Gate:
    """The beginning, or the end, of a sharded module's forward."""

    name: str
    module: nn.Module
    hook: Hook
    """FSDP's own."""

    def open(self, waiting: Sequence[Any]) -> Callable[[int], Any]:
        """Run FSDP's hook once for what all micro-batches came with; gives a function from its index to its part."""
        if len({grad for grad, _ in waiting}) > 1:
            raise LockstepError(
                f"micro-batches come to {self.name} with and without gradients: let all of them do alike"
            )
        parts = self._run([value for _, value in waiting])

        def take(index: int) -> Any:
            # Kept no longer than they are needed.
            part, parts[index] = parts[index], None
            return part

        return take

    def _run(self, values: list[Any]) -> list[Any]:
        raise NotImplementedError


class _Beginning(Gate):
    def _run(self, values: list[Any]) -> list[Any]:
        calls: list[Call] = values
        args, kwargs = self.hook(
            self.module, tuple(args for args, _ in calls), {str(index): kw for index, (_, kw) in enumerate(calls)}
        )
        return [(one, kwargs[str(index)]) for index, one in enumerate(args)]


class _End(Gate):
    def _run(self, values: list[Any]) -> list[Any]:
        outputs = tuple(output for _, output in values)
        if torch.is_grad_enabled():
            outputs = _join(outputs)
        return list(self.hook(self.module, tuple(args for args, _ in values), outputs))


def _join(outputs: Any) -> Any:
    """The same tensors, from one node. FSDP gathers weights when a gradient for one of them comes.

    So that is at the same place of the backward on all ranks, and not where the first micro-batch happens to be.
    """
    found: dict[int, Tensor] = {}
    map_tensors(lambda t: found.setdefault(id(t), t) if t.requires_grad else t, outputs)
    if not found:
        return outputs
    joined = dict(zip(found, _Together.apply(*found.values()), strict=True))  # type: ignore[no-untyped-call]
    return map_tensors(lambda t: joined.get(id(t), t), outputs)


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        # No views, which must not be changed in place.
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        return gradients


class Shards:
    """What fully_shard has put around the modules of a model, while a lockstep runs."""

    def __init__(self, model: nn.Module) -> None:
        self._here = threading.local()
        self._roots = [module for module in model.modules() if is_fully_sharded(module)]
        self._places = [place for name, module in model.named_modules() for place in self._find_places(name, module)]
        self._anyone_came = self._is_over = False

    def _find_places(self, name: str, module: nn.Module) -> Iterator[_Place]:
        """Where FSDP's hooks are, and what is to be there meanwhile."""
        which = f"module {name}" if name else "the model"
        before, after = forward_hooks_of(module)
        for key, hook in filter(_is_theirs, before.items()):
            beginning = _Beginning(f"the beginning of {which}, as it is under fully_shard", module, hook)
            yield _Place(before, key, hook, partial(self._begin, beginning))
        for key, hook in filter(_is_theirs, after.items()):
            end = _End(f"the end of {which}, as it is under fully_shard", module, hook)
            yield _Place(after, key, hook, partial(self._end, end))

    def enter(self) -> None:
        """Put gates in the place of FSDP's hooks."""
        with _lock:
            if any(place.hooks[place.key] is not place.theirs for place in self._places):
                raise LockstepError(
                    "two locksteps in two threads go through one module under fully_shard, which gathers its weights "
                    "for one forward at a time: begin the second when the first is over"
                )
            for place in self._places:
                place.hooks[place.key] = place.ours

    def leave(self) -> None:
        """Put the hooks back. After an error FSDP begins anew."""
        for place in self._places:
            if place.hooks.get(place.key) is place.ours:
                place.hooks[place.key] = place.theirs
        if self._anyone_came and not self._is_over:
            self._is_over = True
            for module in self._roots[:1]:
                begin_anew(module)

    def end(self) -> None:
        """All micro-batches came through."""
        self._is_over = True

    @contextmanager
    def for_one(self, wait: Callable[[Gate, Any], Any]) -> Iterator[None]:
        """This thread runs a micro-batch. ``wait`` takes it to a gate, and gives what is for it behind."""
        self._here.wait = wait
        try:
            yield
        finally:
            self._here.wait = None

    def _begin(self, gate: Gate, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """In the place of FSDP's hook before a forward."""
        wait = getattr(self._here, "wait", None)
        # Another thread, which is not of this lockstep.
        if wait is None:
            return gate.hook(module, args, kwargs)
        self._anyone_came = True
        return wait(gate, (args, kwargs))

    def _end(self, gate: Gate, module: nn.Module, args: Any, output: Any) -> Any:
        """In the place of FSDP's hook behind a forward. Some come there after an error, too."""
        wait = getattr(self._here, "wait", None)
        if wait is None or (output is None and sys.exc_info()[1] is not None):
            return gate.hook(module, args, output)
        return wait(gate, (args, output))


def _is_theirs(item: tuple[int, Hook]) -> bool:
    return belongs_to_fully_shard(item[1])


@dataclass(frozen=True)
class _Place:
    """A hook of a module."""

    hooks: MutableMapping[int, Hook]
    key: int
    theirs: Hook
    ours: Hook


_lock = threading.Lock()
