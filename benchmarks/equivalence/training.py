"""One training of the experiment, on this process's rank."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.equivalence.cases import WINDOW, Case
from benchmarks.equivalence.policies import apply_policy
from benchmarks.equivalence.tasks import load_task
from launch.placement import Placement
from launch.processes import sum_over_ranks
from launch.schedule import global_batches, micro_batches, rank_share
from syncaccum import NonFiniteStatisticsError, commit, lockstep

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


def train(case: Case, placement: Placement, on_step: Callable[[int], None]) -> Trace:
    """Train from the case's initial weights, and test. Collective."""
    training, trace = _Training(case, placement), Trace()
    start = time.perf_counter()
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
        on_step(step + 1)
    trace.seconds = time.perf_counter() - start
    score = training.test()
    trace.score = score if math.isfinite(score) else None
    return trace


class _Training:
    """Model, optimizer and data of this rank."""

    def __init__(self, case: Case, placement: Placement) -> None:
        dtype = getattr(torch, case.dtype)
        self._case, self._placement = case, placement
        self._task = load_task(case.task, case.seed, dtype)
        torch.manual_seed(case.seed)
        # Cast afterwards: every dtype starts from the same weights.
        self._model = self._task.build().to(dtype)
        self._commits = apply_policy(self._model, case.policy)
        self._parallel: nn.Module = self._model
        if placement.launched:
            self._parallel = DistributedDataParallel(self._model)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=case.lr, momentum=_MOMENTUM)

    def step(self, step: int) -> float:
        """One optimizer step; the mean loss of its global batch."""
        self._parallel.train()
        self._optimizer.zero_grad()
        share = rank_share(self._global_batch(step), self._placement.rank, self._placement.size)
        parts = micro_batches(share, self._case.micro_batch)
        mine = self._lockstep(parts) if self._case.policy == "exact" else self._accumulate(parts)
        (loss,) = sum_over_ranks([mine], self._placement, torch.device("cpu"))
        if math.isfinite(loss):
            self._optimizer.step()
            if self._commits:
                commit(self._model)
        return loss / WINDOW

    def _global_batch(self, step: int) -> list[int]:
        samples = len(self._task.train[1])
        epoch, index = divmod(step, samples // WINDOW)
        batch = global_batches(samples, WINDOW, self._case.seed, epoch)[index]
        if self._case.permutation:
            random.Random(f"permutation {self._case.permutation} step {step}").shuffle(batch)
        return batch

    def _compute_loss(self, part: Sequence[int]) -> Tensor:
        inputs, targets = self._task.train
        chosen = torch.as_tensor(part, dtype=torch.int64)
        return self._task.loss(self._parallel(inputs[chosen]), targets[chosen])

    def _backward(self, loss: Tensor) -> float:
        # DDP divides the sum over ranks by their number.
        torch.autograd.backward(loss * (self._placement.size / WINDOW))
        return loss.item()

    def _lockstep(self, parts: Sequence[Sequence[int]]) -> float:
        return self._backward(torch.stack(lockstep(self._parallel, self._compute_loss, parts)).sum())

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
        return torch.nn.utils.parameters_to_vector(self._model.parameters()).detach()

    def test(self) -> float:
        """The score on the test samples, with this rank's running statistics."""
        self._model.eval()
        inputs, targets = self._task.test
        with torch.no_grad():
            return self._task.score(self._model(inputs), targets)
