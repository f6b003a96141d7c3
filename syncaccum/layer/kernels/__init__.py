"""What is compiled: the passes over data in CPU memory, how to build them, and Triton kernels for vectors on a GPU."""
