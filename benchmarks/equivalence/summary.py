"""What several seeds say together: mean score, spread, and gap to the large batch of the same seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.equivalence.cases import FROM_SAMPLES, REFERENCE, TASKS, Case
from benchmarks.equivalence.results import Result


@dataclass(frozen=True)
class Group:
    """What trainings have in common that differ in their seed alone."""

    task: str
    lr: float
    window: int
    steps: int
    ranks: int
    policy: str
    micro_batch: int
    rest: int = 0

    @classmethod
    def of(cls, case: Case) -> Group:
        return cls(**{field.name: getattr(case, field.name) for field in dataclasses.fields(cls)})

    @property
    def setting(self) -> Group:
        """The same for every policy and micro-batch."""
        return dataclasses.replace(self, policy=REFERENCE, micro_batch=self.window)

    @property
    def is_own(self) -> bool:
        """Whether it is the task's own setting on one rank; else an extreme, several ranks, or epochs with a rest."""
        own = TASKS[self.task]
        return (self.lr, self.window, self.ranks, self.rest) == (own.lr, own.window, 1, 0)


@dataclass(frozen=True)
class Summary:
    """Scores in the task's unit: percent, or dB. None where one seed says nothing, or none came through."""

    group: Group
    seeds: int
    failed: int
    mean: float | None
    spread: float | None
    """Standard deviation over seeds."""
    gap: float | None
    """To the reference, seed by seed: below 0 is worse."""
    gap_error: float | None
    """Standard error of the gap."""
    final_loss: float | None
    milliseconds: float
    """Of a step, the median over seeds."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> Summary:
        return cls(**{**content, "group": Group(**content["group"])})


def summarize(results: Sequence[Result]) -> list[Summary]:
    """One for each group of float32 trainings, in the order of the results."""
    plain = [r for r in results if r.case.dtype == "float32" and not r.case.permutation]
    scores = {r.case: scale_score(r.case.task, r.score) for r in plain}
    groups: dict[Group, list[Result]] = {}
    for result in plain:
        groups.setdefault(Group.of(result.case), []).append(result)
    return [_summarize_group(group, members, scores) for group, members in groups.items()]


def scale_score(task: str, score: float | None) -> float | None:
    """Percent, for tasks whose score is a share."""
    return score if score is None or TASKS[task].unit != "%" else 100 * score


def _summarize_group(group: Group, members: Sequence[Result], scores: dict[Case, float | None]) -> Summary:
    trained = [(r, score) for r in members if (score := scores[r.case]) is not None]
    gaps = [score - other for r, score in trained if (other := scores.get(r.case.reference)) is not None]
    spread = _deviation(gaps)
    return Summary(
        group,
        seeds=len(members),
        failed=len(members) - len(trained),
        mean=_mean(score for _, score in trained),
        spread=_deviation([score for _, score in trained]),
        gap=_mean(gaps),
        gap_error=None if spread is None else spread / math.sqrt(len(gaps)),
        final_loss=_mean(loss for r, _ in trained if (loss := r.final_loss) is not None),
        milliseconds=statistics.median(1000 * r.seconds / max(1, len(r.losses)) for r in members),
    )


def _mean(values: Iterable[float]) -> float | None:
    present = list(values)
    return statistics.fmean(present) if present else None


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def find_summary(summaries: Sequence[Summary], setting: Group, policy: str, micro_batch: int) -> Summary | None:
    """Of a policy at a size in a setting; GroupNorm's and Online Normalization's one size stands for all."""
    for summary in summaries:
        group = summary.group
        alike = policy in (REFERENCE, *FROM_SAMPLES) or group.micro_batch == micro_batch
        if (group.setting, group.policy) == (setting, policy) and alike:
            return summary
    return None


def list_settings(summaries: Sequence[Summary]) -> list[Group]:
    return list(dict.fromkeys(summary.group.setting for summary in summaries))


def list_sizes(summaries: Sequence[Summary], setting: Group) -> list[int]:
    """Micro-batches that were tried in a setting."""
    groups = [s.group for s in summaries if s.group.setting == setting]
    return sorted({g.micro_batch for g in groups if g.policy not in (REFERENCE, *FROM_SAMPLES)})
