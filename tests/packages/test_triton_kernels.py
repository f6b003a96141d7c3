"""Triton kernels without a GPU: run by Triton's interpreter on a CPU, and compiled for two kinds of GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from syncaccum import SyncAccumBatchNorm, commit
from syncaccum.layer import fused
from tests.unit.stand_in import StandIn, on_cpu, use_stand_in
from tests.unit.test_cuda_calls import (
    POLICIES,
    C,
    assert_as_the_whole_batch,
    assert_trains_as_on_cpu,
    make_pair,
    run_lockstep,
    run_lookahead,
)
from tests.unit.test_gpu_launches import PARTS, count_launches
from tests.unit.test_passes import channels_first, channels_last

triton = pytest.importorskip("triton")

KERNELS = "syncaccum.layer.kernels.vectors"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A GPU whose kernels are interpreted."""
    load = fused.load_kernels
    stand_in = use_stand_in(monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fused, "_is_broken", False)
    # Interpreted or compiled: its decorators ask once.
    monkeypatch.delitem(sys.modules, KERNELS, raising=False)
    monkeypatch.setattr(fused, "load_kernels", load)
    load.cache_clear()
    yield stand_in
    load.cache_clear()
    sys.modules.pop(KERNELS, None)


@pytest.mark.parametrize("order", [channels_first, channels_last])
@pytest.mark.parametrize("channels", [1, C, 130])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("affine", [True, False])
def test_training_is_that_of_a_cpu(
    cuda: StandIn, policy: str, dtype: torch.dtype, channels: int, order: Callable[[Tensor], Tensor], affine: bool
) -> None:
    assert_trains_as_on_cpu(cuda, policy, dtype, (3, channels, 4, 5), order, affine)


# Of a lockstep's forward, the last one adds to the windows of all layers.
LIMITS = {"batch": (4, 2), "running": (4, 2), "renorm": (4, 4), "lockstep": (2 * PARTS + 3, 2 * PARTS + 2)}


@pytest.mark.parametrize("mode", LIMITS)
def test_a_layer_starts_so_many_kernels_at_most(cuda: StandIn, mode: str) -> None:
    forward, backward = count_launches(mode, cuda)
    most_forward, most_backward = LIMITS[mode]
    assert len(forward) <= most_forward, forward
    assert len(backward) <= most_backward, backward


@pytest.mark.parametrize("order", [channels_first, channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 2), (2, 2, 1), (3,), (1, 2, 3), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_lockstep_is_the_whole_batch(
    cuda: StandIn, sizes: tuple[int, ...], dtype: torch.dtype, order: Callable[[Tensor], Tensor], affine: bool
) -> None:
    parts = [order(torch.randn(n, C, 4, 5, dtype=dtype) + 1) for n in sizes]
    assert_as_the_whole_batch(parts, affine, partial(run_lockstep, cuda))
    # The kernel is told two sizes.
    assert ("syncaccum::merge_vectors" in cuda.launched) == (sizes != (1, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lookahead_has_the_outputs_of_the_whole_batch(cuda: StandIn, dtype: torch.dtype) -> None:
    assert_as_the_whole_batch([torch.randn(5, C, 4, 5, dtype=dtype) + 1], True, partial(run_lookahead, cuda))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_commit_between_forward_and_backward_leaves_the_gradient_alone(
    cuda: StandIn, policy: str, create_graph: bool
) -> None:
    here, there = make_pair(policy, C, torch.float64)
    x = torch.randn(3, C, 4, 5, dtype=torch.float64, requires_grad=True)
    gradients = []
    for layer in (here, there):
        with cuda.on_device():
            y = layer(x)
        if layer is there and policy != "window":
            commit(layer)
        with cuda.on_device():
            gradients.append(torch.autograd.grad(y.square().sum(), [x, layer.weight], create_graph=create_graph))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_nan_goes_where_torch_takes_it(cuda: StandIn, policy: str) -> None:
    here, there = make_pair(policy, C, torch.float32)
    x = torch.randn(3, C, 4)
    x[1, 2, 3] = torch.nan
    with pytest.MonkeyPatch.context() as patch, cuda.on_device():
        patch.setattr(fused, "load_kernels", lambda: None)
        expected = here(x)
    with cuda.on_device():
        actual = there(x)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(here.window.pack().isnan(), there.window.pack().isnan())


def test_a_kernel_that_cannot_start_is_replaced_by_torch(cuda: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(fused, "launch", fail)
    here, there = make_pair("renorm", C, torch.float64)
    x = torch.randn(3, C, 4, dtype=torch.float64)
    with on_cpu():
        expected = here(x)
    with cuda.on_device(), pytest.warns(RuntimeWarning, match="no driver"):
        actual = there(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(there.window.pack(), here.window.pack())
    with cuda.on_device():  # without another warning
        there(x)


def test_without_triton_torch_does_it(cuda: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCACCUM_TRITON", "0")
    layer = SyncAccumBatchNorm(C)
    with cuda.on_device():
        layer(torch.randn(3, C))
    assert not any(name.startswith("syncaccum::") for name in cuda.launched)


SCALARS = {"n", "divisor", "channels", "samples", "of_sample", "trained", "untrained", "parts", "values", "last"}
CONSTANTS: dict[str, dict[str, Any]] = {
    "merge_vectors": {"EPS": 1e-5, "BLOCK": 128},
    "find_vectors": {"POLICY": 4, "EPS": 1e-5, "PRIOR_COUNT": 1.0, "R_MAX": 1.5, "D_MAX": 0.5, "BLOCK": 128},
}


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("capability", [70, 80, 90])
@pytest.mark.parametrize("affine", [True, False])
# Triton 3.9 says that a default of the next version will be another one.
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_kernels_compile_for_a_gpu(name: str, dtype: str, capability: int, affine: bool) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(KERNELS), name)
    constants = dict(CONSTANTS[name])
    if not affine:
        constants |= {"weight": None, "bias": None}
    kinds = {"count": "*i32", "batches": "*i64", "payers": "i64"}
    kinds |= dict.fromkeys(["wide", "window", "prior", "squares", "owed", "owed_after"], "*fp64")
    kinds |= dict.fromkeys(SCALARS, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds.get(argument, f"*{dtype}") for argument in kernel.arg_names}
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=target)
    assert compiled.asm["cubin"]
