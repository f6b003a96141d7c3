"""Ranks whose layers differ are told so, on every rank, before any statistics are sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from syncaccum import LayoutMismatchError, SyncAccumBatchNorm, commit
from tests.oracle import (
    assert_committed_after,
    assert_unchanged,
    feed_layers,
    make_layers,
    make_references,
    take_snapshot,
)
from tests.ranks import Rank, on_ranks

WIDTHS = {"a": 3, "b": 4, "c": 2}

Layers = dict[str, nn.Module]


def make_b(**arguments: Any) -> SyncAccumBatchNorm:
    given: dict[str, Any] = {"num_features": WIDTHS["b"], "dtype": torch.float64, **arguments}
    return SyncAccumBatchNorm(**given)


# Each says how the layers of a rank come to differ from its peers' at layer b or after it; ``by`` differs by rank.
DIFFERENCES: dict[str, Callable[[Layers, int], Layers]] = {
    "count": lambda layers, by: {**layers, **{f"d{i}": make_b() for i in range(by)}},
    "width": lambda layers, by: {**layers, "b": make_b(num_features=WIDTHS["b"] + by)},
    "order": lambda layers, by: {n: layers[n] for n in (("a", "c", "b"), ("b", "a", "c"), ("c", "a", "b"))[by - 1]},
    "eps": lambda layers, by: {**layers, "b": make_b(eps=1e-5 + by * 1e-7)},
    "momentum": lambda layers, by: {**layers, "b": make_b(momentum=0.1 + by * 1e-9)},
    "momentum_none": lambda layers, by: {**layers, "b": make_b(momentum=(None, 0.5, 0.6)[by - 1])},
    "dtype": lambda layers, by: {
        **layers,
        "b": make_b(dtype=(torch.float32, torch.float16, torch.bfloat16)[by - 1]),
    },
    "name": lambda layers, by: {("b" * (1 + by) if n == "b" else n): layer for n, layer in layers.items()},
}


@pytest.mark.parametrize("who", ["one rank", "every rank"])
@pytest.mark.parametrize("earlier_commits", [0, 2])
@pytest.mark.parametrize("difference", DIFFERENCES)
@on_ranks(3)
def test_every_rank_names_the_difference_and_nothing_changes(
    rank: Rank, difference: str, earlier_commits: int, who: str
) -> None:
    layers = make_layers(**WIDTHS)
    references = make_references(layers)
    for step in range(earlier_commits):
        assert_committed_after(layers, references, rank, step)
    good = dict(layers.items())

    if who == "every rank" or rank.index == 1:
        layers.clear()
        layers.update(DIFFERENCES[difference](good, 1 + rank.index))
    feed_layers(layers, rank, seed=99)
    before = take_snapshot(layers)
    with pytest.raises(LayoutMismatchError, match=r"layer \d differs between ranks: rank 0 has .*, rank [12] has"):
        commit(layers)
    assert_unchanged(layers, before)

    layers.clear()
    layers.update(good)
    for layer in good.values():
        layer.discard()
    assert_committed_after(layers, references, rank, seed=7)


@on_ranks(3)
def test_the_message_names_the_first_layer_that_differs_and_both_sides(rank: Rank) -> None:
    layers = make_layers(**WIDTHS)
    if rank.index == 2:
        layers["b"] = make_b(eps=0.5)
        layers["c"] = SyncAccumBatchNorm(9)
    expected = r"layer 1 .*rank 0 has 'b' \(4 channels, torch.float64, eps 1e-05.*rank 2 has 'b' \(4 .* eps 0.5"
    with pytest.raises(LayoutMismatchError, match=expected):
        commit(layers)


@on_ranks(2)
def test_a_missing_layer_is_called_that(rank: Rank) -> None:
    layers = make_layers(a=3) if rank.index else make_layers(a=3, b=4)
    with pytest.raises(LayoutMismatchError, match=r"rank 0 has 'b' .*, rank 1 has no such layer"):
        commit(layers)


@pytest.mark.parametrize("difference", DIFFERENCES)
@on_ranks(2)
def test_the_same_change_on_every_rank_is_committed(rank: Rank, difference: str) -> None:
    layers = make_layers(**WIDTHS)
    commit(layers)
    changed = DIFFERENCES[difference](dict(layers.items()), 1)
    layers.clear()
    layers.update(changed)
    for layer in layers.values():
        layer.double()  # "dtype" was another before the conversion to the reference's
    assert_committed_after(layers, make_references(layers), rank, seed=3)


@on_ranks(2)
def test_a_momentum_schedule_on_every_rank_is_followed(rank: Rank) -> None:
    layers = make_layers(**WIDTHS)
    references = make_references(layers)
    layer: Any
    for step, momentum in enumerate([0.5, 0.25, None, 1.0]):
        for layer in (*layers.values(), *references.values()):
            layer.momentum = momentum
        assert_committed_after(layers, references, rank, step)
