"""What differs on a GPU: statistics that are never looked at in forward, memory orders, streams, offload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from syncaccum import SyncAccumBatchNorm, commit, convert_sync_accum, lockstep, lookahead
from syncaccum.layer import fused
from tests.oracle import assert_same_statistics, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


POLICIES = ["renorm", "batch", "running", "window"]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("ratio", [0.0, 1e4])
@pytest.mark.parametrize("order", [Tensor.contiguous, channels_last])
def test_statistics_of_the_whole_batch(ratio: float, order) -> None:  # type: ignore[no-untyped-def]
    layer = SyncAccumBatchNorm(5, momentum=1.0, device="cuda")
    window = [order(torch.randn(n, 5, 9, 9, device="cuda") + ratio) for n in (4, 1, 3)]
    for x in window:
        layer(x)
    commit(layer)
    expected = reference([[x.cpu() for x in window]], 5, momentum=1.0)
    # The kernel's running means are float32: at 1e4 its variance was 2e-4 off in the stand-in.
    assert_same_statistics(layer.cpu(), expected, rtol=1e-5 + 1e-7 * ratio, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [Tensor.contiguous, channels_last])
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("shape", [(4, 5, 9, 9), (4, 5, 300, 301), (64, 5), (4, 5, 7)], ids=str)
def test_forward_and_backward_are_those_of_the_cpu(  # type: ignore[no-untyped-def]
    policy: str,
    dtype: torch.dtype,
    order,
    shape: tuple[int, ...],
    triton: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not triton:
        monkeypatch.setattr(fused, "load_kernels", lambda: None)
    here, there = (SyncAccumBatchNorm(5, normalization=policy) for _ in range(2))
    if dtype == torch.float64:
        here.double()
        there.double()
    there.cuda()
    tolerance = 16 * torch.finfo(dtype).eps  # roundings of input, output, statistics and gradient, in another order
    for _ in range(2):  # untrained, then trained
        x = torch.randn(shape, dtype=dtype)
        x = (order(x) if x.dim() == 4 else x).requires_grad_()
        y = x.detach().cuda().requires_grad_()
        outputs = here(x), there(y)
        dy = torch.randn_like(x)
        gradients = torch.autograd.grad(outputs[0], x, dy), torch.autograd.grad(outputs[1], y, dy.cuda())
        torch.testing.assert_close(outputs[1].cpu(), outputs[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradients[1][0].cpu(), gradients[0][0], rtol=tolerance, atol=tolerance)
        assert outputs[1].stride() == y.stride()
        commit(here)
        commit(there)


@pytest.mark.parametrize(("policy", "most"), [("batch", 6), ("running", 6), ("renorm", 8), ("window", 8)])
def test_a_layer_starts_so_many_kernels_at_most(policy: str, most: int) -> None:
    layer = SyncAccumBatchNorm(5, normalization=policy, device="cuda")
    x, dy = (torch.randn(4, 5, 9, 9, device="cuda") for _ in range(2))
    for _ in range(2):  # compiled, then counted
        leaves = [x.requires_grad_(), *layer.parameters()]
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            torch.autograd.grad(layer(x), leaves, dy)
            torch.cuda.synchronize()
        commit(layer)
    kernels = [event.name for event in seen.events() if "mem" not in event.name.lower()]
    assert 0 < len(kernels) <= most, kernels


@contextmanager
def no_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", POLICIES)
def test_forward_and_backward_do_not_wait_for_the_device(policy: str) -> None:
    layer = SyncAccumBatchNorm(5, normalization=policy, device="cuda")
    for _ in range(2):  # untrained, then trained
        x = torch.randn(4, 5, 9, 9, device="cuda", requires_grad=True)
        with no_wait():
            layer(x).sum().backward()
        commit(layer)


def test_the_layers_of_a_lockstep_do_not_wait_for_the_device() -> None:
    layers = nn.Sequential(*(SyncAccumBatchNorm(5, device="cuda") for _ in range(3)))
    parts = [torch.randn(n, 5, 9, 9, device="cuda", requires_grad=True) for n in (2, 1, 3)]
    with no_wait():
        torch.cat(lockstep(layers, layers, parts)).sum().backward()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("order", [Tensor.contiguous, channels_last])
def test_an_in_place_activation_may_follow(policy: str, order) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(SyncAccumBatchNorm(5, normalization=policy), nn.ReLU(inplace=True)).cuda()
    x = order(torch.randn(4, 5, 9, 9, device="cuda")).requires_grad_()
    model(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_forward_of_16_bits_needs_the_memory_of_its_output(policy: str, dtype: torch.dtype) -> None:
    layer = SyncAccumBatchNorm(64, normalization=policy, device="cuda")
    x = torch.randn(8, 64, 128, 128, device="cuda", dtype=dtype)
    layer(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer(x)
    # Vectors and the allocator's pieces besides.
    assert torch.cuda.max_memory_allocated() - before < 1.2 * x.nbytes


@pytest.mark.parametrize("order", [Tensor.contiguous, channels_last])
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_lockstep_equals_the_whole_batch(offload: str | None, order) -> None:  # type: ignore[no-untyped-def]
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4))
    plain = plain.double().cuda()
    model = convert_sync_accum(nn.Sequential(*plain))
    expected = nn.Sequential(*[type(m)(*_arguments(m)).double().cuda() for m in plain])
    expected.load_state_dict(model.state_dict())
    parts = [order(torch.randn(n, 3, 9, 9, device="cuda", dtype=torch.float64)) for n in (2, 1, 3)]
    torch.stack([y.square().sum() for y in lockstep(model, model, parts, offload=offload)]).sum().backward()
    expected(torch.cat(parts)).square().sum().backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lookahead_has_the_outputs_of_the_whole_batch(dtype: torch.dtype) -> None:
    layer = SyncAccumBatchNorm(5, device="cuda")
    parts = [torch.randn(n, 5, 9, 9, device="cuda", dtype=dtype, requires_grad=True) for n in (2, 1, 3)]
    outputs = []
    for y in lookahead(layer, layer, parts):
        y.sum().backward()
        outputs.append(y.detach())
    expected = nn.BatchNorm2d(5).cuda().double()(torch.cat(parts).double())
    tolerance = 4 * torch.finfo(dtype).eps  # roundings of input and output
    torch.testing.assert_close(torch.cat(outputs).double(), expected, rtol=tolerance, atol=4 * tolerance)
    assert all(x.grad.isfinite().all() for x in parts)


def test_offload_keeps_one_micro_batch_of_activations_on_the_device() -> None:
    model = convert_sync_accum(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU())).cuda()
    held = {}
    for count in (2, 8):
        parts = [torch.randn(8, 16, 64, 64, device="cuda") for _ in range(count)]
        before = torch.cuda.memory_allocated()
        losses = lockstep(model, lambda x: model(x).square().mean(), parts, offload="cpu")
        torch.cuda.synchronize()
        held[count] = torch.cuda.memory_allocated() - before
        sum(losses).backward()
    assert held[8] < 2 * held[2]


def _arguments(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels, 3
    return (module.num_features,) if isinstance(module, nn.BatchNorm2d) else ()


def test_a_commit_over_mpi_goes_through_host_memory() -> None:
    from mpi4py import MPI  # here, because it starts MPI

    over_mpi = SyncAccumBatchNorm(5, process_group=MPI.COMM_SELF, device="cuda")
    plain = SyncAccumBatchNorm(5, device="cuda")
    x = torch.randn(4, 5, 9, 9, device="cuda")
    for layer in (over_mpi, plain):
        layer(x)
        commit(layer)
    for name, buffer in plain.named_buffers():
        assert torch.equal(over_mpi.get_buffer(name), buffer)
