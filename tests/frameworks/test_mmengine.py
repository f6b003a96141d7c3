"""mmengine's Runner: the hook on the documents' page converts, and each step of its OptimWrapper commits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from syncaccum import commit_on_step, convert_sync_accum, discard
from tests.frameworks.steps import Steps

pytestmark = pytest.mark.filterwarnings("ignore")  # what mmengine's loggers and versions warn of


class SyncAccumHook(Hook):  # type: ignore[misc] # not installed where types are checked
    def before_train(self, runner: Any) -> None:
        discard(convert_sync_accum(runner.model))
        commit_on_step(runner.model, runner.optim_wrapper)
        self.steps = Steps(runner.model, runner.optim_wrapper.optimizer)


class Network(BaseModel):  # type: ignore[misc] # not installed where types are checked
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()

    def forward(self, x: Tensor, y: Tensor, mode: str) -> dict[str, Tensor]:
        return {"loss": (self.net(x) - y).square().mean()}


def test_each_step_commits_its_window_also_the_short_one_at_the_end(tmp_path: Path) -> None:
    model = Network()
    data = TensorDataset(torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64))
    hook = SyncAccumHook()
    runner = Runner(
        model, str(tmp_path), DataLoader(data, 3), train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper=OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.05), accumulative_counts=4),
        custom_hooks=[hook], log_level="ERROR",
    )  # fmt: skip
    runner.train()
    assert hook.steps.windows == [4, 4, 2]
