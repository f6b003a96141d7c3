"""The tables of docs/which-mode.md hold what the published experiment measured."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest

from tests.docs.blocks import ROOT

_PAGE = (ROOT / "docs/which-mode.md").read_text().splitlines()
_RESULTS = json.loads((ROOT / "benchmarks/results/equivalence.json").read_text())["cases"]
_POLICIES = {"BatchNorm per micro-batch": "batchnorm"}  # the others have their own names

# What a table's sentence begins with: the task, its learning rate, window, and each epoch's last window.
_TABLES = {
    "Perceptron on digits": ("mlp", 0.1, 64, 0),
    "ResNet on digits": ("resnet", 0.1, 64, 0),
    "Denoising photographs": ("denoise", 0.03, 64, 0),
    "Segmenting mosaics": ("segment", 0.05, 32, 0),
    "MNIST, window": ("mnist", 0.3, 64, 0),
    "Fine-tuning the ResNet": ("finetune", 0.1, 64, 0),
    "ResNet-18 on digits": ("resnet18", 0.01, 64, 0),
    "Perceptron, epochs with a rest of 29": ("mlp", 0.1, 64, 29),
    "ResNet, epochs with a rest of 29": ("resnet", 0.1, 64, 29),
    "Denoising, epochs with a rest of 20": ("denoise", 0.03, 64, 20),
    "MNIST, epochs with a rest of 32": ("mnist", 0.3, 64, 32),
}


@pytest.mark.parametrize("beginning", _TABLES)
def test_each_cell_is_the_published_gap(beginning: str) -> None:
    start = next(number for number, line in enumerate(_PAGE) if line.startswith(f"{beginning}"))
    head, _, *rows = _read_table(start)
    assert rows
    for size, seeds, *cells in rows:
        runs = [_find(beginning, _POLICIES.get(column, column), int(size)) for column in head[2:]]
        assert int(seeds) == max(map(len, runs))
        for column, cell, found in zip(head[2:], cells, runs, strict=True):
            assert cell == _describe_gap(beginning, found), f"{column}, micro-batch {size}"


@pytest.mark.parametrize("beginning", _TABLES)
def test_the_large_batch_is_the_published_one(beginning: str) -> None:
    _, rate, window, _ = _TABLES[beginning]
    sentence = next(line for line in _PAGE if line.startswith(beginning))
    scores = [run["score"] for run in _find(beginning, "reference", window).values()]
    shown = f"large batch {_round(beginning, statistics.fmean(scores))}"
    if len(scores) > 1:
        shown += f", {_round(beginning, statistics.stdev(scores))} from seed to seed"
    assert sentence.endswith(f"{shown}:")
    assert f", window {window}, " in sentence
    assert f" at learning rate {rate}, " in sentence


def _read_table(start: int) -> list[list[str]]:
    lines = iter(_PAGE[start:])
    first = next(line for line in lines if line.startswith("|"))
    rows = [first]
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(line)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def _find(beginning: str, policy: str, micro_batch: int) -> dict[int, Any]:
    """By seed: on one rank, in float32, the data in its order."""
    task, rate, window, rest = _TABLES[beginning]
    wanted: dict[str, Any] = {
        "task": task, "lr": rate, "policy": policy, "micro_batch": micro_batch, "window": window,
        "ranks": 1, "dtype": "float32", "permutation": 0, "rest": rest,
    }  # fmt: skip
    return {run["case"]["seed"]: run for run in _RESULTS if wanted.items() <= run["case"].items()}


def _describe_gap(beginning: str, runs: dict[int, Any]) -> str:
    """Mean over seeds of the score less the large batch's."""
    if not runs:
        return "not run"
    lost = [run["outcome"] for run in runs.values() if run["score"] is None]
    if lost:
        return str(lost[0]) if len(lost) == len(runs) else f"{len(lost)} of {len(runs)} {lost[0]}"
    reference = _find(beginning, "reference", _TABLES[beginning][2])
    gap = statistics.fmean(run["score"] - reference[seed]["score"] for seed, run in runs.items())
    return _round(beginning, gap, "+")


def _round(beginning: str, score: float, sign: str = "") -> str:
    return f"{score:{sign}.2f}" if _TABLES[beginning][0] == "denoise" else f"{100 * score:{sign}.1f}"
