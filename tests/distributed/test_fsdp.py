"""lockstep and lookahead over fully_shard: FSDP2 sees one forward and one backward of all micro-batches."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncaccum import commit, convert_sync_accum, lockstep, lookahead
from tests.distributed.test_lockstep import Fork, loss_of
from tests.ranks import Rank, on_ranks
from tests.unit.test_offload import DeviceStore

SIZES = {1: [[3, 4, 2]], 2: [[3, 0, 2], [4]], 3: [[2], [3, 1, 0], [1, 2]], 4: [[2, 1], [3], [1, 1, 1], [2]]}
"""Images of each micro-batch, by rank: unequal numbers of them, and of unequal sizes."""
EVEN = [[3, 0, 2], [1, 2, 4]]
"""Of unequal sizes alone."""


class Net(nn.Sequential):
    """A stem, two blocks with two ways each, and a head."""

    def __init__(self) -> None:
        stem = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True))
        super().__init__(stem, Fork(), Fork(), nn.Sequential(nn.Flatten(), nn.Linear(32, 3)))


class Checkpointed(Net):
    """Each block runs again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Encoder(Net):
    """A network with a method that is not its forward."""

    def encode(self, x: Tensor, *, scale: float) -> dict[str, Tensor]:
        return {"logits": super().forward(x * scale)}


def build(cls: type[Net] = Net) -> tuple[Net, Net]:
    """A converted network and its unconverted twin, in float64."""
    torch.manual_seed(0)
    model = convert_sync_accum(cls().double())
    reference = Net().double()
    reference.load_state_dict(model.state_dict())
    return model, reference


def images(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 6, 6, dtype=torch.float64, generator=generator)


def window(seed: int, sizes: Sequence[Sequence[int]], rank: Rank) -> tuple[Tensor, list[Tensor]]:
    """The global batch, and this rank's micro-batches of it."""
    whole = images(seed, sum(map(sum, sizes)))
    mine = whole.split([sum(s) for s in sizes])[rank.index]
    return whole, list(mine.split(list(sizes[rank.index])))


def shard(model: nn.Sequential, parts: str, **settings: Any) -> Any:
    """fully_shard around the root, and around what else ``parts`` says."""
    if "mesh" not in settings:
        settings["mesh"] = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    children = list(model.children())
    layers = [m for m in model.modules() if list(m.parameters(recurse=False))]
    groups: dict[str, list[Any]] = {
        "root": [],
        "one block": children[1:2],
        "blocks": children,
        "layers": layers,
        "layers and blocks": [*layers, *children],
        "a group": [children[1:3]],
    }
    for group in groups[parts]:
        fully_shard(group, **settings)
    fully_shard(model, **settings)
    return model


