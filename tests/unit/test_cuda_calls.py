"""The calls that a GPU would get, on a CPU, in each mode: `stand_in` refuses what torch's CUDA kernels refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncaccum import SyncAccumBatchNorm, commit, lockstep, lookahead
from syncaccum.layer.measure import measure
from tests.oracle import assert_close_to_largest
from tests.unit.stand_in import RefusedError, StandIn, aten, on_cpu, use_stand_in
from tests.unit.test_passes import channels_first, channels_last, sliced

C = 5


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return use_stand_in(monkeypatch)


POLICIES = ["renorm", "batch", "running", "window"]
SHAPES = [(6, C), (4, C, 6), (3, C, 4, 5), (2, C, 2, 3, 2), (4, C, 1, 1), (8, 1, 3, 3)]


def make_pair(policy: str, channels: int, dtype: torch.dtype, affine: bool = True) -> list[SyncAccumBatchNorm]:
    """Two equal layers with uneven parameters; float32 ones for 16-bit data, as under autocast."""
    torch.manual_seed(0)
    first, second = (SyncAccumBatchNorm(channels, normalization=policy, affine=affine) for _ in range(2))
    if affine:
        nn.init.uniform_(first.weight, 0.5, 2)
        nn.init.normal_(first.bias)
    second.load_state_dict(first.state_dict())
    return [layer.double() if dtype == torch.float64 else layer for layer in (first, second)]


def assert_trains_as_on_cpu(
    cuda: StandIn,
    policy: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    order: Callable[[Tensor], Tensor],
    affine: bool,
) -> None:
    """Forward and backward of an untrained layer, and of a trained one."""
    here, there = make_pair(policy, shape[1], dtype, affine)
    tolerance = 16 * torch.finfo(dtype).eps  # roundings of input, output, statistics and gradient, in another order
    for _ in range(2):  # untrained, then trained
        x = order(torch.randn(shape, dtype=dtype) + 1).requires_grad_()
        dy = torch.randn(shape, dtype=dtype)
        leaves = [[x, *layer.parameters()] for layer in (here, there)]
        with on_cpu():
            y = here(x)
            expected = [y, *torch.autograd.grad(y, leaves[0], dy)]
        with cuda.on_device():
            z = there(x)
            actual = [z, *torch.autograd.grad(z, leaves[1], dy)]
        for a, b in zip(actual, expected, strict=True):
            assert_close_to_largest(a, b, tolerance)
        assert z.stride() == y.stride()
        for layer in (here, there):
            commit(layer)
    assert "aten::batch_norm_elemt.out" in cuda.called


@pytest.mark.parametrize("order", [channels_first, channels_last, sliced])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("affine", [True, False])
def test_training_makes_calls_that_cuda_takes_and_gets_the_same(
    cuda: StandIn,
    policy: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    order: Callable[[Tensor], Tensor],
    affine: bool,
) -> None:
    assert_trains_as_on_cpu(cuda, policy, dtype, shape, order, affine)


def assert_as_the_whole_batch(
    parts: Sequence[Tensor],
    affine: bool,
    run: Callable[[SyncAccumBatchNorm, list[Tensor], Tensor], tuple[Tensor, list[Tensor]]],
) -> None:
    """``run`` gives all outputs, and the gradients of what it was given, then of parameters."""
    dtype = parts[0].dtype
    layer = SyncAccumBatchNorm(C, affine=affine)
    plain = nn.BatchNorm2d(C, affine=affine).double()
    if affine:
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
        plain.load_state_dict(layer.state_dict())
    whole = torch.cat(list(parts)).double().requires_grad_()
    dy = torch.randn(whole.shape, dtype=dtype)
    if dtype == torch.float64:
        layer.double()
    ys, gradients = run(layer, [part.clone().requires_grad_() for part in parts], dy)
    y = plain(whole)
    expected = torch.autograd.grad(y, [whole, *plain.parameters()], dy.double())
    tolerance = 16 * torch.finfo(dtype).eps  # as above
    torch.testing.assert_close(ys.double(), y, rtol=tolerance, atol=4 * tolerance)
    actual = [torch.cat(gradients[: len(parts)]), *gradients[len(parts) :]]
    for a, b in zip(actual, expected, strict=True):
        assert_close_to_largest(a.double(), b, tolerance)


def run_lockstep(cuda: StandIn, layer: SyncAccumBatchNorm, xs: list[Tensor], dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    narrow = xs if dy.element_size() == 2 else []
    with cuda.on_device(*narrow):
        outputs = lockstep(layer, layer, xs)
    ys = torch.cat(outputs)
    with cuda.on_device(*narrow):
        gradients = torch.autograd.grad(ys, [*xs, *layer.parameters()], dy)
    return ys, list(gradients)


@pytest.mark.parametrize("order", [channels_first, channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(2, 1, 3), (2, 2), (3,), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_lockstep_makes_calls_that_cuda_takes(
    cuda: StandIn, sizes: tuple[int, ...], dtype: torch.dtype, order: Callable[[Tensor], Tensor], affine: bool
) -> None:
    parts = [order(torch.randn(n, C, 4, 5, dtype=dtype)) for n in sizes]
    assert_as_the_whole_batch(parts, affine, partial(run_lockstep, cuda))


def run_lookahead(
    cuda: StandIn, layer: SyncAccumBatchNorm, xs: list[Tensor], dy: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Of one micro-batch: its gradient is exact, too."""
    # Between its passes, and in the end, the host looks at something.
    with cuda.on_device(may_wait=True):
        for y in lookahead(layer, layer, xs):
            gradients = torch.autograd.grad(y, [*xs, *layer.parameters()], dy)
    return y, list(gradients)


