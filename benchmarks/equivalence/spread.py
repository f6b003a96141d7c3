"""Whether exact, in float32, is as close to the reference as the reference is to itself.

Rounding alone drives two trainings apart. The yardstick is the reference on the same batches in another order inside
each of them: mathematically the same training. Exact is inside their spread if the curve of its losses differs from
the reference's by no more, in the root mean square over steps, than the farthest permuted one does.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.equivalence.cases import Case
from benchmarks.equivalence.results import Result


@dataclass(frozen=True)
class Spread:
    """Differences of loss curves from the reference's: exact's, and those of each permuted reference."""

    exact: Case
    exact_rms: float
    exact_largest: float
    permuted_rms: list[float]
    permuted_largest: list[float]

    @property
    def inside(self) -> bool:
        return self.exact_rms <= max(self.permuted_rms)

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "inside": self.inside}, allow_nan=False)


def measure_spreads(results: Sequence[Result]) -> list[Spread]:
    """One for each exact training in float32 that came through, as its reference did."""
    trained = {result.case: result.losses for result in results if result.outcome == "trained"}
    spreads = []
    for case, losses in trained.items():
        if case.policy != "exact" or case.dtype != "float32" or case.reference not in trained:
            continue
        reference = trained[case.reference]
        permuted = [
            _differences(other, reference)
            for name, other in trained.items()
            if name.permutation and dataclasses.replace(name, permutation=0) == case.reference
        ]
        if permuted:
            mine = _differences(losses, reference)
            others = [_rms(p) for p in permuted], [max(p) for p in permuted]
            spreads.append(Spread(case, _rms(mine), max(mine), *others))
    return spreads


def _differences(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(losses, reference, strict=True)]


def _rms(differences: Sequence[float]) -> float:
    return math.sqrt(sum(d * d for d in differences) / len(differences))
