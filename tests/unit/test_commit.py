"""commit, discard and windows in one process, without a process group."""

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
    convert_sync_accum,
    discard,
)
from syncaccum.errors import NoLayersError, TooFewValuesError
from syncaccum.ranks.transport import Alone
from syncaccum.window import spare
from tests.oracle import assert_same_statistics, reference


def small_model() -> nn.Sequential:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.ReLU()))
    return convert_sync_accum(model.double(), normalization="running")


def state(model: nn.Module) -> list[torch.Tensor]:
    windows = [layer._window for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm)]
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


def test_a_report_is_numbers_under_a_prefix_for_loggers() -> None:
    model = small_model()
    model.append(convert_sync_accum(nn.BatchNorm1d(3).double()))
    model[0](torch.randn(4, 3, 5).double())
    model[1](torch.randn(2, 3).double())
    report = commit(model)
    assert report.as_dict() == {
        "syncaccum/layers": 2,
        "syncaccum/left_alone": 1,
        "syncaccum/min_values": 2,
        "syncaccum/max_values": 20,
        "syncaccum/ranks": 1,
        "syncaccum/seconds": report.seconds,
    }
    nothing = commit(model).as_dict(prefix="")
    assert (nothing["layers"], nothing["left_alone"]) == (0, 3)
    assert (nothing["min_values"], nothing["max_values"]) == (0, 0)


def test_layers_that_saw_nothing_are_left_alone() -> None:
    model = small_model()
    model[0](torch.randn(4, 3).double())
    before = [b.clone() for b in model[1].buffers()]
    report = commit(model)
    assert report.layers == ("0",)
    assert report.values == {"0": 4, "1.0": 0}
    assert all(torch.equal(a, b) for a, b in zip(before, model[1].buffers(), strict=True))
    assert commit(model).layers == ()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_layers_without_a_counter_are_committed(momentum: float | None) -> None:
    layer = SyncAccumBatchNorm(3, momentum=momentum).double()
    layer.num_batches_tracked = None
    x = torch.randn(4, 3).double()
    layer(x)
    before = layer.running_mean.clone()
    commit(layer)
    # nn.BatchNorm without a counter takes nothing of a batch in a cumulative average.
    expected = reference([[x]], 3, momentum=0.1).running_mean if momentum else before
    torch.testing.assert_close(layer.running_mean, expected)


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


# Beyond float16's 65,504 in the variance; in the mean; beyond float32's and bfloat16's 3.4e38; float16 by little.
@pytest.mark.parametrize(
    ("dtype", "scale", "offset"),
    [
        (torch.float16, 1e3, 0.0),
        (torch.float16, 1.0, 1e6),
        (torch.bfloat16, 1e20, 0.0),
        (torch.float32, 1e20, 0.0),
        (torch.float32, 0.0, 1e39),
    ],
)
def test_statistics_that_their_dtype_cannot_hold_change_nothing(
    dtype: torch.dtype, scale: float, offset: float
) -> None:
    model = small_model()
    model[1][0].to(dtype)
    model(torch.randn(4, 3).double())
    commit(model)
    model[0](torch.randn(4, 3).double())
    model[1][0](torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double() * scale + offset)
    before = state(model)
    for _ in range(2):
        with pytest.raises(NonFiniteStatisticsError, match=r"beyond the range .*, in 1\.0; .*in float32"):
            commit(model)
        assert all(torch.equal(a, b) for a, b in zip(before, state(model), strict=True))
    model[1][0].double()  # the remedy, and more: the window goes on
    assert commit(model).values == {"0": 4, "1.0": 5}
    assert model[1][0].running_var.isfinite().all()
    assert model[1][0].running_mean.isfinite().all()


def test_a_statistic_that_rounds_to_the_largest_number_is_committed() -> None:
    layer = SyncAccumBatchNorm(1, momentum=1.0).half()
    # A mean of 65,512 rounds to float16's last number, 65,504, and not to Inf.
    layer(torch.tensor([[65511.0], [65513.0]]))
    commit(layer)
    assert (layer.running_mean.item(), layer.running_var.item()) == (65504, 2)


def test_statistics_that_were_not_finite_before_are_said_to_be() -> None:
    model = small_model()
    model(torch.randn(4, 3).double())
    model[0].running_var[1] = float("inf")
    before = state(model)
    with pytest.raises(NonFiniteStatisticsError, match=r"NaN or Inf before this commit, in 0; .*reset_running_stats"):
        commit(model)
    assert all(torch.equal(a, b) for a, b in zip(before, state(model), strict=True))


def test_finite_statistics_whose_sum_is_not_are_committed() -> None:
    layer = SyncAccumBatchNorm(3, normalization="batch").double()
    layer.running_var.fill_(1e308)
    layer(torch.randn(2, 3).double())
    commit(layer)
    assert (layer.running_var > 8e307).all()


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


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of earlier tests is not taken."""
    monkeypatch.setattr(spare, "_spare", {})


def model_of(seed: int) -> tuple[nn.Sequential, list[nn.BatchNorm1d]]:
    """A model with a window, and nn.BatchNorm layers that have had its global batch."""
    generator = torch.Generator().manual_seed(seed)
    widths = (3, 1, 40)
    model = convert_sync_accum(nn.Sequential(*map(nn.BatchNorm1d, widths)))
    expected = []
    for layer, width in zip(model, widths, strict=True):
        window = [torch.randn(count, width, generator=generator) for count in (4, 3)]
        expected.append(reference([window], width))
        for x in window:
            layer(x)
    return model, expected


def assert_committed(model: nn.Sequential, expected: list[nn.BatchNorm1d]) -> None:
    for layer, other in zip(model, expected, strict=True):
        assert_same_statistics(layer, other)


@pytest.mark.usefixtures("both_passes", "no_memory")
def test_a_commit_amid_anothers_all_reduce_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in two threads that train two models."""
    commit(model_of(2)[0])  # which leaves memory that both would like
    (first, expected), (second, others) = model_of(0), model_of(1)
    meanwhile = [second]

    def all_reduce(self: Alone, flat: torch.Tensor) -> None:
        if meanwhile:
            commit(meanwhile.pop())

    monkeypatch.setattr(Alone, "all_reduce", all_reduce)
    commit(first)
    assert_committed(first, expected)
    assert_committed(second, others)


@pytest.mark.usefixtures("both_passes", "no_memory")
def test_memory_of_a_lost_all_reduce_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = model_of(0)
    messages: list[torch.Tensor] = []

    def all_reduce(self: Alone, flat: torch.Tensor) -> None:
        messages.append(flat)
        if len(messages) == 1:
            raise CommitError("lost")
        messages[0].fill_(7)  # as a peer that comes late may

    monkeypatch.setattr(Alone, "all_reduce", all_reduce)
    with pytest.raises(CommitError, match="lost"):
        commit(model)
    commit(model)
    assert_committed(model, expected)


@pytest.mark.usefixtures("both_passes", "no_memory")
def test_memory_of_a_commit_is_used_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(Alone, "all_reduce", lambda self, flat: seen.append(flat.data_ptr()))
    # What inference mode makes refuses to change outside of it.
    for seed, inference in ((0, True), (1, False)):
        model, expected = model_of(seed)
        with torch.inference_mode(inference):
            commit(model)
        assert_committed(model, expected)
    assert seen[0] == seen[1]


@pytest.mark.usefixtures("no_memory")
def test_memory_is_kept_for_a_few_models_only() -> None:
    for width in range(1, 30):
        layer = convert_sync_accum(nn.BatchNorm1d(width))
        layer(torch.ones(2, width))
        commit(layer)
    assert 0 < len(spare._spare) <= 8
