"""Optimizers that wrap others, as public packages write them, and some that torch's hooks would miss."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer


class Lookahead(Optimizer):
    """As timm's: without Optimizer.__init__, averaging with slow weights every other step."""

    def __init__(self, base_optimizer: Optimizer) -> None:
        self.base_optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups
        self.defaults = base_optimizer.defaults
        self.state = defaultdict(dict)
        self._slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self._taken = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.base_optimizer.step(closure)
        self._taken += 1
        if self._taken % 2 == 0:
            fast = [p for group in self.param_groups for p in group["params"]]
            for slow, parameter in zip(self._slow, fast, strict=True):
                parameter.copy_(slow.lerp_(parameter, 0.5))
        return loss


class SAM(Optimizer):
    """The two-call interface: ``step`` itself raises."""

    def __init__(self, params: Any, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = SGD(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        self._climbed = [p.grad.mul(self.defaults["rho"] / (p.grad.norm() + 1e-12)) for p in self._parameters()]
        for parameter, climb in zip(self._parameters(), self._climbed, strict=True):
            parameter.add_(climb)

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter, climb in zip(self._parameters(), self._climbed, strict=True):
            parameter.sub_(climb)
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:
        raise NotImplementedError("call first_step and second_step")

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


class Holder:
    """No torch Optimizer: keeps the real one in an attribute of any name, as fastai's, apex's and many others."""

    def __init__(self, attribute: str, optimizer: Any) -> None:
        setattr(self, attribute, optimizer)
        self._attribute = attribute

    def step(self, closure: Any = None) -> Any:
        return getattr(self, self._attribute).step(closure)

    def zero_grad(self) -> None:
        getattr(self, self._attribute).zero_grad()


class Subclass(Optimizer):
    """As accelerate's: an Optimizer by class, without Optimizer.__init__ and without attributes of its own."""

    def __init__(self, attribute: str, optimizer: Any) -> None:
        setattr(self, attribute, optimizer)
        self._attribute = attribute

    @property
    def param_groups(self) -> Any:
        return getattr(self, self._attribute).param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        getattr(self, self._attribute).param_groups = groups

    def step(self, closure: Any = None) -> Any:
        return getattr(self, self._attribute).step(closure)


class EverySecond(Subclass):
    """Steps what it wraps in every second call, as wrappers that accumulate gradients."""

    _calls = 0

    def step(self, closure: Any = None) -> Any:
        self._calls += 1
        return super().step(closure) if self._calls % 2 == 0 else None


class Several:
    """A snippet seen in many repositories: one object for several optimizers."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class Container(Optimizer):
    """As torchtitan's: an Optimizer of all parameters that hands its step on to one for each model part."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = list(optimizers)
        super().__init__([p for o in optimizers for group in o.param_groups for p in group["params"]], {})

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class Alternating(Container):
    """Two optimizers for the same parameters, of which one steps at a time, as in SWATS."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self.optimizers = [first, second]
        Optimizer.__init__(self, first.param_groups[0]["params"], {})

    def step(self, closure: Any = None) -> None:
        self.optimizers[0].step()


class Calling(SGD):
    """A subclass whose step calls its parent's: torch's hooks see both."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Bare(Optimizer):
    """Steps by itself, without Optimizer.__init__, hooks or defaults."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": list(params)}]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad, alpha=0.1)


class Own:
    """As fastai's own optimizers: nothing of torch's in it."""

    def __init__(self, params: Any) -> None:
        self.params = list(params)

    def step(self) -> None:
        raise AssertionError("not to be called")

    def zero_grad(self) -> None:
        raise AssertionError("not to be called")


class Stepless(Optimizer):
    """Does its work in calls of other names, and holds no other optimizer."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
