"""Finished cases: how each compares with its reference, and where it is kept for a run that goes on later."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.equivalence.cases import REFERENCE, Case
from benchmarks.equivalence.gradients import Fidelity
from benchmarks.equivalence.memory import Peak
from benchmarks.equivalence.training import Trace
from launch.files import write_atomically

_Measured = TypeVar("_Measured", Fidelity, Peak)


@dataclass(frozen=True)
class Result:
    """``distances``: relative ones of all weights from the reference's, by number of optimizer steps."""

    case: Case
    outcome: str
    losses: list[float]
    score: float | None
    seconds: float
    distances: dict[int, float]

    @property
    def final_loss(self) -> float | None:
        """Mean over the last ten steps: a single batch says little."""
        last = self.losses[-10:]
        return sum(last) / len(last) if self.outcome == "trained" else None

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "final_loss": self.final_loss}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Result:
        return cls.from_content(json.loads(text))

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> Result:
        """Of a JSON object, as `to_json` wrote it."""
        fields = {name: value for name, value in content.items() if name != "final_loss"}
        fields["case"] = Case(**content["case"])
        fields["distances"] = {int(step): value for step, value in content["distances"].items()}
        return cls(**fields)


@dataclass(frozen=True)
class Results:
    """All that an experiment measured."""

    trainings: list[Result]
    gradients: list[Fidelity]
    memory: list[Peak]


class Store:
    """The output folder: one JSON file for each finished case, and the weights of references beside them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, case: Case) -> Result | None:
        path = self._path("cases", case)
        return Result.from_json(path.read_text()) if path.exists() else None

    def keep(self, case: Case, trace: Trace) -> Result:
        """Compare with the reference, which was kept before, and write the case's files."""
        is_reference = case == case.reference
        if is_reference:
            write_atomically(self._weights_path(case), lambda file: torch.save(trace.weights, file))
        reference = torch.load(self._weights_path(case.reference))
        distances = {s: _distance(weights, reference[s]) for s, weights in trace.weights.items() if s in reference}
        # Weights may overflow a step before the loss shows it, and JSON has no infinity.
        finite = {step: distance for step, distance in distances.items() if math.isfinite(distance)}
        result = Result(case, trace.outcome, trace.losses, trace.score, trace.seconds, finite)
        write_atomically(self._path("cases", case), lambda file: file.write(result.to_json().encode()))
        return result

    def find(self, kind: type[_Measured], case: Case) -> _Measured | None:
        path = self._path(kind.__name__.lower(), case)
        return kind.from_content(json.loads(path.read_text())) if path.exists() else None

    def measure(self, kind: type[_Measured], case: Case, measure: Callable[[Case], _Measured]) -> _Measured:
        """What was measured before, or else is now."""
        found = self.find(kind, case)
        if found is not None:
            return found
        measured = measure(case)
        path = self._path(kind.__name__.lower(), case)
        write_atomically(path, lambda file: file.write(measured.to_json().encode()))
        return measured

    def _path(self, kind: str, case: Case) -> Path:
        return self._folder / kind / f"{case.name}.json"

    def _weights_path(self, case: Case) -> Path:
        return self._folder / REFERENCE / f"{case.name}.pt"


def _distance(weights: Tensor, reference: Tensor) -> float:
    """Relative, in the 2-norm and in float64, where the difference of close float32 values is exact."""
    exact = reference.double()
    distance: float = (torch.linalg.vector_norm(weights.double() - exact) / torch.linalg.vector_norm(exact)).item()
    return distance
