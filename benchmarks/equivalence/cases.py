"""Which trainings the experiment is made of; pure Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WINDOW = 64
TASKS = ("mlp", "resnet", "denoise", "resnet18", "finetune")
POLICIES = ("batchnorm", "groupnorm", "running", "batch", "renorm", "renorm-prior0", "renorm-ioffe", "exact")
REFERENCE = "reference"

# How often the reference runs again with the order permuted inside its batches: the same mathematics, other rounding.
PERMUTATIONS = 5


@dataclass(frozen=True)
class Case:
    """One training. ``permutation`` 0 keeps the order of the data inside each global batch."""

    task: str
    policy: str
    micro_batch: int
    lr: float
    seed: int
    steps: int
    dtype: str = "float32"
    ranks: int = 1
    permutation: int = 0

    @property
    def name(self) -> str:
        """Of its files: two cases with one name would compute the same."""
        permuted = f"-permuted{self.permutation}" if self.permutation else ""
        return (
            f"{self.task}-{self.policy}-{self.micro_batch}x{self.ranks}-lr{self.lr:g}-seed{self.seed}"
            f"-{self.dtype}-{self.steps}{permuted}"
        )

    @property
    def reference(self) -> Case:
        """BatchNorm on the whole window: what this case is compared with, and what it should equal."""
        return dataclasses.replace(self, policy=REFERENCE, micro_batch=WINDOW, ranks=1, permutation=0)


@dataclass(frozen=True)
class Limits:
    """What to keep of a plan; None keeps everything."""

    tasks: Sequence[str] | None = None
    policies: Sequence[str] | None = None
    micro_batches: Sequence[int] | None = None
    lrs: Sequence[float] | None = None
    ranks: Sequence[int] | None = None
    steps: int | None = None

    def apply(self, cases: Iterable[Case]) -> list[Case]:
        kept = [
            case
            for case in cases
            if _allows(self.tasks, case.task)
            and _allows(self.policies, case.policy)
            and _allows(self.micro_batches, case.micro_batch)
            and _allows(self.lrs, case.lr)
            and _allows(self.ranks, case.ranks)
        ]
        if self.steps is None:
            return kept
        return [dataclasses.replace(case, steps=min(case.steps, self.steps)) for case in kept]


def _allows(choices: Sequence[object] | None, value: object) -> bool:
    return choices is None or value in choices


def plan_full(seeds: Sequence[int], dtype: str) -> list[Case]:
    """About a quarter of an hour on one core; without references.

    Everything everywhere would take hours: the perceptron tries all, the others what it leaves open. GroupNorm's
    result does not depend on the micro-batch, so one size is enough, the cheapest.
    """
    first = seeds[:1]
    main = ("batchnorm", "running", "renorm", "exact")
    return [
        *_grid("mlp", POLICIES, (1, 2, 4, 8), (0.1,), first, 100, dtype),
        *_grid("mlp", POLICIES, (1, 4), (0.4,), first, 100, dtype),
        *_grid("mlp", POLICIES, (1, 4), (0.1,), seeds[1:], 100, dtype),
        *_grid("resnet", POLICIES, (4,), (0.1,), first, 100, dtype),
        *_grid("resnet", (*main, "groupnorm"), (8,), (0.1,), first, 100, dtype),
        *_grid("resnet", main, (2,), (0.1,), first, 100, dtype),
        *_grid("resnet", ("running", "renorm", "exact"), (1,), (0.1,), first, 100, dtype),
        *_grid("resnet", (*main, "groupnorm"), (4,), (0.4,), first, 100, dtype),
        *_grid("resnet", main, (4,), (0.1,), seeds[1:], 100, dtype),
        *_grid("denoise", (*main, "groupnorm", "renorm-prior0"), (1, 4), (0.03,), first, 60, dtype),
        *_grid("resnet18", (*main, "groupnorm"), (8,), (0.01,), first, 12, dtype),
        *_grid("finetune", main, (1, 2, 4), (0.01,), first, 22, dtype),
        *_grid("mlp", main, (4,), (0.1,), first, 100, dtype, ranks=2),
        *_grid("resnet", main, (8,), (0.1,), first, 100, dtype, ranks=2),
        *_plan_double_precision(first),
    ]


def _plan_double_precision(seeds: Sequence[int]) -> list[Case]:
    """Where rounding hides nothing: exact has to lie on the reference."""
    return [
        *_grid("mlp", ("exact",), (1, 4), (0.1,), seeds, 100, "float64"),
        *_grid("mlp", ("exact",), (8,), (0.1,), seeds, 100, "float64", ranks=2),
        *_grid("resnet", ("exact",), (8,), (0.1,), seeds, 100, "float64"),
        *_grid("resnet", ("exact",), (8,), (0.1,), seeds, 100, "float64", ranks=2),
    ]


def plan_quick(seeds: Sequence[int], dtype: str) -> list[Case]:
    """About a minute on one core; without references."""
    return [
        *_grid("mlp", POLICIES, (1, 4), (0.1,), seeds, 44, dtype),
        *_grid("resnet", ("batchnorm", "running", "renorm", "exact"), (8,), (0.1,), seeds, 11, dtype),
        *_grid("denoise", ("running", "renorm", "exact"), (8,), (0.03,), seeds, 11, dtype),
        *_grid("mlp", ("exact",), (8,), (0.1,), seeds, 100, "float64"),
        *_grid("mlp", ("exact",), (8,), (0.1,), seeds, 22, "float64", ranks=2),
    ]


def _grid(
    task: str,
    policies: Sequence[str],
    micro_batches: Sequence[int],
    lrs: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    dtype: str,
    ranks: int = 1,
) -> list[Case]:
    return [
        Case(task, policy, micro_batch, lr, seed, steps, dtype, ranks)
        for seed in seeds
        for lr in lrs
        for micro_batch in micro_batches
        for policy in policies
    ]


def add_references(cases: Iterable[Case]) -> list[Case]:
    """Each case once, after the reference that it needs; permuted references where exact is to be judged by them."""
    ordered: dict[Case, None] = {}
    for case in cases:
        ordered[case.reference] = None
        if case.policy == "exact" and case.ranks == 1:
            for permutation in range(1, PERMUTATIONS + 1):
                ordered[dataclasses.replace(case.reference, permutation=permutation)] = None
        ordered[case] = None
    return list(ordered)
