"""Compile the Triton kernels for GPUs, as a program: ``python -m tests.packages.compile_kernels``. It needs no GPU.

A process of its own, because Triton's interpreter leaves its marks in Triton.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from syncaccum.layer.kernels import vectors

CONSTANTS: dict[str, dict[str, Any]] = {
    "find_vectors": {"POLICY": 4, "EPS": 1e-5, "PRIOR_COUNT": 1.0, "R_MAX": 1.5, "D_MAX": 0.5, "BLOCK": 128},
    "merge_vectors": {"PARTS": 4, "EPS": 1e-5, "BLOCK": 128},
    "find_window_vectors": {"KNOWS_PRIOR": False, "COUNTS": True, "EPS": 1e-5, "BLOCK": 128},
    "pay": {"AGAIN": False, "BLOCK": 128},
}
"""By kernel."""

# Compute capability, dtype of the passes, and whether there is a weight.
CASES = [(80, "fp32", True), (90, "fp64", False), (75, "fp32", False)]

_KINDS = {"count": "*i32", "batches": "*i64", "payers": "i64"}
_WIDE = ["wide", "window", "prior", "squares", "owed", "owed_after"]
_NUMBERS = ["n", "divisor", "channels", "samples", "of_sample", "trained", "untrained", "values", "last"]


def compile_kernel(name: str, capability: int, dtype: str, affine: bool) -> Any:
    """The compiled kernel, down to machine code."""
    kernel = getattr(vectors, name)
    constants = dict(CONSTANTS[name])
    if not affine and "weight" in kernel.arg_names:
        constants |= {"weight": None, "bias": None}
    kinds = _KINDS | dict.fromkeys(_WIDE, "*fp64") | dict.fromkeys(_NUMBERS, "i32")
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds.get(argument, f"*{dtype}") for argument in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


if __name__ == "__main__":
    for name in CONSTANTS:
        for case in CASES:
            print(name, *case, len(compile_kernel(name, *case).asm["cubin"]), "bytes")
