"""Samples of a micro-batch, to know it again by when its forward runs a second time."""

from __future__ import annotations

import torch
from torch import Tensor

# As many values of a micro-batch as tell it from another one.
_SAMPLES = 8
# Of the largest of them. Equal numbers come out equal, mostly:
# a kernel may be another one where gradients are wanted.
# bfloat16 has steps of 1/128, and a few add up.
# Another dropout mask differs by 1.
_MOST = 0.1


def take_sample(x: Tensor) -> Tensor:
    """A few values from all over a dense tensor."""
    step = max(1, x.numel() // _SAMPLES)
    return x.detach().as_strided((min(_SAMPLES, x.numel()),), (step,)).to(torch.float32, copy=True)


def distance(x: Tensor, sample: Tensor) -> Tensor:
    """How far a micro-batch is from one that a sample was taken of: beyond 1 it is another one. A scalar."""
    now = take_sample(x)
    if now.numel() != sample.numel():
        return torch.full((), torch.inf, device=x.device)
    if now.numel() == 0:
        return torch.zeros((), device=x.device)
    return (now - sample).abs().max() / (_MOST * torch.maximum(sample.abs().max(), now.abs().max()) + 1e-30)
