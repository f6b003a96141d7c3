"""Layers whose global batch is that of a process group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncaccum import (
    AccumulateBatchNorm,
    NonFiniteStatisticsError,
    SyncAccumBatchNorm,
    commit,
    convert_sync_accum,
    revert_sync_accum,
    summary,
)
from tests.oracle import (
    assert_committed,
    assert_same_statistics,
    assert_unchanged,
    feed_layers,
    gather_global_batch,
    make_reference,
    make_references,
    take_snapshot,
)
from tests.ranks import Rank, on_ranks


def make_groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Ranks 0 and 1, and rank 2 alone. Collective over all three."""
    return dist.new_group([0, 1]), dist.new_group([2])


def own_group(rank: Rank) -> dist.ProcessGroup:
    pair, single = make_groups()
    return pair if rank.index < 2 else single


@on_ranks(3)
def test_a_group_commits_its_own_global_batch(rank: Rank) -> None:
    group = own_group(rank)
    layers = nn.ModuleDict({"a": SyncAccumBatchNorm(3, process_group=group, dtype=torch.float64)})
    references = make_references(layers)
    for step in range(2):
        fed = feed_layers(layers, rank, seed=step)
        assert commit(layers).ranks == (2 if rank.index < 2 else 1)
        assert_committed(layers, references, fed, group)


@on_ranks(3)
def test_a_group_can_commit_while_the_other_does_not(rank: Rank) -> None:
    group = own_group(rank)
    layers = nn.ModuleDict({"a": SyncAccumBatchNorm(3, process_group=group, dtype=torch.float64)})
    references = make_references(layers)
    fed = feed_layers(layers, rank)
    if rank.index < 2:
        commit(layers)
        assert_committed(layers, references, fed, group)
    else:
        assert layers["a"].window.count > 0


@on_ranks(3)
def test_layers_of_one_model_may_have_different_groups(rank: Rank) -> None:
    group = own_group(rank)
    layers = nn.ModuleDict(
        {
            "everyone": SyncAccumBatchNorm(3, dtype=torch.float64),
            "group": SyncAccumBatchNorm(2, process_group=group, dtype=torch.float64),
            "everyone_too": SyncAccumBatchNorm(4, process_group=dist.group.WORLD, dtype=torch.float64),
        }
    )
    groups = {"everyone": None, "group": group, "everyone_too": None}
    references = make_references(layers)
    fed = feed_layers(layers, rank)
    report = commit(layers)
    assert report.ranks == 3
    assert report.values == {
        name: len(gather_global_batch(fed[name], groups[name])) for name in ("everyone", "everyone_too", "group")
    }
    for name, layer in layers.items():
        references[name](gather_global_batch(fed[name], groups[name]))
        assert_same_statistics(layer, references[name])


@on_ranks(3)
def test_an_error_in_one_group_leaves_the_others_commit_whole(rank: Rank) -> None:
    """Nor does it keep a rank from the all-reduce that ranks of the other group wait in."""
    group = own_group(rank)
    layers = nn.ModuleDict(
        {
            "group": SyncAccumBatchNorm(2, process_group=group, dtype=torch.float64),
            "everyone": SyncAccumBatchNorm(3, dtype=torch.float64),
        }
    )
    everyone = nn.ModuleDict({"everyone": layers["everyone"]})
    references = make_references(everyone)
    fed = feed_layers(layers, rank)
    if rank.index == 0:
        layers["group"](torch.full((1, 2), torch.inf, dtype=torch.float64))
    group_alone = nn.ModuleDict({"group": layers["group"]})
    before = take_snapshot(group_alone)
    if rank.index < 2:
        with pytest.raises(NonFiniteStatisticsError, match="rank 0: group"):
            commit(layers)
        assert_unchanged(group_alone, before)
    else:
        assert set(commit(layers).layers) == {"everyone", "group"}
        assert layers["group"].num_batches_tracked == 1
    assert_committed(everyone, references, fed)


@on_ranks(3)
def test_a_rank_outside_the_group_is_told_at_once(rank: Rank) -> None:
    pair = dist.new_group([0, 1])
    model = nn.Sequential(nn.BatchNorm1d(2))
    if rank.index < 2:
        SyncAccumBatchNorm(2, process_group=pair)
        convert_sync_accum(model, process_group=pair)
        return
    with pytest.raises(ValueError, match="not a member"):
        SyncAccumBatchNorm(2, process_group=pair)
    with pytest.raises(ValueError, match="not a member"):
        convert_sync_accum(model, process_group=pair)
    assert type(model[0]) is nn.BatchNorm1d


@on_ranks(3)
def test_conversion_keeps_sync_batch_norms_group_and_reverting_gives_it_back(rank: Rank) -> None:
    group = own_group(rank)
    sync = nn.SyncBatchNorm(2, process_group=group)
    layer = convert_sync_accum(sync)
    assert layer.process_group is group
    reference = make_reference(layer)
    x = torch.randn(3, 2) + rank.index
    layer(x)
    commit(layer)
    reference(gather_global_batch([x], group))
    # float32 statistics, compared at float32's default tolerance.
    torch.testing.assert_close(layer.running_mean, reference.running_mean.float())
    assert type(revert_sync_accum(layer)) is nn.SyncBatchNorm
    assert layer.process_group is group


@on_ranks(3)
def test_a_given_group_overrides_sync_batch_norms(rank: Rank) -> None:
    group = own_group(rank)
    sync = nn.SyncBatchNorm(2, process_group=group)
    assert convert_sync_accum(sync, process_group=dist.group.WORLD).process_group is dist.group.WORLD


@on_ranks(2)
def test_accumulate_batch_norm_takes_part_in_the_default_group(rank: Rank) -> None:
    """It has no argument for a group, and so commits over all ranks."""
    layer = AccumulateBatchNorm(nn.BatchNorm2d, 2, momentum=1.0)
    layer(torch.full((1, 2, 1, 1), 2.0 * rank.index))
    layer.update_stats()
    assert layer.running_mean.tolist() == [1.0, 1.0]
    assert layer.running_var.tolist() == [2.0, 2.0]


@on_ranks(3)
def test_a_summary_of_one_rank_names_the_groups_and_asks_no_peer(rank: Rank) -> None:
    group = own_group(rank)
    layers = nn.ModuleDict({"a": SyncAccumBatchNorm(3, process_group=group), "b": SyncAccumBatchNorm(3)}).double()
    fed = feed_layers(layers, rank)
    if rank.index == 0:
        # A collective would wait here for the others.
        assert [layer.group for layer in summary(layers).layers] == ["gloo, 2 ranks", "gloo, 3 ranks"]
        assert summary(layers).layers[0].values == sum(x.shape[0] * x.shape[2] for x in fed["a"])
    commit(layers)
    dist.destroy_process_group(group)
    assert summary(layers).layers[0].group == "destroyed"
