"""Does accumulation train the network that the large batch trains? One command compares all normalization policies.

The same network, data, initial weights and order: BatchNorm on the whole window is the reference, every other case
accumulates over micro-batches. Finished cases are kept in the output folder; a second start goes on behind them.

    python -m benchmarks.equivalence --quick
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.equivalence.cases import ANOTHER_WINDOW, POLICIES, REFERENCE, TASKS
from benchmarks.equivalence.plan import Limits, Plan, plan_full, plan_quick


def main(argv: Sequence[str] | None = None) -> None:
    parser = _build_parser()
    options = parser.parse_args(argv)
    _check(parser, options)
    try:
        _start(parser, options)
    except ImportError as error:
        parser.exit(1, f"{parser.prog}: error: {error}; pip install 'syncaccum[experiment]' brings what it needs\n")
    except OSError as error:
        remedy = "make room or get the rights to write there, or give another folder; finished cases are kept"
        parser.exit(1, f"{parser.prog}: error: {error}; {remedy}\n")


def _start(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.redraw:
        _redraw(Path(options.redraw))
        return
    plan = (plan_quick if options.quick else plan_full)(list(dict.fromkeys(options.seeds)))
    limits = Limits(options.tasks, options.policies, options.micro_batches, options.lrs, options.ranks, options.steps)
    plan = limits.apply(plan)
    if not plan:
        parser.error("no case is left: the options that limit the plan exclude each other")
    _run(plan, Path(options.output), options.publish and Path(options.publish))


def _run(plan: Plan, output: Path, publish: Path | None) -> None:
    # Late: torch takes seconds to import, and a mistyped option should not wait for it.
    import torch

    from benchmarks.equivalence.report import report
    from benchmarks.equivalence.runner import run

    torch.set_num_threads(1)  # small images: a second thread only waits
    report(run(plan, output), [output] if publish is None else [output, publish])


def _redraw(folder: Path) -> None:
    from benchmarks.equivalence.report import redraw

    redraw(folder)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps}: give 1 or more")
    if options.redraw and not Path(options.redraw, "equivalence.json").is_file():
        parser.error(f"--redraw {options.redraw}: there is no equivalence.json; give a folder that has one")
    for option in ("output", "publish"):
        folder = getattr(options, option)
        if folder and any(
            os.path.exists(path) and not os.path.isdir(path) for path in (Path(folder), *Path(folder).parents)
        ):
            parser.error(f"--{option} {folder}: that is, or is below, a file; give a folder")


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.equivalence",
        description="Compare normalization policies under gradient accumulation with BatchNorm on the whole window.",
        allow_abbrev=False,
    )
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="a small part of the plan, for a minute on one core")
    scale.add_argument("--full", action="store_true", help="the whole plan, for two hours (default)")
    scale.add_argument("--redraw", metavar="FOLDER", help="train nothing; draw the pictures of its equivalence.json")
    add = parser.add_argument
    add("--output", default="runs/equivalence", help="folder for finished cases, JSON and plot (default: %(default)s)")
    add("--publish", metavar="FOLDER", help="also write equivalence.json and the pictures there")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3, 4],
        help="of weights and data order; long parts of the plan use the first, or the first two",
    )
    limits = parser.add_argument_group(
        "limits",
        "run only this part of the plan, and the references it needs; two processes may share an output folder",
    )
    add = limits.add_argument
    add("--tasks", nargs="+", choices=TASKS)
    add("--policies", nargs="+", choices=(*POLICIES, REFERENCE, ANOTHER_WINDOW))
    add("--micro-batches", nargs="+", type=int, metavar="SAMPLES")
    add("--lrs", nargs="+", type=float, metavar="RATE")
    add("--ranks", nargs="+", type=int, metavar="NUMBER")
    add("--steps", type=int, help="at most so many optimizer steps in each case")
    return parser


if __name__ == "__main__":
    main()
