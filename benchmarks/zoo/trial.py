"""One model's trial: convert, two windows, commits against nn.BatchNorm, and back."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncaccum import SyncAccumBatchNorm, commit, convert_sync_accum, revert_sync_accum
from tests.oracle import concatenate, make_reference

WINDOW = (2, 1)
"""Examples in the micro-batches of each window: uneven, and one alone."""

TOLERANCE = 1e-6
"""Running statistics are kept in float32, which rounds by 6e-8, once in each of two commits."""

Forward = Callable[[int], Any]
"""The model's forward of so many new examples."""


@dataclass
class Outcome:
    """What was found. ``failure`` is empty where all held."""

    layers: int = 0
    unreached: int = 0
    error: float = 0.0
    seconds: float = 0.0
    failure: str = ""


class TrialError(Exception):
    """Something that must hold for every model does not."""


def try_model(model: nn.Module, forward: Forward) -> Outcome:
    """Convert, train for two windows with frozen weights, commit, revert. What fails is in the outcome."""
    outcome, began = Outcome(), time.process_time()
    try:
        _try_model(model, forward, outcome)
    except Exception as error:
        outcome.failure = f"{type(error).__name__}: {error}"[:300]
    outcome.seconds = round(time.process_time() - began, 1)
    return outcome


def _try_model(model: nn.Module, forward: Forward, outcome: Outcome) -> None:
    before = _describe(model)
    convert_sync_accum(model.train())
    _require(list(model.state_dict()) == before[0], "other keys after the conversion")
    _refuse_left_alone(model)
    windows = _Windows(model)
    outcome.layers = len(windows.layers)
    for _ in range(2):
        for size in WINDOW:
            windows.see(forward, size)
        commit(model)
        outcome.error = max(outcome.error, windows.measure_error())
    outcome.unreached = len(windows.layers) - len(windows.reached)
    _require(outcome.error <= TOLERANCE, f"statistics differ from nn.BatchNorm's by {outcome.error:.1e}")
    windows.remove()
    converted = _evaluate(model, forward)
    revert_sync_accum(model)
    _require(_describe(model) == before, "other keys or classes after the revert")
    reverted = _evaluate(model, forward)
    same = all(torch.equal(a, b) for a, b in zip(converted, reverted, strict=True))
    _require(same, "eval differs from that of the reverted model")


def _describe(model: nn.Module) -> tuple[list[str], list[type]]:
    return list(model.state_dict()), [type(module) for module in model.modules()]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise TrialError(message)


def _refuse_left_alone(model: nn.Module) -> None:
    left = {
        type(module).__qualname__
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and not isinstance(module, SyncAccumBatchNorm)
    }
    _require(not left, f"left alone: {', '.join(sorted(left))}")


class _Windows:
    """Watches the layers of a model: what they see, and what their statistics must be."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        named = ((name, module) for name, module in model.named_modules() if isinstance(module, SyncAccumBatchNorm))
        self.layers = {name: layer for name, layer in named if layer.track_running_stats}
        self.reached: set[str] = set()
        self._references = {name: make_reference(layer) for name, layer in self.layers.items()}
        self._seen: dict[str, list[Tensor]] = defaultdict(list)
        self._hooks = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name: self._keep(name, inputs[0]))
            for name, layer in self.layers.items()
        ]

    def _keep(self, name: str, x: Tensor) -> None:
        self.reached.add(name)
        self._seen[name].append(concatenate([x]))

    def see(self, forward: Forward, size: int) -> None:
        """A micro-batch, forward and backward. No buffer may move before the commit."""
        before = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        losses = [y.float().square().mean() for y in _find_tensors(forward(size)) if y.requires_grad]
        if losses:
            torch.autograd.backward(losses)
        self._model.zero_grad(set_to_none=True)
        for name, buffer in self._model.named_buffers():
            if name in before and name.rpartition(".")[2].startswith("running_"):
                _require(torch.equal(buffer, before[name]), f"{name} moved within a window")

    def measure_error(self) -> float:
        """The largest difference from nn.BatchNorm on the whole window, as a share of what the layer has seen."""
        errors = [0.0]
        for name, layer in self.layers.items():
            expected = self._references[name]
            if name in self._seen:
                expected(concatenate(self._seen.pop(name)))
            _require(bool(layer.num_batches_tracked == expected.num_batches_tracked), f"{name}: commits")
            errors += _compare(layer, expected)
        return max(errors)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _compare(layer: Any, expected: Any) -> list[float]:
    """Means against the size of values, variances against themselves."""
    mean, var = expected.running_mean, expected.running_var
    values = (mean.square() + var).sqrt()
    of_mean = (layer.running_mean.double() - mean).abs() / values
    of_var = (layer.running_var.double() - var).abs() / var
    return [float(of_mean.max()), float(of_var.max())]


@torch.no_grad()
def _evaluate(model: nn.Module, forward: Forward) -> list[Tensor]:
    model.eval()
    torch.manual_seed(0)
    return list(_find_tensors(forward(2)))


def _find_tensors(result: Any) -> Iterator[Tensor]:
    """All floating-point tensors in what a model returns."""
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, Mapping):
        yield from _find_tensors(list(result.values()))
    elif isinstance(result, list | tuple):
        for item in result:
            yield from _find_tensors(item)
    elif is_dataclass(result):
        yield from _find_tensors([getattr(result, field.name) for field in fields(result)])
