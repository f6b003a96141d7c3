"""One rank of a document whose examples start torch.distributed from MPI: mpirun.sh RANKS -m THIS DOCUMENT."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.docs.blocks import run_examples

if __name__ == "__main__":
    document = Path(sys.argv[1])
    count = run_examples(document, int(os.environ["OMPI_COMM_WORLD_RANK"]), document.parent)
    print(f"{count} examples ran")
