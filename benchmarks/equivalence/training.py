"""One training of the experiment, on this process's rank."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.equivalence.cases import Case
from benchmarks.equivalence.policies import apply_policy
from benchmarks.equivalence.tasks import load_task
from launch.placement import Placement
from launch.processes import sum_over_ranks
from launch.schedule import global_batches, micro_batches, rank_share
from syncaccum import NonFiniteStatisticsError, commit, lockstep, lookahead

SNAPSHOT_STEPS = (1, 2, 5, 10, 20, 50, 100)
_MOMENTUM = 0.9
_TOO_FEW = "Expected more than 1 value per channel"  # how nn.BatchNorm's message begins


@dataclass
class Trace:
    """What a training left: ``outcome`` is trained, diverged, or cannot, where a layer refused the micro-batch."""

    outcome: str = "trained"
    losses: list[float] = field(default_factory=list)
    score: float | None = None
    seconds: float = 0.0
    weights: dict[int, Tensor] = field(default_factory=dict)
    """All parameters as one vector, by number of optimizer steps."""


def train(case: Case, placement: Placement) -> Trace:
    """Train from the case's initial weights, and test. Collective."""
    training, trace = Training(case, placement), Trace()
    # Of the processor: other programs may be running.
    start = time.process_time()
    for step in range(case.steps):
        try:
            loss = training.step(step)
        except NonFiniteStatisticsError:
            loss = math.nan
        except ValueError as error:
            if not str(error).startswith(_TOO_FEW):
                raise
            trace.outcome = "cannot"
            return trace
        if not math.isfinite(loss):
            trace.outcome = "diverged"
            return trace
        trace.losses.append(loss)
        if step + 1 in SNAPSHOT_STEPS:
            trace.weights[step + 1] = training.flatten_weights()
    trace.seconds = time.process_time() - start
    score = training.test()
    trace.score = score if math.isfinite(score) else None
    return trace


class Training:
    """Model, optimizer and data of this rank."""

    def __init__(self, case: Case, placement: Placement) -> None:
        dtype = getattr(torch, case.dtype)
        self._case, self._placement = case, placement
        self._task = load_task(case.task, case.seed, dtype, case.window, case.rest)
        torch.manual_seed(case.seed)
        # Cast afterwards: every dtype starts from the same weights.
        self.model = self._task.build().to(dtype)
        self._commits = apply_policy(self.model, case)
        self._parallel: nn.Module = self.model
        if placement.launched:
            self._parallel = DistributedDataParallel(self.model)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=case.lr, momentum=_MOMENTUM)
        # To 0, so that the last score is no luck of the last steps.
        # With a rest it is the score right after a full step that counts.
        self._schedule = None if case.rest else CosineAnnealingLR(self._optimizer, case.steps)

    def step(self, step: int) -> float:
        """One optimizer step; the mean loss of its global batch."""
        loss = self.compute_gradient(step)
        if math.isfinite(loss):
            self.apply_gradient()
        return loss

    def compute_gradient(self, step: int) -> float:
        """Leave the gradient of a step's global batch at the parameters; its mean loss."""
        self._parallel.train()
        self._optimizer.zero_grad()
        batch = self._global_batch(step)
        self._samples = len(batch)
        share = rank_share(batch, self._placement.rank, self._placement.size)
        parts = micro_batches(share, self._case.micro_batch)
        walk = {"exact": self._lockstep, "lookahead": self._look_ahead}.get(self._case.policy, self._accumulate)
        (loss,) = sum_over_ranks([walk(parts)], self._placement, torch.device("cpu"))
        return loss / len(batch)

    def apply_gradient(self) -> None:
        """The optimizer's step, and the commit that belongs to it."""
        self._optimizer.step()
        if self._schedule is not None:
            self._schedule.step()
        self.commit()

    def commit(self) -> None:
        if self._commits:
            commit(self.model)

    def _global_batch(self, step: int) -> list[int]:
        samples = len(self._task.train[1])
        epoch, index = divmod(step, math.ceil(samples / self._case.window))
        batch = global_batches(samples, self._case.window, self._case.seed, epoch)[index]
        if self._case.permutation:
            random.Random(f"permutation {self._case.permutation} step {step}").shuffle(batch)
        return batch

    def _compute_loss(self, part: Sequence[int]) -> Tensor:
        inputs, targets = self._task.train
        chosen = torch.as_tensor(part, dtype=torch.int64)
        return self._task.loss(self._parallel(inputs[chosen]), targets[chosen])

    def _backward(self, loss: Tensor) -> float:
        # DDP divides the sum over ranks by their number.
        torch.autograd.backward(loss * (self._placement.size / self._samples))
        return loss.item()

    def _lockstep(self, parts: Sequence[Sequence[int]]) -> float:
        return self._backward(torch.stack(lockstep(self._parallel, self._compute_loss, parts)).sum())

    def _look_ahead(self, parts: Sequence[Sequence[int]]) -> float:
        return sum(self._backward(loss) for loss in lookahead(self._parallel, self._compute_loss, parts))

    def _accumulate(self, parts: Sequence[Sequence[int]]) -> float:
        total = 0.0
        with self._no_sync():
            for part in parts[:-1]:
                total += self._backward(self._compute_loss(part))
        return total + self._backward(self._compute_loss(parts[-1]))

    def _no_sync(self) -> AbstractContextManager[None]:
        if isinstance(self._parallel, DistributedDataParallel):
            no_sync: AbstractContextManager[None] = self._parallel.no_sync()
            return no_sync
        return nullcontext()

    def flatten_weights(self) -> Tensor:
        return torch.nn.utils.parameters_to_vector(self.model.parameters()).detach()

    def test(self) -> float:
        """The score on the test samples, with this rank's running statistics."""
        self.model.eval()
        inputs, targets = self._task.test
        with torch.no_grad():
            return self._task.score(self.model(inputs), targets)
