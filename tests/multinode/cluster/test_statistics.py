"""A commit across nodes gives the statistics of nn.BatchNorm on torch.cat of what all ranks saw, in float64."""

from __future__ import annotations

import torch

from launch.models import build_model
from syncaccum import commit, convert_sync_accum
from tests.oracle import (
    Oracle,
    assert_committed,
    assert_same_on_all_ranks,
    feed_layers,
    make_layers,
    make_references,
)
from tests.ranks import Rank


def test_layers_fed_unevenly(rank: Rank) -> None:
    layers = make_layers(a=3, b=130)
    references = make_references(layers)
    for step in range(3):
        fed = feed_layers(layers, rank, seed=step)  # 3 + rank values and more
        report = commit(layers)
        assert_committed(layers, references, fed)
        assert report.ranks == rank.size
        assert_same_on_all_ranks(list(layers.buffers()))


def test_a_network_fed_unevenly(rank: Rank) -> None:
    model = convert_sync_accum(build_model("resnet").double())
    oracle = Oracle(model)
    for _ in range(2):
        for batch_size in range(rank.index + 1):  # on rank 0 a single micro-batch, and that without an image
            images = torch.randn(batch_size, 1, 8, 8 + 4 * rank.index, dtype=torch.float64)
            oracle.forward(100 + (1 + rank.index) * images)
        commit(model)
        oracle.check_commit()
        assert_same_on_all_ranks(list(model.buffers()))
