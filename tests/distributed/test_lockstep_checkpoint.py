"""torch.utils.checkpoint inside lockstep, over ranks: exact under DDP, without collectives of its own."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncaccum import LockstepError, commit, lockstep
from tests.distributed.test_lockstep import SPLITS, count_collectives
from tests.ranks import Rank, on_ranks
from tests.unit.test_lockstep import assert_same_gradients, images, pair
from tests.unit.test_lockstep_checkpoint import Fickle, Masks, around, blocks, hand_masks, loss_of


def gather_masks(model: nn.Module) -> None:
    """Let each rank know what masks all of them have drawn, in rank order. Collective."""
    for masks in model.modules():
        if isinstance(masks, Masks):
            everyones: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyones, masks.noted)
            masks.noted = [mask for noted in everyones for mask in noted]


def check_against_the_whole_batch(rank: Rank, **settings: Any) -> None:
    torch.manual_seed(0)
    model, reference = blocks()
    ddp = DistributedDataParallel(model, **settings)
    sizes = SPLITS[rank.size]
    start = sum(sum(s) for s in sizes[: rank.index])
    for step in range(3):
        torch.manual_seed(step)
        whole = torch.cat(images(sum(sum(s) for s in sizes)))
        torch.manual_seed(10 * step + rank.index)  # masks of their own
        mine = list(whole[start : start + sum(sizes[rank.index])].split(sizes[rank.index]))
        losses = lockstep(ddp, lambda x: loss_of(ddp(x)), mine)
        gather_masks(model)
        hand_masks(model, reference, as_one=True)
        # DDP averages over the ranks; the reference sums.
        torch.autograd.backward(torch.stack(losses).sum() * rank.size)
        loss_of(reference(whole)).backward()
        assert_same_gradients(model, reference)
        commit(ddp)
        model.zero_grad()
        reference.zero_grad()
    for mine_, its in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine_, its)
    gc.collect()  # DDP's reference cycles keep gloo busy after the group is gone


@on_ranks(1)
def test_one_rank_under_ddp_equals_the_whole_batch(rank: Rank) -> None:
    check_against_the_whole_batch(rank)


@on_ranks(2)
def test_two_ranks_under_ddp_equal_the_whole_batch(rank: Rank) -> None:
    check_against_the_whole_batch(rank)


@on_ranks(2)
def test_two_ranks_whose_ddp_looks_for_unused_parameters(rank: Rank) -> None:
    check_against_the_whole_batch(rank, find_unused_parameters=True)


@on_ranks(2)
def test_checkpoints_add_no_collectives(rank: Rank) -> None:
    model, _ = blocks()
    parts = images(2, 3)
    lockstep(model, model, parts)  # the first time, ranks compare their layers
    outputs: list[Tensor] = []
    layers = 1 + 3 * 2
    assert count_collectives(lambda: outputs.extend(lockstep(model, model, parts))) == layers
    assert count_collectives(lambda: torch.cat(outputs).sum().backward()) == layers


@on_ranks(2)
def test_a_second_forward_that_differs_on_one_rank_is_an_error_on_both(rank: Rank) -> None:
    model, _ = pair(lambda: nn.Sequential(nn.Conv2d(2, 2, 1), Fickle(), nn.BatchNorm2d(2), nn.Tanh()))
    if rank.index == 0:
        model[1] = nn.Identity()
    outputs = lockstep(model, lambda x: around(model, x), images(2, 3))
    says = r"layer 2 saw other values" if rank.index else r"ranks meet different layers: rank 0 2, rank 1 given up"
    with pytest.raises(LockstepError, match=says):
        loss_of(torch.cat(outputs)).backward()
    # And all can go on.
    model[1] = nn.Identity()
    outputs = lockstep(model, lambda x: around(model, x), images(2, 3))
    loss_of(torch.cat(outputs)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
