"""The doctor's command line; see ``--help``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from syncaccum import doctor
from syncaccum.doctor.examination import Examination
from syncaccum.doctor.launcher import locate
from syncaccum.doctor.rank import Finding, ProblemError, Rank
from syncaccum.doctor.report import Report


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parse_arguments(argv)
    report = Report(arguments.timeout, arguments.json)
    rank = os.environ.get("RANK", "")
    us, healthy = Rank(int(rank) if rank.isdecimal() else 0), False  # where this process cannot be located
    try:
        us = locate()
        healthy = Examination(us, report).run(arguments.model)
    except ProblemError as error:
        report.add([*us.findings, Finding("problem", *error.args)])
        if us.rank == 0:
            print(report.render(), flush=True)
        elif us.speaks:
            print(f"rank {us.rank} cannot tell rank 0\n{report.render_text()}", file=sys.stderr, flush=True)
        else:  # torchrun would at once end the one that speaks, had this one left first
            time.sleep(5.0)
    if not healthy:
        os._exit(1)  # past whatever a broken group or a store that never answers still keeps busy


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m syncaccum.doctor", description=doctor.__doc__, allow_abbrev=False)
    waiting = "seconds for the ranks to meet, and for each thing they do together (default 60)"
    compared = "compare the layers of the model that this function returns on every rank; it is converted if need be"
    parser.add_argument("--json", action="store_true", help="print the report as JSON, on rank 0's stdout")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help=waiting)
    parser.add_argument("--model", metavar="PACKAGE.MODULE:FACTORY", help=compared)
    arguments = parser.parse_args(argv)
    if not 0 < arguments.timeout < float("inf"):
        parser.error(f"--timeout is {arguments.timeout:g}: give a number of seconds above 0")
    return arguments


if __name__ == "__main__":
    main()
