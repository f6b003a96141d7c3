"""Windows that must not be committed: every rank decides alike, and the running statistics stay as they were."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from syncaccum import (
    NonFiniteStatisticsError,
    SyncAccumBatchNorm,
    TooFewValuesError,
    commit,
    discard,
)
from tests.oracle import (
    assert_committed_after,
    assert_unchanged,
    feed_layers,
    make_layers,
    make_references,
    take_snapshot,
)
from tests.ranks import Rank, on_ranks


def poison(layer: Any, value: float) -> None:
    layer(torch.full((1, layer.num_features), value, dtype=torch.float64))


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@on_ranks(2)
def test_non_finite_values_on_one_rank_stop_the_commit_on_all(rank: Rank, value: float, bad_rank: int) -> None:
    layers = make_layers(a=3, b=4)
    references = make_references(layers)
    assert_committed_after(layers, references, rank, seed=0)

    feed_layers(layers, rank, seed=1)
    if rank.index == bad_rank:
        poison(layers["b"], value)
    before = take_snapshot(layers)
    for _ in range(2):  # the window is kept, so a second commit says the same
        with pytest.raises(NonFiniteStatisticsError, match=rf"\(rank {bad_rank}: b\)"):
            commit(layers)
        assert_unchanged(layers, before)

    discard(layers)
    assert_committed_after(layers, references, rank, seed=2)


@on_ranks(3)
def test_every_bad_layer_is_named_by_rank(rank: Rank) -> None:
    layers = make_layers(a=3, b=4, c=2)
    if rank.index == 0:
        poison(layers["c"], math.nan)
    if rank.index == 2:
        poison(layers["a"], math.inf)
        poison(layers["b"], math.nan)
    with pytest.raises(NonFiniteStatisticsError, match=r"\(rank 0: c; rank 2: a, b\)"):
        commit(layers)


@on_ranks(2)
def test_sums_that_overflow_only_together_stop_the_commit(rank: Rank) -> None:
    layers = make_layers(a=1)
    poison(layers["a"], 1.1e154)  # its square is 1.2e308, and float64 ends at 1.8e308
    assert take_snapshot(layers)["a.window"].isfinite().all()
    before = take_snapshot(layers)
    with pytest.raises(NonFiniteStatisticsError, match="only in the sum over ranks"):
        commit(layers)
    assert_unchanged(layers, before)


@pytest.mark.parametrize("bad_rank", [0, 1])
@on_ranks(2)
def test_statistics_beyond_their_dtype_stop_the_commit_on_all(rank: Rank, bad_rank: int) -> None:
    layers = make_layers(a=3, b=4)
    layers["b"].half()
    feed_layers(layers, rank)
    if rank.index == bad_rank:
        layers["b"](torch.tensor([[1e5] * 4, [-1e5] * 4], dtype=torch.float64))
    before = take_snapshot(layers)
    for _ in range(2):
        with pytest.raises(NonFiniteStatisticsError, match=r"beyond the range of .*float16.*, in b;"):
            commit(layers)
        assert_unchanged(layers, before)
    layers["b"].float()
    assert list(commit(layers).layers) == ["a", "b"]


@on_ranks(2)
def test_one_value_in_the_global_batch_is_a_value_error_on_every_rank(rank: Rank) -> None:
    layers = make_layers(a=3, b=2)
    references = make_references(layers)
    feed_layers(nn.ModuleDict({"a": layers["a"]}), rank)
    if rank.index == 0:
        poison(layers["b"], 1.0)
    before = take_snapshot(layers)
    with pytest.raises(ValueError, match=r"one value per channel in the whole global batch .* in b:"):
        commit(layers)
    with pytest.raises(TooFewValuesError):
        commit(layers)
    assert_unchanged(layers, before)

    discard(layers)
    assert_committed_after(layers, references, rank, seed=1)


@on_ranks(2)
def test_the_window_of_one_value_can_be_filled_up(rank: Rank) -> None:
    layer = SyncAccumBatchNorm(1, momentum=1.0)
    if rank.index == 0:
        layer(torch.tensor([[1.0]]))
    with pytest.raises(TooFewValuesError):
        commit(layer)
    if rank.index == 1:
        layer(torch.tensor([[3.0]]))
    commit(layer)
    assert (layer.running_mean.item(), layer.running_var.item()) == (2.0, 2.0)


@pytest.mark.parametrize("fed_names", [[], ["a"]])
@on_ranks(2)
def test_layers_that_no_rank_fed_are_left_alone(rank: Rank, fed_names: list[str]) -> None:
    """A commit with nothing at all in it is one, too."""
    layers = make_layers(a=3, b=2)
    feed_layers(nn.ModuleDict({name: layers[name] for name in fed_names}), rank)
    untouched = nn.ModuleDict({name: layer for name, layer in layers.items() if name not in fed_names})
    before = take_snapshot(untouched)
    report = commit(layers)
    assert list(report.layers) == fed_names
    assert report.values["b"] == 0
    assert_unchanged(untouched, before)
    assert untouched["b"].num_batches_tracked == 0
