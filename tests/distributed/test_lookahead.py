"""lookahead over ranks: an exact forward, DDP with default flags, rounds of unequal ranks, peers that give up."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncaccum import LockstepError, SyncAccumBatchNorm, commit, convert_sync_accum, lockstep, lookahead
from tests.distributed.test_lockstep import images, loss_of, models
from tests.ranks import Rank, on_ranks

SPLITS = {2: [[[3, 4], [2, 5]], [[2], [3, 0, 1]], [[0], [4, 3]]], 3: [[[2], [3, 1, 0], [1, 2]]]}
"""By number of ranks: for each rank the sizes of its micro-batches."""


def share(whole: Tensor, sizes: Sequence[Sequence[int]], rank: int) -> list[Tensor]:
    start = sum(sum(s) for s in sizes[:rank])
    return list(whole[start : start + sum(sizes[rank])].split(list(sizes[rank])))


def losses(model: nn.Module, parts: Sequence[Tensor]) -> Iterator[Tensor]:
    return lookahead(model, lambda x: loss_of(model(x)), parts)


def check_forward_and_ddp(rank: Rank) -> None:
    for sizes in SPLITS[rank.size]:
        model, reference = models()
        ddp = DistributedDataParallel(model)
        reduced: list[int] = []

        # Without annotations: torch looks for classes there, not for their names.
        def count(state, bucket, reduced=reduced):  # type: ignore[no-untyped-def]
            reduced.append(bucket.buffer().numel())
            future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
            return future.then(lambda f: f.value()[0] / rank.size)

        ddp.register_comm_hook(None, count)
        for step in range(2):
            whole = images(step, sum(sum(s) for s in sizes))
            total = 0.0
            for loss in losses(ddp, share(whole, sizes, rank.index)):
                total += loss.item()
                loss.backward()
            # Each window reduces each gradient once, in the last backward.
            assert sum(reduced) == sum(p.numel() for p in model.parameters()) * (step + 1)
            everyones = torch.tensor(total).double()
            dist.all_reduce(everyones)
            torch.testing.assert_close(everyones.item(), loss_of(reference(whole)).item())
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            mean = gradient.clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(gradient, mean / rank.size)
            commit(model)
        for key, value in reference.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], value)


@on_ranks(2)
def test_losses_and_statistics_are_the_large_batchs_on_two_ranks(rank: Rank) -> None:
    check_forward_and_ddp(rank)


@on_ranks(3)
def test_losses_and_statistics_are_the_large_batchs_on_three_ranks(rank: Rank) -> None:
    check_forward_and_ddp(rank)


@on_ranks(2)
def test_the_gradient_is_the_formulas_on_two_ranks(rank: Rank) -> None:
    layer = convert_sync_accum(nn.BatchNorm1d(3, affine=False).double())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        xs = [[torch.randn(2, 3, dtype=torch.float64, generator=generator) for _ in range(2)] for _ in range(3)]
        dys = [[torch.randn(2, 3, dtype=torch.float64, generator=generator) + 0.5 for _ in range(2)] for _ in range(3)]
        mine = [one[rank.index].requires_grad_() for one in xs]
        for y, dy in zip(lookahead(layer, layer, mine), [one[rank.index] for one in dys], strict=True):
            y.backward(dy)
        dxs = by_formula([[x.detach() for x in one] for one in xs], dys, layer.eps)
        for x, dx in zip(mine, dxs, strict=True):
            torch.testing.assert_close(x.grad, dx[rank.index])
        commit(layer)


def by_formula(xs: list[list[Tensor]], dys: list[list[Tensor]], eps: float) -> list[list[Tensor]]:
    """The formula of rounds as it says, by round and rank, for equal micro-batches."""
    ranks, n, samples = len(xs[0]), float(len(xs[0][0])), len(xs[0][0])
    whole = torch.cat([x for one in xs for x in one])
    scale = (whole.var(0, unbiased=False) + eps).rsqrt()
    total, done = float(len(whole)), 0.0
    seen = torch.zeros(2, whole.shape[1]).double()
    applied = [torch.zeros_like(seen) for _ in range(ranks)]
    dxs: list[list[Tensor]] = []
    for number, (round_xs, round_dys) in enumerate(zip(xs, dys, strict=True)):
        hats = [(x - whole.mean(0)) * scale for x in round_xs]
        sums = [torch.stack([dy.sum(0), (dy * hat).sum(0)]) for dy, hat in zip(round_dys, hats, strict=True)]
        left, others = len(xs) - number, n * (ranks - 1)
        dxs.append([])
        for rank in range(ranks):
            w = samples / (samples + 2) / left
            owed = seen + sums[rank] + others * w * sums[rank] / n
            each = (owed / ranks - applied[rank]) / max((total - done) / ranks, 0.1 * total / ranks)
            applied[rank] = applied[rank] + n * each
            dxs[-1].append(scale * (round_dys[rank] - each[0] - hats[rank] * each[1]))
        seen, done = seen + sum(sums), done + n * ranks
    return dxs


@on_ranks(2)
def test_a_peer_that_gives_up_is_named_at_once(rank: Rank) -> None:
    model, _ = models()
    results = cast(Generator[Tensor], losses(model, images(rank.index, 6).split(2)))
    next(results).backward()
    if rank.index == 1:
        results.close()
    else:
        with pytest.raises(LockstepError, match="rank 1 given up"):
            next(results)
    assert all(layer.window.count == 0 for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm))
    # The group is of use as before.
    for loss in losses(model, [images(rank.index, 3)]):
        loss.backward()
    assert commit(model).ranks == 2


@on_ranks(2)
def test_values_that_change_between_the_passes_on_one_rank_are_an_error_on_all(rank: Rank) -> None:
    model, _ = models()
    changes = iter(range(100))
    match = "at layer .* on this rank" if rank.index == 1 else "at its layers .* on rank 1"
    forward = (lambda x: model(x * (1 + next(changes)))) if rank.index == 1 else model
    results = lookahead(model, forward, images(rank.index, 4).split(2))
    with pytest.raises(LockstepError, match=rf"values {match}.*do not step"):
        deque((y.sum().backward() for y in results), maxlen=0)
    assert all(layer.window.count == 0 for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm))
    for loss in losses(model, [images(rank.index, 3)]):
        loss.backward()
    assert commit(model).ranks == 2


@on_ranks(2)
def test_lockstep_on_one_rank_and_lookahead_on_the_other_are_at_odds(rank: Rank) -> None:
    model, _ = models()
    parts = list(images(rank.index, 4).split(2))
    calls = [lambda: lockstep(model, model, parts), lambda: next(lookahead(model, model, parts))]
    with pytest.raises(LockstepError, match=r"rank \d (lockstep|lookahead)"):
        calls[rank.index]()
