"""Which cases the experiment is made of: trainings, gradients beside the reference's, and memory; pure Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.equivalence.cases import ANOTHER_WINDOW, FROM_SAMPLES, POLICIES, REFERENCE, Case, make_grid

# How often the reference runs again with the order permuted inside its batches: the same mathematics, other rounding.
PERMUTATIONS = 3

_MAIN = ("batchnorm", "renorm", "window", "lookahead")
_REST = ("mabn", "running", "batch", "renorm-prior2", "renorm-prior4", "renorm-ioffe")
_CHEAPEST = 8  # samples in a micro-batch; for policies that do not depend on them


@dataclass(frozen=True)
class Plan:
    trainings: list[Case] = field(default_factory=list)
    gradients: list[Case] = field(default_factory=list)
    """Cases along whose reference's trajectory gradients are compared."""
    memory: list[Case] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.trainings or self.gradients or self.memory)


@dataclass(frozen=True)
class Limits:
    """What to keep of a plan; None keeps everything."""

    tasks: Sequence[str] | None = None
    policies: Sequence[str] | None = None
    micro_batches: Sequence[int] | None = None
    lrs: Sequence[float] | None = None
    ranks: Sequence[int] | None = None
    steps: int | None = None

    def apply(self, plan: Plan) -> Plan:
        return Plan(*(self._keep(cases) for cases in (plan.trainings, plan.gradients, plan.memory)))

    def _keep(self, cases: Iterable[Case]) -> list[Case]:
        kept = [case for case in cases if self._allow(case)]
        if self.steps is None:
            return kept
        return [dataclasses.replace(case, steps=min(case.steps, self.steps)) for case in kept]

    def _allow(self, case: Case) -> bool:
        pairs = (
            (self.tasks, case.task),
            (self.policies, case.policy),
            (self.micro_batches, case.micro_batch),
            (self.lrs, case.lr),
            (self.ranks, case.ranks),
        )
        return all(choices is None or value in choices for choices, value in pairs)


def plan_full(seeds: Sequence[int]) -> Plan:
    """About two hours on one core; without references.

    Everything everywhere would take a day. Where runs are short, the policies that a user chooses between have all
    sizes and seeds; relatives and settings have the sizes at which they differ, and two seeds.
    """
    few, one = seeds[:2], seeds[:1]
    return Plan(
        trainings=[
            *_plan_chosen_on(seeds),
            *_plan_held_out(seeds),
            *_plan_extremes(few),
            *_plan_rests(seeds),
            *make_grid("mlp", (*_MAIN, "exact"), (4,), few, ranks=2),
            *make_grid("denoise", (*_MAIN, "exact"), (4,), one, ranks=2),
            *_plan_double_precision(one),
        ],
        gradients=_plan_gradients(one),
        memory=_plan_memory(one),
    )


def _plan_chosen_on(seeds: Sequence[int]) -> list[Case]:
    some, few, one = seeds[:3], seeds[:2], seeds[:1]
    return [
        *make_grid("mlp", _MAIN, (1, 4), seeds),
        *make_grid("mlp", _MAIN, (2, 8), some),
        *make_grid("mlp", FROM_SAMPLES, (_CHEAPEST,), seeds),
        *make_grid("mlp", (*_REST, "exact"), (4,), few),
        *make_grid("mlp", (*_REST, "exact"), (1,), one),
        *make_grid("denoise", _MAIN, (1, 4), seeds),
        *make_grid("denoise", _MAIN, (2, 8), one),
        *make_grid("denoise", FROM_SAMPLES, (_CHEAPEST,), seeds),
        *make_grid("denoise", (*_REST, "exact"), (4,), few),
        *make_grid("denoise", (*_REST, "exact"), (1,), one),
        *make_grid("resnet", _MAIN, (1, 2), one),
        *make_grid("resnet", _MAIN, (4,), few),
        *make_grid("resnet", (*_MAIN, *FROM_SAMPLES), (_CHEAPEST,), one),
        *make_grid("resnet", ("mabn", "running", "exact"), (4,), one),
    ]


def _plan_held_out(seeds: Sequence[int]) -> list[Case]:
    some, few, one = seeds[:3], seeds[:2], seeds[:1]
    return [
        *make_grid("segment", _MAIN, (1,), seeds),
        *make_grid("segment", _MAIN, (2,), some),
        *make_grid("segment", _MAIN, (4,), one),
        *make_grid("segment", FROM_SAMPLES, (_CHEAPEST,), seeds),
        *make_grid("segment", ("exact",), (1,), seeds),
        *make_grid("segment", _REST, (1,), one),
        *make_grid("segment", ("mabn", "exact"), (2,), few),
        *make_grid("mnist", _MAIN, (1, 4), seeds),
        *make_grid("mnist", _MAIN, (2, 8), few),
        *make_grid("mnist", FROM_SAMPLES, (_CHEAPEST,), seeds),
        *make_grid("mnist", (*_REST, "exact"), (2,), few),
        *make_grid("finetune", _MAIN, (1, 2), one),
        *make_grid("finetune", _MAIN, (4,), few),
        *make_grid("finetune", ("running", "mabn", "exact"), (4,), few),
        *make_grid("finetune", FROM_SAMPLES, (_CHEAPEST,), few),
        *make_grid("resnet18", ("batchnorm", "window", "lookahead"), (4,), one),
        *make_grid("resnet18", (*_MAIN, "mabn", *FROM_SAMPLES), (_CHEAPEST,), one),
    ]


