"""Any split of a batch into micro-batches gives the statistics of the whole; shapes and values by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from syncaccum import SyncAccumBatchNorm
from tests.oracle import assert_same_statistics, concatenate, reference

windows = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(1, 5), min_size=3, max_size=3)), min_size=1, max_size=4),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(
    windows,
    st.integers(0, 3),
    st.sampled_from([None, 0.0, 0.1, 1.0]),
    st.sampled_from([0.0, 5.0, 1e3]),
    st.sampled_from(["renorm", "running"]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_any_split_into_micro_batches_gives_the_statistics_of_the_whole(
    shapes: list[list[tuple[int, list[int]]]],
    spatial: int,
    momentum: float | None,
    ratio: float,
    policy: str,
    last: bool,
    seed: int,
) -> None:
    values = torch.Generator().manual_seed(seed)
    data = [
        [torch.randn(n, 2, *s[:spatial], generator=values, dtype=torch.float64) + ratio for n, s in window]
        for window in shapes
    ]
    data = [w for w in data if concatenate(w).shape[0] > 1]
    layer = SyncAccumBatchNorm(2, momentum=momentum, normalization=policy, dtype=torch.float64)
    for window in data:
        for x in window:
            layer(_store_channels_last(x) if last else x)
        layer.update_stats()
    # A float64 square of the mean is rounded to 1.1e-16 of itself, some twenty times over; two values may happen to
    # lie close together, so the error is no fixed share of their variance.
    assert_same_statistics(layer, reference(data, 2, momentum), rtol=1e-12, atol=20 * 1.1e-16 * (1 + ratio**2))


def _store_channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
