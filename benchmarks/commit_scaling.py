"""What a commit costs over 2 to 16 ranks, gloo and MPI, and what it would cost over thousands.

ResNet-50's 53 layers. In every round the bare all-reduce of as many bytes and the commit take turns, and their ratio is
taken round by round. Bare all-reduces of other sizes feed an alpha-beta model, which is carried to 4,096 ranks; see
``model_of``.

    python -m benchmarks.commit_scaling
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from benchmarks.commit_speed import resnet50_widths, timed
from benchmarks.report import RESULTS, Figure, publish
from syncaccum import SyncAccumBatchNorm, commit
from syncaccum.ranks.agreement import HEADER
from tests.ranks import Rank, run_on_ranks

CHECKOUT = Path(__file__).resolve().parent.parent
RANKS = (2, 4, 8, 16)
# Doubles; the last but one is what ResNet-50's commit sends.
MESSAGE = HEADER + sum(1 + 2 * width for width in resnet50_widths())
SIZES = (1, 1_000, 10_000, MESSAGE, 4 * MESSAGE)
CARRIED_TO = 4_096


@dataclass
class Times:
    """Seconds on rank 0 of one job: medians of bare all-reduces by size, and of the commit; ratios round by round."""

    bare: dict[int, float] = field(default_factory=dict)
    commit: float = 0.0
    ratio: float = 0.0


def measure(
    group: Any, all_reduce: Callable[[torch.Tensor], object], barrier: Callable[[], object], ranks: int
) -> Times:
    """Collective; ``group`` is what the layers get as process_group."""
    rounds = max(40, 400 // ranks)
    model = nn.Sequential(*(SyncAccumBatchNorm(width, process_group=group) for width in resnet50_widths()))
    inputs = [torch.randn(2, width) for width in resnet50_widths()]
    messages = {size: torch.zeros(size, dtype=torch.float64) for size in SIZES}

    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    commits = []
    for _ in range(rounds):
        with torch.no_grad():
            for layer, x in zip(model, inputs, strict=True):
                layer(x)
        for size, message in messages.items():
            seconds[size].append(timed(lambda message=message: all_reduce(message), barrier))  # type: ignore[misc]
        commits.append(timed(lambda: commit(model), barrier))
    skip = rounds // 10  # the first ones make connections and agree on the layers
    ratios = [c / b for c, b in zip(commits[skip:], seconds[MESSAGE][skip:], strict=True)]
    return Times(
        {size: statistics.median(s[skip:]) for size, s in seconds.items()},
        statistics.median(commits[skip:]),
        statistics.median(ratios),
    )


def measure_gloo(rank: Rank) -> Times:
    return measure(None, dist.all_reduce, dist.barrier, rank.size)


def run_gloo(ranks: int) -> Times:
    times: Times = run_on_ranks(measure_gloo, ranks, patience=600.0)[0]
    return times


def measure_mpi(output: Path) -> None:
    """What ``mpirun`` starts on every rank."""
    from mpi4py import MPI

    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    times = measure(comm, lambda t: comm.Allreduce(MPI.IN_PLACE, [t, MPI.DOUBLE]), comm.Barrier, comm.Get_size())
    if comm.Get_rank() == 0:
        output.write_text(json.dumps(asdict(times)))


def run_mpi(programs: Path, ranks: int) -> Times:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "times.json"
        subprocess.run(
            ["launch/mpirun.sh", str(ranks), "-m", "benchmarks.commit_scaling", str(output)],
            cwd=CHECKOUT,
            env={**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
            check=True,
        )
        times = json.loads(output.read_text())
    return Times({int(size): s for size, s in times["bare"].items()}, times["commit"], times["ratio"])


@dataclass(frozen=True)
class Model:
    """T(p, n) = steps(p) alpha + bytes(p, n) beta, in seconds; n in bytes."""

    algorithm: str
    alpha: float
    beta: float

    def predict(self, ranks: NDArray[np.float64], size: float) -> NDArray[np.float64]:
        steps, moved = _cost(self.algorithm, ranks, size)
        seconds: NDArray[np.float64] = steps * self.alpha + moved * self.beta
        return seconds


def _cost(algorithm: str, p: Any, n: Any) -> tuple[Any, Any]:
    """Messages one after the other, and bytes through one rank, of an all-reduce over p ranks of their own machines."""
    if algorithm == "ring":  # gloo's: reduce-scatter, then all-gather
        return 2 * (p - 1), 2 * n * (p - 1) / p
    return 2 * np.log2(p), 2 * n * (p - 1) / p  # MPI's for such sizes: Rabenseifner's, halving and doubling


def model_of(algorithm: str, by_ranks: dict[int, Times], cores: int) -> Model:
    """Alpha and beta by least squares of the relative error, over all sizes where each rank has a core.

    Assumptions when carried further: every rank on a machine of its own, links that do not disturb one another,
    latency and bandwidth of this machine's loopback or shared memory, the same algorithm for any number of ranks, no
    rank late. A real network has other alphas and betas.
    """
    rows, targets = [], []
    for ranks, times in by_ranks.items():
        if ranks <= cores:
            for size, seconds in times.bare.items():
                rows.append(np.array(_cost(algorithm, ranks, 8 * size)) / seconds)
                targets.append(1.0)
    (alpha, beta), *_ = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)
    return Model(algorithm, float(alpha), float(beta))


def draw(measured: dict[str, dict[int, Times]], models: dict[str, Model]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (cost, overhead) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    carried = np.geomspace(2, CARRIED_TO, 60)
    for (name, by_ranks), color in zip(measured.items(), ("C0", "C1", "C2"), strict=False):
        ranks = list(by_ranks)
        cost.plot(ranks, [t.bare[MESSAGE] * 1e3 for t in by_ranks.values()], "o", color=color, label=f"{name}: bare")
        cost.plot(ranks, [t.commit * 1e3 for t in by_ranks.values()], "x", color=color, label=f"{name}: commit")
        predicted = models[name].predict(carried, 8 * MESSAGE)
        cost.plot(carried, predicted * 1e3, "-", color=color, lw=1, label=f"{name}: model, own machines")
        own = by_ranks[2].commit - by_ranks[2].bare[MESSAGE]  # what does not depend on the number of ranks
        overhead.plot(carried, (predicted + own) / predicted, "-", color=color, lw=1, label=f"{name}: model")
        overhead.plot(ranks, [t.ratio for t in by_ranks.values()], "o", color=color, label=f"{name}: measured")
    overhead.axhline(1.3, color="gray", ls=":", lw=1)
    cost.set(xscale="log", yscale="log", xlabel="ranks", ylabel="ms", title=f"ResNet-50: {8 * MESSAGE / 1e3:.0f} kB")
    overhead.set(xscale="log", xlabel="ranks", title="commit / bare all-reduce", ylim=(0.9, None))
    for axes in (cost, overhead):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(RESULTS / "commit_scaling.png", dpi=110)


def main() -> None:
    beside_python = Path(sys.executable).parent
    libraries = {"Open MPI": beside_python, "MPICH": beside_python.parent / "mpich" / "bin"}
    measured: dict[str, dict[int, Times]] = {"gloo": {p: run_gloo(p) for p in RANKS}}
    for name, programs in libraries.items():
        measured[name] = {p: run_mpi(programs, p) for p in RANKS}
    alone = run_gloo(1).commit
    cores = len(os.sched_getaffinity(0))
    models = {
        name: model_of("ring" if name == "gloo" else "halving", by_ranks, cores) for name, by_ranks in measured.items()
    }
    figures = [
        Figure(
            f"commit / bare all-reduce, {name}, {ranks} ranks",
            times.ratio,
            1.3,
            note=f"{times.commit * 1e3:.2f} / {times.bare[MESSAGE] * 1e3:.2f} ms",
        )
        for name, by_ranks in measured.items()
        for ranks, times in by_ranks.items()
    ]
    figures.append(Figure("a commit on one rank, which has no one to wait for, ms", alone * 1e3))
    for name, model in models.items():
        seconds = float(model.predict(np.array([float(CARRIED_TO)]), 8 * MESSAGE)[0])
        note = f"{model.algorithm}: alpha {model.alpha * 1e6:.1f} us, beta {1e-9 / model.beta:.2f} GB/s"
        figures.append(
            Figure(f"model, {name}, {CARRIED_TO} ranks on machines of their own, ms", seconds * 1e3, note=note)
        )
    publish(
        "commit_scaling",
        figures,
        {
            "alone": alone,
            "times": {name: {p: asdict(t) for p, t in by_ranks.items()} for name, by_ranks in measured.items()},
            "models": {name: asdict(model) for name, model in models.items()},
            "assumptions": model_of.__doc__,
        },
    )
    draw(measured, models)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure_mpi(Path(sys.argv[1]))
    else:
        main()
