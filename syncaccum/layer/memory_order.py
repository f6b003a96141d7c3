"""The two memory orders that passes over data tell apart, and how a per-channel vector meets them.

*Columns*: the channel varies fastest (channels_last of any dimension, and (N, C)). *Rows*: each (sample, channel) is
contiguous. A tensor that is neither is copied first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def make_dense(x: Tensor) -> Tensor:
    """x itself where a pass can walk it in memory order, else a contiguous copy (through autograd)."""
    return x if x.is_contiguous() or is_columns(x) else x.contiguous()


def is_rows(x: Tensor) -> bool:
    """Whether a dense tensor is to be walked as rows."""
    # With one channel or one position a tensor is in both orders.
    # Rows of one value are slow: then take it for columns.
    return x.is_contiguous() and x.dim() > 2 and x.stride(1) > 1


def is_columns(x: Tensor) -> bool:
    """Whether a tensor lies in memory as columns, without gaps."""
    # The usual case: torch's own flag, and no view to make.
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def as_columns(x: Tensor) -> Tensor:
    """(values, C) view of a dense tensor in columns order."""
    channels = x.shape[1]
    # view() cannot say this of a channels_last tensor.
    return x.as_strided((x.numel() // channels, channels), (channels, 1))


def match_order(dy: Tensor, x: Tensor) -> Tensor:
    """dy in x's memory order; a copy where it comes in another one, or is expanded, as from ``y.sum()``."""
    # torch's kernels read dy and x side by side.
    if dy.stride() == x.stride():
        return dy
    return dy.contiguous() if is_rows(x) else dy.movedim(1, -1).contiguous().movedim(-1, 1)


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """A vector of shape (C,) as one that broadcasts over ``like``: (1, C, 1, ...)."""
    return vector.reshape(1, -1, *[1] * (like.dim() - 2))


def as_passes(x: Tensor, like: Tensor | None = None) -> Tensor:
    """The view that torch's kernels walk in memory order, (N, C, L) rows or (values, C); ``like`` decides which."""
    return x.flatten(2) if is_rows(x if like is None else like) else as_columns(x)


def is_on_cpu(x: Tensor) -> bool:
    """Whether the passes for a CPU are to walk it. They may look at values: no device is to be waited for."""
    return kind_of(x) == "cpu"


def is_on_cuda(x: Tensor) -> bool:
    """Whether torch's CUDA kernels are to walk it. On any other device plain operations do."""
    return kind_of(x) == "cuda"


def kind_of(x: Tensor) -> str:
    """The kind of its device. Asked here only: tests put a stand-in in a device's place."""
    # Faster than to ask for the device.
    return "cpu" if x.is_cpu else x.device.type
