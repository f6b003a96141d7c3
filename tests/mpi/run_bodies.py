"""Run every body on all ranks of this job and leave each rank's outcomes in a folder: rank -> {body: story}."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
from mpi4py import MPI

from tests.mpi.bodies import BODIES


def main(folder: Path) -> None:
    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    stories: dict[str, str] = {}
    for body in BODIES:
        try:
            body(comm.Dup())
            story = ""
        except BaseException:  # pytest's failures are no Exceptions
            story = traceback.format_exc()
        stories[body.__name__] = story
        (folder / f"{comm.rank}.json").write_text(json.dumps(stories))
        if story:
            comm.Abort(1)  # the other ranks may wait for this one


if __name__ == "__main__":
    main(Path(sys.argv[1]))
