"""A run from start, or from its checkpoint, to finish."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from launch.arguments import Arguments
from launch.checkpoint import save_checkpoint
from launch.learner import DivergedError, Learner
from launch.output import open_output, write_output
from launch.placement import Placement
from launch.processes import choose_device, from_rank_zero, limit_threads, process_group
from launch.progress import Progress
from launch.report import ConsoleReporter, Reporter, SilentReporter


def run(arguments: Arguments, placement: Placement) -> Progress:
    """Train as asked and leave everything in the output folder. Collective."""
    saved = open_output(arguments, placement) if placement.rank == 0 else None
    limit_threads(placement)
    device = choose_device(placement)
    with process_group(placement, device, arguments.timeout):
        # Nodes need not share a disk: rank 0 alone reads and writes.
        saved = from_rank_zero(saved, placement)
        return _train(arguments, placement, device, saved)


def _train(arguments: Arguments, placement: Placement, device: torch.device, saved: dict[str, Any] | None) -> Progress:
    learner = Learner(arguments, placement, device)
    progress = Progress()
    if saved is not None:
        learner.load_state_dict(saved["learner"])
        progress = Progress.from_state_dict(saved["progress"])
    folder, steps_per_epoch = Path(arguments.output), len(learner.batches(0))
    reporter: Reporter = SilentReporter()
    if console := write_output(lambda: ConsoleReporter(arguments, progress, steps_per_epoch), folder, placement):
        reporter = console
    with reporter:
        _Run(arguments, placement, learner, progress, reporter).fit()
    write_output(lambda: reporter.on_finish(progress, placement.size, str(device)), folder, placement)
    return progress


@dataclasses.dataclass
class _Run:
    arguments: Arguments
    placement: Placement
    learner: Learner
    progress: Progress
    reporter: Reporter

    def fit(self) -> None:
        """Go on from ``progress`` to the last epoch, leaving checkpoints on the way."""
        self._clock = time.perf_counter() - self.progress.seconds
        self._save()  # from here on a kill leaves something to go on from
        while self.progress.epoch < self.arguments.epochs:
            for batch in self.learner.batches(self.progress.epoch)[self.progress.step :]:
                self._step(batch)
            record = self.progress.finish_epoch(self.learner.test())
            self.reporter.on_epoch(self.progress, record)
            self._save()

    def _step(self, batch: list[int]) -> None:
        try:
            sums = self.learner.step(batch)
        except DivergedError as error:
            step = self.progress.total_steps + 1
            remedy = f"Lower --lr {self.arguments.lr}, or use --normalization renorm"
            self.placement.stop(f"train.py: error: training diverged at step {step}: {error}. {remedy}", 1)
        self.progress.add_step(sums)
        self.reporter.on_step(self.progress, sums)
        every = self.arguments.checkpoint_every
        if every and self.progress.total_steps % every == 0:
            self._save()

    def _save(self) -> None:
        """Collective; rank 0 writes."""
        self.progress.seconds = time.perf_counter() - self._clock
        state = {
            "arguments": dataclasses.asdict(self.arguments),
            "learner": self.learner.state_dict(),
            "progress": self.progress.state_dict(),
        }
        write_output(lambda: self._write(state), Path(self.arguments.output), self.placement)

    def _write(self, state: dict[str, Any]) -> None:
        self.reporter.on_checkpoint()
        save_checkpoint(Path(self.arguments.output), state, self.arguments.keep_checkpoints)
