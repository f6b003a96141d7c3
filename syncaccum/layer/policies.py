"""The normalization policies: what a training forward normalises with, and what gradient flows.

A policy is arithmetic on float64 vectors of length C, the number of channels. It turns a micro-batch's mean and
population variance into a :class:`Normalizer`. `passes` applies that to the data. No policy sees data or ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from syncaccum.layer.state import Accumulating
from syncaccum.moments import pack_statistics
from syncaccum.torch_private import buffers_of


class Normalizer(NamedTuple):
    r"""What a forward applies and its backward differentiates, per channel.

    .. math::
        \hat x = (x - c) s, \qquad y = (\hat x r + d) \gamma + \beta, \qquad
        \frac{\partial L}{\partial x} = \gamma r s
            \Bigl(dy - \varphi \bigl(\textstyle\sum dy + \hat x \sum dy\, \hat x\bigr)\Bigr)

    In code c is ``center``, s ``scale``, r ``gain``, d ``offset`` and :math:`\varphi` ``feedback``; :math:`\gamma` and
    :math:`\beta` are the layer's weight and bias. Shapes are ``(C,)``.

    The backward takes r and d for constants. ``feedback`` says how much one value moves the statistics: 1/n if they
    are the micro-batch's own, w/n if it has a share w in them, None if they are constants.
    """

    center: Tensor
    scale: Tensor
    gain: Tensor | None  # None stands for 1
    offset: Tensor | None  # None stands for 0
    feedback: Tensor | float | None

    @property
    def is_plain(self) -> bool:
        """Whether the statistics are those of the data alone: nn.BatchNorm's own forward and backward."""
        return self.gain is None and self.feedback is not None

    def slope(self, weight: Tensor | None) -> Tensor:
        """What x - c is multiplied by."""
        slope = self.scale if self.gain is None else self.scale * self.gain
        return slope if weight is None else slope * weight

    def shift(self, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """What is added then; None stands for 0."""
        if self.offset is None:
            return bias
        shift = self.offset if weight is None else self.offset * weight
        return shift if bias is None else shift + bias

    def to_dtype(self, dtype: torch.dtype) -> Normalizer:
        """The same in another precision. Policies compute in float64; data is float32 mostly."""
        center, scale = self.center.to(dtype), self.scale.to(dtype)
        gain = None if self.gain is None else self.gain.to(dtype)
        offset = None if self.offset is None else self.offset.to(dtype)
        # feedback never meets data, only C-sized sums.
        return Normalizer(center, scale, gain, offset, self.feedback)


class Batch(NamedTuple):
    """The micro-batch's own statistics, gradient through them: nn.BatchNorm's training forward (arXiv:1502.03167)."""

    eps: float

    def normalizer(self, count: int, mean: Tensor, variance: Tensor) -> Normalizer:
        # 1/n: one value is an n-th of the mean.
        return Normalizer(mean, torch.rsqrt(variance + self.eps), None, None, 1.0 / count)


class Running(NamedTuple):
    """The committed statistics, held constant: the ``"running"`` policy of ``AccumulateBatchNorm``."""

    eps: float
    committed_mean: Tensor
    committed_variance: Tensor

    def normalizer(self, count: int, mean: Tensor, variance: Tensor) -> Normalizer:
        scale = torch.rsqrt(self.committed_variance + self.eps)
        # No feedback: the data moves none of these.
        return Normalizer(self.committed_mean, scale, None, None, None)


class Renorm(NamedTuple):
    r"""The committed statistics, approached from the micro-batch's own, gradient through the latter.

    Batch renormalization (Ioffe 2017, arXiv:1702.03275), with the micro-batch's n values counted against
    ``prior_count`` observations of the committed mean and variance (ours; it makes n = 1 and n = 2 train):

    .. math::
        w &= n / (n + \mathrm{prior}), \qquad \mu_s = w m_b + (1-w) \mu, \\
        v_s &= w v_b + (1-w) v + w (1-w) (m_b - \mu)^2, \\
        r &= \mathrm{clip}\bigl(\sqrt{(v_s+\epsilon)/(v+\epsilon)}, 1/r_{max}, r_{max}\bigr), \qquad
        d = \mathrm{clip}\bigl((\mu_s-\mu)/\sqrt{v+\epsilon}, -d_{max}, d_{max}\bigr)

    v_s is the law of total variance, so nothing cancels. Since
    :math:`\partial v_s/\partial x = 2w(x-\mu_s)/n`, the gradient is BatchNorm's with w/n in the place of 1/n.

    A layer that never had a commit has 0 and 1 for mu and v. They bound what few values do in its first window.
    """

    eps: float
    committed_mean: Tensor
    committed_variance: Tensor
    prior_count: float
    r_max: float
    d_max: float

    def normalizer(self, count: int, mean: Tensor, variance: Tensor) -> Normalizer:
        mu, v = self.committed_mean, self.committed_variance
        # Share of the micro-batch in what is known of the channel.
        w = count / (count + self.prior_count)
        # Mean and variance of both together (law of total variance).
        mu_s = torch.lerp(mu, mean, w)
        step = mean - mu
        v_s = torch.lerp(v, variance, w) + step.square() * (w * (1 - w))
        scale = torch.rsqrt(v_s + self.eps)
        committed_scale = torch.rsqrt(v + self.eps)
        # Detached: Ioffe's backward takes r and d for constants.
        # The clips bound how far committed statistics may correct.
        r = (committed_scale / scale.detach()).clamp(1 / self.r_max, self.r_max)
        d = ((mu_s.detach() - mu) * committed_scale).clamp(-self.d_max, self.d_max)
        # A value is an n-th of the mean, which has share w.
        return Normalizer(mu_s, scale, r, d, w / count)


class Window(NamedTuple):
    r"""The window so far: this micro-batch together with the window's earlier ones and with the last window.

    ``others`` are packed moments of those: count k, sum :math:`T_1`, sum of squares :math:`T_2`. With the
    micro-batch's n, m and v:

    .. math::
        c = \frac{T_1 + n m}{k + n}, \qquad s^{-2} = \frac{T_2 + n (v + m^2)}{k + n} - c^2 + \epsilon

    ``feedback`` is 1, because the backward is handed what each value takes back, and no sums (`so_far`).
    """

    eps: float
    others: Tensor

    def normalizer(self, count: int, mean: Tensor, variance: Tensor) -> Normalizer:
        return self.normalizer_of(pack_statistics(count, mean, variance))

    def normalizer_of(self, own: Tensor) -> Normalizer:
        """`normalizer`, for the micro-batch's packed moments."""
        total = self.others + own
        center, mean_sq = (total[1:] / total[0]).chunk(2)
        # Rounding can leave a constant channel below zero.
        var = torch.addcmul(mean_sq, center, center, value=-1).clamp_min(0)
        return Normalizer(center, torch.rsqrt(var + self.eps), None, None, 1.0)


ReduceSums = Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]
"""From a micro-batch's sums of dy and of dy x_hat to those that its gradient takes."""


