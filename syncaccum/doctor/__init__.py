"""The doctor finds out, before a job does, what would make its ranks hang, abort or disagree.

On every node as the job itself is started, ``torchrun ... -m syncaccum.doctor`` or ``mpirun ... python -m mpi4py -m
syncaccum.doctor``; alone, ``python -m syncaccum.doctor`` looks at this machine only.
"""
