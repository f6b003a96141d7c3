"""The oracle of the unit tests: nn.BatchNorm on torch.cat of the whole batch, in float64."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from syncaccum import SyncAccumBatchNorm

BATCH_NORMS: dict[int, type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def concatenate(micro_batches: Iterable[Tensor]) -> Tensor:
    """All values, whatever their spatial shapes, as one (n, C) batch in float64: BatchNorm sees no difference."""
    return torch.cat([x.detach().movedim(1, -1).reshape(-1, x.shape[1]) for x in micro_batches]).double()


def reference(windows: Iterable[Iterable[Tensor]], channels: int, momentum: float | None = 0.1) -> nn.BatchNorm1d:
    """nn.BatchNorm1d in float64 after one training forward for each window."""
    layer = nn.BatchNorm1d(channels, momentum=momentum).double()
    for window in windows:
        layer(concatenate(window))
    return layer


def assert_same_statistics(layer: SyncAccumBatchNorm, expected: nn.Module, rtol: float, atol: float = 0.0) -> None:
    for name in ("running_mean", "running_var"):
        actual = getattr(layer, name).double()
        torch.testing.assert_close(
            actual, getattr(expected, name), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert layer.num_batches_tracked == expected.num_batches_tracked


def trained_layer(channels: int, normalization: str = "renorm", **kwargs: object) -> SyncAccumBatchNorm:
    """A float64 layer with random parameters and statistics that one window was committed to."""
    layer = SyncAccumBatchNorm(channels, normalization=normalization, **kwargs).double()  # type: ignore[arg-type]
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    layer(torch.randn(50, channels, dtype=torch.float64) * 2 + 1)
    layer.update_stats()
    return layer