@pytest.mark.parametrize("order", [channels_first, channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_lookahead_makes_calls_that_cuda_takes(
    cuda: StandIn, dtype: torch.dtype, order: Callable[[Tensor], Tensor]
) -> None:
    parts = [order(torch.randn(5, C, 4, 5, dtype=dtype))]
    assert_as_the_whole_batch(parts, True, partial(run_lookahead, cuda))


def test_waits_of_a_lookahead_are_as_many_for_many_layers(cuda: StandIn) -> None:
    def count(layers: int) -> int:
        model = nn.Sequential(*(SyncAccumBatchNorm(C) for _ in range(layers)))
        before = len(cuda.waits)
        with cuda.on_device(may_wait=True):
            for y in lookahead(model, model, [torch.randn(n, C, 4, requires_grad=True) for n in (2, 3)]):
                y.sum().backward()
        return len(cuda.waits) - before

    assert count(1) == count(4) > 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(0, C), (0, C, 3, 4)], ids=str)
def test_an_empty_micro_batch(cuda: StandIn, policy: str, shape: tuple[int, ...]) -> None:
    layer = SyncAccumBatchNorm(C, normalization=policy)
    x = torch.empty(shape, requires_grad=True)
    with cuda.on_device():
        gradients = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    assert [g.shape for g in gradients] == [x.shape, (C,), (C,)]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_one_gradient_alone(cuda: StandIn, policy: str, wanted: str) -> None:
    layer = SyncAccumBatchNorm(C, normalization=policy).requires_grad_(False)
    x = torch.randn(3, C, 4, 5)
    leaf = x if wanted == "x" else layer.get_parameter(wanted)
    leaf.requires_grad_()
    with cuda.on_device():
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), leaf)
    assert gradient.isfinite().all()


def test_a_bias_without_a_weight(cuda: StandIn) -> None:
    layer = SyncAccumBatchNorm(C, normalization="batch")
    layer.weight = None
    x = torch.randn(3, C, 4, 5, requires_grad=True)
    dy = torch.randn(3, C, 4, 5)
    with cuda.on_device():
        _, dbias = torch.autograd.grad(layer(x), [x, layer.bias], dy)
    torch.testing.assert_close(dbias, dy.sum((0, 2, 3)))


