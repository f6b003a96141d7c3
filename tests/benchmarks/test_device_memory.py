"""The count of a device's memory: what lives, what was parked, what came back, in every thread of a lockstep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.device_memory import Live, parking_outside, peak_bytes
from benchmarks.lockstep_speed import one_by_one, side_by_side
from benchmarks.lookahead_cost import look_ahead
from syncaccum import convert_sync_accum, discard

WIDTH = 256
VECTOR = 4 * WIDTH
"""Bytes."""


def test_live_tensors_count_once_until_they_are_gone() -> None:
    with Live() as live:
        x = torch.ones(WIDTH)
        y = x * 2
        assert live.now == 2 * VECTOR
        # Views and operators in place take no memory.
        y.add_(x.view(16, -1).flatten())
        assert live.now == live.peak == 2 * VECTOR
        del x
        assert live.now == VECTOR
        del y
    assert (live.now, live.peak) == (0, 2 * VECTOR)


def test_what_autograd_saves_counts_until_the_backward() -> None:
    x = torch.ones(WIDTH, requires_grad=True)
    with Live() as live:
        y = x.exp()
        z = y.sin()
        del y
        # Saved for the backward of both.
        assert live.now == 2 * VECTOR
        z.sum().backward()
        del z
    # The gradient stays.
    assert live.now == VECTOR


LAYERS = 6


class Wide(nn.Module):
    """Its activations are much larger than its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4)) for _ in range(LAYERS)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


K, ROWS = 8, 4096
ONE = 4 * 4 * ROWS
"""Bytes of one activation of a micro-batch."""


def peaks_of(walk: Callable[..., None], offload: bool) -> float:
    """In activations of a micro-batch."""
    torch.manual_seed(0)
    model = convert_sync_accum(Wide())
    parts = torch.randn(K * ROWS, 4).split(ROWS)

    def step() -> None:
        if offload:
            with parking_outside():
                walk(model, parts, "cpu")
        else:
            walk(model, parts)
        discard(model)

    return peak_bytes(step) / ONE


def test_lockstep_holds_a_window_and_lookahead_a_micro_batch() -> None:
    ordinary, ahead = peaks_of(one_by_one, False), peaks_of(look_ahead, False)
    # Each Tanh's output is saved, by itself and by the layer after it; a few more are on their way.
    assert LAYERS <= ordinary < LAYERS + 6
    assert LAYERS * K <= peaks_of(side_by_side, False) < (LAYERS + 6) * K
    # The frontier: an input of one layer for each micro-batch but one.
    assert ahead == pytest.approx(ordinary + K - 1, abs=1)


def test_what_is_parked_does_not_count_and_comes_back_as_device_memory() -> None:
    ordinary = peaks_of(one_by_one, False)
    # Its peak is the second pass: that of a micro-batch alone.
    assert peaks_of(look_ahead, True) == pytest.approx(ordinary, abs=1)
    # Inputs of a layer, and its gradients, wait in host memory, too. What the waiting forwards hold does not:
    # here the input of the block that they are in.
    assert peaks_of(side_by_side, True) == pytest.approx(K + 2, abs=1)
