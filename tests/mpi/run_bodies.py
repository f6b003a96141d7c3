"""Run every body on groups of one to four of this job's ranks; each leaves {size: {body: story}} in a folder.

A job takes seconds to start and a body milliseconds, so one job serves all sizes. The groups of one partition work side
by side, and ranks in a group are other ones than in the job.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
from mpi4py import MPI

from tests.mpi.bodies import BODIES
from tests.mpi.jobs import JOB_SIZE, PARTITIONS


def main(folder: Path) -> None:
    world = MPI.COMM_WORLD
    assert world.size == JOB_SIZE
    torch.set_num_threads(1)
    stories: dict[int, dict[str, str]] = {}
    for sizes in PARTITIONS:
        colours = [colour for colour, size in enumerate(sizes) for _ in range(size)]
        # Keys that count down: rank 0 of a group is the last of its ranks in the job.
        group = world.Split(colours[world.rank], key=-world.rank)
        of_size = stories.setdefault(group.size, {})
        for body in BODIES:
            try:
                torch.manual_seed(0)
                body(MPI.Intracomm(group.Dup()))
                story = ""
            except BaseException:  # pytest's failures are no Exceptions
                story = traceback.format_exc()
            of_size[body.__name__] = story
            (folder / f"{world.rank}.json").write_text(json.dumps(stories))
            if story:
                world.Abort(1)  # the other ranks may wait for this one


if __name__ == "__main__":
    main(Path(sys.argv[1]))
