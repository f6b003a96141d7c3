"""lookahead beside NumPy, whose generator a forward may draw from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from syncaccum import convert_sync_accum, lookahead


def test_numpys_random_numbers_are_alike_in_both_passes_and_go_on_outside_as_if_nothing_was() -> None:
    model = convert_sync_accum(nn.BatchNorm1d(3))
    drawn: list[float] = []

    def forward(x: Tensor) -> Tensor:
        drawn.append(np.random.random())
        y: Tensor = model(x + drawn[-1])
        return y

    np.random.seed(0)
    expected = np.random.random(2)
    np.random.seed(0)
    outside = [np.random.random()]
    for y in lookahead(model, forward, [torch.randn(4, 3) for _ in range(3)]):
        torch.autograd.backward(y.square().sum())
    outside.append(np.random.random())
    assert drawn[:3] == drawn[3:]
    assert len(set(drawn)) == 3
    assert outside == expected.tolist()
