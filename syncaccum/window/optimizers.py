"""Which of torch's optimizers takes the steps, whatever wraps it; and hooks that its step cannot miss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

_INSTEAD = "call syncaccum.commit(model) after each of its steps instead"


def find_optimizers(given: Any) -> list[Optimizer]:
    """The optimizers that take the steps, each once: those of a collection, innermost where they are wrapped.

    Raises:
        ValueError: the collection is empty.
        TypeError: something is no optimizer, and holds none whose steps torch's hooks see.
    """
    if not isinstance(given, Mapping | list | tuple | set):
        return list(dict.fromkeys(_unwrap_one(given)))
    if not given:
        raise ValueError("no optimizer was given: there is no step to commit after")
    # dict.fromkeys: each once, in order.
    return list(dict.fromkeys(found for part in _parts(given) for found in find_optimizers(part)))


def _unwrap_one(given: Any) -> list[Optimizer]:
    found = _unwrap(given, frozenset())
    if not found:
        raise TypeError(
            f"{type(given).__name__} is no torch.optim.Optimizer and holds none, so its steps cannot be seen: "
            f"{_INSTEAD}"
        )
    for optimizer in found:
        # torch wraps every step in its hooks: look inside.
        if inspect.unwrap(type(optimizer).step) is inspect.unwrap(Optimizer.step):
            raise TypeError(f"{type(optimizer).__name__} has no step of its own that could be seen: {_INSTEAD}")
    return found


def _unwrap(wrapper: Any, outer: frozenset[int]) -> list[Optimizer]:
    """The innermost optimizers in a wrapper. Of an optimizer that holds no other, itself.

    ``outer`` has the wrappers around it: some hold a reference back to what holds them.
    """
    outer |= {id(wrapper)}
    held = [part for value in getattr(wrapper, "__dict__", {}).values() for part in _parts(value)]
    inner = [
        found for part in held if id(part) not in outer and _is_like_optimizer(part) for found in _unwrap(part, outer)
    ]
    if not isinstance(wrapper, Optimizer):
        return inner
    # It may hold an optimizer of other parameters, with another task.
    # Of several it alone knows which steps when:
    # then its own step is the one to see.
    ours = list(dict.fromkeys(found for found in inner if _share_parameters(wrapper, found)))
    return ours if len(ours) == 1 else [wrapper]


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list | tuple | set) else [value]


def _is_like_optimizer(value: Any) -> bool:
    """Whether it is an optimizer by class or by its methods. Schedulers have no zero_grad.

    Modules have one, and some have a step of their own, too. None of them is an optimizer.
    """
    if isinstance(value, type | nn.Module):
        return False
    return isinstance(value, Optimizer) or all(callable(getattr(value, n, None)) for n in ("step", "zero_grad"))


def _share_parameters(wrapper: Optimizer, inner: Optimizer) -> bool:
    # Nothing to compare: take what it holds for its own.
    if not hasattr(wrapper, "param_groups"):
        return True
    return not {id(p) for p in _parameters(wrapper)}.isdisjoint(id(p) for p in _parameters(inner))


def _parameters(optimizer: Optimizer) -> Iterator[Any]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def hook_step(
    optimizer: Optimizer, before: Callable[..., None], after: Callable[..., None]
) -> tuple[RemovableHandle, RemovableHandle]:
    """Call these with the optimizer before and after each step.

    A step that calls its parent class's step is seen twice, one inside the other.
    """
    # Many wrappers never call Optimizer.__init__, which makes room for hooks.
    # __setstate__ makes it, too, as when an optimizer is unpickled.
    Optimizer.__setstate__(optimizer, {} if hasattr(optimizer, "defaults") else {"defaults": {}})
    if not getattr(optimizer.step, "hooked", False):
        _hook_replaced_step(optimizer)
    # torch.compile would trace the hooks together with the step.
    pre, post = (torch.compiler.disable(hook) for hook in (before, after))  # type: ignore[no-untyped-call]
    return optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)


def _hook_replaced_step(optimizer: Optimizer) -> None:
    """Hook a step that somebody has put on the instance. torch hooks the class's step, which that may never call."""
    replaced = optimizer.step

    def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return replaced(*args, **kwargs)

    hooked: Any = Optimizer.profile_hook_step(step)
    hooked.hooked = True  # torch's own mark
    setattr(optimizer, "step", MethodType(hooked, optimizer))  # noqa: B010 - mypy sees a method
