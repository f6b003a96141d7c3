"""Signal handlers that raise at random moments: every layer is as before the call, or every layer as after it."""

from __future__ import annotations

import ctypes
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncaccum import SyncAccumBatchNorm, commit, commit_on_step, convert_sync_accum, discard, load_window_state_dict
from syncaccum.torch_private import add_to_all, copy_all, zero_all
from syncaccum.window.uninterrupted import run_uninterrupted

LAYERS, CHANNELS = 30, 8


class InterruptError(Exception):
    pass


def interrupt(*_: Any) -> None:
    raise InterruptError


@pytest.fixture
def alarm() -> Iterator[None]:
    """SIGALRM raises; pytest-timeout's own alarm is put back afterwards."""
    handler = signal.signal(signal.SIGALRM, interrupt)
    seconds, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds, interval)
    torch.set_grad_enabled(True)  # torch's no_grad, as in optimizer.step, may have been left by the wrong door


class Scene:
    """A model with open windows, which can be put back as it was, and what a call makes of it."""

    def __init__(self, model: nn.Module, call: Callable[[], object], *, keeps_grad_mode: bool = True) -> None:
        self.keeps_grad_mode = keeps_grad_mode
        self.layers = [layer for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm)]
        self.call = call
        self.tensors = [t for layer in self.layers for t in (*layer.buffers(), layer._window)]
        self.before = self.state()
        times = []
        for _ in range(15):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            self.after = self.state()
            self.put_back()
        self.seconds = statistics.median(times)

    def state(self) -> tuple[list[Tensor], list[int]]:
        return [t.clone() for t in self.tensors], [layer._accumulation.micro_batches for layer in self.layers]

    def put_back(self) -> None:
        copy_all(self.tensors, self.before[0])
        for layer, count in zip(self.layers, self.before[1], strict=True):
            layer._accumulation.micro_batches = count

    def count_halves(self, trials: int, seed: int = 0) -> tuple[int, int, int]:
        """How many of these calls were interrupted and left all old, all new, and something else."""
        moments = random.Random(seed)
        old = new = half = 0
        for _ in range(trials):
            self.put_back()
            try:
                # A little longer than the call: its end is where it writes.
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-6, 1.3 * self.seconds))
                self.call()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except InterruptError:
                assert torch.is_grad_enabled() or not self.keeps_grad_mode
                is_old, is_new = self.is_now(self.before), self.is_now(self.after)
                old, new, half = old + is_old, new + is_new, half + (not is_old and not is_new)
        return old, new, half

    def is_now(self, state: tuple[list[Tensor], list[int]]) -> bool:
        tensors, counts = self.state()
        return counts == state[1] and all(torch.equal(a, b) for a, b in zip(tensors, state[0], strict=True))


def make_model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = convert_sync_accum(nn.Sequential(*[nn.BatchNorm1d(CHANNELS) for _ in range(LAYERS)]))
    model[1].momentum = None
    model[2].double()
    for layer in model:
        layer(torch.randn(4, CHANNELS, generator=generator).to(layer.get_buffer("running_mean").dtype))
    return model


def test_no_interrupted_commit_of_a_thousand_leaves_new_statistics_and_the_window(alarm: None) -> None:
    model = make_model()
    old, new, half = Scene(model, lambda: commit(model)).count_halves(1000)
    print(f"{old + new + half} commits interrupted: {old} left all as it was, {new} all new, {half} something else")
    assert half == 0
    # Else the moments missed the commit, and the test says nothing.
    assert old + new > 100


def update_one(model: nn.Sequential) -> None:
    model[0].update_stats()


def step(model: nn.Sequential) -> Callable[[nn.Sequential], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    commit_on_step(model, optimizer)
    return lambda _: optimizer.step()


def load(model: nn.Sequential) -> None:
    load_window_state_dict(model, {str(i): torch.ones(1 + 2 * CHANNELS).double() for i in range(LAYERS)})


def test_an_interrupted_update_stats_is_whole(alarm: None) -> None:
    assert_whole(make_model(), update_one)


def test_an_interrupted_commit_on_step_is_whole(alarm: None) -> None:
    model = make_model()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert_whole(model, step(model), keeps_grad_mode=False)  # torch's own step does not


def test_an_interrupted_load_is_whole(alarm: None) -> None:
    assert_whole(make_model(), load)


def test_an_interrupted_discard_is_whole(alarm: None) -> None:
    assert_whole(make_model(), discard)


def assert_whole(model: nn.Sequential, call: Callable[[nn.Sequential], object], **kwargs: bool) -> None:
    old, new, half = Scene(model, lambda: call(model), **kwargs).count_halves(300)
    print(f"{old} left all as it was, {new} all new, {half} something else")
    assert half == 0
    assert old + new > 30  # the moments did meet the call


def test_a_signal_in_the_middle_waits_for_all_the_steps(alarm: None) -> None:
    """The signal comes for certain: libc's raise, which does not look for Python's handlers."""
    tensors = [torch.ones(2), torch.ones(2)]
    done: list[int] = []
    steps = [
        partial(copy_all, tensors[:1], [torch.zeros(2)]),
        partial(ctypes.CDLL(None)["raise"], int(signal.SIGALRM)),
        partial(add_to_all, tensors[:1], 5),
        partial(zero_all, tensors[1:]),
        partial(done.append, 1),
    ]
    # A mode, as torch.device is one, would run Python around each step.
    with torch.device("cpu"), pytest.raises(InterruptError):
        run_uninterrupted(steps)
    assert [t.tolist() for t in tensors] == [[5, 5], [0, 0]]
    assert done == [1]
    assert torch.ones(1).add(1).item() == 2  # and torch is as it was
