"""The doctor's command line; see ``--help``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from syncaccum.doctor.examination import Examination
from syncaccum.doctor.findings import ProblemError
from syncaccum.doctor.report import Report, render_json, render_text

# torchrun looks after its ranks every 0.1 s, and when one has failed it ends the others at once.
_LAUNCHER_REACTS_WITHIN = 5.0


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _build_parser().parse_args(argv)

    def publish(report: Report) -> None:
        print(render_json(report) if arguments.json else render_text(report), flush=True)

    examination = Examination(arguments.timeout, arguments.model, publish)
    try:
        healthy = examination.run()
    except ProblemError as error:
        _report_alone(examination, error)
        healthy = False
    if not healthy:
        _leave()


def _report_alone(examination: Examination, error: ProblemError) -> None:
    """What this rank knows, where no report of all ranks can be: rank 0's in its place, on others one per node."""
    placement, report = examination.placement, examination.report
    report.add([error.finding])
    if placement.rank == 0:
        examination.publish(report)
    elif placement.speaks:
        print(f"rank {placement.rank} cannot tell rank 0\n{render_text(report)}", file=sys.stderr, flush=True)
    else:  # the launcher would end the one that speaks, had this one left first
        time.sleep(_LAUNCHER_REACTS_WITHIN)


def _leave() -> NoReturn:
    """Exit 1, past whatever a broken group or a store that never answers still keeps busy."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m syncaccum.doctor",
        description="Examine a distributed job before it runs: torchrun ... -m syncaccum.doctor on every node, with "
        "the job's own options; or mpirun ... python -m mpi4py -m syncaccum.doctor. Prints one report, on rank 0, and "
        "exits non-zero if it found a problem.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print the report as JSON, on rank 0's stdout")
    add(
        "--timeout",
        type=_parse_seconds,
        default=60.0,
        metavar="SECONDS",
        help="for the ranks to meet, and for each thing they do together (default 60)",
    )
    add(
        "--model",
        type=_parse_factory,
        metavar="PACKAGE.MODULE:FACTORY",
        help="compare the layers of the model that this function returns on every rank; it is converted if need be",
    )
    return parser


def _parse_seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


_parse_seconds.__name__ = "number of seconds above 0"  # argparse says "invalid ... value"


def _parse_factory(text: str) -> str:
    module, _, function = text.partition(":")
    if not module or not function:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form package.module:factory")
    return text


if __name__ == "__main__":
    main()
