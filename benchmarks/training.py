"""Does a network that accumulates train as it does with the large batch?

The digits ResNet (17 BatchNorm2d) and perceptron (3 BatchNorm1d) of launch/, window 64, one process, by learning
rate, seed and micro-batch size; SGD with momentum 0.9. "BatchNorm@64" takes the whole window at once: what accumulation
should equal.
Losses are means over the last epoch.

    python -m benchmarks.training
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from statistics import mean

import torch
from rich.progress import track

from benchmarks.report import Figure, publish
from launch.arguments import Arguments
from launch.learner import DivergedError, Learner
from launch.placement import Placement
from launch.progress import EpochRecord, Progress

SEEDS = (0, 1, 2)
IMAGES = 1436  # leaves no window a remainder that some micro-batch size would cut down to a single image
Case = tuple[str, str, int, float]  # model, normalization, micro-batch, learning rate

RESNET = [
    ("resnet", normalization, micro_batch, lr)
    for lr in (0.1, 0.4)
    for normalization, micro_batch in (("none", 64), ("renorm", 4), ("batch", 4), ("none", 4), ("running", 4))
]
MLP = [
    ("mlp", normalization, micro_batch, 0.1)
    for normalization, micro_batch in (("none", 64), ("renorm", 1), ("renorm", 2), ("none", 2), ("running", 1))
]


def train(case: Case, seed: int) -> EpochRecord:
    """The last epoch's record; NaN throughout where training diverged."""
    model, normalization, micro_batch, lr = case
    arguments = Arguments(
        model=model, normalization=normalization, micro_batch=micro_batch, lr=lr, seed=seed, train_images=IMAGES
    )
    learner = Learner(arguments, Placement(), torch.device("cpu"))
    progress = Progress()
    try:
        for epoch in range(arguments.epochs):
            for batch in learner.batches(epoch):
                progress.add_step(learner.step(batch))
            progress.finish_epoch(learner.test())
    except DivergedError:
        return EpochRecord(*[math.nan] * 4)
    return progress.history[-1]


def train_all(cases: Sequence[Case]) -> dict[Case, list[EpochRecord]]:
    """By case, a record for each seed. Nothing is timed, so each core trains one."""
    runs = list(itertools.product(cases, SEEDS))
    pool = ProcessPoolExecutor(
        len(os.sched_getaffinity(0)),
        get_context("spawn"),
        torch.set_num_threads,  # small images: a second thread only waits
        (1,),
    )
    with pool:
        records = list(track(pool.map(train, *zip(*runs, strict=True)), "training", len(runs)))
    return {
        case: records[at : at + len(SEEDS)] for case, at in zip(cases, range(0, len(runs), len(SEEDS)), strict=True)
    }


def main() -> None:
    records = train_all([*RESNET, *MLP])
    loss = {case: mean(r.train_loss for r in runs) for case, runs in records.items()}
    accuracy = {case: mean(r.test_accuracy for r in runs) for case, runs in records.items()}
    diverged = {case: sum(math.isnan(r.train_loss) for r in runs) for case, runs in records.items()}
    figures = []
    for lr, target in ((0.1, 1.5), (0.4, None)):
        renorm, large = ("resnet", "renorm", 4, lr), ("resnet", "none", 64, lr)
        note = f"{loss[renorm]:.4f} / {loss[large]:.4f}, means of {len(SEEDS)} seeds"
        figures.append(
            Figure(f"ResNet, lr {lr}: loss of renorm@4 / BatchNorm@64", loss[renorm] / loss[large], target, note=note)
        )
        figures.append(Figure(f"ResNet, lr {lr}: diverged runs of renorm@4", diverged[renorm], 0))
        for policy in ("batch", "none", "running"):
            other = ("resnet", policy, 4, lr)
            name = "BatchNorm" if policy == "none" else policy
            figures.append(Figure(f"ResNet, lr {lr}: loss of {name}@4 / BatchNorm@64", loss[other] / loss[large]))
    for case in MLP:
        name = "BatchNorm" if case[1] == "none" else case[1]
        target = 95.0 if case[1] == "renorm" else None
        what = f"perceptron, lr 0.1: test accuracy of {name}@{case[2]}, %"
        seeds = "seeds " + ", ".join(f"{100 * r.test_accuracy:.1f}" for r in records[case])
        figures.append(Figure(what, 100 * accuracy[case], target, at_least=True, note=seeds))
    details = [
        {
            "case": dict(zip(("model", "normalization", "micro_batch", "lr"), case, strict=True)),
            "seeds": [asdict(r) for r in runs],
        }
        for case, runs in records.items()
    ]
    publish("training", figures, details)


if __name__ == "__main__":
    main()
