"""How far are running statistics from those of the concatenated batch, when the mean dwarfs the deviation?

Relative error of running_var after a first window of four uneven micro-batches, against float64 on torch.cat; next to
nn.BatchNorm2d on the concatenation and to raw float32 sums of squares (torchgpipe's, fairscale's and the seed's way).

    python -m benchmarks.precision
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.layer_speed import FORMATS
from benchmarks.report import Figure, publish
from syncaccum import SyncAccumBatchNorm

CHANNELS = 16
SIZES = (8, 3, 1, 12)


def micro_batches(ratio: float, dtype: torch.dtype, memory_format: torch.memory_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(n, CHANNELS, 28, 28) for n in SIZES]
    return [(torch.randn(s, generator=generator, dtype=dtype) + ratio).to(memory_format=memory_format) for s in shapes]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs() / expected.abs()).max().item()


def of_commit(window: list[Tensor], dtype: torch.dtype) -> Tensor:
    layer = SyncAccumBatchNorm(CHANNELS, momentum=1.0, dtype=dtype)
    for x in window:
        layer(x)
    layer.update_stats()
    assert layer.running_var is not None
    return layer.running_var


def of_batch_norm(window: list[Tensor], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    layer = nn.BatchNorm2d(CHANNELS, momentum=1.0, dtype=dtype)
    layer(torch.cat(window).to(memory_format=memory_format))
    assert layer.running_var is not None
    return layer.running_var


def of_raw_sums(window: list[Tensor]) -> Tensor:
    count = sum(x.numel() // CHANNELS for x in window)
    total = torch.stack([x.sum((0, 2, 3)) for x in window]).sum(0)
    total_sq = torch.stack([(x * x).sum((0, 2, 3)) for x in window]).sum(0)
    return (total_sq / count - (total / count) ** 2) * count / (count - 1)


def main() -> None:
    figures = []
    for dtype, ratios in ((torch.float64, (0.0, 5.0, 1e3)), (torch.float32, (0.0, 1e2, 1e3, 1e4, 1e5))):
        for ratio in ratios:
            for order, memory_format in FORMATS.items():
                window = micro_batches(ratio, dtype, memory_format)
                expected = torch.cat(window).double().transpose(0, 1).flatten(1).var(1)
                target = {torch.float64: 1e-12 if ratio <= 5 else 1e-9, torch.float32: 1e-5}[dtype]
                where = f"{str(dtype).removeprefix('torch.')}, mean/std {ratio:g}, {order}"
                peers = (
                    f"nn.BatchNorm2d {relative_error(of_batch_norm(window, dtype, memory_format), expected):.1g}, "
                    f"raw sums {relative_error(of_raw_sums(window), expected):.1g}"
                )
                error = relative_error(of_commit(window, dtype), expected)
                figures.append(Figure(where, error, target if ratio <= 1e4 else None, note=peers))
    publish("precision", figures)


if __name__ == "__main__":
    main()
