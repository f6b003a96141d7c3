"""Moments: additive, exact, float64."""

from __future__ import annotations

import pytest
import torch

from syncaccum import Moments
from tests.oracle import concatenate


def test_moments_of_parts_add_up_to_moments_of_the_whole() -> None:
    parts = [torch.randn(n, 3, length, dtype=torch.float64) for n, length in ((2, 5), (0, 4), (7, 1))]
    whole = concatenate(parts)
    summed = Moments.zeros(3)
    for part in parts:
        summed = summed + Moments.of(part)
    assert summed.count == whole.shape[0]
    torch.testing.assert_close(summed.mean, whole.mean(0))
    torch.testing.assert_close(summed.variance, whole.var(0, correction=0))


def test_adding_leaves_the_summands_alone() -> None:
    first, second = Moments.of(torch.ones(2, 3)), Moments.of(torch.ones(4, 3))
    before = first.pack().clone()
    _ = first + second
    assert torch.equal(first.pack(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_float64_whatever_the_input(dtype: torch.dtype) -> None:
    moments = Moments.of(torch.ones(3, 2, dtype=dtype))
    assert {moments.count.dtype, moments.total.dtype, moments.total_sq.dtype} == {torch.float64}


def test_pack_and_unpack_are_inverse() -> None:
    moments = Moments.of(torch.randn(5, 4))
    assert torch.equal(Moments.unpack(moments.pack()).pack(), moments.pack())


def test_variance_of_a_constant_is_never_negative() -> None:
    # A constant whose square does not fit float64: S2/n - mean^2 rounds to either side of zero.
    assert (Moments.of(torch.full((7, 1), 1e8 / 3, dtype=torch.float64)).variance >= 0).all()
