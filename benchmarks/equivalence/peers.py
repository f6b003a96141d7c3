"""Two relatives from the literature, written anew from their papers; for this experiment only.

Both carry statistics from sample to sample or from micro-batch to micro-batch, on this rank alone. Every state is
float64 and of the size of the channels.
"""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Moments = tuple[Tensor, Tensor]
"""Two vectors, one entry per channel."""


class _Peer(nn.Module):
    """Has the affine parameters of the BatchNorm layer in whose place it stands."""

    mean: Tensor
    variance: Tensor

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.register_buffer("mean", torch.zeros(layer.num_features, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(layer.num_features, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(*x.shape[:2], -1)
        y = self._normalize(flat) if self.training else self._normalize_known(flat)
        return self._scale(y * self.weight[:, None] + self.bias[:, None]).view_as(x)

    def _normalize(self, x: Tensor) -> Tensor:
        """What it does in training, without affine parameters, on ``(N, C, L)``."""
        raise NotImplementedError

    def _scale(self, y: Tensor) -> Tensor:
        """What comes after the affine parameters: nothing, mostly."""
        return y

    def _normalize_known(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(self.variance + self.eps)
        return (x - self.mean.to(x.dtype)[:, None]) * scale.to(x.dtype)[:, None]


class OnlineNorm(_Peer):
    r"""Online Normalization: statistics that stream sample by sample, and a control process in the backward.

    Chiley et al. 2019, arXiv 1905.05894, with its layer scaling. For each sample t in its turn, :math:`\mu(\cdot)` the
    mean over the sample's values of a channel, :math:`\sigma^2(\cdot)` their variance:

    .. math::
        y_t &= (x_t - \mu_{t-1}) / \sigma_{t-1}, \qquad
        \mu_t = \alpha_f \mu_{t-1} + (1 - \alpha_f) \mu(x_t), \\
        \sigma^2_t &= \alpha_f \sigma^2_{t-1} + (1 - \alpha_f) \sigma^2(x_t)
            + \alpha_f (1 - \alpha_f) (\mu(x_t) - \mu_{t-1})^2, \\
        y'_t &\leftarrow y'_t - (1 - \alpha_b) \epsilon^y_{t-1} y_t, \qquad
        \epsilon^y_t = \epsilon^y_{t-1} + \mu(y'_t y_t), \\
        x'_t &= y'_t / \sigma_{t-1} - (1 - \alpha_b) \epsilon^1_{t-1}, \qquad
        \epsilon^1_t = \epsilon^1_{t-1} + \mu(x'_t)

    The result does not depend on the micro-batch. The decays are the paper's for ImageNet.
    """

    error_y: Tensor
    error_1: Tensor

    def __init__(self, layer: _BatchNorm, alpha_f: float = 0.999, alpha_b: float = 0.99) -> None:
        super().__init__(layer)
        self.alpha_f, self.alpha_b = alpha_f, alpha_b
        self.register_buffer("error_y", torch.zeros_like(self.mean))
        self.register_buffer("error_1", torch.zeros_like(self.mean))

    def _normalize(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Stream.apply(x, self))  # type: ignore[no-untyped-call]

    def _scale(self, y: Tensor) -> Tensor:
        # Layer scaling: all values of a sample to mean square 1.
        return y * torch.rsqrt(y.square().mean((1, 2), keepdim=True) + self.eps)


class _Stream(torch.autograd.Function):
    """Online Normalization without affine parameters and layer scaling, on ``(N, C, L)``.

    Sums over a sample's values come first, for all samples at once; the recurrences then run on vectors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: OnlineNorm) -> Tensor:
        variances, means = torch.var_mean(x.double(), 2, correction=0)
        centers, scales = [], []
        keep, take = layer.alpha_f, 1 - layer.alpha_f
        for mean, variance in zip(means, variances, strict=True):
            centers.append(layer.mean.clone())
            scales.append(torch.rsqrt(layer.variance + layer.eps))
            step = mean - layer.mean
            layer.variance.mul_(keep).add_(take * variance + keep * take * step.square())
            layer.mean.add_(take * step)
        scale = torch.stack(scales).to(x.dtype)[..., None]
        y = (x - torch.stack(centers).to(x.dtype)[..., None]) * scale
        ctx.save_for_backward(y, scale)
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        layer: OnlineNorm = ctx.layer
        take = 1 - layer.alpha_b
        sums = [part.double().mean(2) for part in (dy, y, dy * y, y * y)]
        errors_y, errors_1 = [], []
        for s, m_dy, m_y, m_dyy, m_yy in zip(scale[..., 0].double(), *sums, strict=True):
            errors_y.append(take * layer.error_y)
            errors_1.append(take * layer.error_1)
            layer.error_y.add_(m_dyy - errors_y[-1] * m_yy)
            layer.error_1.add_(s * (m_dy - errors_y[-1] * m_y) - errors_1[-1])
        along_y, along_1 = (torch.stack(errors).to(dy.dtype)[..., None] for errors in (errors_y, errors_1))
        return (dy - along_y * y) * scale - along_1, None


class MovingAverageNorm(_Peer):
    r"""MABN's moving averages: statistics and the two sums of the backward are means over the last micro-batches.

    Yan et al. 2020, arXiv 2001.06838. With m micro-batches to a window, each average is over the last m of them, this
    one included:

    .. math::
        \hat x = \frac{x - \bar\mu}{\sqrt{\bar{x^2} - \bar\mu^2 + \epsilon}}, \qquad
        \frac{\partial L}{\partial x} = \frac{1}{\sigma} (dy - \bar\Psi_1 - \hat x \bar\Psi_{\hat x}), \qquad
        \Psi_1 = \mathrm{mean}(dy), \quad \Psi_{\hat x} = \mathrm{mean}(dy\, \hat x)

    Without the paper's centralised weights, which change convolutions and spare it the two means; so they are here.
    Without its clipped correction by running statistics, and without a warm-up on the micro-batch alone, which one
    value per channel does not allow. Statistics to test with are exponential averages with the paper's 0.98.
    """

    _DECAY = 0.98

    def __init__(self, layer: _BatchNorm, micro_batches: int) -> None:
        super().__init__(layer)
        self.statistics: deque[Moments] = deque(maxlen=micro_batches)
        self.feedback: deque[Moments] = deque(maxlen=micro_batches)

    def _normalize(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Average.apply(x, self))  # type: ignore[no-untyped-call]


class _Average(torch.autograd.Function):
    """MovingAverageNorm without affine parameters, on ``(N, C, L)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: MovingAverageNorm) -> Tensor:
        own_variance, own_mean = torch.var_mean(x.double(), (0, 2), correction=0)
        layer.statistics.append((own_mean, own_variance + own_mean.square()))
        mean, square = _average(layer.statistics)
        variance = square - mean.square()
        layer.mean.lerp_(mean, 1 - layer._DECAY)
        layer.variance.lerp_(variance, 1 - layer._DECAY)
        scale = torch.rsqrt(variance + layer.eps).to(x.dtype)[:, None]
        y = (x - mean.to(x.dtype)[:, None]) * scale
        ctx.save_for_backward(y, scale)
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        ctx.layer.feedback.append((dy.double().mean((0, 2)), (dy * y).double().mean((0, 2))))
        along_1, along_y = (part.to(dy.dtype)[:, None] for part in _average(ctx.layer.feedback))
        return (dy - along_1 - y * along_y) * scale, None


def _average(entries: deque[Moments]) -> Moments:
    first, second = (torch.stack(parts).mean(0) for parts in zip(*entries, strict=True))
    return first, second
