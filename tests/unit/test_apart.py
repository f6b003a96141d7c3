"""lockstep with offload where micro-batches meet: each has nodes of its own; its input and gradient wait outside."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncaccum import SyncAccumBatchNorm, commit, lockstep
from syncaccum.exact import apart
from syncaccum.exact.offload import Lane
from tests.unit.stand_in import StandIn, use_stand_in
from tests.unit.test_lockstep import Branching, assert_same_gradients, images, pair
from tests.unit.test_offload import DeviceStore, run_offloaded


class PreActivation(nn.Module):
    """What comes to a layer is used again behind it, and the first layer's input has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(2, affine=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 3, padding=1)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class Twice(nn.Module):
    """One layer is visited twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(x).tanh()))


def loss_of(outputs: list[Tensor]) -> Tensor:
    return torch.stack([y.square().sum() + y.sum() for y in outputs]).sum()


@pytest.fixture
def departures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the micro-batches that went through nodes of their own."""
    seen: list[int] = []
    whole = apart._Depart.apply

    def count(way: Any, measured: Any, x: Tensor, token: Tensor) -> Tensor:
        seen.append(len(x))
        y: Tensor = whole(way, measured, x, token)
        return y

    monkeypatch.setattr(apart._Depart, "apply", count)
    return seen


@pytest.mark.parametrize("make", [Branching, PreActivation, Twice])
@pytest.mark.parametrize("sizes", [(2, 1, 3), (2, 0, 3), (5,)], ids=str)
def test_gradients_and_statistics_are_the_large_batchs(
    departures: list[int], make: Callable[[], nn.Module], sizes: tuple[int, ...]
) -> None:
    model, reference = pair(make)
    for _ in range(2):
        model.zero_grad()
        reference.zero_grad()
        parts = [x.requires_grad_() for x in images(*sizes)]
        loss = loss_of(run_offloaded(model, parts)[0])
        loss.backward(retain_graph=True)
        whole = torch.cat([x.detach() for x in parts]).requires_grad_()
        expected = reference(whole)
        (expected.square().sum() + expected.sum()).backward()
        assert_same_gradients(model, reference)
        torch.testing.assert_close(torch.cat([x.grad for x in parts]), whole.grad, rtol=1e-9, atol=1e-12)
        commit(model)
        # A layer that is visited twice has one window.
        if make is PreActivation:
            for b, c in zip(model.buffers(), reference.buffers(), strict=True):
                torch.testing.assert_close(b, c)
        # A graph may be walked again.
        loss.backward()
        torch.testing.assert_close(torch.cat([x.grad for x in parts]), 2 * whole.grad, rtol=1e-9, atol=1e-12)
    assert departures.count(sizes[0]) >= 4


def test_an_output_without_a_loss_has_its_part_in_the_statistics_alone(departures: list[int]) -> None:
    model, reference = pair(PreActivation)
    parts = [x.requires_grad_() for x in images(2, 3)]
    outputs, _ = run_offloaded(model, parts)
    outputs[0].square().sum().backward()
    whole = torch.cat([x.detach() for x in parts]).requires_grad_()
    reference(whole)[:2].square().sum().backward()
    assert_same_gradients(model, reference)
    torch.testing.assert_close(torch.cat([x.grad for x in parts]), whole.grad, rtol=1e-9, atol=1e-12)
    assert departures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_mean_loses_no_precision(departures: list[int], dtype: torch.dtype) -> None:
    layer, plain = SyncAccumBatchNorm(2), nn.BatchNorm2d(2).double()
    parts = [(x * (1 if dtype == torch.float32 else 50) + 1e4).to(dtype) for x in images(2, 3)]
    (first, second), _ = run_offloaded(layer, parts)
    y = plain(torch.cat(parts).double())
    # The layer's own, as tests of precision have it; bfloat16 rounds the output to 1/256.
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(torch.cat([first, second]).double(), y, rtol=tolerance, atol=tolerance)
    assert departures == [2, 3]


def test_under_a_checkpoint_all_meet_in_one_node(departures: list[int]) -> None:
    model, reference = pair()
    parts = images(2, 3)

    def forward(x: Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=False)

    loss_of(run_offloaded(model, parts, forward)[0]).backward()
    expected = reference(torch.cat(parts))
    (expected.square().sum() + expected.sum()).backward()
    assert_same_gradients(model, reference)
    assert not departures


def test_create_graph_is_refused() -> None:
    model, _ = pair()
    parts = [x.requires_grad_() for x in images(2, 3)]
    loss = loss_of(run_offloaded(model, parts)[0])
    with pytest.raises(RuntimeError, match="lockstep does not support create_graph=True"):
        torch.autograd.grad(loss, parts, create_graph=True)


