"""lockstep over ranks that are at odds, under wrappers' odd settings, and inside a wrapper's own forward."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from syncaccum import (
    CommitError,
    LockstepError,
    commit,
    convert_sync_accum,
    gather_window_state_dict,
    lockstep,
)
from tests.ranks import Rank, on_ranks

M = TypeVar("M", bound=nn.Module)
SIZES = [[3, 2], [4, 1, 2]]
"""Of micro-batches, by rank."""


def make_net(layers: int = 2) -> nn.Sequential:
    blocks = [module for _ in range(layers) for module in (nn.Linear(4, 4), nn.BatchNorm1d(4))]
    return nn.Sequential(*blocks, nn.Linear(4, 1)).double()


def twins(make: Callable[[], M]) -> tuple[M, M]:
    """A converted model and an unconverted one with the same state, alike on all ranks."""
    torch.manual_seed(0)
    reference, model = make().double(), make().double()
    model.load_state_dict(reference.state_dict())
    return convert_sync_accum(model), reference


def data(step: int) -> tuple[Tensor, list[list[Tensor]]]:
    """A global batch, and its micro-batches by rank."""
    generator = torch.Generator().manual_seed(step)
    whole = torch.randn(sum(map(sum, SIZES)), 4, dtype=torch.float64, generator=generator)
    parts = iter(whole.split([n for sizes in SIZES for n in sizes]))
    return whole, [[next(parts) for _ in sizes] for sizes in SIZES]


def assert_same_gradients(model: nn.Module, reference: nn.Module, factor: float = 1.0) -> None:
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        expected = None if q.grad is None else q.grad * factor
        if p.grad is None or expected is None:
            assert p.grad is expected is None, name
            continue
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        # A bias before a BatchNorm has a gradient of zero, which is rounding in both.
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12, msg=begin_with(name))


def begin_with(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


def train_one_step(net: nn.Module, reference: nn.Module, rank: Rank, step: int) -> None:
    """Exact over the ranks: outputs, and statistics once committed."""
    whole, parts = data(step)
    outputs = lockstep(net, net, parts[rank.index])
    expected = reference(whole)
    start = 0 if rank.index == 0 else sum(SIZES[0])
    torch.testing.assert_close(torch.cat(outputs), expected[start : start + sum(SIZES[rank.index])])
    torch.cat(outputs).square().sum().backward()
    commit(net)
    for b, c in zip(net.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(b, c)


def walk_backward(outputs: list[Tensor]) -> None:
    torch.cat(outputs).square().sum().backward()


# --- ranks at odds --------------------------------------------------------------------------------------------


@on_ranks(2)
def test_a_rank_that_skips_a_backward_is_found_and_both_go_on(rank: Rank) -> None:
    net, reference = twins(lambda: make_net(1))
    _, parts = data(0)
    outputs = lockstep(net, net, parts[rank.index])
    actions = [lambda: walk_backward(outputs), lambda: lockstep(net, net, parts[1])]
    with pytest.raises(LockstepError, match=r"backward of meeting 1, lockstep 1,.*; forward of meeting 1, lockstep 2,"):
        actions[rank.index]()
    for layer in net.modules():
        if hasattr(layer, "discard"):
            layer.discard()
    for step in range(2):
        train_one_step(net, reference, rank, step)


@on_ranks(2)
def test_a_rank_that_retries_after_an_error_is_found_and_both_go_on(rank: Rank) -> None:
    net, reference = twins(make_net)
    _, parts = data(0)

    def forward(x: Tensor) -> Tensor:
        y = net[:2](x)
        if rank.index == 0:
            raise torch.OutOfMemoryError("made up")
        return net[2:](y)

    if rank.index == 0:
        with pytest.raises(torch.OutOfMemoryError):
            lockstep(net, forward, parts[0])
    with pytest.raises(LockstepError, match="ranks meet different layers: rank 0 1, rank 1 3"):
        lockstep(net, net if rank.index == 0 else forward, parts[rank.index])
    for step in range(2):
        train_one_step(net, reference, rank, step)


@on_ranks(2)
def test_a_retry_before_the_first_layer_takes_the_place_of_what_failed(rank: Rank) -> None:
    net, reference = twins(make_net)
    if rank.index == 0:
        with pytest.raises(torch.OutOfMemoryError):
            lockstep(net, lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("made up")), [1, 2])
    for step in range(2):
        train_one_step(net, reference, rank, step)


CALLS: dict[str, Callable[[nn.Module], Any]] = {"commit": commit, "gather_window_state_dict": gather_window_state_dict}


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("in_backward", [True, False])
@on_ranks(2)
def test_a_lockstep_that_meets_another_call_is_an_error_on_both_and_both_go_on(
    rank: Rank, call: str, layers: int, in_backward: bool
) -> None:
    group = dist.new_group()
    torch.manual_seed(0)
    reference, net = make_net(layers), make_net(layers)
    net.load_state_dict(reference.state_dict())
    convert_sync_accum(net, group)
    _, parts = data(0)
    outputs = lockstep(net, net, parts[rank.index])
    goes_on = (lambda: walk_backward(outputs)) if in_backward else (lambda: lockstep(net, net, parts[0]))
    actions = [goes_on, lambda: CALLS[call](net)]
    with pytest.raises((LockstepError, CommitError), match=r"rank 0 .*, rank 1 ") as caught:
        actions[rank.index]()
    assert isinstance(caught.value, CommitError if rank.index == 1 else LockstepError)
    if rank.index == 0:
        # Not the other's layers, which it sends with the call's name.
        assert "rank 1 commit" in str(caught.value) or "rank 1 gather" in str(caught.value)
        assert "channels" not in str(caught.value)
    for layer in net.modules():
        if hasattr(layer, "discard"):
            layer.discard()
    net.zero_grad()
    for step in range(2):
        train_one_step(net, reference, rank, step)


# --- wrappers -------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Each micro-batch goes through one of three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def forward(self, x: Tensor, heads: list[int]) -> dict[str, Tensor]:
        """``heads``: one for each image, so that a large batch may have several."""
        y = self.body(x)
        return {
            f"head {h}": self.heads[h](y[[i for i, one in enumerate(heads) if one == h]]) for h in sorted(set(heads))
        }


# By rank, the head of each micro-batch.
CHOICES = {
    "different in each": [[0, 1], [2, 1, 0]],
    "the last has what others lack": [[0, 0], [1, 1, 2]],
    "one that nobody uses": [[0, 1], [1, 0, 0]],
    "one for each rank": [[0, 0], [1, 1, 1]],
}


@pytest.mark.parametrize("setting", ["find_unused_parameters", "static_graph"])
@pytest.mark.parametrize("choice", list(CHOICES))
@on_ranks(2)
def test_unused_parameters_are_those_that_no_micro_batch_uses(rank: Rank, choice: str, setting: str) -> None:
    model, reference = twins(Heads)
    ddp = DistributedDataParallel(model, **{setting: True})  # type: ignore[arg-type]
    heads = CHOICES[choice]
    for step in range(3):
        whole, parts = data(step)
        model.zero_grad()
        reference.zero_grad()
        batches = [(x, [h] * len(x)) for x, h in zip(parts[rank.index], heads[rank.index], strict=True)]
        losses = lockstep(ddp, lambda b: ddp(*b)[f"head {b[1][0]}"].square().sum(), batches)
        torch.stack(losses).sum().backward()
        every = [
            h for hs, sizes in zip(heads, SIZES, strict=True) for h, n in zip(hs, sizes, strict=True) for _ in range(n)
        ]
        torch.stack([y.square().sum() for y in reference(whole, every).values()]).sum().backward()
        # DDP averages over the ranks; the reference sums.
        assert_same_gradients(model, reference, factor=1 / 2)
        commit(ddp)
    gc.collect()


class Step(nn.Module):
    """What a loop owner wraps: its forward is the training step, and splits its window itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.unused = nn.Linear(2, 2)
        self.given: nn.Module | None = None

    def forward(self, parts: list[Tensor]) -> Tensor:
        losses = lockstep(self.given or self, lambda x: self.net(x).square().sum(), parts)
        return torch.stack(losses).sum()


