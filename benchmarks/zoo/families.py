"""What the lists of all libraries share: families, their smallest models, and images that a model takes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

LARGEST = 100_000_000
"""Parameters of the largest model that is tried: more are several gigabytes with gradients."""

_SMALL = 30_000_000
"""Parameters of a model than which no smaller one is looked for."""

Built = tuple[nn.Module, Callable[[int], Any]]
"""A model, and its forward of so many new examples."""


@dataclass(frozen=True)
class Model:
    """One that a library can build without a download."""

    family: str
    name: str


def list_small(names: Iterable[str], family_of: Callable[[str], str], make: Callable[[str], Any]) -> Iterator[Model]:
    """Of each family, and of each beginning of a name in it, a small model that has BatchNorm, if there is one.

    First come those of each family's first beginning, then of its second, and so on: a run that is stopped has seen
    as many families as it could.
    """
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(names, key=_by_numbers):
        groups[family_of(name)][re.split(r"\d", name)[0].rstrip("_-")].append(name)
    for rank in range(max(map(len, groups.values()))):
        for family, beginnings in groups.items():
            for group in list(beginnings.values())[rank : rank + 1]:
                yield from (Model(family, name) for name in _find_small(group, make))


def _by_numbers(name: str) -> list[Any]:
    """resnet18 before resnet101."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def _find_small(group: Iterable[str], make: Callable[[str], Any]) -> Iterator[str]:
    """The first that is small, or else the smallest; none where three have no BatchNorm."""
    found: list[tuple[int, str]] = []
    without = 0
    for name in group:
        model = _make_empty(name, make)
        without += not _has_batch_norm(model)
        if without == 3:
            return
        if _has_batch_norm(model):
            found.append((sum(parameter.numel() for parameter in model.parameters()), name))
            if found[-1][0] <= _SMALL:
                break
    yield from (name for parameters, name in sorted(found)[:1] if parameters <= LARGEST)


def _make_empty(name: str, make: Callable[[str], Any]) -> Any:
    """Without memory, unless its constructor looks at values."""
    try:
        with torch.device("meta"):
            return make(name)
    except RuntimeError:
        return make(name)


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())


def with_images(model: nn.Module, make: Callable[[int, int], Tensor], sides: Iterable[int]) -> Built:
    """The model with images of the first of these sides that it takes, or else of the last. ``make(size, side)``."""
    *smaller, last = sides
    side = next((side for side in smaller if _takes(model, make(1, side))), last)
    return model, lambda size: model(make(size, side))


@torch.no_grad()
def _takes(model: nn.Module, images: Tensor) -> bool:
    try:
        model.eval()(images)
    except Exception:
        return False
    return True
