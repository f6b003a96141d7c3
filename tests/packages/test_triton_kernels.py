"""Triton kernels without a GPU: run by Triton's interpreter on a CPU, and compiled for two kinds of GPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from syncaccum import SyncAccumBatchNorm, commit, lockstep, not_counted
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

pytest.importorskip("triton")
compile_kernels = importlib.import_module("tests.packages.compile_kernels")

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
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("affine", [True, False])
def test_training_is_that_of_a_cpu(
    cuda: StandIn, policy: str, dtype: torch.dtype, order: Callable[[Tensor], Tensor], affine: bool
) -> None:
    # More channels than one program takes.
    assert_trains_as_on_cpu(cuda, policy, dtype, (3, 130, 4, 5), order, affine)


@pytest.mark.parametrize("has_counter", [True, False])
def test_windows_of_several_micro_batches(cuda: StandIn, has_counter: bool) -> None:
    """Walked twice, not counted, run again by a checkpoint: outputs, gradients and books are those of torch."""
    here, there = make_pair("window", C, torch.float64)
    if not has_counter:
        here.num_batches_tracked = there.num_batches_tracked = None
    for sizes in ([2, 3], [1, 2, 4], [2, 2]):
        xs = [torch.randn(n, C, 4, 5, dtype=torch.float64, requires_grad=True) for n in sizes]
        dys = [torch.randn_like(x) for x in xs]
        with pytest.MonkeyPatch.context() as patch, cuda.on_device(may_wait=True):
            patch.setattr(fused, "load_kernels", lambda: None)
            expected = _walk(here, xs, dys)
        with cuda.on_device(may_wait=True):
            actual = _walk(there, xs, dys)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
        for layer in (here, there):
            commit(layer)
    assert {"syncaccum::find_window_vectors", "syncaccum::pay"} <= set(cuda.launched)


def _walk(layer: SyncAccumBatchNorm, xs: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    for x, dy in zip(xs, dys, strict=True):
        y = layer(x)
        for _ in range(2):
            found += torch.autograd.grad(y, [x, layer.weight, layer.bias], dy, retain_graph=True)
        with not_counted(layer):
            z = layer(x)
        found += [y, z, *torch.autograd.grad(z, x, dy)]
        w = checkpoint(layer, x, use_reentrant=False)
        found += [w, *torch.autograd.grad(w, x, dy)]
    return [*found, layer.window.pack(), *layer._accumulation.ledger.pack().values()]


# Of a lockstep's forward, the last one adds to the windows of all layers.
LIMITS = {
    "batch": (4, 2),
    "running": (4, 2),
    "renorm": (4, 4),
    "window": (4, 4),
    "lockstep": (2 * PARTS + 3, 2 * PARTS + 2),
}


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


# Several programs, the first of which alone has NaN; and more channels than one of them looks at at a time.
@pytest.mark.parametrize("channels", [130, 1100])
def test_one_micro_batch_with_nan_spoils_no_other(cuda: StandIn, channels: int) -> None:
    here, there = make_pair("window", channels, torch.float64)
    for layer in (here, there):
        with on_cpu():
            layer(torch.ones(2, channels, 2, dtype=torch.float64)).sum().backward()
        commit(layer)
    bad, good = torch.randn(2, 3, channels, 2, dtype=torch.float64)
    bad[1, 2, 1] = torch.nan
    dy = torch.randn_like(good)
    found = []
    for layer in (here, there):
        with pytest.MonkeyPatch.context() as patch, cuda.on_device(may_wait=True):
            if layer is here:
                patch.setattr(fused, "load_kernels", lambda: None)
            y = layer(bad)
            assert y.isnan().any()
            y.backward(dy)
            ledger = layer._accumulation.ledger
            assert torch.equal(ledger.owed, torch.zeros_like(ledger.owed))
            x = good.clone().requires_grad_()
            y = layer(x)
            found.append([y, *torch.autograd.grad(y, x, dy), ledger.owed])
    for actual, expected in zip(*found, strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected)
    assert {"syncaccum::find_window_vectors", "syncaccum::pay"} <= set(cuda.launched)


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


@pytest.mark.parametrize("policy", POLICIES)
def test_their_operators_are_as_torch_library_wants_them(cuda: StandIn, policy: str) -> None:
    """Their schemas, what they change, and the shapes that compilers are told."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    operators = [getattr(torch.ops.syncaccum, name).default for name in compile_kernels.CONSTANTS]

    class Listens(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in operators:
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    layer = SyncAccumBatchNorm(C, normalization=policy)
    xs = [torch.randn(2, C, 4, requires_grad=True) for _ in range(2)]
    with cuda.on_device(), Listens():
        layer(xs[0]).sum().backward()
        lockstep(layer, layer, xs)
    assert len(calls) == 2 + (policy == "window")
    for operator, args in calls:
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


def test_the_kernels_compile_for_gpus() -> None:
    program = [sys.executable, "-m", "tests.packages.compile_kernels"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bytes") == len(compile_kernels.CONSTANTS) * len(compile_kernels.CASES)
