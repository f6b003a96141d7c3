"""The tables of docs/which-mode.md hold what the published experiment measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.docs.blocks import ROOT

_PAGE = (ROOT / "docs/which-mode.md").read_text().splitlines()
_RESULTS = json.loads((ROOT / "benchmarks/results/equivalence.json").read_text())["cases"]
_POLICIES = {"BatchNorm per micro-batch": "batchnorm", "GroupNorm": "groupnorm"}  # the others have their own names

# What a table's sentence begins with: the task, and its learning rate.
_TABLES = {
    "Perceptron on digits": ("mlp", 0.1),
    "ResNet on digits": ("resnet", 0.1),
    "Denoising photographs": ("denoise", 0.03),
    "Fine-tuning the ResNet": ("finetune", 0.01),
}


@pytest.mark.parametrize("beginning", _TABLES)
def test_each_cell_is_the_published_score(beginning: str) -> None:
    task, rate = _TABLES[beginning]
    start = next(number for number, line in enumerate(_PAGE) if line.startswith(beginning))
    head, _, *rows = _read_table(start)
    assert len(rows) > 1
    for size, *cells in rows:
        for column, cell in zip(head[1:], cells, strict=True):
            policy = _POLICIES.get(column, column)
            assert cell == _describe(task, rate, policy, int(size)), f"{column}, micro-batch {size}"


@pytest.mark.parametrize("beginning", _TABLES)
def test_the_large_batch_is_the_published_one(beginning: str) -> None:
    sentence = next(line for line in _PAGE if line.startswith(beginning))
    assert f"large batch {_describe(*_TABLES[beginning], 'reference', 64)}" in sentence


def _read_table(start: int) -> list[list[str]]:
    lines = iter(_PAGE[start:])
    first = next(line for line in lines if line.startswith("|"))
    rows = [first]
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(line)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def _describe(task: str, rate: float, policy: str, micro_batch: int) -> str:
    """A cell: of the first seed, one rank, float32, the data in its order."""
    wanted: dict[str, Any] = {
        "task": task, "lr": rate, "policy": policy, "micro_batch": micro_batch,
        "seed": 0, "ranks": 1, "dtype": "float32", "permutation": 0,
    }  # fmt: skip
    found = [r for r in _RESULTS if wanted.items() <= r["case"].items()]
    if not found:
        return "not run"
    (result,) = found
    if result["score"] is None:
        outcome: str = result["outcome"]
        return outcome
    return f"{result['score']:.2f}" if task == "denoise" else f"{result['score']:.1%}".rstrip("%")