def _plan_extremes(seeds: Sequence[int]) -> list[Case]:
    """High learning rates, and windows of 2 to 64 micro-batches: where each policy breaks."""
    return [
        *make_grid("mlp", (*_MAIN, "mabn", "renorm-ioffe"), (1,), seeds[:1], lr=0.4),
        *make_grid("mlp", (*_MAIN, "mabn", "renorm-ioffe"), (4,), seeds, lr=0.4),
        *make_grid("mlp", (*_MAIN, "mabn", "renorm-ioffe"), (4,), seeds, lr=1.6),
        *make_grid("mlp", FROM_SAMPLES, (_CHEAPEST,), seeds, lr=0.4),
        *make_grid("denoise", (*_MAIN, "mabn"), (4,), seeds[:1], lr=0.1),
        *make_grid("denoise", (*_MAIN, "mabn"), (4,), seeds[:1], lr=0.3),
        *(case for window in (8, 16, 32) for case in make_grid("mlp", _MAIN, (4,), seeds, window=window)),
        *(case for window in (128, 256) for case in make_grid("mlp", _MAIN, (4,), seeds[:1], window=window)),
    ]


def _plan_rests(seeds: Sequence[int]) -> list[Case]:
    """Epochs whose last window is short, a constant learning rate, and the score right after such a window."""
    return [
        *make_grid("mlp", _MAIN, (1, 4), seeds, steps=115, rest=29),
        *make_grid("denoise", _MAIN, (1, 4), seeds[:2], steps=64, rest=20),
        *make_grid("mnist", _MAIN, (1, 4), seeds[:3], steps=63, rest=32),
        *make_grid("resnet", _MAIN, (4,), seeds[:2], steps=46, rest=29),
    ]


def _plan_double_precision(seeds: Sequence[int]) -> list[Case]:
    """Where rounding hides nothing: exact has to lie on the reference."""
    return [
        *make_grid("mlp", ("exact",), (1, 4), seeds, dtype="float64", steps=100),
        *make_grid("mlp", ("exact",), (8,), seeds, dtype="float64", steps=100, ranks=2),
        *make_grid("resnet", ("exact",), (8,), seeds, dtype="float64", steps=40),
        *make_grid("resnet", ("exact",), (8,), seeds, dtype="float64", steps=20, ranks=2),
    ]


def _plan_gradients(seeds: Sequence[int]) -> list[Case]:
    # At 1 value per channel plain BatchNorm raises: the perceptron's table begins at 2.
    compared = ("batchnorm", "renorm", "renorm-prior4", "mabn", "window", "lookahead", "exact")
    return [
        *make_grid("mlp", compared[1:], (1,), seeds, steps=100),
        *make_grid("mlp", (*compared, "running"), (4,), seeds, steps=100),
        *make_grid("mlp", (ANOTHER_WINDOW, "online"), (_CHEAPEST,), seeds, steps=100),
        *make_grid("denoise", compared, (1, 4), seeds, steps=40),
        *make_grid("denoise", (ANOTHER_WINDOW, "online"), (_CHEAPEST,), seeds, steps=40),
        *make_grid("resnet", compared, (2, 4, 8), seeds, steps=20),
        *make_grid("resnet", (ANOTHER_WINDOW, "online"), (_CHEAPEST,), seeds, steps=20),
        *(case for ranks in (2, 4, 8) for case in _on_ranks(seeds, ranks)),
        *make_grid("segment", compared, (1, 4), seeds, steps=40),
        *make_grid("segment", (ANOTHER_WINDOW, "online"), (_CHEAPEST,), seeds, steps=40),
    ]


def _on_ranks(seeds: Sequence[int], ranks: int) -> list[Case]:
    return [
        *make_grid("mlp", ("lookahead",), (1,), seeds, steps=60, ranks=ranks),
        *make_grid("denoise", ("lookahead",), (1,), seeds, steps=20, ranks=ranks),
    ]


def _plan_memory(seeds: Sequence[int]) -> list[Case]:
    measured = (*_MAIN, "exact")
    return [
        *make_grid("segment", (REFERENCE,), (32,), seeds),
        *make_grid("segment", (*measured, "mabn"), (1, 4), seeds),
        *make_grid("segment", FROM_SAMPLES, (1,), seeds),
        *make_grid("resnet", (REFERENCE,), (64,), seeds),
        *make_grid("resnet", measured, (4,), seeds),
    ]


def plan_quick(seeds: Sequence[int]) -> Plan:
    """About a minute on one core; without references."""
    one = seeds[:1]
    return Plan(
        trainings=[
            *make_grid("mlp", POLICIES, (4,), one, steps=22),
            *make_grid("resnet", (*_MAIN, "exact"), (8,), one, steps=5),
            *make_grid("denoise", (*_MAIN, "exact"), (8,), one, steps=8),
            *make_grid("segment", (*_MAIN, "exact"), (4,), one, steps=8),
            *make_grid("mnist", (*_MAIN, "exact"), (8,), one, steps=8),
            *make_grid("mlp", ("exact",), (8,), one, dtype="float64", steps=100),
            *make_grid("mlp", ("exact",), (8,), one, dtype="float64", steps=22, ranks=2),
        ],
        gradients=make_grid("mlp", (ANOTHER_WINDOW, *_MAIN, "exact"), (8,), one, steps=22),
        memory=[
            *make_grid("segment", (REFERENCE,), (32,), one),
            *make_grid("segment", ("batchnorm", "window", "lookahead"), (4,), one),
        ],
    )


def add_references(cases: Iterable[Case]) -> list[Case]:
    """Each training once, after the reference that it needs; permuted ones where exact is to be judged by them."""
    ordered: dict[Case, None] = {}
    for case in cases:
        ordered[case.reference] = None
        if case.policy == "exact" and case.ranks == 1 and case.dtype == "float32":
            for permutation in range(1, PERMUTATIONS + 1):
                ordered[dataclasses.replace(case.reference, permutation=permutation)] = None
        ordered[case] = None
    return list(ordered)
