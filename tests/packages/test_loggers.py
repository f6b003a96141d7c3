"""What a commit did, in TensorBoard: written by its usual calls, read back by its own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from syncaccum import commit_on_step, convert_sync_accum

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter


def train(*sizes: int) -> Any:
    """A report for each step: its micro-batch has so many values."""
    model = convert_sync_accum(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = commit_on_step(model, optimizer)
    for size in sizes:
        model(torch.randn(size, 3)).sum().backward()
        optimizer.step()
        yield handle.report


def read(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_add_scalars_takes_a_report(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step, report in enumerate(train(8, 6)):
            writer.add_scalars("commit", report.as_dict(prefix=""), step)
    # It makes a run of each number, and one chart of all.
    assert read(tmp_path / "commit_max_values", "commit") == [(0, 8.0), (1, 6.0)]
    assert read(tmp_path / "commit_ranks", "commit") == [(0, 1.0), (1, 1.0)]
    assert len(list(tmp_path.glob("commit_*"))) == 6


def test_add_scalar_takes_each_number_and_add_scalars_the_layers_values(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step, report in enumerate(train(8, 6)):
            for name, number in report.as_dict().items():
                writer.add_scalar(name, number, step)
            writer.add_scalars("values", report.values, step)
    assert read(tmp_path, "syncaccum/min_values") == [(0, 8.0), (1, 6.0)]
    assert all(seconds > 0 for _, seconds in read(tmp_path, "syncaccum/seconds"))
    assert read(tmp_path / "values_1", "values") == [(0, 8.0), (1, 6.0)]
