"""Policy "window" over ranks: the last window is the global one, and each rank balances its own sums."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from syncaccum import SyncAccumBatchNorm, commit, gather_window_state_dict, load_window_state_dict, window_state_dict
from tests.ranks import Rank, on_ranks, run_on_ranks

State = dict[str, Tensor]


def make_layer() -> SyncAccumBatchNorm:
    return SyncAccumBatchNorm(3, normalization="window", dtype=torch.float64)


def draw(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 5, generator=generator, dtype=torch.float64) * 3 + 2


def feed(layer: torch.nn.Module, seed: int, micro_batches: int) -> list[Tensor]:
    """Gradients of micro-batches."""
    gradients = []
    for i in range(micro_batches):
        x = draw(seed + i).requires_grad_()
        layer(x).backward(draw(seed + i + 500))
        assert x.grad is not None
        gradients.append(x.grad)
    return gradients


@on_ranks(2)
def test_the_prior_is_the_last_global_batch_on_every_rank(rank: Rank) -> None:
    layer = make_layer()
    # Uneven: one micro-batch on rank 0, two on rank 1.
    feed(layer, 100 * rank.index, 1 + rank.index)
    commit(layer)
    before = [draw(0), draw(100), draw(101)]
    flat = torch.cat(before).transpose(0, 1).flatten(1)
    x = draw(7 + rank.index)
    own = x.transpose(0, 1).flatten(1)
    # 12 samples of 5 values, counted as 4.
    weights = torch.cat([torch.full((60,), 4 / 12), torch.ones(20)]).double()
    values = torch.cat([flat, own], 1)
    mean = (values * weights).sum(1, keepdim=True) / weights.sum()
    var = ((values - mean).square() * weights).sum(1, keepdim=True) / weights.sum()
    expected = ((own - mean) / (var + layer.eps).sqrt()).unflatten(1, (4, 5)).transpose(0, 1)
    torch.testing.assert_close(layer(x), expected)


@on_ranks(2)
def test_ddp_gives_each_rank_the_gradients_of_its_own_books(rank: Rank) -> None:
    alone, parallel = make_layer(), DistributedDataParallel(make_layer())
    for window in range(2):
        seed = 10 * window + 100 * rank.index
        torch.testing.assert_close(feed(parallel, seed, 3), feed(alone, seed, 3))
        commit(parallel)
        commit(alone)


def feed_and_save(rank: Rank) -> tuple[State, State]:
    layer = make_layer()
    # After three windows each rank finds its prior worth something else.
    for window in range(3):
        feed(layer, 100 * rank.index + 10 * window, 2)
        commit(layer)
    feed(layer, 100 * rank.index + 50, 1)
    return window_state_dict(layer), gather_window_state_dict(layer)


def load_and_save(rank: Rank, state: State) -> State:
    layer, other = make_layer(), make_layer()
    load_window_state_dict(layer, state)
    saved = window_state_dict(layer)
    # A third of a count is none the worse.
    load_window_state_dict(other, saved)
    assert all(torch.equal(value, saved[key]) for key, value in window_state_dict(other).items())
    return saved


def test_books_saved_by_two_ranks_are_shared_out_over_any_number() -> None:
    saved = run_on_ranks(feed_and_save, 2)
    owns, (gathered, _) = [own for own, _ in saved], [all_ for _, all_ in saved]
    stacked = {key: torch.stack([own[key] for own in owns]) for key in owns[0]}
    for state in (gathered, stacked):
        for ranks in (1, 2, 3):
            loaded = run_on_ranks(load_and_save, ranks, state)
            for key, shares in stacked.items():
                parts = torch.stack([one[key] for one in loaded])
                if state is stacked and ranks == 2:
                    # To each its own, bit for bit.
                    assert torch.equal(parts, shares), key
                elif key.endswith("/last"):
                    # A prior's sums and, at the end of the squares, its worth: the mean of what they were.
                    torch.testing.assert_close(parts, shares.mean(0).expand_as(parts))
                elif key.endswith("/squares"):
                    torch.testing.assert_close(parts[:, :-1].sum(0), shares[:, :-1].sum(0))
                    torch.testing.assert_close(parts[:, -1], shares[:, -1].mean().expand(ranks))
                else:
                    torch.testing.assert_close(parts.sum(0), shares.sum(0))
    worths = [own[key][-1] for own in owns for key in own if key.endswith("/squares")]
    # 1 to 16 samples, and not only whole numbers of them.
    assert worths[0] != worths[1]
    assert not all(float(worth).is_integer() for worth in worths)
