"""The first pass: mean and variance to 1e-6 whatever is in the data, in both memory orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from syncaccum import SyncAccumBatchNorm
from syncaccum.layer.measure import channel_origin, measure, merge
from tests.oracle import reference

pytestmark = pytest.mark.usefixtures("both_passes")

# What nn.BatchNorm in float64 gives, to this relative error: some roundings of float32, 6e-8 each.
RTOL = 1e-6

SHAPES = [(1, 3, 224, 224), (1, 3, 100, 101), (2, 3, 91, 93), (8, 16, 7, 7), (1, 64, 14, 14), (1, 512, 7, 7)]


def rows(x: Tensor) -> Tensor:
    return x.contiguous()


def columns(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spots(shape: tuple[int, ...], base: float, height: float) -> Iterator[Tensor]:
    """A spot in the middle, in a corner and on the left; one hot pixel; a constant border; noise of another size."""
    _, _, h, w = shape
    for top, left in ((h // 2 - 1, w // 2 - 1), (0, 0), (h // 2, 0)):
        x = random(shape) + base
        x[:, :, top : top + 3, left : left + 3] += height
        yield x
    x = random(shape) * 0.1 + base
    x[0, :, h // 3, w // 2] += height
    yield x
    x = torch.full(shape, base)
    x[:, :, 1:-1, 1:-1] += height + random((*shape[:2], h - 2, w - 2))
    yield x


def assert_measured(x: Tensor) -> None:
    expected = x.double().movedim(1, -1).reshape(-1, x.shape[1])
    measured = measure(x)
    variance = expected.var(0, correction=0)
    torch.testing.assert_close(measured.variance, variance, rtol=RTOL, atol=0)
    # In standard deviations.
    error = (measured.mean - expected.mean(0)).abs() / variance.sqrt()
    assert error.max() < RTOL


@pytest.mark.parametrize("order", [rows, columns])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("height", [10.0, 1e3, 1e5])
@pytest.mark.parametrize("base", [0.0, 1.0, 1e4])
def test_spots_borders_and_hot_pixels(
    shape: tuple[int, ...], base: float, height: float, order: Callable[[Tensor], Tensor]
) -> None:
    for x in spots(shape, base, height):
        assert_measured(order(x))


@pytest.mark.parametrize("order", [rows, columns])
@pytest.mark.parametrize("shape", [*SHAPES, (8, 16, 56, 56), (2, 3, 20011), (4, 5, 6, 7, 8)], ids=str)
@pytest.mark.parametrize("ratio", [0.0, 0.7, 1.0, 2.0, 3.9, 5.0, 30.0, 1e3, 1e4])
def test_a_large_mean(shape: tuple[int, ...], ratio: float, order: Callable[[Tensor], Tensor]) -> None:
    assert_measured(order(random(shape) + ratio))


@pytest.mark.parametrize("order", [rows, columns])
@pytest.mark.parametrize("shape", [*SHAPES, (20_000, 8), (64, 512), (10_007, 3)], ids=str)
def test_values_that_all_round_alike(shape: tuple[int, ...], order: Callable[[Tensor], Tensor]) -> None:
    """In one running sum equal numbers lose their ends on the same side each time: 5e-5 at 20,000 of them."""
    generator = torch.Generator().manual_seed(0)
    binary = torch.randint(0, 2, shape, generator=generator).float() * 0.7371
    for x in (binary, binary * 2 - 0.7371, torch.randint(0, 256, shape, generator=generator).float()):
        assert_measured(order(x))


@pytest.mark.parametrize("order", [rows, columns])
def test_channels_of_every_kind_at_once(order: Callable[[Tensor], Tensor]) -> None:
    """Those that are measured again are put back where they belong."""
    offsets = torch.tensor([0.0, 3.0, -0.5, -2.0, 0.9]).view(1, -1, 1, 1)
    assert_measured(order(random((2, 5, 31, 33)) + offsets))
    assert_measured(order(random((2, 5, 31, 33)) + offsets.mul(1e3)))


@pytest.mark.parametrize("order", [rows, columns])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, order: Callable[[Tensor], Tensor]) -> None:
    for x in spots((1, 3, 64, 65), 1.0, 1e3):
        assert_measured(order(x.to(dtype)))


def test_a_constant_channel_has_no_variance() -> None:
    for x in (torch.full((2, 3, 50, 51), 1234.567), torch.zeros(2, 3, 50, 51), torch.full((333, 3), -1e4 / 3)):
        measured = measure(x)
        torch.testing.assert_close(measured.mean, x.double().flatten(2).mean((0, 2)) if x.dim() > 2 else x.double()[0])
        # Of the mean's last place in float32, squared.
        assert (measured.variance <= (measured.mean * 6e-8).square()).all()


@pytest.mark.parametrize("order", [rows, columns])
def test_running_statistics_with_a_bright_spot(order: Callable[[Tensor], Tensor]) -> None:
    for x in spots((1, 3, 64, 64), 0.0, 1e3):
        layer = SyncAccumBatchNorm(3, momentum=1.0)
        layer(order(x))
        layer.update_stats()
        expected = reference([[x]], 3, momentum=1.0)
        torch.testing.assert_close(layer.running_var.double(), expected.running_var, rtol=RTOL, atol=0)


@pytest.mark.parametrize("order", [rows, columns])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 3, 3), (3, 2), (1000, 2), (500, 2, 1, 1), (2, 3, 5)], ids=str)
def test_the_origin_is_near_the_mean_whatever_is_in_the_middle(
    shape: tuple[int, ...], order: Callable[[Tensor], Tensor]
) -> None:
    """A GPU's forward measures from there, and cannot look first."""
    batches = [random(shape) + 1e4, torch.rand(shape, generator=torch.Generator().manual_seed(1)) ** 8]
    if len(shape) == 4 and shape[2] > 3:
        batches += [*spots(shape, 1e4, 1e3), *spots(shape, 0.0, 1e5)]
    for x in batches:
        flat = x.double().movedim(1, -1).reshape(-1, shape[1])
        deviation = (channel_origin(order(x)) - flat.mean(0)).abs() / flat.std(0)
        # The whole tensor's median is within 1; that of a sample of two values may be further off.
        assert deviation.max() < 5


@pytest.mark.parametrize("ratio", [0.0, 1e4, 1e9])
@pytest.mark.parametrize("sizes", [(4,), (2, 0, 5, 1), (0, 0)], ids=str)
def test_merged_micro_batches_are_the_whole_batch(sizes: tuple[int, ...], ratio: float) -> None:
    parts = [random((n, 3, 7), seed=i).double() * (i + 1) + ratio + i for i, n in enumerate(sizes)]
    whole = torch.cat(parts).movedim(1, -1).reshape(-1, 3)
    n, mean, variance = merge([measure(part) for part in parts])
    assert n == whole.shape[0]
    if n == 0:
        assert not mean.any()
        assert not variance.any()
        return
    # Twice the last place of the mean in float64, against a deviation of about 1.
    tolerance = max(1e-14, 4 * ratio * torch.finfo(torch.float64).eps)
    torch.testing.assert_close(mean, whole.mean(0), rtol=0, atol=tolerance)
    torch.testing.assert_close(variance, whole.var(0, correction=0), rtol=tolerance, atol=0)
