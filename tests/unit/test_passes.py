"""The four passes: gradients, memory orders, dtypes, precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from syncaccum.layer.measure import measure
from syncaccum.layer.passes import normalize
from syncaccum.layer.policies import Batch, Normalizer, Policy, Renorm, Running
from tests.oracle import as_columns

pytestmark = pytest.mark.usefixtures("both_passes")

C = 3
SHAPES = [(5, C), (4, C, 6), (3, C, 4, 5), (2, C, 2, 3, 2), (1, C, 7), (2, C, 1, 1), (1, C)]
EPS = 1e-5


def channels_first(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def sliced(x: Tensor) -> Tensor:
    return torch.stack((x, x), dim=-1)[..., 0]


ORDERS = [channels_first, channels_last, sliced]


def policies(count: int) -> dict[str, Policy]:
    mean, variance = torch.randn(C, dtype=torch.float64), torch.rand(C, dtype=torch.float64) + 0.5
    made: dict[str, Policy] = {
        "running": Running(EPS, mean, variance),
        "renorm": Renorm(EPS, mean, variance, 1.0, 1.5, 0.5),
    }
    if count > 1:
        made["batch"] = Batch(EPS)
    return made


def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, policy: Policy) -> Tensor:
    """The definition, in operations that autograd differentiates: what the passes must agree with."""
    columns = x.movedim(1, -1).reshape(-1, C)
    to: Normalizer = policy.normalizer(columns.shape[0], columns.mean(0), columns.var(0, correction=0))
    y = (columns - to.center) * to.scale
    if to.gain is not None:
        y = y * to.gain
    if to.offset is not None:
        y = y + to.offset
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.reshape(x.movedim(1, -1).shape).movedim(-1, 1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_forward_and_backward_are_those_of_the_definition(
    shape: tuple[int, ...], order: Callable[[Tensor], Tensor], affine: bool
) -> None:
    for name, policy in policies(torch.Size(shape).numel() // C).items():
        x = order(torch.randn(shape, dtype=torch.float64) * 2 + 0.7).requires_grad_()
        parameters = [torch.randn(C, dtype=torch.float64, requires_grad=True) for _ in range(2)] if affine else []
        weight, bias = parameters if affine else (None, None)
        y, _ = normalize(x, weight, bias, policy)
        expected = plain(x, weight, bias, policy)
        dy = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(y, expected, msg=f"{name}: {{}}".format)
        gradients = torch.autograd.grad(y, [x, *parameters], dy)
        for actual, wanted in zip(gradients, torch.autograd.grad(expected, [x, *parameters], dy), strict=True):
            torch.testing.assert_close(actual, wanted, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["batch", "running"])  # renorm's constants in backward are no numeric derivative
def test_gradcheck(order: Callable[[Tensor], Tensor], name: str) -> None:
    policy = policies(12)[name]
    x = order(torch.randn(3, C, 2, 2, dtype=torch.float64)).requires_grad_()
    weight, bias = (torch.randn(C, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(lambda x, w, b: normalize(x, w, b, policy)[0], (x, weight, bias))
    assert gradgradcheck(lambda x, w, b: normalize(x, w, b, policy)[0], (x, weight, bias))


def test_renorm_gradcheck_with_gain_and_offset_held_constant() -> None:
    """Clips that are never reached make r and d vary: freeze them, and the rest must be a numeric derivative."""
    renorm = policies(12)["renorm"]
    x = torch.randn(3, C, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(C, dtype=torch.float64, requires_grad=True) for _ in range(2))
    frozen = renorm.normalizer(12, x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), correction=0))

    class Frozen:
        def normalizer(self, *moments: Any) -> Normalizer:
            return renorm.normalizer(*moments)._replace(gain=frozen.gain, offset=frozen.offset)

    policy: Any = Frozen()
    assert gradcheck(lambda x, w, b: normalize(x, w, b, policy)[0], (x, weight, bias))
    assert gradgradcheck(lambda x, w, b: normalize(x, w, b, policy)[0], (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ORDERS)
def test_output_and_gradient_keep_dtype_and_memory_order(dtype: torch.dtype, order: Callable[[Tensor], Tensor]) -> None:
    x = order(torch.randn(4, C, 5, 6, dtype=dtype)).requires_grad_()
    weight = torch.ones(C, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    y, _ = normalize(x, weight, None, Batch(EPS))
    (dx, dweight) = torch.autograd.grad(y, (x, weight), torch.randn_like(y))
    assert (y.dtype, dx.dtype, dweight.dtype) == (dtype, dtype, weight.dtype)
    if order is not sliced:
        assert y.stride() == x.stride() == dx.stride()
    expected = torch.nn.functional.batch_norm(x.detach().double(), None, None, weight.double(), None, True, 0.0, EPS)
    # One rounding of the output to its own dtype; float32 also of the statistics.
    torch.testing.assert_close(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_a_gradient_in_another_memory_order_is_taken_as_it_is() -> None:
    x = torch.randn(2, C, 4, 4, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, C, 4, 4, dtype=torch.float64)
    y, _ = normalize(x, None, None, Batch(EPS))
    (expected,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (actual,) = torch.autograd.grad(y, x, channels_last(dy))
    torch.testing.assert_close(actual, expected)
    (summed,) = torch.autograd.grad(normalize(x, None, None, Running(EPS, *torch.ones(2, C).double()))[0].sum(), x)
    torch.testing.assert_close(summed, torch.full_like(x, (1 + EPS) ** -0.5))


@pytest.mark.parametrize("order", [channels_first, channels_last])
@pytest.mark.parametrize("shape", [(8, C, 56, 56), (1, C, 300, 301), (9001, C), (4, C, 64)], ids=str)
@pytest.mark.parametrize("ratio", [0.0, 3.0, 25.0, 1e2, 1e3, 1e4])
def test_float32_variance_survives_a_large_mean(
    shape: tuple[int, ...], order: Callable[[Tensor], Tensor], ratio: float
) -> None:
    """torchgpipe's raw float32 sums give a variance of -8 at 1e4; recombined float32 means are off by 2e-5."""
    x = order(torch.randn(shape, generator=torch.Generator().manual_seed(0)) + ratio)
    measured = measure(x)
    columns = as_columns(x)
    # Rounding of float32 sums of up to 4,096 squares (1e-6), and of unshifted rows, 16 times 1e-7.
    torch.testing.assert_close(measured.variance, columns.var(0, correction=0), rtol=4e-6, atol=0)
    # In standard deviations: a float32 mean would be off by up to 1e-3 at 1e4.
    torch.testing.assert_close(measured.mean, columns.mean(0), rtol=0, atol=5e-6)


