"""fastai's optimizer, which is none of torch's, and its accumulation callback: one commit for each optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.utils.data import TensorDataset

from syncaccum import commit_on_step, convert_sync_accum
from tests.oracle import Oracle, assert_same_statistics, concatenate


def make_model() -> Any:
    return convert_sync_accum(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double())


def test_each_step_of_the_wrapped_optimizer_commits_its_window() -> None:
    model = make_model()
    optimizer = OptimWrapper(model.parameters(), torch.optim.SGD, lr=0.1)
    commit_on_step(model, optimizer)
    oracle = Oracle(model)
    for step in range(3):
        for n in (4, 3):
            oracle.forward(torch.randn(n, 3, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        oracle.check_commit()
        assert model[1].num_batches_tracked == step + 1


class _CommitOnStep(Callback):  # type: ignore[misc] # fastai has no types
    """A learner makes its optimizer when it begins to fit."""

    def before_fit(self) -> None:
        commit_on_step(self.learn.model, self.learn.opt)


def test_a_learner_that_accumulates_gradients_commits_once_a_step() -> None:
    data = TensorDataset(torch.randn(24, 3), torch.randn(24, 1))  # its mean of losses is in float32
    loaders: Any = DataLoaders.from_dsets(data, data, bs=4, shuffle=False, device="cpu")
    model = make_model().float()
    reference = nn.BatchNorm1d(4).double()
    seen: list[torch.Tensor] = []
    model[1].register_forward_pre_hook(
        lambda layer, inputs: seen.append(inputs[0].detach()) if layer.training else None
    )
    learner = Learner(loaders, model, loss_func=nn.MSELoss(), opt_func=_make_optimizer, cbs=[GradientAccumulation(12)])
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=0.1, cbs=[_CommitOnStep()])
    assert len(seen) == 6
    for window in (seen[:3], seen[3:]):  # GradientAccumulation counts examples: twelve are three micro-batches
        reference(concatenate(window))
    assert_same_statistics(model[1], reference, rtol=2e-6, atol=1e-6)  # kept in float32


def _make_optimizer(parameters: Any, lr: float) -> OptimWrapper:
    return OptimWrapper(parameters, torch.optim.SGD, lr=lr)
