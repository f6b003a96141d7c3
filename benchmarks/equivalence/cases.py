"""What a measurement of the experiment is about: task, policy, sizes; pure Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """How a task is trained. The learning rate was chosen by the reference alone."""

    lr: float
    steps: int
    window: int
    unit: str
    chosen_on: bool
    """Whether settings of policies were chosen on this task; else it was held out."""


TASKS = {
    "mlp": Setting(0.1, 120, 64, "%", chosen_on=True),
    "resnet": Setting(0.1, 60, 64, "%", chosen_on=True),
    "denoise": Setting(0.03, 100, 64, "dB", chosen_on=True),
    "segment": Setting(0.05, 130, 32, "%", chosen_on=False),
    "mnist": Setting(0.3, 64, 64, "%", chosen_on=False),
    "finetune": Setting(0.1, 33, 64, "%", chosen_on=False),
    "resnet18": Setting(0.01, 40, 64, "%", chosen_on=False),
}
REFERENCE = "reference"
ANOTHER_WINDOW = "another-window"
"""Not a policy: the yardstick for gradients, the reference's own of the next window of data."""

OURS = ("running", "batch", "renorm", "renorm-prior2", "renorm-prior4", "renorm-ioffe", "window", "lookahead", "exact")
POLICIES = ("batchnorm", "groupnorm", "online", "mabn", *OURS)

FROM_SAMPLES = ("groupnorm", "online")
"""Policies whose result does not depend on the micro-batch: one size stands for all."""


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
    window: int = 64
    rest: int = 0
    """Samples in each epoch's last window, as a loader without drop_last has it. Then the learning rate is constant."""

    @property
    def name(self) -> str:
        """Of its files: two cases with one name would compute the same."""
        permuted = f"-permuted{self.permutation}" if self.permutation else ""
        rest = f"-rest{self.rest}" if self.rest else ""
        return (
            f"{self.task}-{self.policy}-{self.micro_batch}of{self.window}x{self.ranks}-lr{self.lr:g}-seed{self.seed}"
            f"-{self.dtype}-{self.steps}{permuted}{rest}"
        )

    @property
    def reference(self) -> Case:
        """BatchNorm on the whole window: what this case is compared with, and what it should equal."""
        return dataclasses.replace(self, policy=REFERENCE, micro_batch=self.window, ranks=1, permutation=0)

    @property
    def micro_batches(self) -> int:
        """In the window of a rank."""
        return max(1, self.window // self.ranks // self.micro_batch)


def make_grid(
    task: str,
    policies: Sequence[str],
    micro_batches: Sequence[int],
    seeds: Sequence[int],
    *,
    lr: float | None = None,
    steps: int | None = None,
    window: int | None = None,
    dtype: str = "float32",
    ranks: int = 1,
    rest: int = 0,
) -> list[Case]:
    """Every policy at every size with every seed, at the task's own setting where nothing else is said."""
    own = TASKS[task]
    lr, steps, window = lr or own.lr, steps or own.steps, window or own.window
    return [
        Case(task, policy, micro_batch, lr, seed, steps, dtype, ranks, window=window, rest=rest)
        for seed in seeds
        for micro_batch in micro_batches
        for policy in policies
    ]