def test_origin_is_not_led_astray_by_outliers_or_blank_borders() -> None:
    x = torch.full((4, C, 32, 32), 1e4) + torch.randn(4, C, 32, 32, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, :] = 0.0
    x[0, 0, 5, 5] = 1e6
    variance = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(measure(x).variance, variance, rtol=1e-6, atol=0)  # float32 sums


def test_empty_micro_batch_gives_empty_output_and_zero_gradients() -> None:
    x = torch.empty(0, C, 4, 4, requires_grad=True)
    weight = torch.ones(C, requires_grad=True)
    y, sums = normalize(x, weight, None, Running(EPS, torch.zeros(C).double(), torch.ones(C).double()))
    y.sum().backward()
    assert y.shape == x.shape
    assert torch.equal(sums, torch.zeros(1 + 2 * C, dtype=torch.float64))
    assert torch.equal(weight.grad, torch.zeros(C))


def test_only_wanted_gradients_are_computed() -> None:
    x, weight = torch.randn(4, C), torch.ones(C, requires_grad=True)
    y, _ = normalize(x, weight, torch.zeros(C), Batch(EPS))
    y.square().sum().backward()
    assert weight.grad is not None


def test_the_input_is_never_written_to() -> None:
    for ratio in (0.0, 1e4):
        x = torch.randn(4, C, 5) + ratio
        before = x.clone()
        normalize(x, None, None, Batch(EPS))
        assert torch.equal(x, before)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["batch", "renorm"])
def test_one_channel_has_two_memory_orders_at_once(order: Callable[[Tensor], Tensor], name: str) -> None:
    """Its strides look like those of one or the other, and the gradient's may look different."""
    policy: dict[str, Policy] = {
        "batch": Batch(EPS),
        "renorm": Renorm(EPS, torch.zeros(1).double(), torch.ones(1).double(), 1, 2, 1),
    }
    x = order(torch.randn(4, 1, 3, 5, dtype=torch.float64)).requires_grad_()
    dy = torch.randn(4, 1, 3, 5, dtype=torch.float64)
    y, _ = normalize(x, None, None, policy[name])
    (expected,) = torch.autograd.grad(y, x, channels_first(dy), retain_graph=True)
    for other in (channels_last(dy), dy.as_strided(dy.shape, (15, 1, 5, 1)), dy.as_strided(dy.shape, (15, 15, 5, 1))):
        (actual,) = torch.autograd.grad(y, x, other, retain_graph=True)
        torch.testing.assert_close(actual, expected)
