"""How near a policy's accumulated gradient is to the large batch's, along the large batch's own training.

At each step the network under test takes the reference's weights, walks the same window, and keeps its own state:
running statistics, the last window, what relatives stream. The yardstick is the reference's gradient of the next
window: how much two draws of data differ.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.equivalence.cases import ANOTHER_WINDOW, REFERENCE, Case
from benchmarks.equivalence.training import Training
from launch.placement import Placement


@dataclass(frozen=True)
class Fidelity:
    """Medians over the steps, None where not finite; ``error`` is relative, in the 2-norm of all parameters."""

    case: Case
    error: float | None
    cosine: float | None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> Fidelity:
        return cls(**{**content, "case": Case(**content["case"])})


def compare_gradients(case: Case, placement: Placement) -> Fidelity:
    """Train the reference, whole on each rank, and compare at each of its steps. Collective."""
    reference = Training(case.reference, Placement())
    yardstick = case.policy == ANOTHER_WINDOW
    tested = Training(dataclasses.replace(case.reference, policy=REFERENCE) if yardstick else case, placement)
    errors, cosines = [], []
    for step in range(case.steps):
        _copy_weights(reference.model, tested.model)
        reference.compute_gradient(step)
        tested.compute_gradient(step + 1 if yardstick else step)
        tested.commit()
        error, cosine = _compare(_flatten_gradient(tested.model), _flatten_gradient(reference.model))
        errors.append(error)
        cosines.append(cosine)
        reference.apply_gradient()
    return Fidelity(case, _find_median(errors), _find_median(cosines))


def _find_median(values: list[float]) -> float | None:
    # A step that overflowed counts as the worst; NaN has no place in an order.
    ordered = sorted(math.inf if math.isnan(value) else value for value in values)
    median = statistics.median(ordered)
    return median if math.isfinite(median) else None


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for own, other in zip(target.parameters(), source.parameters(), strict=True):
            own.copy_(other)


def _flatten_gradient(model: nn.Module) -> Tensor:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def _compare(gradient: Tensor, reference: Tensor) -> tuple[float, float]:
    error = torch.linalg.vector_norm(gradient - reference) / torch.linalg.vector_norm(reference)
    return error.item(), torch.cosine_similarity(gradient, reference, 0).item()
