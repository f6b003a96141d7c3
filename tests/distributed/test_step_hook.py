"""commit_on_step in training with DDP: one window for one optimizer step."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncaccum import commit_on_step, convert_sync_accum
from tests.oracle import Oracle, assert_same_on_all_ranks
from tests.ranks import Rank, on_ranks


def make_network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2), nn.BatchNorm1d(2)).double()


def make_micro_batch(rank: Rank, index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * index + rank.index)
    return torch.randn(4 + rank.index, 3, generator=generator, dtype=torch.float64) + rank.index


@on_ranks(2)
def test_each_step_commits_the_window_that_it_closes(rank: Rank) -> None:
    ddp = DistributedDataParallel(convert_sync_accum(make_network()))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    commit_on_step(ddp, optimizer)
    oracle = Oracle(ddp)
    for step in range(3):
        for index in range(1 + step):
            oracle.forward(make_micro_batch(rank, 10 * step + index)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        oracle.check_commit()
        assert ddp.module[1].window.count == 0
        assert ddp.module[1].num_batches_tracked == 1 + step
    assert_same_on_all_ranks([*ddp.parameters(), *ddp.buffers()])


@on_ranks(2)
def test_a_removed_hook_commits_no_more(rank: Rank) -> None:
    model = convert_sync_accum(make_network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = commit_on_step(model, optimizer)
    for expected_batches in (1, 1):
        model(make_micro_batch(rank, 0)).square().mean().backward()
        optimizer.step()
        handle.remove()
        assert model[1].num_batches_tracked == expected_batches
