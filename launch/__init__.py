"""Training and equivalence scripts for torchrun, and the modules they are made of."""
