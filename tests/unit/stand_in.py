"""A stand-in for a GPU, on a CPU: it takes the calls that a GPU would get, and refuses what a GPU would not do.

The conditions are those of ATen/native/cuda/Normalization.cu and .cuh of torch 2.13, and of the launch of a CUDA
kernel, which takes no empty grid. It also refuses what makes the host wait for the device, and counts launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from syncaccum.layer import fused, memory_order

aten = torch.ops.aten


class RefusedError(RuntimeError):
    """What a GPU would not do, or not without a wait."""


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
        require(x.device == first.device, "data on two devices")
        # Another order is walked by a general kernel, which is slow, or by none.
        require(x.is_contiguous(), "data that is not contiguous")
        require(in_columns(x) == in_columns(first), "data in two memory orders")


def check_vectors(x: Tensor, *vectors: Tensor) -> None:
    """Accessors check the dtype; kernels of columns read raw pointers."""
    for vector in vectors:
        require(vector.dtype == accumulated(x.dtype), f"a vector of {vector.dtype} for data of {x.dtype}")
        require(vector.shape == (x.shape[1],) and vector.is_contiguous(), "a vector of another shape or strides")
        require(vector.device == x.device, "a vector on another device")


def check_parameters(x: Tensor, *parameters: Tensor | None) -> None:
    given = [p for p in parameters if p is not None]
    for p in given:
        require(p.dtype in (x.dtype, accumulated(x.dtype)), f"parameters of {p.dtype} for data of {x.dtype}")
        require(p.dtype == given[0].dtype and p.is_contiguous(), "parameters of two dtypes, or with strides")
        require(p.shape == (x.shape[1],) and p.device == x.device, "parameters of another shape or device")


def wide(x: Tensor) -> Tensor:
    return x.to(accumulated(x.dtype))


def spread(vector: Tensor | None, x: Tensor, default: float) -> Any:
    return default if vector is None else wide(vector).view(1, -1, *[1] * (x.dim() - 2))


def over(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


# As many threads as a block of the kernels has.
_LANES = 512


def welford(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance by running means, and merges of them, in the precision of the data: as rounded."""
    mean, square = torch.zeros(2, _LANES, columns.shape[1], dtype=columns.dtype)
    count = torch.zeros(_LANES, 1, dtype=columns.dtype)
    for rows in columns.split(_LANES):
        here = slice(0, rows.shape[0])
        count[here] += 1
        delta = rows - mean[here]
        mean[here] += delta / count[here]
        square[here] += delta * (rows - mean[here])
    while mean.shape[0] > 1:
        (m, m_), (s, s_), (n, n_) = mean.chunk(2), square.chunk(2), count.chunk(2)
        factor = 1 / (n + n_).clamp_min(1)
        mean, square, count = (m * n + m_ * n_) * factor, s + s_ + (m - m_).square() * n * n_ * factor, n + n_
    return mean[0], square[0] / count[0]


def update_stats(x: Tensor, mean: None, var: None, momentum: float) -> tuple[Tensor, Tensor]:
    check_data(x)
    return welford(wide(x).movedim(1, -1).reshape(-1, x.shape[1]))


def elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float, **out: Tensor
) -> Tensor:
    check_data(x, *out.values())
    check_vectors(x, mean, invstd)
    check_parameters(x, weight, bias)
    y = (wide(x) - spread(mean, x, 0)) * spread(invstd, x, 1) * spread(weight, x, 1) + spread(bias, x, 0)
    return out["out"].copy_(y) if out else y.to(x.dtype)


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, *wanted: bool
) -> tuple[Tensor | None, ...]:
    check_data(x, dy)
    check_vectors(x, mean, invstd)
    check_parameters(x, weight)
    require(weight is not None or not any(wanted[1:]), "tensor does not have a device")
    dy_sum = wide(dy).sum(over(x))
    dy_xmu = (wide(dy) * (wide(x) - spread(mean, x, 0))).sum(over(x))
    options = mean if weight is None else weight
    parameters = [(dy_xmu * invstd).to(options.dtype), dy_sum.to(options.dtype)]
    if in_columns(x):
        # All or nothing, whatever was wanted.
        return dy_sum, dy_xmu, *(parameters if weight is not None else [mean.new_empty(0)] * 2)
    sums = [dy_sum, dy_xmu, *parameters]
    asked = [wanted[0], *wanted]
    return tuple(v if flag else None for v, flag in zip(sums, asked, strict=True))


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
    require(count.dim() == 1 and count.is_contiguous(), "a count that is no vector")
    n = count.sum()
    scale = spread(invstd, x, 1)
    centered = (wide(x) - spread(mean, x, 0)) * scale.square() * spread(sum_dy_xmu, x, 0) / n
    return ((wide(dy) - spread(sum_dy, x, 0) / n - centered) * scale * spread(weight, x, 1)).to(x.dtype)


