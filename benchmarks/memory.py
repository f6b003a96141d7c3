"""How much memory does the layer take, next to nn.BatchNorm2d: its window, and the peak of forward and backward?

The peak counts every tensor that torch's allocator hands out between the start of the forward and the end of the
backward, from the profiler's allocation events.

    python -m benchmarks.memory
"""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.layer_speed import FORMATS, SHAPES
from benchmarks.report import Figure, publish
from syncaccum import SyncAccumBatchNorm, commit


def peak_bytes(layer: nn.Module, shape: tuple[int, ...], memory_format: torch.memory_format) -> int:
    """Largest sum of live bytes allocated since the forward began."""
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    dy = torch.randn(shape).to(memory_format=memory_format)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = layer(x)
        gradients = torch.autograd.grad(y, (x, *layer.parameters()), dy)
    del y, gradients
    assert profiler.profiler is not None
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(max(itertools.accumulate(changes)))


def main() -> None:
    figures = []
    for shape in SHAPES:
        channels = shape[1]
        for order, memory_format in FORMATS.items():
            reference = peak_bytes(nn.BatchNorm2d(channels), shape, memory_format)
            for policy in ("running", "renorm", "batch"):
                layer = SyncAccumBatchNorm(channels, normalization=policy)
                layer(torch.randn(shape))
                commit(layer)
                peak = peak_bytes(layer, shape, memory_format)
                what = f"peak of {policy} / nn.BatchNorm2d, {'x'.join(map(str, shape))} {order}"
                figures.append(Figure(what, peak / reference, 1.0, note=f"{peak} / {reference} bytes"))
        window = SyncAccumBatchNorm(channels)._window
        bytes_ = window.untyped_storage().nbytes()
        figures.append(
            Figure(
                f"window of {channels} channels / 8 (1 + 2 C)",
                bytes_ / (8 * (1 + 2 * channels)),
                1.0,
                note=f"{bytes_} bytes",
            )
        )
    publish("memory", figures)


if __name__ == "__main__":
    main()