class Policy(Protocol):
    """What turns a micro-batch's count, mean and population variance into what to apply."""

    def normalizer(self, count: int, mean: Tensor, variance: Tensor) -> Normalizer:
        """What a forward applies, and its backward differentiates."""


def choose_policy(layer: Accumulating, count: int, eps: float) -> Policy:
    """What a training forward of ``count`` values per channel normalises with, now: to be held, see `hold`.

    Raises:
        ValueError: one value per channel under ``"batch"``, as nn.BatchNorm.
    """
    state = layer._accumulation
    # One value is its own mean: the output would be the bias.
    if state.normalization == "batch" and count == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got 1; "
            f'normalization="renorm" accepts it, in {layer}'
        )
    if state.normalization == "batch" and count > 1:
        return Batch(eps)
    buffers = buffers_of(layer)
    mean, variance = cast(Tensor, buffers["running_mean"]), cast(Tensor, buffers["running_var"])
    if state.normalization == "renorm" and count > 0:
        return Renorm(eps, mean, variance, state.prior_count, state.r_max, state.d_max)
    # Policy "running"; and of any policy a micro-batch without values.
    return Running(eps, mean, variance)


def hold(policy: Policy) -> Policy:
    """The policy with committed statistics of its own, in float64: a commit before the backward changes the layer's."""
    # A tuple, and no union: each forward comes here.
    if isinstance(policy, (Running, Renorm)):
        eps, mean, variance, *settings = policy
        return type(policy)(eps, _copy(mean), _copy(variance), *settings)
    return policy


def copy_committed(layer: Accumulating) -> tuple[Tensor, Tensor]:
    """The committed statistics in float64."""
    buffers = buffers_of(layer)
    mean, variance = cast(Tensor, buffers["running_mean"]), cast(Tensor, buffers["running_var"])
    return _copy(mean), _copy(variance)


def _copy(statistics: Tensor) -> Tensor:
    return statistics.to(torch.float64, copy=True)