@pytest.mark.parametrize("order", [channels_first, channels_last])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e3, 1e4])
def test_a_large_mean(cuda: StandIn, ratio: float, order: Callable[[Tensor], Tensor]) -> None:
    """The kernel's running means are float32, as nn.BatchNorm's there."""
    x = torch.randn(8, C, 21, 20) + ratio
    with cuda.on_device():
        measured = measure(order(x)).widen()
    expected = x.double().var((0, 2, 3), correction=0)
    # A rounding of the mean is 6e-8 of it, and a few add up.
    torch.testing.assert_close(measured.variance, expected, rtol=1e-6 + 1e-7 * ratio, atol=0)
    error = (measured.mean - x.double().mean((0, 2, 3))).abs() / expected.sqrt()
    # So many merges, and each rounds the mean.
    assert error.max() < 1e-6 + 6e-8 * 9 * ratio


@pytest.mark.parametrize("order", [channels_first, channels_last])
def test_a_bright_spot_in_the_middle(cuda: StandIn, order: Callable[[Tensor], Tensor]) -> None:
    layer = SyncAccumBatchNorm(3, momentum=1.0)
    x = torch.randn(1, 3, 64, 64) + 100
    x[:, :, 30:33, 30:33] += 1e4
    with cuda.on_device():
        layer(order(x))
    commit(layer)
    # The kernel's own float32 sums.
    torch.testing.assert_close(layer.running_var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0)


def test_the_stand_in_refuses_what_cuda_refuses(cuda: StandIn) -> None:
    """The call that could not train on a GPU, and three more of its kind."""
    x, half = torch.randn(3, C, 4), torch.randn(3, C, 4).half()
    mean, ones = torch.zeros(C), torch.ones(C)
    with cuda.on_device():
        for x_ in (x, x.movedim(1, -1).reshape(-1, C)):
            with pytest.raises(RefusedError, match="does not have a device"):
                aten.native_batch_norm_backward(x_, x_, None, None, None, mean, ones, True, 0.0, [False, True, True])
        with pytest.raises(RefusedError, match="a vector of"):
            torch.batch_norm_elemt(half, None, None, mean.half(), ones.half(), 0.0)
        with pytest.raises(RefusedError, match="parameters of"):
            torch.batch_norm_elemt(x, ones.double(), None, mean, ones, 0.0)
        with pytest.raises(RefusedError, match="on no data"):
            torch.batch_norm_update_stats(x[:0], None, None, 0.0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [channels_first, channels_last])
