"""The compiled arithmetic of a commit: which statistics it takes, and its call. `kernels/fold.cpp` has it."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, c_double, c_int64
from struct import Struct

import torch
from torch import Tensor, nn

from syncaccum.layer import native

# The struct of fold.cpp.
_CALL = Struct("@q4Pq")
# Half precision is rare in statistics: torch's operations do.
_ONE_DTYPE = ({torch.float32}, {torch.float64})
_PLAIN = {Tensor, nn.Parameter}


def takes(sums: Tensor, statistics: Sequence[Tensor], widths: Sequence[int]) -> bool:
    """Whether :func:`fold` takes reduced sums and buffers of these widths: plain ones, of one dtype, in CPU memory."""
    return (
        native.takes(sums)
        and {type(tensor) for tensor in statistics} <= _PLAIN
        and {tensor.dtype for tensor in statistics} in _ONE_DTYPE
        and all(tensor.is_cpu for tensor in statistics)
        and [tensor.numel() for tensor in statistics] == list(widths)
    )


def fold(sums: Tensor, statistics: Tensor, widths: Sequence[int], factors: Sequence[float]) -> float:
    """Make new running statistics of old ones, in place, and return the sum of them all.

    Args:
        sums: packed moments of each layer's global batch, one after the other, float64.
        statistics: the running means of all layers, then the running variances.
        widths: channels of each layer.
        factors: how much of the new statistics each layer takes.
    """
    layers, channels = len(widths), sum(widths)
    if (sums.numel(), statistics.numel(), len(factors)) != (layers + 2 * channels, 2 * channels, layers):
        raise RuntimeError(f"{layers} layers with {channels} channels need other sums and statistics")
    # They must live until the call is over.
    of_layers = (c_int64 * layers)(*widths), (c_double * layers)(*factors)
    addresses = (addressof(of_layers[0]), addressof(of_layers[1]), sums.data_ptr(), statistics.data_ptr())
    return native.fold(_CALL.pack(layers, *addresses, statistics.dtype == torch.float64))
