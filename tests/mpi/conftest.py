"""The test process reads the bodies' names and is itself no rank: MPI must not start in it."""

from __future__ import annotations

import mpi4py

mpi4py.rc.initialize = False
