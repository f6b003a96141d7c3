"""Which images make up each global batch, and how ranks and micro-batches split it.

Pure Python. A global batch depends on the seed, the epoch and the window only, never on the number of ranks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

TRAIN_IMAGES = 1437  # 80 % of the 1797 digits
TEST_IMAGES = 360


def global_batches(images: int, window: int, seed: int, epoch: int) -> list[list[int]]:
    """All images of an epoch in random order, ``window`` at a time; the last global batch takes the rest."""
    order = list(range(images))
    random.Random(f"seed {seed} epoch {epoch}").shuffle(order)
    return [order[start : start + window] for start in range(0, images, window)]


def rank_share(batch: Sequence[int], rank: int, ranks: int) -> Sequence[int]:
    """This rank's part of a global batch; parts differ by one image at most, and may be empty."""
    return batch[len(batch) * rank // ranks : len(batch) * (rank + 1) // ranks]


def micro_batches(share: Sequence[int], size: int) -> list[Sequence[int]]:
    """A rank's share, ``size`` images at a time.

    An empty share is one empty micro-batch: every rank has a backward pass in which gradients are reduced.
    """
    return [share[start : start + size] for start in range(0, len(share), size)] or [share]


def smallest_micro_batch(images: int, window: int, micro_batch: int, ranks: int) -> int:
    """Images in the smallest micro-batch of an epoch that has any."""
    batches = {min(window, images), images % window}
    return min(
        len(part)
        for size in batches
        for rank in range(ranks)
        for part in micro_batches(rank_share(range(size), rank, ranks), micro_batch)
        if part
    )