def native_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    train: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    require(not train, "not used in training")
    return aten.native_batch_norm.default(x, weight, bias, mean, var, train, momentum, eps)


def native_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rm: None, rv: None, mean: Tensor, invstd: Tensor, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    train, eps, wanted = rest
    if not train:
        return aten.native_batch_norm_backward.default(dy, x, weight, rm, rv, mean, invstd, train, eps, wanted)
    _, _, dweight, dbias = backward_reduce(dy, x, mean, invstd, weight, True, *wanted[1:])
    sum_dy, sum_dy_xmu, *_ = backward_reduce(dy, x, mean, invstd, weight, True, False, False)
    n = torch.full((1,), x.numel() // x.shape[1], dtype=torch.int32)
    dx = backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, n) if wanted[0] else None
    return dx, dweight if wanted[1] else None, dbias if wanted[2] else None


KERNELS: dict[Any, Callable[..., Any]] = {
    aten.batch_norm_update_stats.default: update_stats,
    aten.batch_norm_elemt.default: elemt,
    aten.batch_norm_elemt.out: elemt,
    aten.batch_norm_backward_reduce.default: backward_reduce,
    aten.batch_norm_backward_elemt.default: backward_elemt,
    aten.native_batch_norm.default: native_forward,
    aten.native_batch_norm_backward.default: native_backward,
}

# Where torch is told to be deterministic, they raise on CUDA.
UNSTEADY = {aten.median.dim, aten.kthvalue.default}

# The host waits for their values, or for a size that depends on them.
READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
}

# Python's ways to wait: they read a tensor, or send values to the device.
WAITS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.cpu,
    Tensor.numpy,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    torch.tensor,
    torch.as_tensor,
    Tensor.new_tensor,
}

_STARTS_NONE = ("aten::empty", "aten::new_empty", "aten::resize_", "aten::promote_types")


def launches(func: Any) -> bool:
    """Whether an operator starts a kernel: views and allocations do not."""
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return not is_view and not func.name().startswith(_STARTS_NONE)


def use_stand_in(patch: pytest.MonkeyPatch, kind: str = "cuda") -> StandIn:
    """Have layers take tensors for those of a device. They use torch's operators alone: nothing here runs Triton's."""
    patch.setattr(memory_order, "kind_of", lambda x: kind)
    patch.setattr(fused, "load_kernels", lambda: None)
    return StandIn(kind)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Ordinary passes inside, as a yardstick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_order, "kind_of", lambda x: "cpu")
        yield


class StandIn(TorchDispatchMode):
    """Takes torch's operators.

    Args:
        kind: of device: the kernels of nn.SyncBatchNorm are there on "cuda" alone.
    """

    def __init__(self, kind: str = "cuda") -> None:
        super().__init__()
        self.kind = kind
        self.called: set[str] = set()
        self.launched: list[str] = []
        self.waits: list[str] = []
        self._sizes: set[torch.Size] = set()
        self._may_wait = False

    @contextmanager
    def on_device(self, *data: Tensor, may_wait: bool = False) -> Iterator[StandIn]:
        """What runs inside runs on the device.

        Args:
            data: 16-bit tensors of which nobody may make a copy of 32 bits.
            may_wait: whether the host may wait for the device; else it is refused. All waits go to ``waits``.
        """
        self._sizes, self._may_wait = {x.shape for x in data}, may_wait
        with self, _SeesWaits(self):
            yield self

    def wait(self, what: str) -> None:
        self.waits.append(what)
        require(self._may_wait, f"{what} makes the host wait for the device")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        require(func not in UNSTEADY, f"{func} is not deterministic on CUDA")
        if func in READS or (
            func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        ):
            self.wait(func.name())
        if launches(func):
            self.launched.append(func.name())
        if "batch_norm" in func.name():
            require(self.kind == "cuda" and func in KERNELS, f"{func}: no stand-in")
            self.called.add(func.name())
            return KERNELS[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape in self._sizes:
            require(result.element_size() <= 2, f"{func} makes a copy of {result.dtype}")
        return result


class _SeesWaits(TorchFunctionMode):
    def __init__(self, stand_in: StandIn) -> None:
        super().__init__()
        self._stand_in = stand_in

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Values for host memory need no device.
        stays = isinstance(kwargs.get("device"), str)
        if (func in WAITS and not stays) or (func is Tensor.to and "cpu" in args[1:]):
            self._stand_in.wait(func.__name__)
        return func(*args, **kwargs)