@pytest.mark.parametrize("given", ["module", "wrapper", "net"])
@on_ranks(2)
def test_lockstep_inside_the_forward_of_ddp_equals_the_whole_batch(rank: Rank, given: str) -> None:
    step_module, reference = twins(Step)
    ddp = DistributedDataParallel(step_module, find_unused_parameters=True)
    # Not as a submodule: the wrapper would be inside itself.
    object.__setattr__(step_module, "given", {"module": None, "wrapper": ddp, "net": step_module.net}[given])
    for step in range(3):
        whole, parts = data(step)
        step_module.zero_grad()
        reference.zero_grad()
        ddp(parts[rank.index]).backward()
        reference.net(whole).square().sum().backward()
        assert_same_gradients(step_module, reference, factor=1 / 2)
        commit(ddp)
        for b, c in zip(step_module.net.buffers(), reference.net.buffers(), strict=True):
            torch.testing.assert_close(b, c)
    gc.collect()


@on_ranks(2)
def test_lockstep_inside_the_forward_of_fsdp2_equals_the_whole_batch(rank: Rank) -> None:
    step_module, reference = twins(Step)
    fully_shard(step_module, mesh=dist.init_device_mesh("cpu", (2,)))
    for step in range(2):
        whole, parts = data(step)
        step_module.zero_grad()
        reference.zero_grad()
        step_module(parts[rank.index]).backward()
        reference.net(whole).square().sum().backward()
        assert_same_gradients(step_module.net, reference.net, factor=1 / 2)
        commit(step_module)


@on_ranks(2)
def test_nobody_is_told_of_buffers_that_only_ddp_writes(rank: Rank) -> None:
    net, _ = twins(lambda: make_net().append(Offset()))
    ddp = DistributedDataParallel(net)
    for step in range(2):  # warnings are errors here
        lockstep(ddp, ddp, data(step)[1][rank.index])
    gc.collect()


class Offset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset
