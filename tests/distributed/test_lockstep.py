"""lockstep over ranks: exact, silent but for its two collectives per layer, alike in its errors."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from launch.models import build_model
from syncaccum import (
    CommitError,
    LayoutMismatchError,
    LockstepError,
    SyncAccumBatchNorm,
    TooFewValuesError,
    commit,
    commit_on_step,
    convert_sync_accum,
    lockstep,
)
from tests.ranks import Rank, on_ranks
from tests.unit.test_offload import DeviceStore

# Images of each micro-batch, by rank: unequal numbers of them, of unequal sizes, one of them empty.
SPLITS = {1: [[3, 4, 2]], 2: [[3, 0, 2], [4, 1]], 3: [[2], [3, 1, 0], [1, 2]]}


def images(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=generator)


def share(whole: Tensor, rank: int, ranks: int) -> list[Tensor]:
    """This rank's micro-batches of the global batch."""
    sizes = SPLITS[ranks]
    start = sum(sum(s) for s in sizes[:rank])
    return list(whole[start : start + sum(sizes[rank])].split(sizes[rank]))


def models(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A converted digits ResNet and its unconverted twin, float64."""
    torch.manual_seed(seed)
    reference = build_model("resnet").double()
    model = build_model("resnet").double()
    model.load_state_dict(reference.state_dict())
    return convert_sync_accum(model), reference


def loss_of(outputs: Tensor) -> Tensor:
    return outputs.square().sum() + outputs[:, 0].sum()


def check_against_the_whole_batch(rank: Rank, ranks: int) -> None:
    """One step under DDP with default flags against one process on torch.cat."""
    model, reference = models()
    ddp = DistributedDataParallel(model)
    for step in range(3):
        whole = images(step, sum(sum(s) for s in SPLITS[ranks]))
        model.zero_grad()
        reference.zero_grad()
        losses = lockstep(ddp, lambda x: loss_of(ddp(x)), share(whole, rank.index, ranks))
        # DDP averages over the ranks; the reference sums.
        torch.autograd.backward(torch.stack(losses).sum() * ranks)
        commit(ddp)
        torch.autograd.backward(loss_of(reference(whole)))
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            # The target for a ResNet; relative to the largest gradient of the parameter.
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12 * float(q.grad.abs().max()))
        for b, c in zip(model.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(b, c, rtol=1e-12, atol=1e-14)
    gc.collect()  # DDP's reference cycles keep gloo busy after the group is gone


@on_ranks(1)
def test_one_rank_under_ddp_equals_the_whole_batch(rank: Rank) -> None:
    check_against_the_whole_batch(rank, 1)


@on_ranks(2)
def test_two_ranks_under_ddp_equal_the_whole_batch(rank: Rank) -> None:
    check_against_the_whole_batch(rank, 2)


@on_ranks(3)
def test_three_ranks_under_ddp_equal_the_whole_batch(rank: Rank) -> None:
    check_against_the_whole_batch(rank, 3)


@on_ranks(2, timeout=90)
def test_one_hundred_steps_on_two_ranks_of_four_micro_batches(rank: Rank) -> None:
    model, reference = models()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    commit_on_step(ddp, optimizer)
    expected = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    for step in range(100):
        whole = images(step, 16)
        classes = torch.arange(16) % 10
        mine = list(zip(whole.chunk(2)[rank.index].chunk(4), classes.chunk(2)[rank.index].chunk(4), strict=True))

        def forward(batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(ddp(batch[0]), batch[1], reduction="sum") * (2 / 16)

        optimizer.zero_grad()
        torch.autograd.backward(torch.stack(lockstep(ddp, forward, mine)).sum())
        optimizer.step()
        if rank.index == 0:
            expected.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(reference(whole), classes))
            expected.step()
    if rank.index == 0:
        difference = torch.cat(
            [(p - q).flatten() for p, q in zip(model.parameters(), reference.parameters(), strict=True)]
        )
        scale = torch.cat([q.flatten() for q in reference.parameters()])
        assert difference.norm() / scale.norm() <= 1e-7  # the target
    gc.collect()


def count_collectives(action: Callable[[], object]) -> int:
    """All-reduces asked of torch; not by its profiler, which does not see the threads of the micro-batches."""
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as spy:
        action()
    return spy.call_count


@on_ranks(2)
def test_two_collectives_per_layer_whatever_the_number_of_micro_batches(rank: Rank) -> None:
    model = convert_sync_accum(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5), nn.BatchNorm1d(5)))
    lockstep(model, model, [torch.randn(4, 3)])  # the first time, ranks compare their layers
    for count in (1, 4 + rank.index):
        outputs: list[Tensor] = []
        parts = [torch.randn(4, 3) for _ in range(count)]
        assert count_collectives(lambda p=parts, o=outputs: o.extend(lockstep(model, model, p))) == 2  # type: ignore[misc]
        assert count_collectives(lambda o=outputs: torch.autograd.backward(torch.cat(o).sum())) == 2  # type: ignore[misc]


@on_ranks(2)
def test_a_rank_without_data_passes_an_empty_micro_batch(rank: Rank) -> None:
    layer = SyncAccumBatchNorm(3, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64) if rank.index else torch.empty(0, 3, dtype=torch.float64)
    (y,) = lockstep(layer, layer, [x])
    y.sum().backward()
    if rank.index:
        torch.testing.assert_close(y, nn.BatchNorm1d(3).double()(x))
    commit(layer)
    assert layer.num_batches_tracked == 1


@on_ranks(2)
def test_one_value_in_the_global_batch_is_refused_on_every_rank(rank: Rank) -> None:
    layer = SyncAccumBatchNorm(3)
    with pytest.raises(TooFewValuesError, match="one value per channel in the whole global batch"):
        lockstep(layer, layer, [torch.randn(rank.index, 3)])
    # One on each rank is enough.
    lockstep(layer, layer, [torch.randn(1, 3)])


@on_ranks(2)
def test_ranks_that_meet_different_layers_both_hear_which(rank: Rank) -> None:
    model = nn.ModuleDict({"narrow": SyncAccumBatchNorm(3), "wide": SyncAccumBatchNorm(300)})
    name = ("narrow", "wide")[rank.index]
    with pytest.raises(LockstepError, match="rank 0 narrow, rank 1 wide"):
        lockstep(model, model[name], [torch.randn(4, (3, 300)[rank.index])])
    assert model[name].window.count == 0
    lockstep(model, model["wide"], [torch.randn(4, 300)])


@on_ranks(2)
def test_models_that_differ_between_ranks_are_refused(rank: Rank) -> None:
    layer = SyncAccumBatchNorm(3 + rank.index)
    with pytest.raises(LayoutMismatchError, match="layer 0 differs between ranks"):
        lockstep(layer, layer, [torch.randn(4, 3 + rank.index)])


@on_ranks(2, timeout=2)
def test_an_exception_on_one_rank_reaches_the_others_at_the_timeout(rank: Rank) -> None:
    layer = SyncAccumBatchNorm(3)
    lockstep(layer, layer, [torch.randn(4, 3)])

    def forward(x: Tensor) -> Tensor:
        if rank.index == 1:
            raise KeyError("boom")
        return layer(x)

    with pytest.raises((KeyError, CommitError)) as caught:
        lockstep(layer, forward, [torch.randn(4, 3)] * 3)
    assert isinstance(caught.value, KeyError if rank.index == 1 else CommitError)
    assert layer.window.count == 4


@on_ranks(2)
def test_a_wrapper_that_was_not_passed_is_refused(rank: Rank) -> None:
    model = convert_sync_accum(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    ddp = DistributedDataParallel(model)
    with pytest.raises(LockstepError, match="pass that as lockstep's model"):
        lockstep(model, ddp, [torch.randn(4, 3)] * 2)
    gc.collect()


@on_ranks(2)
def test_no_sync_and_buckets_of_ddp_go_on_as_before(rank: Rank) -> None:
    model = convert_sync_accum(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    ddp = DistributedDataParallel(model)
    for _ in range(3):
        with ddp.no_sync():
            torch.autograd.backward(torch.cat(lockstep(ddp, ddp, [torch.randn(4, 3)] * 2)).square().sum())
        assert ddp.require_backward_grad_sync
        torch.autograd.backward(torch.cat(lockstep(ddp, ddp, [torch.randn(4, 3)] * (1 + rank.index))).square().sum())
        gradient = model[0].weight.grad.clone()
        everyones = [torch.empty_like(gradient) for _ in range(2)]
        dist.all_gather(everyones, gradient)
        assert torch.equal(*everyones)
        ddp.zero_grad()
    gc.collect()


@on_ranks(2)
def test_groups_of_their_own(rank: Rank) -> None:
    groups = [dist.new_group([0]), dist.new_group([1])]
    layer = SyncAccumBatchNorm(3, process_group=groups[rank.index], dtype=torch.float64)
    parts = [torch.randn(2 + rank.index, 3, dtype=torch.float64) for _ in range(2)]
    torch.testing.assert_close(torch.cat(lockstep(layer, layer, parts)), nn.BatchNorm1d(3).double()(torch.cat(parts)))


@pytest.mark.parametrize("ratio", [1e4, 1e7, 1e9])
@on_ranks(2)
def test_a_mean_of_many_standard_deviations_that_was_committed(rank: Rank, ratio: float) -> None:
    """Ranks send sums of what is left once the running mean is taken away."""
    layer = convert_sync_accum(nn.BatchNorm2d(1, momentum=1.0).double())
    reference = nn.BatchNorm2d(1).double()
    whole = images(0, 10) + ratio
    parts = share(whole, rank.index, 2)
    for _ in range(2):  # the second time from the running mean on
        y = torch.cat(lockstep(layer, layer, parts))
        commit(layer)
    expected = reference(whole)[: len(y)] if rank.index == 0 else reference(whole)[-len(y) :]
    # The last places of the mean and of the running mean in float64, in standard deviations.
    tolerance = 8 * ratio * torch.finfo(torch.float64).eps
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@on_ranks(2)
def test_running_means_that_differ_between_ranks_are_found(rank: Rank) -> None:
    layer = convert_sync_accum(nn.BatchNorm2d(1).double())
    layer.running_mean.fill_(rank.index)
    with pytest.raises(LockstepError, match="forward of meeting 1, lockstep 1, running mean"):
        lockstep(layer, layer, [images(0, 2)])


@on_ranks(2)
def test_a_running_mean_that_is_not_finite_spoils_no_output(rank: Rank) -> None:
    layer = convert_sync_accum(nn.BatchNorm2d(1).double())
    layer.running_mean.fill_(float("nan"))
    whole = images(0, 4)
    (y,) = lockstep(layer, layer, [whole[2 * rank.index :][:2]])
    torch.testing.assert_close(y, nn.BatchNorm2d(1).double()(whole)[2 * rank.index :][:2])


class Fork(nn.Module):
    """Two ways side by side, the short one first: in the backward it comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
        self.long = nn.Sequential(
            nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Tanh(), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        short = self.short(x)
        return torch.tanh(self.long(x) + short)


@on_ranks(2)
def test_ranks_with_one_and_with_many_micro_batches_walk_backward_in_one_order(rank: Rank) -> None:
    """A thread numbers its own autograd nodes, and a backward goes by numbers. Ten layers drive the numbers apart."""
    torch.manual_seed(0)
    stem = [nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)) for _ in range(10)]
    model = convert_sync_accum(nn.Sequential(*stem, Fork(), Fork()).double())
    xs = list(torch.randn(8, 2, 4, 4, dtype=torch.float64).split([8, 2][rank.index]))
    torch.stack(lockstep(model, lambda x: loss_of(model(x)), xs)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@on_ranks(2)
def test_with_offload_gradients_are_the_large_batchs_on_ranks_with_other_numbers(rank: Rank) -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), Fork(), Fork()).double()
    model = convert_sync_accum(deepcopy(reference))
    whole = torch.randn(8, 2, 4, 4, dtype=torch.float64)
    mine = whole.split(4)[rank.index]
    # By module: the package has a function of that name, too.
    with patch.object(sys.modules["syncaccum.exact.lockstep"], "HostStore", DeviceStore):
        losses = lockstep(model, lambda x: loss_of(model(x)), mine.split([4, 1][rank.index]), offload="cpu")
    assert DeviceStore.made.pop().parked
    torch.stack(losses).sum().backward()
    loss_of(reference(whole)).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        dist.all_reduce(p.grad)
        # A bias before BatchNorm has a gradient that is zero by algebra.
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12 * max(1.0, float(q.grad.abs().max())))
