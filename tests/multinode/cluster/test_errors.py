"""What is wrong on a single rank raises the same named error on every rank of every node, and changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from syncaccum import LayoutMismatchError, NonFiniteStatisticsError, SyncAccumBatchNorm, commit, discard
from tests.oracle import (
    assert_committed_after,
    assert_unchanged,
    feed_layers,
    make_layers,
    make_references,
    take_snapshot,
)
from tests.ranks import Rank


@pytest.mark.parametrize("earlier_commits", [0, 1])
def test_a_layer_that_differs_on_the_last_rank(rank: Rank, earlier_commits: int) -> None:
    layers = make_layers(a=3, b=4)
    references = make_references(layers)
    for step in range(earlier_commits):
        assert_committed_after(layers, references, rank, seed=step)

    last = rank.size - 1
    good = layers["b"]
    if rank.index == last:
        layers["b"] = SyncAccumBatchNorm(4, eps=0.5, dtype=torch.float64)
    feed_layers(layers, rank, seed=8)
    before = take_snapshot(layers)
    expected = rf"layer 1 .*rank 0 has 'b' \(4 channels, .* eps 1e-05, .*rank {last} has 'b' \(4 channels, .* eps 0.5"
    with pytest.raises(LayoutMismatchError, match=expected):
        commit(layers)
    assert_unchanged(layers, before)

    layers["b"] = good
    discard(layers)
    assert_committed_after(layers, references, rank, seed=9)


def test_nan_on_the_last_rank(rank: Rank) -> None:
    layers = make_layers(a=3, b=4)
    references = make_references(layers)
    last = rank.size - 1
    feed_layers(layers, rank, seed=1)
    if rank.index == last:
        layers["b"](torch.full((2, 4), math.nan, dtype=torch.float64))
    before = take_snapshot(layers)
    with pytest.raises(NonFiniteStatisticsError, match=rf"\(rank {last}: b\)"):
        commit(layers)
    assert_unchanged(layers, before)

    discard(layers)
    assert_committed_after(layers, references, rank, seed=2)
