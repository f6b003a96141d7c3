"""fully_shard inside lockstep: FSDP sees one forward, with the inputs and outputs of all micro-batches.

At the beginning of a module's forward FSDP gathers its weights, at the end it gives them up, and again so in the
backward, where it reduces gradients. If each micro-batch did that, the first would take the weights from the others.
So both are gates: a micro-batch waits there for all others, and FSDP's hook runs once for all. Then nothing that FSDP
sends depends on how many micro-batches a rank has.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from syncaccum.errors import LockstepError
from syncaccum.torch_private import (
    forward_hooks_of,
    is_fully_sharded,
    map_tensors,
    method_of_fully_shard,
    sharded_forwards,
)

Hook = Callable[..., Any]


class Gate:
    """The beginning, or the end, of a sharded module's forward.

    Args:
        name: where it is, for messages.
        hook: FSDP's own.
    """

    def __init__(self, name: str, hook: Hook) -> None:
        self.name = name
        self.hook = hook

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
        modules, args, kwargs = zip(*values, strict=True)
        args, named = self.hook(modules[0], args, {str(index): one for index, one in enumerate(kwargs)})
        return [(one, named[str(index)]) for index, one in enumerate(args)]


class _End(Gate):
    def _run(self, values: list[Any]) -> list[Any]:
        modules, args, outputs = zip(*values, strict=True)
        return list(self.hook(modules[0], args, _join(outputs) if torch.is_grad_enabled() else outputs))


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
    """What fully_shard has put around the modules of a model, while a ``call`` such as lockstep runs."""

    def __init__(self, model: nn.Module, call: str) -> None:
        self._call = call
        self._here = threading.local()
        self._modules = {module: name for name, module in model.named_modules() if is_fully_sharded(module)}
        # The call may come from inside of their forwards.
        self._around = sharded_forwards()
        self._places: list[_Place] = []
        self._has_begun = self._is_over = False

    def enter(self) -> None:
        """Put gates in the place of FSDP's hooks."""
        with _lock:
            for module, name in self._modules.items():
                if _users.setdefault(module, self) is not self:
                    raise LockstepError(
                        f"two locksteps in two threads go through {_describe(name)}, which is under fully_shard and "
                        "gathers its weights for one forward at a time: begin the second when the first is over"
                    )
        for module, name in self._modules.items():
            before, after = forward_hooks_of(module)
            self._place_gates(before, _Beginning, f"the beginning of {_describe(name)}", self._begin)
            self._place_gates(after, _End, f"the end of {_describe(name)}", self._end)

    def _place_gates(self, hooks: dict[int, Hook], gate: type[Gate], where: str, replacement: Hook) -> None:
        where += ", which is under fully_shard"
        for key, hook in hooks.items():
            if (method := method_of_fully_shard(hook)) is not None:
                self._replace(hooks, key, partial(replacement, gate(where, hook)))
                # Methods that register_fsdp_forward_method knows look there.
                self._replace(vars(method.__self__), method.__name__, partial(replacement, gate(where, method)))

    def _replace(self, names: dict[Any, Any], key: Any, ours: Hook) -> None:
        self._places.append(_Place(names, key, names.get(key), ours))
        names[key] = ours

    def leave(self) -> None:
        """Put the hooks back. After an error FSDP begins anew."""
        for place in reversed(self._places):
            place.give_back()
        with _lock:
            for module in self._modules:
                if _users.get(module) is self:
                    del _users[module]
        if self._has_begun and not self._is_over:
            self._is_over = True
            start_over(self._modules)

    def refuse_others(self, layer: str) -> None:
        """Raise where a layer runs inside of a sharded module that the model has not: it would have no gates."""
        for module in sharded_forwards():
            if not any(module is known for known in (*self._modules, *self._around)):
                raise LockstepError(
                    f"layer {layer} runs inside of {type(module).__name__}, which is under fully_shard and not part of "
                    f"the model: pass that as {self._call}'s model"
                )

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
        behind = wait(gate, (module, args, kwargs))
        self._has_begun = True
        return behind

    def _end(self, gate: Gate, module: nn.Module, args: Any, output: Any) -> Any:
        """In the place of FSDP's hook behind a forward. Some come there after an error, too."""
        wait = getattr(self._here, "wait", None)
        if wait is None or (output is None and sys.exc_info()[1] is not None):
            return gate.hook(module, args, output)
        return wait(gate, (module, args, output))


@dataclass(frozen=True)
class _Place:
    """Where FSDP had a function, or looks for one, and what is there instead."""

    names: dict[Any, Any]
    key: Any
    theirs: Hook | None
    ours: Hook

    def give_back(self) -> None:
        """May be called twice."""
        if self.names.get(self.key) is not self.ours:
            return
        if self.theirs is None:
            del self.names[self.key]
        else:
            self.names[self.key] = self.theirs


def _describe(name: str) -> str:
    return f"module {name}" if name else "the model"


_lock = threading.Lock()
_users: weakref.WeakKeyDictionary[nn.Module, Shards] = weakref.WeakKeyDictionary()
"""Which lockstep a module serves."""


def start_over(modules: Iterable[nn.Module]) -> None:
    """After a forward that failed, let FSDP be as before it, where torch can: weights are given up."""
    sharded = [module for module in modules if is_fully_sharded(module)]
    inner = {m for module in sharded for m in module.modules() if m is not module}
    for module in sharded:
        reset = getattr(module, "reset_iter_state", None)
        if module not in inner and reset is not None:
            # Refused where it is not the outermost: that one fails, too.
            with suppress(RuntimeError):
                reset()


def refuse_around() -> None:
    """Raise in the forward of a sharded module."""
    if sharded_forwards():
        raise LockstepError(
            "lookahead inside the forward of a module under fully_shard, which gathers weights for one forward and one "
            "backward behind it: call lookahead outside, with that module as its model"
        )