def full(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def assert_gradients(model: nn.Module, expected: Sequence[Tensor | None]) -> None:
    # The target, of the gradient's length. Rounding of float64 sums over some hundred values is below 1e-13.
    atol = 1e-12 * float(torch.cat([g.flatten() for g in expected if g is not None]).norm())
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(full(p.grad), gradient, rtol=0, atol=atol)


def check_lockstep(
    model: nn.Module,
    reference: nn.Module,
    rank: Rank,
    run: Callable[[Tensor], Tensor] | None = None,
    offload: str | None = None,
) -> None:
    """Two steps against nn.BatchNorm on the global batch."""
    for step in range(2):
        whole, parts = window(step, SIZES[rank.size], rank)
        model.zero_grad()
        reference.zero_grad()
        losses = lockstep(model, lambda x: loss_of((run or model)(x)), parts, offload=offload)
        # FSDP averages over the ranks; the reference sums.
        (torch.stack(losses).sum() * rank.size).backward()
        loss_of(reference(whole)).backward()
        assert_gradients(model, [p.grad for p in reference.parameters()])
        commit(model)
        for b, c in zip(model.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(b, c, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("parts", ["root", "one block", "blocks", "layers", "layers and blocks", "a group"])
@on_ranks(2)
def test_gradients_of_lockstep_are_the_large_batchs(rank: Rank, parts: str, reshard: bool) -> None:
    model, reference = build()
    check_lockstep(shard(model, parts, reshard_after_forward=reshard), reference, rank)


@pytest.mark.parametrize("parts", ["root", "blocks"])
@on_ranks(1)
def test_gradients_on_one_rank_are_the_large_batchs(rank: Rank, parts: str) -> None:
    model, reference = build()
    check_lockstep(shard(model, parts), reference, rank)


@pytest.mark.parametrize("parts", ["root", "layers and blocks"])
@on_ranks(3)
def test_gradients_on_three_ranks_are_the_large_batchs(rank: Rank, parts: str) -> None:
    model, reference = build()
    check_lockstep(shard(model, parts), reference, rank)


@on_ranks(4)
def test_gradients_are_the_large_batchs_where_weights_are_replicated_and_sharded(rank: Rank) -> None:
    model, reference = build()
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    check_lockstep(shard(model, "blocks", mesh=mesh), reference, rank)


@on_ranks(2)
def test_blocks_under_a_checkpoint_are_gathered_again(rank: Rank) -> None:
    model, reference = build(Checkpointed)
    check_lockstep(shard(model, "blocks"), reference, rank)


@on_ranks(2)
def test_with_offload_weights_stay_and_activations_wait_outside(rank: Rank) -> None:
    model, reference = build()
    with patch.object(sys.modules["syncaccum.exact.lockstep"], "HostStore", DeviceStore):
        check_lockstep(shard(model, "blocks"), reference, rank, offload="cpu")
    assert all(store.parked for store in DeviceStore.made)
    DeviceStore.made.clear()


@on_ranks(2)
def test_a_method_that_is_registered_as_a_forward_is_one(rank: Rank) -> None:
    model, reference = build(Encoder)
    shard(model, "blocks")
    register_fsdp_forward_method(model, "encode")

    def encode(x: Tensor) -> Tensor:
        logits: Tensor = model.encode(x / 2, scale=2.0)["logits"]
        return logits

    check_lockstep(model, reference, rank, encode)


@on_ranks(2)
def test_lockstep_inside_of_a_sharded_forward_is_exact(rank: Rank) -> None:
    """As a framework does that calls a training step through its wrapper's forward."""

    class Step(nn.Sequential):
        def forward(self, parts: Sequence[Tensor]) -> Tensor:
            return torch.stack(lockstep(self[0], lambda x: loss_of(self[0](x)), parts)).sum()

    inner, reference = build()
    model = Step(inner)
    shard(model, "root")
    whole, parts = window(0, SIZES[2], rank)
    (model(parts) * 2).backward()
    loss_of(reference(whole)).backward()
    assert_gradients(model, [p.grad for p in reference.parameters()])


@on_ranks(2)
def test_two_locksteps_before_one_backward(rank: Rank) -> None:
    model, reference = build()
    shard(model, "blocks")
    total = torch.zeros((), dtype=torch.float64)
    for step in range(2):
        whole, parts = window(step, EVEN, rank)
        total = total + torch.stack(lockstep(model, lambda x: loss_of(model(x)), parts)).sum()
        loss_of(reference(whole)).backward()
    (total * 2).backward()
    assert_gradients(model, [p.grad for p in reference.parameters()])


@pytest.mark.parametrize("parts", ["root", "blocks", "layers"])
@on_ranks(2)
def test_in_bfloat16_gradients_are_those_of_weights_that_were_cast(rank: Rank, parts: str) -> None:
    model = build()[0].float()
    cast = deepcopy(model).bfloat16()
    for name, b in cast.named_buffers():
        b.data = model.get_buffer(name).clone()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, parts, mp_policy=policy)
    _, micro_batches = window(0, SIZES[2], rank)
    for m in (model, cast):
        outputs = lockstep(m, m, [x.bfloat16() for x in micro_batches])
        torch.stack([loss_of(y.float()) for y in outputs]).sum().backward()
        commit(m)
    for p, q in zip(model.parameters(), cast.parameters(), strict=True):
        mean = q.grad.float() / 2
        dist.all_reduce(mean)
        # FSDP divides the sum, this divides the parts.
        torch.testing.assert_close(full(p.grad), mean, rtol=1e-6, atol=0)
    for b, c in zip(model.buffers(), cast.buffers(), strict=True):
        assert b.dtype == c.dtype
        assert torch.equal(b, c)
        assert b.dtype in (torch.float32, torch.int64)


def walk(model: nn.Module, parts: Sequence[Tensor], *, last_only: bool = False) -> Iterator[float]:
    """One window; its losses."""
    for index, loss in enumerate(lookahead(model, lambda x: loss_of(model(x)), parts)):
        if last_only and isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(index + 1 == len(parts))
        yield loss.item()
        loss.backward()


@pytest.mark.parametrize(
    ("parts", "settings", "last_only"),
    [
        ("root", {}, False),
        ("root", {"reshard_after_forward": True}, True),
        ("one block", {"reshard_after_forward": False}, True),
        ("layers and blocks", {}, True),
        ("a group", {"reshard_after_forward": True}, False),
    ],
    ids=str,
)
@on_ranks(2)
def test_lookahead_is_that_of_ddp(rank: Rank, parts: str, settings: dict[str, bool], last_only: bool) -> None:
    """DDP reduces in the last backward. FSDP does in each, or where the user says."""
    model, reference = build()
    other, _ = build()
    ddp = DistributedDataParallel(other)
    shard(model, parts, **settings)
    for step in range(2):
        whole, micro_batches = window(step, EVEN, rank)
        model.zero_grad()
        other.zero_grad()
        total = torch.tensor(sum(walk(model, micro_batches, last_only=last_only)), dtype=torch.float64)
        dist.all_reduce(total)
        torch.testing.assert_close(total.item(), loss_of(reference(whole)).item())
        sum(walk(ddp, micro_batches))
        assert_gradients(model, [p.grad for p in other.parameters()])
        commit(model)
        commit(other)
        for b, c in zip(model.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(b, c, rtol=1e-12, atol=1e-14)
    gc.collect()
