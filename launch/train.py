"""Train on digits with accumulated gradients and BatchNorm statistics of the global batch.

torchrun --standalone --nproc-per-node 2 launch/train.py, or python -m launch.train for a single process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: Python has put this folder on the path, we need the one above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.arguments import MISSING_PACKAGE_REMEDY, parse_arguments
from launch.placement import Placement


def main(argv: Sequence[str] | None = None) -> None:
    placement = Placement.from_environment()
    arguments = parse_arguments(argv, placement)
    try:
        # Late: torch takes seconds to import, and a mistyped option should not wait for it.
        from launch.training import run
    except ImportError as error:
        placement.stop(f"train.py: error: {error}; {MISSING_PACKAGE_REMEDY}", 2)
    run(arguments, placement)


if __name__ == "__main__":
    main()
