"""The calls that a GPU would get, on a CPU: a stand-in takes them, and refuses what torch's CUDA kernels refuse.

The conditions are those of ATen/native/cuda/Normalization.cu and .cuh of torch 2.13, and of the launch of a CUDA
kernel, which takes no empty grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from syncaccum import SyncAccumBatchNorm, commit, convert_sync_accum, lockstep
from tests.unit.test_passes import channels_first, channels_last, sliced

C = 5
aten = torch.ops.aten


class RefusedError(RuntimeError):
    """What CUDA would not do."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise RefusedError(what)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """ATen's acc_type on CUDA."""
    return torch.promote_types(dtype, torch.float32)


def in_columns(x: Tensor) -> bool:
    """batch_norm_use_channels_last_kernels."""
    return (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)) or (
        x.is_contiguous() and x.stride(1) == 1
    )


def check_data(*tensors: Tensor) -> None:
    first = tensors[0]
    require(first.numel() > 0, "a kernel on no data")
    for x in tensors:
        require(x.dtype == first.dtype and x.shape == first.shape, "data of two dtypes or shapes")
        # Another order is walked by a general kernel, which is slow, or by none.
        require(x.is_contiguous(), "data that is not contiguous")
        require(in_columns(x) == in_columns(first), "data in two memory orders")


def check_vectors(x: Tensor, *vectors: Tensor) -> None:
    """Accessors check the dtype; kernels of columns read raw pointers."""
    for vector in vectors:
        require(vector.dtype == accumulated(x.dtype), f"a vector of {vector.dtype} for data of {x.dtype}")
        require(vector.shape == (x.shape[1],) and vector.is_contiguous(), "a vector of another shape or strides")


def check_parameters(x: Tensor, *parameters: Tensor | None) -> None:
    given = [p for p in parameters if p is not None]
    for p in given:
        require(p.dtype in (x.dtype, accumulated(x.dtype)), f"parameters of {p.dtype} for data of {x.dtype}")
        require(p.dtype == given[0].dtype and p.is_contiguous(), "parameters of two dtypes, or with strides")


def wide(x: Tensor) -> Tensor:
    return x.to(accumulated(x.dtype))


def spread(vector: Tensor | None, x: Tensor, default: float) -> Any:
    return default if vector is None else wide(vector).view(1, -1, *[1] * (x.dim() - 2))


def over(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def update_stats(x: Tensor, mean: None, var: None, momentum: float) -> tuple[Tensor, Tensor]:
    check_data(x)
    batch_var, batch_mean = torch.var_mean(wide(x), over(x), correction=0)
    return batch_mean, batch_var


def elemt(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    check_data(x)
    check_vectors(x, mean, invstd)
    check_parameters(x, weight, bias)
    y = (wide(x) - spread(mean, x, 0)) * spread(invstd, x, 1) * spread(weight, x, 1) + spread(bias, x, 0)
    return y.to(x.dtype)


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, *wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_data(x, dy)
    check_vectors(x, mean, invstd)
    check_parameters(x, weight)
    require(weight is not None or not any(wanted[1:]), "tensor does not have a device")
    sum_dy = wide(dy).sum(over(x))
    sum_dy_xmu = (wide(dy) * (wide(x) - spread(mean, x, 0))).sum(over(x))
    options = mean if weight is None else weight
    return sum_dy, sum_dy_xmu, (sum_dy_xmu * invstd).to(options.dtype), sum_dy.to(options.dtype)


def backward_elemt(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    check_data(x, dy)
    check_vectors(x, mean, invstd, sum_dy, sum_dy_xmu)
    # Rows want the weight in mean's dtype.
    require(weight is None or weight.dtype == mean.dtype, "weight and mean of two dtypes")
    check_parameters(x, weight)
    require(count.dtype == torch.int32 and count.device == x.device, "a count that is no int32 on the device")
    n = count.sum()
    scale = spread(invstd, x, 1)
    centered = (wide(x) - spread(mean, x, 0)) * scale.square() * spread(sum_dy_xmu, x, 0) / n
    return ((wide(dy) - spread(sum_dy, x, 0) / n - centered) * scale * spread(weight, x, 1)).to(x.dtype)


def native_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rm: None, rv: None, mean: Tensor, invstd: Tensor, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    train, _, wanted = rest
    require(train, "not used outside training")
    if any(wanted[1:]):
        require(weight is not None, "tensor does not have a device")
    sum_dy, sum_dy_xmu, dweight, dbias = backward_reduce(dy, x, mean, invstd, weight, True, *wanted[1:])
    n = torch.full((1,), x.numel() // x.shape[1], dtype=torch.int32)
    dx = backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, n) if wanted[0] else None
    return dx, dweight if wanted[1] else None, dbias if wanted[2] else None


KERNELS: dict[Any, Callable[..., Any]] = {
    aten.batch_norm_update_stats.default: update_stats,
    aten.batch_norm_elemt.default: elemt,
    aten.batch_norm_backward_reduce.default: backward_reduce,
    aten.batch_norm_backward_elemt.default: backward_elemt,
    aten.native_batch_norm_backward.default: native_backward,
}

# They wait for the device, or are not deterministic there: a forward and backward must do without.
AVOIDED = {aten._local_scalar_dense.default, aten.nonzero.default, aten.median.dim, aten.kthvalue.default}


class CudaStandIn(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        require(func not in AVOIDED, f"{func} in a forward or backward")
        if "batch_norm" in func.name():
            require(func in KERNELS, f"{func}: no stand-in")
            self.called.add(func.name())
            return KERNELS[func](*args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaStandIn:
    for module in ("measure", "passes"):
        monkeypatch.setattr(f"syncaccum.layer.{module}.is_on_cuda", lambda x: True)
    # The counter of an untrained layer is not looked at on a GPU.
    monkeypatch.setattr("syncaccum.layer.so_far._ask_if_untrained", lambda layer: layer.num_batches_tracked == 0)
    return CudaStandIn()


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


@pytest.mark.parametrize("order", [channels_first, channels_last, sliced])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("affine", [True, False])
def test_training_makes_calls_that_cuda_takes_and_gets_the_same(
    cuda: CudaStandIn,
    policy: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    order: Callable[[Tensor], Tensor],
    affine: bool,
) -> None:
    here, there = make_pair(policy, shape[1], dtype, affine)
    tolerance = 16 * torch.finfo(dtype).eps  # roundings of input, output, statistics and gradient, in another order
    for _ in range(2):  # untrained, then trained
        x = order(torch.randn(shape, dtype=dtype) + 1).requires_grad_()
        dy = torch.randn(shape, dtype=dtype)
        leaves = [[x, *layer.parameters()] for layer in (here, there)]
        with pytest.MonkeyPatch.context() as cpu:
            for module in ("measure", "passes"):
                cpu.setattr(f"syncaccum.layer.{module}.is_on_cuda", lambda x: False)
            y = here(x)
            expected = [y, *torch.autograd.grad(y, leaves[0], dy)]
        with cuda:
            z = there(x)
            actual = [z, *torch.autograd.grad(z, leaves[1], dy)]
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.detach().abs().max())))
        assert z.stride() == y.stride()
        for layer in (here, there):
            commit(layer)
    assert "aten::batch_norm_elemt" in cuda.called


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(2, 1, 3), (3,), (2, 0, 1)], ids=str)
def test_lockstep_makes_calls_that_cuda_takes(cuda: CudaStandIn, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = convert_sync_accum(nn.BatchNorm2d(C))
    plain = nn.BatchNorm2d(C).double()
    parts = [torch.randn(n, C, 4, 5, dtype=dtype) for n in sizes]
    xs = [part.clone().requires_grad_() for part in parts]
    whole = torch.cat(parts).double().requires_grad_()
    dy = torch.randn(whole.shape, dtype=dtype)
    if dtype == torch.float64:
        layer.double()
    with cuda:
        ys = torch.cat(lockstep(layer, layer, xs))
        actual = torch.autograd.grad(ys, [*xs, *layer.parameters()], dy)
    y = plain(whole)
    dx, *expected = torch.autograd.grad(y, [whole, *plain.parameters()], dy.double())
    tolerance = 16 * torch.finfo(dtype).eps  # as above
    torch.testing.assert_close(ys.double(), y, rtol=tolerance, atol=tolerance)
    for a, b in zip([torch.cat(actual[: len(xs)]), *actual[len(xs) :]], [dx, *expected], strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance * max(1.0, float(b.detach().abs().max()))
        )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(0, C), (0, C, 3, 4)], ids=str)
