"""Examines a distributed job before it runs, and names what would make its ranks hang, abort or disagree.

``torchrun ... -m syncaccum.doctor``, or ``mpirun ... python -m mpi4py -m syncaccum.doctor``, on every node, with the
job's own options; alone it looks at this machine. Rank 0 prints one report; a problem makes the exit non-zero.
"""
