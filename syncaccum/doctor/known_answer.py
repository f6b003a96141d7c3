"""A small commit, compared with what it must give: nn.BatchNorm on the global batch, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from syncaccum.layer.batchnorm import SyncAccumBatchNorm
from syncaccum.transport import Group
from syncaccum.window.commit import commit

# The moving average of each momentum, and the cumulative one.
_LAYERS: dict[str, tuple[int, float | None]] = {"moving": (3, 0.1), "cumulative": (8, None)}
_COMMITS = 2

TOLERANCE = 1e-10
"""Relative, of float64 sums of values whose mean and std are alike: rounding of 1e-16, over at most some 1e4 values."""


def measure_commit_error(group: Group, rank: int, size: int, device: torch.device, timeout: float) -> float:
    """The largest relative error of this rank's running statistics after a few commits. Collective.

    Windows differ between ranks, in content, size and number of micro-batches, and every third rank has none.

    Args:
        group: as a layer's ``process_group``.
        rank: in that group.
        size: of that group.
        device: of the layers.
        timeout: of each commit, in seconds.

    Raises:
        CommitError: a commit failed.
    """
    layers = nn.ModuleDict(
        {
            name: SyncAccumBatchNorm(
                width, momentum=momentum, process_group=group, device=device, dtype=torch.float64, affine=False
            )
            for name, (width, momentum) in _LAYERS.items()
        }
    )
    references = {
        name: nn.BatchNorm1d(width, momentum=momentum, affine=False, dtype=torch.float64)
        for name, (width, momentum) in _LAYERS.items()
    }
    for step in range(_COMMITS):
        for name, layer in layers.items():
            for micro_batch in _draw_window(rank, step, _LAYERS[name][0]):
                layer(micro_batch.to(device))
        commit(layers, timeout=timeout)
        for name, reference in references.items():
            width = _LAYERS[name][0]
            reference(torch.cat([x for peer in range(size) for x in _draw_window(peer, step, width)]))
    return max(_compare(layers[name], reference) for name, reference in references.items())


def _draw_window(rank: int, step: int, width: int) -> list[Tensor]:
    """What a rank sees, which every other rank can draw as well."""
    generator = torch.Generator().manual_seed(1_000_000 * step + rank)
    sizes = [2 + (index + rank + step) % 4 for index in range((rank + 1) % 3)]
    return [3 * torch.randn(n, width, generator=generator, dtype=torch.float64) + 1 + rank % 5 for n in sizes]


def _compare(layer: nn.Module, reference: nn.Module) -> float:
    """NaN and Inf count as the largest number, which JSON can say, as it cannot say Inf."""
    errors = [
        ((ours.cpu() - theirs) / theirs).abs().max()
        for ours, theirs in zip(layer.buffers(), reference.buffers(), strict=True)
    ]
    return torch.stack(errors).to(torch.float64).nan_to_num(nan=torch.finfo(torch.float64).max).max().item()
