"""How long all-reduces take at the sizes that training ResNet-50 needs."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from syncaccum.ranks.agreement import HEADER
from syncaccum.ranks.transport import Transport

# One number; all windows of ResNet-50's BatchNorm layers, as a commit sends them; its parameters' float32 gradients.
RESNET50_LAYERS, RESNET50_CHANNELS = 53, 26_560
_RESNET50_PARAMETERS = 25_557_032
LATENCY_BYTES = 8
STATISTICS_BYTES = 8 * (HEADER + RESNET50_LAYERS + 2 * RESNET50_CHANNELS)
GRADIENT_BYTES = 4 * _RESNET50_PARAMETERS

_BUDGET = 2.0
"""Seconds for each size."""
_FEWEST, _MOST = 3, 100
"""All-reduces of each size: enough for a median, and no more than tell anything new."""


@dataclass(frozen=True)
class AllReduce:
    """An all-reduce of so many bytes takes so many seconds, the median on the slowest rank."""

    what: str
    bytes: int
    seconds: float
    ranks: int

    @property
    def bandwidth(self) -> float:
        """Bytes of message per second."""
        return self.bytes / self.seconds

    @property
    def bus_bandwidth(self) -> float:
        """Bytes per second through each rank's network, were the algorithm optimal: 2 (n-1)/n times the message's."""
        return self.bandwidth * 2 * (self.ranks - 1) / self.ranks


def time_all_reduces(transport: Transport, device: torch.device) -> list[AllReduce]:
    """Float64 sums at three sizes; equal on all ranks. Collective.

    The gradients are cut down to what the time allows, judged by the statistics.
    """
    latency = _measure("one number", LATENCY_BYTES, transport, device)
    of_statistics = _measure("ResNet-50's statistics", STATISTICS_BYTES, transport, device)
    affordable = int(of_statistics.bandwidth * _BUDGET / _FEWEST) // 8 * 8
    if affordable < GRADIENT_BYTES:
        what = f"gradients, cut from ResNet-50's {GRADIENT_BYTES / 1e6:.0f} MB"
        return [latency, of_statistics, _measure(what, affordable, transport, device)]
    return [latency, of_statistics, _measure("ResNet-50's gradients", GRADIENT_BYTES, transport, device)]


def _measure(what: str, size: int, transport: Transport, device: torch.device) -> AllReduce:
    message = torch.zeros(size // 8, dtype=torch.float64, device=transport.choose_device(device))
    _time_one(transport, message)  # the first pays for buffers and connections
    once = _slowest(transport, [_time_one(transport, message)])
    rounds = min(_MOST, max(_FEWEST, int(_BUDGET / once)))
    seconds = _slowest(transport, [_time_one(transport, message) for _ in range(rounds)])
    return AllReduce(what, size, seconds, transport.size)


def _time_one(transport: Transport, message: Tensor) -> float:
    start = time.perf_counter()
    transport.all_reduce(message)
    if message.device.type == "cuda":
        torch.cuda.synchronize(message.device)
    return time.perf_counter() - start


def _slowest(transport: Transport, seconds: list[float]) -> float:
    """The largest of the ranks' medians; the same on all of them. Collective."""
    return float(max(gather_objects(transport, statistics.median(seconds))))