def test_an_empty_micro_batch(cuda: CudaStandIn, policy: str, shape: tuple[int, ...]) -> None:
    layer = SyncAccumBatchNorm(C, normalization=policy)
    x = torch.empty(shape, requires_grad=True)
    with cuda:
        gradients = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    assert [g.shape for g in gradients] == [x.shape, (C,), (C,)]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_one_gradient_alone(cuda: CudaStandIn, policy: str, wanted: str) -> None:
    layer = SyncAccumBatchNorm(C, normalization=policy).requires_grad_(False)
    x = torch.randn(3, C, 4, 5)
    leaf = x if wanted == "x" else layer.get_parameter(wanted)
    leaf.requires_grad_()
    with cuda:
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), leaf)
    assert gradient.isfinite().all()


def test_a_bias_without_a_weight(cuda: CudaStandIn) -> None:
    layer = SyncAccumBatchNorm(C, normalization="batch")
    layer.weight = None
    x = torch.randn(3, C, 4, 5, requires_grad=True)
    dy = torch.randn(3, C, 4, 5)
    with cuda:
        _, dbias = torch.autograd.grad(layer(x), [x, layer.bias], dy)
    torch.testing.assert_close(dbias, dy.sum((0, 2, 3)))


@pytest.mark.parametrize("order", [channels_first, channels_last])
def test_a_bright_spot_in_the_middle(cuda: CudaStandIn, order: Callable[[Tensor], Tensor]) -> None:
    layer = SyncAccumBatchNorm(3, momentum=1.0)
    x = torch.randn(1, 3, 64, 64) + 100
    x[:, :, 30:33, 30:33] += 1e4
    with cuda:
        layer(order(x))
    commit(layer)
    # The kernel's own float32 sums.
    torch.testing.assert_close(layer.running_var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0)


def test_the_stand_in_refuses_what_cuda_refuses(cuda: CudaStandIn) -> None:
    """The call that could not train on a GPU, and three more of its kind."""
    x, half = torch.randn(3, C, 4), torch.randn(3, C, 4).half()
    mean, ones = torch.zeros(C), torch.ones(C)
    with cuda:
        for x_ in (x, x.movedim(1, -1).reshape(-1, C)):
            with pytest.raises(RefusedError, match="does not have a device"):
                aten.native_batch_norm_backward(x_, x_, None, None, None, mean, ones, True, 0.0, [False, True, True])
        with pytest.raises(RefusedError, match="a vector of"):
            torch.batch_norm_elemt(half, None, None, mean.half(), ones.half(), 0.0)
        with pytest.raises(RefusedError, match="parameters of"):
            torch.batch_norm_elemt(x, ones.double(), None, mean, ones, 0.0)
        with pytest.raises(RefusedError, match="on no data"):
            torch.batch_norm_update_stats(x[:0], None, None, 0.0)
