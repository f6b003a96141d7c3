"""The comparison that the training in containers must pass can also fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from launch.checkpoint import save_checkpoint
from tests.multinode.same_weights import main


def leave_run(folder: Path, weight: Tensor, momentum: Tensor, name: str = "weight") -> str:
    learner = {"model": {name: weight}, "optimizer": {"state": {0: {"momentum_buffer": momentum}}}}
    save_checkpoint(folder, {"learner": learner, "progress": {"total_steps": 1}}, keep=1)
    return str(folder)


@pytest.fixture
def expected(tmp_path: Path) -> str:
    return leave_run(tmp_path / "expected", torch.ones(3), torch.ones(3))


def test_equal_runs(expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(leave_run(tmp_path, torch.ones(3), torch.ones(3)), expected) == 0
    assert "2 of 2 tensors" in capsys.readouterr().out


def test_a_last_bit_is_a_difference(expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = torch.nextafter(torch.ones(3), torch.tensor(2.0))
    assert main(leave_run(tmp_path, other, other), expected) == 1
    printed = capsys.readouterr().out
    assert "weight: up to 1.2e-07 apart" in printed
    assert "momentum of parameter 0: up to 1.2e-07 apart" in printed


def test_another_model_is_a_difference(expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(leave_run(tmp_path, torch.ones(3), torch.ones(3), name="bias"), expected) == 1
    assert "only in one of the two: bias, weight" in capsys.readouterr().out
