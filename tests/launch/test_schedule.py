"""The order of the data depends on seed and epoch only; ranks and micro-batches split it without loss."""

from __future__ import annotations

from itertools import chain

import pytest

from launch.schedule import global_batches, micro_batches, rank_share, smallest_micro_batch


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("micro_batch", [1, 3, 4, 100])
def test_ranks_and_micro_batches_put_together_are_the_global_batches(ranks: int, micro_batch: int) -> None:
    for batch in global_batches(images=67, window=16, seed=3, epoch=1):
        shares = [rank_share(batch, rank, ranks) for rank in range(ranks)]
        parts = [part for share in shares for part in micro_batches(share, micro_batch)]
        assert list(chain(*parts)) == batch
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert max(map(len, parts)) <= micro_batch


def test_an_epoch_is_every_image_once_in_windows_and_a_rest() -> None:
    batches = global_batches(images=67, window=16, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [16, 16, 16, 16, 3]
    assert sorted(chain(*batches)) == list(range(67))


def test_order_changes_with_seed_and_with_epoch_and_with_nothing_else() -> None:
    orders = [list(chain(*global_batches(67, 16, seed, epoch))) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert list(chain(*global_batches(67, 5, seed=0, epoch=0))) == orders[0]


def test_a_rank_without_images_still_has_a_micro_batch() -> None:
    assert [list(part) for part in micro_batches(rank_share([7], 0, 2), 4)] == [[]]


@pytest.mark.parametrize(
    ("images", "window", "micro_batch", "ranks", "smallest"),
    [(64, 64, 4, 2, 4), (64, 64, 5, 2, 2), (66, 64, 4, 2, 1), (67, 64, 4, 3, 1), (1437, 64, 4, 2, 2)],
)
def test_smallest_micro_batch(images: int, window: int, micro_batch: int, ranks: int, smallest: int) -> None:
    parts = [
        len(part)
        for batch in global_batches(images, window, 0, 0)
        for rank in range(ranks)
        for part in micro_batches(rank_share(batch, rank, ranks), micro_batch)
    ]
    assert smallest_micro_batch(images, window, micro_batch, ranks) == smallest
    assert min(filter(None, parts)) == smallest
