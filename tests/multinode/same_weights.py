"""python -m tests.multinode.same_weights OUTPUT EXPECTED: whether two runs of train.py left the same weights.

Bit for bit: the same ranks reduce the same numbers in the same order, wherever they are.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.checkpoint import find_checkpoints


def read_tensors(output: str) -> dict[str, Tensor]:
    """Weights, running statistics and SGD's momentum at the end of a run."""
    newest, *_ = find_checkpoints(Path(output)).values()
    saved: dict[str, Any] = torch.load(newest, weights_only=True)
    tensors: dict[str, Tensor] = dict(saved["learner"]["model"])
    for index, state in saved["learner"]["optimizer"]["state"].items():
        tensors[f"momentum of parameter {index}"] = state["momentum_buffer"]
    return tensors


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """What differs, a line for each."""
    if ours.keys() != theirs.keys():
        return [f"only in one of the two: {', '.join(sorted(ours.keys() ^ theirs.keys()))}"]
    return [
        f"{name}: up to {(value.double() - theirs[name].double()).abs().max():.2g} apart"
        for name, value in ours.items()
        if not torch.equal(value, theirs[name])
    ]


def main(output: str, expected: str) -> int:
    ours, theirs = read_tensors(output), read_tensors(expected)
    differences = compare(ours, theirs)
    for line in differences:
        print(line)
    print(f"{len(ours) - len(differences)} of {len(ours)} tensors of {output} and {expected} are equal bit for bit")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
