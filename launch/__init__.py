"""A training script for torchrun and mpirun, and the modules it is made of."""
