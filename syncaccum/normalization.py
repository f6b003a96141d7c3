"""The normalization policies: which statistics a training forward normalises with, and what gradient flows.

Pure arithmetic on float64 vectors of length C; no modules, no ranks, no data. Each policy turns a micro-batch's
own mean and variance into a :class:`Normalizer`; `passes` does the work on the data.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

POLICIES = ("renorm", "batch", "running")


class Normalizer(NamedTuple):
    r"""What a forward applies and its backward differentiates, per channel.

    .. math::
        \hat x = (x - c) s, \qquad y = (\hat x r + d) \gamma + \beta, \qquad
        \frac{\partial L}{\partial x} = \gamma r s
            \Bigl(dy - \varphi \bigl(\textstyle\sum dy + \hat x \sum dy\, \hat x\bigr)\Bigr)

    r and d are constants in backward. :math:`\varphi` (``feedback``) is how much one value moves the statistics:
    1/n where they are the micro-batch's own, w/n where they are its share w, and None where they are constants.
    """

    center: Tensor
    scale: Tensor
    gain: Tensor | None  # r; None for 1, together with
    offset: Tensor | None  # d; None for 0
    feedback: Tensor | float | None

    def cast(self, dtype: torch.dtype) -> Normalizer:
        """The same in another precision: that of the data, when it is put to work."""
        center, scale = self.center.to(dtype), self.scale.to(dtype)
        gain = None if self.gain is None else self.gain.to(dtype)
        offset = None if self.offset is None else self.offset.to(dtype)
        return Normalizer(center, scale, gain, offset, self.feedback)


class Batch(NamedTuple):
    """The micro-batch's own statistics, gradient through them: nn.BatchNorm's training forward."""

    eps: float

    def normalizer(self, count: int, mean: Tensor, variance: Tensor) -> Normalizer:
        return Normalizer(mean, torch.rsqrt(variance + self.eps), None, None, 1.0 / count)


class Running(NamedTuple):
    """The committed statistics, held constant: the seed's layer."""

    eps: float
    committed_mean: Tensor
    committed_variance: Tensor

    def normalizer(self, count: int, mean: Tensor, variance: Tensor) -> Normalizer:
        scale = torch.rsqrt(self.committed_variance + self.eps)
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
    ``untrained`` is a boolean scalar for a layer that may never have had a commit: where it holds there are no
    statistics to trust, and the layer behaves as :class:`Batch`. It is a tensor because the counter may live on a
    device that a forward must not wait for; None where it is known not to hold.
    """

    eps: float
    committed_mean: Tensor
    committed_variance: Tensor
    untrained: Tensor | None
    prior_count: float
    r_max: float
    d_max: float

    def normalizer(self, count: int, mean: Tensor, variance: Tensor) -> Normalizer:
        mu, v = self.committed_mean, self.committed_variance
        w: Any = count / (count + self.prior_count)
        if self.untrained is not None:
            mu = torch.where(self.untrained, mean.detach(), mu)
            v = torch.where(self.untrained, variance.detach(), v)
            w = torch.where(self.untrained, 1.0, torch.full_like(mu, w))
        mu_s = torch.lerp(mu, mean, w)
        v_s = torch.lerp(v, variance, w) + (mean - mu).square() * (w * (1 - w))
        scale = torch.rsqrt(v_s + self.eps)
        committed_scale = torch.rsqrt(v + self.eps)
        r = (committed_scale / scale.detach()).clamp(1 / self.r_max, self.r_max)
        d = ((mu_s.detach() - mu) * committed_scale).clamp(-self.d_max, self.d_max)
        return Normalizer(mu_s, scale, r, d, w / count)


Policy = Batch | Running | Renorm
