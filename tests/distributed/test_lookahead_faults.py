"""lookahead over ranks of which one gives up: with long messages, with several groups, before DDP's last backward."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncaccum import CommitError, LockstepError, SyncAccumBatchNorm, commit, convert_sync_accum, lookahead
from tests.oracle import gather_global_batch
from tests.ranks import Rank, on_ranks

TIMEOUT = 30.0
"""Of the group. What takes a quarter of it did not wait for it."""


class Twice(nn.Module):
    """Comes to each of two layers three times: a round is longer than a commit, and goes in several messages."""

    def __init__(self, groups: Sequence[Any] = (None, None)) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norms = nn.ModuleList(convert_sync_accum(nn.BatchNorm1d(3), group) for group in groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        for _ in range(3):
            for norm in self.norms:
                x = norm(torch.tanh(x) + x)
        return x


def make(groups: Sequence[Any] = (None, None)) -> Twice:
    torch.manual_seed(0)
    return Twice(groups).double()


def parts_of(rank: Rank, *sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank.index)
    return [torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in sizes]


def loss_of(y: Tensor) -> Tensor:
    return y.square().sum() + y[:, 0].exp().sum()


def check_a_window(model: nn.Module, rank: Rank) -> None:
    """Everything works: by outputs, and by statistics of a layer of its own in the model's group."""
    for loss in lookahead(model, lambda x: loss_of(model(x)), parts_of(rank, 2, 0, 3)):
        loss.backward()
    assert commit(model).ranks == rank.size
    layer = convert_sync_accum(nn.BatchNorm1d(3).double())
    parts = parts_of(rank, 1, 3)
    outputs = []
    for y in lookahead(layer, layer, parts):
        outputs.append(y.detach())
        y.sum().backward()
    commit(layer)
    whole, reference = gather_global_batch(parts), nn.BatchNorm1d(3).double()
    expected = reference(whole).split([4] * rank.size)[rank.index]
    torch.testing.assert_close(torch.cat(outputs), expected)
    torch.testing.assert_close(layer.running_var, reference.running_var)


def windows_of(model: nn.Module) -> list[int]:
    return [int(layer.window.count) for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm)]


class BoomError(Exception):
    pass


def run_until(model: nn.Module, parts: Sequence[Tensor], raises: Callable[[int], bool], in_body: bool) -> None:
    """A loop that raises in forward's second pass, or in the loop's body, at a micro-batch's index."""
    indexes = {id(x): index for index, x in enumerate(parts)}

    def forward(x: Tensor) -> Tensor:
        y = loss_of(model(x))
        if torch.is_grad_enabled() and not in_body and raises(indexes[id(x)]):
            raise BoomError
        return y

    for index, loss in enumerate(lookahead(model, forward, parts)):
        if in_body and raises(index):
            raise BoomError
        loss.backward()


@pytest.mark.parametrize("in_body", [True, False], ids=["in the body", "in forward"])
@pytest.mark.parametrize("at", [0, 1, 2])
@on_ranks(3, timeout=TIMEOUT)
def test_peers_name_the_rank_that_raised_at_once(rank: Rank, at: int, in_body: bool) -> None:
    model = make()
    model(parts_of(rank, 4)[0])
    before = windows_of(model)
    # Unequal numbers: rank 2 sits the first round out.
    parts = parts_of(rank, 2, 3, 1) if rank.index < 2 else parts_of(rank, 2, 2)
    start = time.monotonic()
    with pytest.raises((BoomError, LockstepError)) as caught:
        run_until(model, parts, lambda index: rank.index == 1 and index == at, in_body)
    assert time.monotonic() - start < TIMEOUT / 4
    if rank.index == 1:
        assert isinstance(caught.value, BoomError)
    else:
        assert "rank 1 given up" in str(caught.value)
    assert windows_of(model) == before
    check_a_window(model, rank)


@pytest.mark.parametrize("at", [0, 1])
@on_ranks(3, timeout=TIMEOUT)
def test_the_news_passes_from_group_to_group(rank: Rank, at: int) -> None:
    """Rank 2 shares no layer with the rank that raises, but one with a rank that does."""
    left, right = dist.new_group([0, 1]), dist.new_group([1, 2])
    alone = [dist.new_group([index]) for index in range(3)][rank.index]
    model = make([(left, alone), (left, right), (alone, right)][rank.index])
    start = time.monotonic()
    with pytest.raises((BoomError, LockstepError)) as caught:
        run_until(model, parts_of(rank, 2, 3, 1), lambda index: rank.index == 0 and index == at, False)
    assert time.monotonic() - start < TIMEOUT / 4
    assert isinstance(caught.value, BoomError if rank.index == 0 else LockstepError)
    assert windows_of(model) == [0, 0]
    for loss in lookahead(model, lambda x: loss_of(model(x)), parts_of(rank, 2, 3)):
        loss.backward()


@on_ranks(3)
def test_all_ranks_that_break_together_raise_nothing(rank: Rank) -> None:
    model = make()
    for loss in lookahead(model, lambda x: loss_of(model(x)), parts_of(rank, 2, 3, 1)):
        loss.backward()
        break
    assert windows_of(model) == [0, 0]
    check_a_window(model, rank)


@pytest.mark.parametrize("sizes", [(2, 3), (4,)], ids=str)
@on_ranks(2, timeout=TIMEOUT)
def test_under_ddp_a_failure_in_the_last_forward_meets_no_gradients(rank: Rank, sizes: tuple[int, ...]) -> None:
    """The peers' backward is not begun: their gradients and the news would meet in one all-reduce."""
    model = make()
    ddp = DistributedDataParallel(model)
    parts = parts_of(rank, *sizes)
    start = time.monotonic()
    with pytest.raises((BoomError, LockstepError)) as caught:
        run_until(ddp, parts, lambda index: rank.index == 1 and index == len(parts) - 1, in_body=False)
    assert time.monotonic() - start < TIMEOUT / 4
    assert isinstance(caught.value, BoomError if rank.index == 1 else LockstepError)
    assert rank.index == 1 or "rank 1 given up" in str(caught.value)
    assert windows_of(model) == [0, 0]
    check_a_window(model, rank)
    gc.collect()


@on_ranks(2, timeout=3)
def test_under_ddp_a_failure_before_the_last_backward_is_found_at_the_timeout(rank: Rank) -> None:
    """As in any training with DDP: a peer waits for gradients."""
    ddp = DistributedDataParallel(make())
    with pytest.raises((BoomError, RuntimeError)) as caught:
        run_until(ddp, parts_of(rank, 2, 3), lambda index: rank.index == 1 and index == 1, in_body=True)
    assert isinstance(caught.value, BoomError if rank.index == 1 else RuntimeError)
    # It is torch's own error: no message of ours met the gradients.
    assert not isinstance(caught.value, CommitError)
    assert windows_of(ddp) == [0, 0]
    gc.collect()


@on_ranks(2)
def test_a_rank_with_an_empty_micro_batch_only(rank: Rank) -> None:
    model = make()
    ddp = DistributedDataParallel(model)
    parts = parts_of(rank, *((3, 2), (0,))[rank.index])
    for _ in range(2):
        model.zero_grad()
        for loss in lookahead(ddp, lambda x: loss_of(ddp(x)), parts):
            loss.backward()
    gradient = model.linear.weight.grad.clone()
    dist.broadcast(gradient, 0)
    assert torch.equal(gradient, model.linear.weight.grad)
    assert gradient.abs().sum() > 0
    commit(ddp)
    gc.collect()
