"""lockstep and lookahead over fully_shard: FSDP2 sees one forward and one backward of all micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from syncaccum import commit, lockstep
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
