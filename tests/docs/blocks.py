"""Runs the Python in a document or in docstrings, with the names that it takes for granted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser
from torch import nn

import syncaccum
from launch.digits import load_split

ROOT = Path(__file__).resolve().parent.parent.parent

_IN_FORCE = Sybil(parsers=[PythonCodeBlockParser(), DocTestParser()])


def run_examples(path: Path, rank: int, folder: Path, **names: Any) -> int:
    """Run all examples of a file in their order, in one namespace; says how many there were.

    Args:
        path: the file.
        rank: which micro-batches it gets.
        folder: where it may write.
        names: what it takes for granted besides.

    Raises:
        Exception: what an example raises, or SybilFailure where it does not print what the file says.
    """
    document = _IN_FORCE.parse(path)
    document.namespace.update({**_make_names(rank, folder), **names})
    examples = list(document.examples())
    for example in examples:
        example.evaluate()
    return len(examples)


def _make_names(rank: int, folder: Path) -> dict[str, Any]:
    """What the documents assume: a network with BatchNorm, real images in micro-batches, a loss, an optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 10))
    images, _ = load_split(torch.device("cpu"), torch.float32)
    # Rank 0 has more micro-batches than the others, and the last of them is a smaller one.
    start, sizes = (0, [8, 8, 4]) if rank == 0 else (20 * rank, [8, 8])
    mine = slice(start, start + sum(sizes))
    parts = [torch.split(samples[mine], sizes) for samples in (images.pixels, images.classes)]
    return {
        "syncaccum": syncaccum,
        "model": model,
        "loss_fn": F.cross_entropy,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "micro_batches": list(zip(*parts, strict=True)),
        "folder": folder,
    }
