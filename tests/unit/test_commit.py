"""commit, discard, windows and commit_on_step in one process, without a process group."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from syncaccum import (
    CommitError,
    NonFiniteStatisticsError,
    SyncAccumBatchNorm,
    commit,
    commit_on_step,
    convert_sync_accum,
    discard,
)
from syncaccum.errors import NoLayersError, TooFewValuesError
from tests.oracle import assert_same_statistics, reference


def small_model() -> nn.Sequential:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.ReLU()))
    return convert_sync_accum(model.double(), normalization="running")


def state(model: nn.Module) -> list[torch.Tensor]:
    windows = [layer._accumulation.window for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm)]
    return [t.clone() for t in (*model.buffers(), *windows)]


def test_report_names_layers_values_ranks_and_seconds() -> None:
    model = small_model()
    model(torch.randn(4, 3, 5).double())
    model[0](torch.randn(2, 3).double())
    report = commit(model)
    assert report.layers == ("0", "1.0")
    assert report.values == {"0": 22, "1.0": 20}
    assert report.ranks == 1
    assert report.seconds > 0


def test_layers_that_saw_nothing_are_left_alone() -> None:
    model = small_model()
    model[0](torch.randn(4, 3).double())
    before = [b.clone() for b in model[1].buffers()]
    report = commit(model)
    assert report.layers == ("0",)
    assert report.values == {"0": 4, "1.0": 0}
    assert all(torch.equal(a, b) for a, b in zip(before, model[1].buffers(), strict=True))
    assert commit(model).layers == ()


def test_every_layer_has_its_own_momentum() -> None:
    model = small_model()
    data = [torch.randn(6, 3).double() for _ in range(3)]
    for x in data:
        model[0](x)
        model[1][0](x)
        commit(model)
    assert_same_statistics(model[0], reference([[x] for x in data], 3, 0.1), rtol=1e-12)
    assert_same_statistics(model[1][0], reference([[x] for x in data], 3, None), rtol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_statistics_change_nothing(bad: float) -> None:
    model = small_model()
    model(torch.randn(4, 3).double())
    model[1][0](torch.full((2, 3), bad, dtype=torch.float64))
    before = state(model)
    with pytest.raises(NonFiniteStatisticsError, match=r"rank 0: 1\.0.*discard\(model\)") as error:
        commit(model)
    assert "rank 0: 0" not in str(error.value)
    for a, b in zip(before, state(model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    discard(model)
    model(torch.randn(4, 3).double())
    assert commit(model).values == {"0": 4, "1.0": 4}


def test_a_single_value_changes_nothing_and_may_be_joined_by_more() -> None:
    model = small_model()
    model(torch.randn(1, 3).double())
    before = state(model)
    with pytest.raises(TooFewValuesError, match=r"one value per channel.*0, 1\.0"):
        commit(model)
    with pytest.raises(ValueError, match="accumulate more"):
        commit(model)
    assert all(torch.equal(a, b) for a, b in zip(before, state(model), strict=True))
    model(torch.randn(1, 3).double())
    assert commit(model).values == {"0": 2, "1.0": 2}


@pytest.mark.parametrize("verb", [commit, discard])
def test_a_model_without_layers_is_told_to_convert_first(verb: Callable[[nn.Module], object]) -> None:
    with pytest.raises(NoLayersError, match=r"convert_sync_accum\(model\) first"):
        verb(nn.Sequential(nn.BatchNorm1d(3)))


def test_torchs_own_conversion_is_noticed() -> None:
    undone = nn.SyncBatchNorm.convert_sync_batchnorm(small_model())
    with pytest.raises(CommitError, match="convert_sync_batchnorm undoes it"):
        commit(undone)


def test_update_stats_commits_one_layer_alone() -> None:
    model = small_model()
    model(torch.randn(4, 3).double())
    model[0].update_stats()
    assert model[0].num_batches_tracked == 1
    assert model[1][0].num_batches_tracked == 0
    assert model[1][0].window.count == 4


def test_a_shared_layer_is_committed_once() -> None:
    layer = SyncAccumBatchNorm(3)
    model = nn.ModuleDict({"a": layer, "b": layer})
    layer(torch.randn(4, 3))
    assert commit(model).layers == ("a",)
    assert layer.num_batches_tracked == 1


def test_commit_on_step_commits_each_window_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), SyncAccumBatchNorm(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = commit_on_step(model, optimizer)
    for _ in range(2):
        for _ in range(3):
            model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model[1].num_batches_tracked == 2
    assert model[1].window.count == 0
    handle.remove()
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert model[1].num_batches_tracked == 2


class TwiceStepping(torch.optim.SGD):
    """A subclass whose step calls its parent's: torch fires the hook for both."""

    def step(self, closure=None):  # type: ignore[no-untyped-def]
        return super().step(closure)


def test_commit_on_step_survives_an_optimizer_that_fires_its_hook_twice() -> None:
    layer = SyncAccumBatchNorm(3)
    optimizer = TwiceStepping(layer.parameters(), lr=0.1)
    commit_on_step(layer, optimizer)
    layer(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    assert layer.num_batches_tracked == 1


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: an Optimizer by class, without hooks of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure=None):  # type: ignore[no-untyped-def]
        return self.optimizer.step(closure)


def test_commit_on_step_sees_through_a_wrapper() -> None:
    layer = SyncAccumBatchNorm(3)
    optimizer = Wrapper(torch.optim.SGD(layer.parameters(), lr=0.1))
    commit_on_step(layer, optimizer)
    layer(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    assert layer.num_batches_tracked == 1


def test_a_step_that_grad_scaler_skips_keeps_the_window_for_the_next() -> None:
    layer = SyncAccumBatchNorm(3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    commit_on_step(layer, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    scaler.scale(layer(torch.randn(4, 3)).square().sum() * 1e5).backward()
    scaler.step(optimizer)
    scaler.update(1.0)
    optimizer.zero_grad()
    assert layer.num_batches_tracked == 0
    scaler.scale(layer(torch.randn(4, 3)).square().sum()).backward()
    scaler.step(optimizer)
    assert layer.num_batches_tracked == 1


def test_commit_on_step_refuses_an_unconverted_model_at_once() -> None:
    model = nn.BatchNorm1d(3)
    with pytest.raises(NoLayersError):
        commit_on_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
