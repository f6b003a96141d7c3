"""Forward and backward of micro-batches that share their statistics, a step at a time, for who does not do all at once.

Sums are two rows: of dy, and of what goes with dy: x_hat, or x less the mean on a GPU, as its kernels want it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncaccum.layer import gpu, passes
from syncaccum.layer.measure import Measured
from syncaccum.layer.memory_order import is_on_cuda
from syncaccum.layer.policies import Normalizer, ReduceSums


class Steps:
    """Those of one meeting.

    Args:
        norm: from the moments of everyone's micro-batches.
        vectors: the same with weight and bias, where somebody has made them.
    """

    def __init__(
        self, norm: Normalizer, weight: Tensor | None, bias: Tensor | None, vectors: gpu.Vectors | None
    ) -> None:
        self._norm = norm
        self._weight = None if weight is None else weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._vectors = vectors

    def _on_gpu(self, x: Tensor) -> gpu.Vectors | None:
        if self._vectors is None and is_on_cuda(x):
            self._vectors = gpu.make_vectors(self._norm, x, self._weight, self._bias)
        return self._vectors

    def apply(self, x: Tensor, measured: Measured) -> Tensor:
        """The output of a dense micro-batch."""
        return passes.apply_known(x, measured, self._weight, self._bias, self._norm, self._on_gpu(x))

    def sum_up(self, dy: Tensor, x: Tensor) -> Tensor:
        """The sums of one micro-batch."""
        if (vectors := self._on_gpu(x)) is not None:
            return gpu.sum_up_apart(dy, x, vectors)
        return torch.stack(passes.gradient_sums(dy, x, self._norm)).to(torch.float64)

    def parameter_gradients(self, sums: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of weight and bias, from this process's sums."""
        first, second = sums
        if self._vectors is not None:
            second = second * self._vectors.norm.scale
        dweight, dbias = passes.parameter_gradients(self._norm, (first, second))
        return (
            None if self._weight is None else dweight.to(self._weight.dtype),
            None if self._bias is None else dbias.to(self._bias.dtype),
        )

    def reduce(self, sums: Tensor, reduce_sums: ReduceSums | None) -> Tensor:
        """Everyone's sums. Collective where there are others."""
        if reduce_sums is None:
            return sums
        first, second = sums
        scale = 1 if self._vectors is None else self._vectors.norm.scale
        first, second = reduce_sums((first, second * scale))
        return torch.stack((first, second / scale)).to(sums.dtype)

    def apply_gradient(self, dy: Tensor, x: Tensor, sums: Tensor) -> Tensor:
        """The gradient of x, from everyone's sums."""
        if self._vectors is not None:
            return gpu.apply_gradient_apart(dy, x, self._vectors, sums)
        first, second = sums
        return passes.apply_gradient(dy, x, self._weight, self._norm, (first, second))
