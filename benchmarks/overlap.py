"""How much of a commit does a training step wait for, with overlap and without?

ResNet-50 with DistributedDataParallel on two gloo ranks, one thread each, two micro-batches of 8x3x96x96 in a step: the
first under ``no_sync()``. Exposed is the wall time of this library's calls: of the sending, when the last backward
begins, and of the commit after ``optimizer.step()``. Steps with overlap and without take turns. Beside it stands the
same in the rank's own processor time, which has no waiting in it.

    python -m benchmarks.overlap
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import ResNetConfig, ResNetForImageClassification

from benchmarks.report import Figure, publish
from syncaccum import commit_on_step, convert_sync_accum
from syncaccum.window.step_hook import CommitHandle
from tests.ranks import Rank, run_on_ranks

RANKS = 2
ROUNDS = 8
SHAPE = (8, 3, 96, 96)


class Times(NamedTuple):
    """Seconds by the clock, and of this thread's processor time: other work on the machine stretches the former."""

    wall: float = 0.0
    core: float = 0.0

    @classmethod
    def now(cls) -> Times:
        return cls(time.perf_counter(), time.thread_time())

    def since(self, start: Times) -> Times:
        return Times(self.wall - start.wall, self.core - start.core)

    def plus(self, other: Times) -> Times:
        return Times(self.wall + other.wall, self.core + other.core)


class Stopwatch:
    """Adds up the times of some functions."""

    def __init__(self) -> None:
        self.times = Times()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = Times.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.times = self.times.plus(Times.now().since(start))

        return timed

    @contextmanager
    def runs(self) -> Iterator[None]:
        """Watch all that a commit_on_step which is made in here calls."""
        watched: dict[str, Any] = {name: self.around(getattr(CommitHandle, name)) for name in ("start_commit", "_end")}
        with mock.patch.multiple(CommitHandle, **watched):
            yield


class Job:
    """One model, and its steps."""

    def __init__(self, *, overlap: bool) -> None:
        torch.manual_seed(0)
        model = ResNetForImageClassification(ResNetConfig())
        self._ddp = DistributedDataParallel(convert_sync_accum(model))
        self._optimizer = torch.optim.SGD(self._ddp.parameters(), lr=1e-3)
        commit_on_step(self._ddp, self._optimizer, overlap=overlap)

    def step(self) -> None:
        with self._ddp.no_sync():
            self._walk()
        self._walk()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _walk(self) -> None:
        torch.autograd.backward(self._ddp(torch.randn(SHAPE)).logits.square().mean())


def measure(rank: Rank) -> dict[str, list[tuple[Times, Times]]]:
    """By kind, what was exposed and what all took, for each step."""
    torch.set_num_threads(1)
    watch = Stopwatch()
    times: dict[str, list[tuple[Times, Times]]] = {}
    with watch.runs():
        jobs = {"without overlap": Job(overlap=False), "with overlap": Job(overlap=True)}
        for _ in range(ROUNDS):
            for name, job in jobs.items():
                watch.times, start = Times(), Times.now()
                job.step()
                times.setdefault(name, []).append((watch.times, Times.now().since(start)))
    # The first step compares layers, and DDP sorts its buckets in the second.
    return {name: pairs[2:] for name, pairs in times.items()}


def summarize(name: str, pairs: list[tuple[Times, Times]]) -> Iterator[Figure]:
    for clock, what in (("wall", ""), ("core", ", processor time")):
        exposed, step = ([getattr(times, clock) for times in column] for column in zip(*pairs, strict=True))
        share = statistics.median(a / b for a, b in zip(exposed, step, strict=True))
        yield Figure(
            f"exposed {name}, over the step{what}, ResNet-50, 2 ranks, %",
            100 * share,
            0.5 if name == "with overlap" else None,
            note=f"{statistics.median(exposed) * 1e3:.2f} ms of {statistics.median(step):.2f} s",
        )


def main() -> None:
    measured = run_on_ranks(measure, RANKS, timeout=300.0, patience=600.0)[0]
    figures = [figure for name, pairs in measured.items() for figure in summarize(name, pairs)]
    publish("overlap", figures, measured)


if __name__ == "__main__":
    main()
