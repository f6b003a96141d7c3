"""`make zoo`: try every family of BatchNorm models, go on where the last run stopped, and write docs/zoo.md."""

from __future__ import annotations

import argparse

from benchmarks.zoo.runner import LIBRARIES, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("libraries", nargs="*", default=list(LIBRARIES), help=f"of {', '.join(LIBRARIES)}")
    parser.add_argument("--fresh", action="store_true", help="try again what was tried")
    arguments = parser.parse_args()
    run(arguments.libraries, fresh=arguments.fresh)