@pytest.mark.parametrize("narrow_weights", [True, False])
def test_16_bit_data_is_never_copied_to_32_bits(
    cuda: StandIn, policy: str, dtype: torch.dtype, order: Callable[[Tensor], Tensor], narrow_weights: bool
) -> None:
    layer = SyncAccumBatchNorm(C, normalization=policy, dtype=dtype if narrow_weights else torch.float32)
    x = order(torch.randn(4, C, 6, 5, dtype=dtype)).requires_grad_()
    with cuda.on_device(x):
        y = layer(x)
        gradients = torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))
    assert [g.dtype for g in gradients] == [dtype, layer.weight.dtype, layer.weight.dtype]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(6, C), (4, C, 6), (2, C, 3, 4), (2, C, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("order", [channels_first, channels_last])
def test_an_in_place_activation_may_follow(
    cuda: StandIn, policy: str, shape: tuple[int, ...], order: Callable[[Tensor], Tensor]
) -> None:
    here, there = make_pair(policy, C, torch.float64)
    x = order(torch.randn(shape, dtype=torch.float64)).requires_grad_()
    with on_cpu():
        expected = torch.autograd.grad(here(x).relu().sum(), x)
    with cuda.on_device():
        actual = torch.autograd.grad(there(x).relu_().sum(), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_eval_is_batch_norms(cuda: StandIn, policy: str, dtype: torch.dtype) -> None:
    layer = SyncAccumBatchNorm(C, normalization=policy).eval()
    x = torch.randn(3, C, 4, 5, dtype=dtype, requires_grad=True)
    with cuda.on_device():
        y = layer(x)
        y.sum().backward()
    plain = nn.BatchNorm2d(C).eval()
    torch.testing.assert_close(y, plain(x.detach()))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint(cuda: StandIn, policy: str, reentrant: bool) -> None:
    here, there = make_pair(policy, C, torch.float32)
    x = torch.randn(3, C, 4, 5, requires_grad=True)
    dy = torch.randn(3, C, 4, 5)
    # Under policy "window" the second forward looks for what the first one used.
    with cuda.on_device(may_wait=policy == "window"):
        expected = torch.autograd.grad(here(x), [x, *here.parameters()], dy)
        # The reentrant kind gives no gradients to autograd.grad.
        checkpoint(there, x, use_reentrant=reentrant).backward(dy)
    for actual, wanted in zip([x.grad, *(p.grad for p in there.parameters())], expected, strict=True):
        assert torch.equal(actual, wanted)
    assert torch.equal(here.window.pack(), there.window.pack())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_gradient_of_a_gradient(cuda: StandIn, policy: str) -> None:
    here, there = make_pair(policy, C, torch.float64)
    x = torch.randn(3, C, 4, 5, dtype=torch.float64, requires_grad=True)
    probes = [torch.randn_like(x) for _ in range(2)]

    def second(layer: SyncAccumBatchNorm) -> tuple[Tensor, ...]:
        leaves = [x, layer.weight]
        (dx,) = torch.autograd.grad((layer(x).square() * probes[0]).sum(), x, create_graph=True)
        return torch.autograd.grad((dx * probes[1]).sum(), leaves)

    with on_cpu():
        expected = second(here)
    with cuda.on_device():
        actual = second(there)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("order", [channels_first, channels_last, sliced])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_device_gets_plain_operations_and_no_waits(
    monkeypatch: pytest.MonkeyPatch, policy: str, order: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    here, there = make_pair(policy, C, dtype)
    x = order(torch.randn(3, C, 4, 5, dtype=dtype) + 1).requires_grad_()
    dy = torch.randn(3, C, 4, 5, dtype=dtype)
    expected = [here(x), *torch.autograd.grad(here(x), [x, *here.parameters()], dy)]
    with use_stand_in(monkeypatch, "xpu").on_device():
        y = there(x)
        actual = [y, *torch.autograd.grad(there(x), [x, *there.parameters()], dy)]
    tolerance = 16 * torch.finfo(dtype).eps  # as above
    for a, b in zip(actual, expected, strict=True):
        assert_close_to_largest(a, b, tolerance)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_waits_of_a_commit_are_as_many_for_many_layers(cuda: StandIn, momentum: float | None) -> None:
    def count(layers: int) -> int:
        model = nn.Sequential(*(SyncAccumBatchNorm(C, momentum=momentum) for _ in range(layers)))
        # The second one: the first finds out where in the message what is.
        for _ in range(2):
            with cuda.on_device():
                model(torch.randn(3, C))
            before = len(cuda.waits)
            with cuda.on_device(may_wait=True):
                commit(model)
        return len(cuda.waits) - before

    assert count(1) == count(4)


def test_the_stand_in_sees_waits() -> None:
    stand_in, x = StandIn(), torch.ones(3)
    waits: list[Callable[[], Any]] = [
        lambda: x.sum().item(),
        lambda: bool(x.sum() > 0),
        lambda: float(x[0]),
        lambda: x.cpu(),
        lambda: x.to("cpu"),
        lambda: x.tolist(),
        lambda: x[x > 0],
        lambda: torch.equal(x, x),
        lambda: torch.tensor([1.0], device=x.device),
    ]
    with stand_in.on_device():
        for wait in waits:
            with pytest.raises(RefusedError, match="wait for the device"):
                wait()
