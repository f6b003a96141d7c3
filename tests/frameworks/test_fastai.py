"""fastai's learner with SyncAccumCallback beside its accumulation: one commit for each optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import Learner
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.optimizer import SGD, OptimWrapper
from torch import nn
from torch.utils.data import TensorDataset

from syncaccum import commit_on_step, convert_sync_accum
from syncaccum.integrations.fastai import SyncAccumCallback
from tests.oracle import Oracle, assert_same_statistics, concatenate, make_reference

# Of fastai, when it loads what lr_find has saved.
pytestmark = pytest.mark.filterwarnings("ignore:.*numpy.core is deprecated:DeprecationWarning")


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


class Watch(Callback):  # type: ignore[misc] # fastai has no types
    """Keeps what the layer saw, by commit. Its order is after SyncAccumCallback's, which converts the model."""

    order = 1

    def __init__(self) -> None:
        self.windows: list[list[torch.Tensor]] = [[]]
        self.commits = 0

    def before_fit(self) -> None:
        self.layer: Any = self.learn.model[1]
        self.commits = int(self.layer.num_batches_tracked)
        self.windows = [[]]
        self.hook = self.layer.register_forward_pre_hook(lambda _, inputs: self.see(inputs[0]))

    def see(self, x: torch.Tensor) -> None:
        if self.layer.training:
            self.windows[-1].append(x.detach())

    def after_batch(self) -> None:
        if self.layer.num_batches_tracked > self.commits:
            self.commits += 1
            self.windows.append([])

    def after_fit(self) -> None:
        self.hook.remove()


def make_learner(*callbacks: Callback, optimizer: Any = SGD) -> tuple[Any, Watch]:
    # Its mean of losses is in float32.
    data = TensorDataset(torch.randn(28, 3), torch.randn(28, 1))
    loaders: Any = DataLoaders.from_dsets(data, data, bs=4, shuffle=False, device="cpu")
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    watch = Watch()
    # GradientAccumulation counts examples: twelve are three micro-batches.
    watch.committing = SyncAccumCallback()
    callbacks = (GradientAccumulation(12), watch.committing, watch, *callbacks)
    return Learner(loaders, model, loss_func=nn.MSELoss(), opt_func=optimizer, cbs=callbacks), watch


def check_fit(learner: Any, watch: Watch) -> None:
    """An epoch of seven micro-batches: two windows, and one micro-batch that fastai leaves without a step."""
    reference = make_reference(learner.model[1])
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=0.1)
    assert [len(window) for window in watch.windows] == [3, 3, 1]
    for window in watch.windows[:2]:
        reference(concatenate(window))
    layer = learner.model[1]
    assert_same_statistics(layer, reference, rtol=2e-6, atol=1e-6)  # kept in float32
    assert layer.window.count == 0
    assert watch.committing.report.values == {"1": 12}


def _make_optimizer(parameters: Any, lr: float) -> OptimWrapper:
    """One of torch's; SGD is fastai's own."""
    return OptimWrapper(parameters, torch.optim.SGD, lr=lr)


@pytest.mark.parametrize("optimizer", [SGD, _make_optimizer])
def test_a_learner_that_accumulates_gradients_commits_once_a_step(optimizer: Any) -> None:
    check_fit(*make_learner(optimizer=optimizer))


class SkipOne(Callback):  # type: ignore[misc] # fastai has no types
    """What MixedPrecision does with an overflow, once, and in its order: after GradientAccumulation."""

    order = MixedPrecision.order
    has_skipped = False

    def before_step(self) -> None:
        if not self.has_skipped:
            self.has_skipped = True
            raise CancelStepException


def test_a_skipped_step_leaves_its_window_to_the_next() -> None:
    learner, watch = make_learner(SkipOne())
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=0.1)
    assert [len(window) for window in watch.windows] == [6, 1]


class Failing(Callback):  # type: ignore[misc] # fastai has no types
    def after_loss(self) -> None:
        if self.learn.iter == 1 and self.learn.epoch == 0 and self.learn.training and not self.has_failed:
            self.has_failed = True
            raise RuntimeError("out of memory")

    has_failed = False


def test_a_fit_after_an_exception_starts_with_an_empty_window() -> None:
    learner, watch = make_learner(Failing())
    with pytest.raises(RuntimeError, match="out of memory"), learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=0.1)
    assert learner.model[1].window.count == 8
    watch.hook.remove()
    check_fit(learner, watch)


def test_lr_find_leaves_statistics_as_they_were_and_no_window_open(tmp_path: Path) -> None:
    learner, watch = make_learner()
    learner.path = tmp_path
    with learner.no_bar(), learner.no_logging():
        learner.lr_find(num_it=8, show_plot=False)
    layer = learner.model[1]
    assert watch.commits > 0
    assert layer.num_batches_tracked == 0
    assert layer.window.count == 0
    check_fit(learner, watch)
