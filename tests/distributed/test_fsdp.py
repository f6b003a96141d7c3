"""lockstep and lookahead over fully_shard: FSDP2 sees one forward and one backward of all micro-batches."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from syncaccum import LockstepError, SyncAccumBatchNorm, commit, lockstep, lookahead
from tests.distributed.test_lockstep import images, loss_of, models
from tests.ranks import Rank, on_ranks

SPLITS = {1: [[3, 4, 2]], 2: [[3, 1, 2], [4, 2]], 3: [[2], [3, 1, 0], [1, 2]]}
"""Images of each micro-batch, by rank: unequal numbers of them, and of unequal sizes."""


def share(whole: Tensor, rank: Rank) -> list[Tensor]:
    """This rank's micro-batches of the global batch."""
    sizes = SPLITS[rank.size]
    start = sum(sum(s) for s in sizes[: rank.index])
    return list(whole[start : start + sum(sizes[rank.index])].split(sizes[rank.index]))


def shard(model: nn.Module, parts: str, **settings: Any) -> nn.Module:
    """fully_shard around the root, and around what else ``parts`` says."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for module in _find_parts(model, parts):
        fully_shard(module, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)
    return model


def _find_parts(model: nn.Module, parts: str) -> Sequence[nn.Module]:
    children = [child for child in model.children() if list(child.parameters())]
    leaves = [m for m in model.modules() if list(m.parameters(recurse=False))]
    return {"root": [], "some": children[::2], "children": children, "layers": leaves}[parts]


def full(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def check_against_the_whole_batch(rank: Rank, parts: str, **settings: Any) -> None:
    model, reference = models()
    shard(model, parts, **settings)
    for step in range(2):
        whole = images(step, sum(sum(s) for s in SPLITS[rank.size]))
        model.zero_grad()
        reference.zero_grad()
        losses = lockstep(model, lambda x: loss_of(model(x)), share(whole, rank))
        # FSDP averages over the ranks; the reference sums.
        torch.autograd.backward(torch.stack(losses).sum() * rank.size)
        commit(model)
        torch.autograd.backward(loss_of(reference(whole)))
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            # Of the length: a rounding of the sums in float64, over some hundred values.
            torch.testing.assert_close(full(p.grad), q.grad, rtol=0, atol=1e-12 * float(q.grad.norm()))
        for b, c in zip(model.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(b, c, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("parts", ["root", "some", "children", "layers"])
@pytest.mark.parametrize("reshard", [True, False])
@on_ranks(2)
def test_gradients_under_fully_shard_are_the_large_batchs(rank: Rank, parts: str, reshard: bool) -> None:
    check_against_the_whole_batch(rank, parts, reshard_after_forward=reshard)


def lookahead_under(model: nn.Module, parts: Sequence[Tensor], *, sync_last_only: bool = False) -> float:
    """One window; the sum of its losses on this rank."""
    total = 0.0
    for index, loss in enumerate(lookahead(model, lambda x: loss_of(model(x)), parts)):
        if sync_last_only and isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(index + 1 == len(parts))
        total += loss.item()
        loss.backward()
    return total


@pytest.mark.parametrize("parts", ["root", "some", "layers"])
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("sync_last_only", [True, False])
@on_ranks(2)
def test_lookahead_under_fully_shard_is_lookahead_under_ddp(
    rank: Rank, parts: str, reshard: bool, sync_last_only: bool
) -> None:
    model, reference = models()
    other, _ = models()
    ddp = DistributedDataParallel(other)
    shard(model, parts, reshard_after_forward=reshard)
    for step in range(2):
        sizes = [[3, 1, 0], [1, 2, 4]]
        whole = images(step, sum(map(sum, sizes)))
        mine = list(whole.split(sum(sizes, []))[3 * rank.index :][:3])
        model.zero_grad()
        other.zero_grad()
        total = torch.tensor(lookahead_under(model, mine, sync_last_only=sync_last_only), dtype=torch.float64)
        dist.all_reduce(total)
        torch.testing.assert_close(total.item(), loss_of(reference(whole)).item())
        lookahead_under(ddp, mine)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(full(p.grad), q.grad, rtol=0, atol=1e-12 * float(q.grad.norm()))
        for m in (model, other):
            commit(m)
        for b, c in zip(model.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(b, c, rtol=1e-12, atol=1e-14)
    gc.collect()


@on_ranks(2)
def test_lookahead_under_fully_shard_refuses_unequal_numbers_on_all_ranks(rank: Rank) -> None:
    model, _ = models()
    shard(model, "children")
    parts = list(images(0, 6).split([2, 3][rank.index]))
    with pytest.raises(LockstepError, match=r"rank 0 has 3, rank 1 has 2: give ranks with fewer .* empty \(N = 0\)"):
        lookahead_under(model, parts)
    assert all(layer.window.count == 0 for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm))
    lookahead_under(model, [*parts, images(0, 0)] if rank.index == 1 else parts)
    assert commit(model).ranks == 2
