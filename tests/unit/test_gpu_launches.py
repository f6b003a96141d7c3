"""How many kernels a layer starts on a GPU, counted by the stand-in: limits, so that no change adds one unseen.

``python -m tests.unit.test_gpu_launches`` prints a table.
"""

from __future__ import annotations

import pytest
import torch

from syncaccum import SyncAccumBatchNorm, commit, lockstep
from tests.unit.stand_in import StandIn, use_stand_in

C = 5
PARTS = 4
"""Micro-batches of a lockstep."""

# Launches of a forward and of a backward, in torch's operators alone.
LIMITS = {"batch": (14, 3), "running": (16, 2), "renorm": (34, 5), "window": (29, 17), "lockstep": (29, 11)}


def count_launches(mode: str, stand_in: StandIn) -> tuple[list[str], list[str]]:
    """The operators of a layer's forward and backward, in its second window."""
    layer = SyncAccumBatchNorm(C, normalization="batch" if mode == "lockstep" else mode)
    for _ in range(2):
        stand_in.launched.clear()
        xs = [torch.randn(2, C, 4, 5, requires_grad=True) for _ in range(PARTS if mode == "lockstep" else 1)]
        dys = [torch.randn(2, C, 4, 5) for _ in xs]
        with stand_in.on_device():
            ys = lockstep(layer, layer, xs) if mode == "lockstep" else [layer(xs[0])]
            forward = list(stand_in.launched)
            torch.autograd.grad(ys, [*xs, layer.weight, layer.bias], dys)
        backward = stand_in.launched[len(forward) :]
        commit(layer)
    return forward, backward


@pytest.mark.parametrize("mode", LIMITS)
def test_a_layer_starts_so_many_kernels_at_most(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = count_launches(mode, use_stand_in(monkeypatch))
    most_forward, most_backward = LIMITS[mode]
    assert len(forward) <= most_forward, forward
    assert len(backward) <= most_backward, backward


if __name__ == "__main__":
    for mode in LIMITS:
        with pytest.MonkeyPatch.context() as patch:
            forward, backward = count_launches(mode, use_stand_in(patch))
        print(f"{mode:10} {len(forward):3} {len(backward):3}")
