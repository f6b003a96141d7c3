"""The doctor's command line; see ``--help``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from syncaccum.doctor.examination import Examination
from syncaccum.doctor.findings import ProblemError
from syncaccum.doctor.placement import locate
from syncaccum.doctor.rank import Rank
from syncaccum.doctor.report import Report, render_json, render_text

_DESCRIPTION = """Examine a distributed job before it runs: torchrun ... -m syncaccum.doctor on every node, with the job's
own options; or mpirun ... python -m mpi4py -m syncaccum.doctor. Prints one report, on rank 0; exits non-zero on a problem.
"""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parse_arguments(argv)

    def publish(report: Report) -> None:
        print(render_json(report) if arguments.json else render_text(report), flush=True)

    report = Report(arguments.timeout)
    # Should it turn out that this process cannot be located.
    rank = os.environ.get("RANK", "")
    us = Rank(int(rank) if rank.isdecimal() else 0)
    try:
        us = locate()
        healthy = Examination(us, report, publish).run(arguments.model)
    except ProblemError as error:
        report.add([*us.findings, error.finding])
        healthy = False
        if us.rank == 0:
            publish(report)
        elif us.speaks:
            print(f"rank {us.rank} cannot tell rank 0\n{render_text(report)}", file=sys.stderr, flush=True)
        else:  # torchrun would at once end the one that speaks, had this one left first
            time.sleep(5.0)
    if not healthy:
        os._exit(1)  # past whatever a broken group or a store that never answers still keeps busy


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m syncaccum.doctor", description=_DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--json", action="store_true", help="print the report as JSON, on rank 0's stdout")
    waiting = "seconds for the ranks to meet, and for each thing they do together (default 60)"
    add("--timeout", type=float, default=60.0, metavar="SECONDS", help=waiting)
    compared = "compare the layers of the model that this function returns on every rank; it is converted if need be"
    add("--model", metavar="PACKAGE.MODULE:FACTORY", help=compared)
    arguments = parser.parse_args(argv)
    if not 0 < arguments.timeout < float("inf"):
        parser.error(f"--timeout is {arguments.timeout:g}: give a number of seconds above 0")
    return arguments


if __name__ == "__main__":
    main()
