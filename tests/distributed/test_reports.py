"""What people have reported of BatchNorm on several ranks elsewhere, tried here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

from syncaccum import commit, convert_sync_accum
from tests.distributed.oracle import Oracle, assert_same_on_all_ranks
from tests.ranks import Rank, on_ranks


def make_model() -> Any:
    torch.manual_seed(0)
    return convert_sync_accum(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2), nn.BatchNorm1d(2))
    )


def draw(rank: Rank, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * index + rank.index)
    return torch.randn(4 + rank.index, 3, generator=generator) + rank.index


@pytest.mark.parametrize("param_dtype", [None, torch.bfloat16])
@on_ranks(2)
def test_sharded_parameters_of_two_precisions(rank: Rank, param_dtype: torch.dtype | None) -> None:
    """pytorch/pytorch#75478: FSDP keeps BatchNorm in float32 in the middle of a model in bfloat16."""
    sharded = FullyShardedDataParallel(
        make_model(),
        device_id=torch.device("cpu"),
        use_orig_params=True,
        mixed_precision=None if param_dtype is None else MixedPrecision(param_dtype=param_dtype),
    )
    oracle = Oracle(sharded)
    for step in range(3):
        for index in range(2):
            oracle.forward(draw(rank, 10 * step + index)).float().square().mean().backward()
        assert commit(sharded).layers == ("1", "4")
        oracle.check_commit()
    assert_same_on_all_ranks(list(sharded.buffers()))


@on_ranks(2)
def test_tracking_that_is_off_on_one_rank_at_the_commit(rank: Rank) -> None:
    """lyakaap/VAT-pytorch#8: the flag is this rank's own, so ranks must not differ over which layers they commit."""
    model = make_model()
    oracle = Oracle(model)
    for step in range(2):
        oracle.forward(draw(rank, step))
        if rank.index == 0:
            model[1].track_running_stats = False
        commit(model)
        model[1].track_running_stats = True
        oracle.check_commit()


@on_ranks(2)
def test_a_layer_that_all_ranks_prune_between_windows(rank: Rank) -> None:
    """VainF/Torch-Pruning#466: on every rank, after the ranks have agreed on the layers as they were."""
    model = make_model()
    oracle = Oracle(model)
    oracle.forward(draw(rank, 0))
    commit(model)
    oracle.check_commit()
    layer = model[4]
    layer.num_features = 1
    model[3] = nn.Linear(4, 1)
    layer.running_mean, layer.running_var = layer.running_mean[:1], layer.running_var[:1]
    layer.weight, layer.bias = nn.Parameter(layer.weight.data[:1]), nn.Parameter(layer.bias.data[:1])
    oracle = Oracle(model)
    oracle.forward(draw(rank, 1))
    commit(model)
    oracle.check_commit()
