"""Ignite's trainer: commit_on_step closes each window of its accumulation."""

from __future__ import annotations

import torch
from ignite.engine import create_supervised_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from syncaccum import commit_on_step, convert_sync_accum
from tests.frameworks.steps import Steps


def test_each_step_commits_its_window() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    convert_sync_accum(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    commit_on_step(model, optimizer)
    steps = Steps(model, optimizer)
    data = TensorDataset(torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64))
    trainer = create_supervised_trainer(model, optimizer, nn.MSELoss(), gradient_accumulation_steps=4)
    trainer.run(DataLoader(data, 3), max_epochs=2)
    # Ten micro-batches an epoch: to Ignite a window goes on in the next.
    assert steps.windows == [4] * 5