def test_the_backward_walks_one_micro_batch_from_layer_to_layer_and_then_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So one gradient is on the device, and the others wait in host memory."""
    model, _ = pair(lambda: nn.Sequential(*[m for _ in range(3) for m in (nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))]))
    order: list[tuple[str, int]] = []
    for node in (apart._Arrive, apart._Depart):

        def note(ctx: Any, gradient: Tensor, node: Any = node, backward: Any = node.backward) -> Any:
            order.append((node.__name__, len(ctx.saved_tensors[0])))
            return backward(ctx, gradient)

        monkeypatch.setattr(node, "backward", staticmethod(note))
    outputs, _ = run_offloaded(model, images(1, 2, 3, 4))
    loss_of(outputs).backward()
    # By micro-batch: its gradient leaves one layer, and comes to the next.
    inner = order[4:-4]
    assert inner == [(name, size) for size in (1, 2, 3, 4) for name in ("_Arrive", "_Depart")] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_a_gpu_gets_the_calls_that_it_takes(
    monkeypatch: pytest.MonkeyPatch, departures: list[int], dtype: torch.dtype, affine: bool
) -> None:
    cuda: StandIn = use_stand_in(monkeypatch)
    layer, plain = SyncAccumBatchNorm(2, affine=affine), nn.BatchNorm2d(2, affine=affine).double()
    parts = [x.to(dtype).requires_grad_() for x in images(2, 0, 3)]
    whole = torch.cat([x.detach() for x in parts]).double().requires_grad_()
    dy = torch.randn(whole.shape)
    # What goes to the host and back is memory of the CPU here, too.
    with cuda.on_device(may_wait=True):
        outputs, _ = run_offloaded(layer, parts)
        torch.autograd.backward(outputs, [g.to(dtype) for g in dy.split([2, 0, 3])])
    y = plain(whole)
    y.backward(dy.to(dtype).double())
    tolerance = 16 * torch.finfo(dtype).eps  # roundings of input, output, statistics and gradient, in another order
    torch.testing.assert_close(torch.cat(outputs).double(), y, rtol=tolerance, atol=4 * tolerance)
    actual = torch.cat([x.grad for x in parts]).double()
    torch.testing.assert_close(actual, whole.grad, rtol=tolerance, atol=4 * tolerance)
    for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=tolerance, atol=16 * tolerance)
    assert departures == [2, 0, 3]
    assert not [wait for wait in cuda.waits if wait != "to"]


class LateStream:
    """A stream whose copies are made as late as events allow."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self.done = 0
        self.waits = 0

    def wait_stream(self, other: LateStream) -> None:
        self.waits += 1
        self.work.append(other.catch_up(len(other.work)))

    def wait_event(self, event: Callable[[], None]) -> None:
        self.work.append(event)

    def record_event(self) -> Callable[[], None]:
        return self.catch_up(len(self.work))

    def catch_up(self, end: int) -> Callable[[], None]:
        def run() -> None:
            while self.done < end:
                self.done += 1
                self.work[self.done - 1]()

        return run


class NowStream(LateStream):
    """The current one: the CPU does its work at once, and so what it waits for."""

    def wait_event(self, event: Callable[[], None]) -> None:
        event()


class LateStreams:
    """In the place of torch.cuda."""

    def __init__(self) -> None:
        self.current = NowStream()
        self.own = LateStream()
        self.copies = 0

    @contextmanager
    def stream(self, stream: LateStream) -> Iterator[None]:
        copy = Tensor.copy_

        def late(to: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
            assert non_blocking
            self.copies += 1
            stream.work.append(lambda: copy(to, source))
            return to

        with patch.object(Tensor, "copy_", late):
            yield


def test_a_lanes_copies_are_waited_for_before_they_are_used() -> None:
    streams = LateStreams()
    lane = Lane(streams, streams.own, streams.current)
    sent = [torch.randn(3) for _ in range(4)]
    hosts = [torch.full((3,), torch.nan) for _ in sent]
    with patch.object(Tensor, "record_stream", lambda tensor, stream: None):
        for tensor, host in zip(sent, hosts, strict=True):
            lane.send(tensor, host)
        # All but the last are surely there, before their memory is given up.
        assert [bool(host.isnan().all()) for host in hosts] == [False, False, False, True]
        assert len(lane._going) == 1
        fetched = [lane.fetch(host, torch.device("cpu")) for host in hosts]
    assert not lane._going
    before = streams.own.done
    for (tensor, wait), expected in zip(fetched, sent, strict=True):
        wait()
        assert torch.equal(tensor, expected)
    assert streams.own.done > before
    # Each copy is behind what the device computes.
    assert streams.copies == streams.own.waits == 8


def test_memory_that_nobody_took_is_given_up_behind_its_copy() -> None:
    streams = LateStreams()
    lane = Lane(streams, streams.own, streams.current)
    recorded: list[object] = []
    with patch.object(Tensor, "record_stream", lambda tensor, stream: recorded.append(stream)):
        lane.fetch(torch.ones(3), torch.device("cpu"))
    assert recorded == [streams.own]


def test_without_offload_all_meet_in_one_node(departures: list[int]) -> None:
    model, _ = pair()
    with patch.object(sys.modules["syncaccum.exact.lockstep"], "HostStore", DeviceStore):
        lockstep(model, model, images(2, 3))
    assert not departures
