"""Policy "window" in compiled code: its state is seen and changed by operators, which a compiler calls as they are.

The operators take the ledger by its key. So no tensor that they change is saved for a backward, which would refuse to
run after the next micro-batch has changed it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncaccum.layer.compose import measure_composed
from syncaccum.layer.ledger import ledger_of
from syncaccum.layer.memory_order import make_dense, per_channel
from syncaccum.layer.policies import Window
from syncaccum.layer.replay import Record, number_forward
from syncaccum.moments import Moments, drop_if_nonfinite, pack_statistics
from syncaccum.torch_private import runs_in_backward, saved_tensor_hooks


def normalize_compiled(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    window: Tensor,
    committed: Tensor,
    key: Tensor,
    counts: bool,
) -> tuple[Tensor, Tensor]:
    """Normalise a micro-batch; also its packed moments.

    Args:
        window: packed moments of the window before this micro-batch.
        committed: packed moments to add to them where no window before is known.
        key: the ledger's.
        counts: whether the micro-batch goes into the window.
    """
    x = make_dense(x)
    n, samples = x.numel() // x.shape[1], x.shape[0]
    shifted, origin, mean, variance = measure_composed(x)
    own = pack_statistics(n, mean.detach(), variance.detach())
    others, ticket = look_at_window(own, window, committed, n, samples, key, counts, torch.is_grad_enabled())
    norm = Window(eps, others).normalizer(n, mean.detach(), variance.detach())
    gamma = torch.ones_like(norm.center) if weight is None else weight.to(torch.float64)
    beta = torch.zeros_like(norm.center) if bias is None else bias.to(torch.float64)
    gamma, beta = owe(gamma, beta, mean, variance, norm.center, norm.scale, others, key, ticket, n, samples)
    gap, scale, gamma, beta = (
        per_channel(v.to(shifted.dtype), x) for v in (origin - norm.center, norm.scale, gamma, beta)
    )
    y = (shifted + gap) * scale * gamma + beta
    return y.to(x.dtype), own


@torch.library.custom_op("syncaccum::look_at_window", mutates_args=())
def look_at_window(
    own: Tensor, window: Tensor, committed: Tensor, n: int, samples: int, key: Tensor, counts: bool, grad: bool
) -> tuple[Tensor, Tensor]:
    """What a micro-batch is counted together with, and the numbers by which its backward finds its place."""
    ledger = ledger_of(key)
    if runs_in_backward():
        record = ledger.recall(own, "in compiled code")
    else:
        prior = ledger.prior.to(own.device) * (n // samples) if ledger.knows_prior else committed
        record = Record(drop_if_nonfinite(window) + prior, ledger.number, number_forward(), counts)
        if counts:
            ledger.note(Moments.unpack(own).total / n, samples)
        # The record's numbers go on alone: nobody else holds it.
        if not grad or saved_tensor_hooks() is not None:
            ledger.records.add(record, own, hold=True)
    ticket = torch.tensor([record.number, record.forward, record.counts], device="cpu")
    # The compiler may use its memory again.
    return record.others.clone(), ticket


@look_at_window.register_fake
def _(
    own: Tensor, window: Tensor, committed: Tensor, n: int, samples: int, key: Tensor, counts: bool, grad: bool
) -> Any:
    return torch.empty_like(own), torch.empty(3, dtype=torch.int64, device="cpu")


@torch.library.custom_op("syncaccum::owe", mutates_args=())
def owe(
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    variance: Tensor,
    center: Tensor,
    scale: Tensor,
    others: Tensor,
    key: Tensor,
    ticket: Tensor,
    n: int,
    samples: int,
) -> tuple[Tensor, Tensor]:
    r"""Gamma and beta as they are. In backward their gradients are the sums of :math:`dy\,\hat x` and dy.

    So there the books learn these sums, and what each value takes back flows to it through mean and variance.
    """
    return gamma.clone(), beta.clone()


@owe.register_fake
def _(gamma: Tensor, beta: Tensor, *_: Any) -> Any:
    return torch.empty_like(gamma), torch.empty_like(beta)


def _keep_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    gamma, _, mean, _, center, scale, others, key, ticket, ctx.n, ctx.samples = inputs
    ctx.save_for_backward(gamma, mean, center, scale, others, key, ticket)


def _backward_of_owe(ctx: Any, dgamma: Tensor, dbeta: Tensor) -> Any:
    gamma, mean, center, scale, others, key, ticket = ctx.saved_tensors
    batch = torch.cat((dbeta, dgamma))
    a, b = take_back(batch, others, key, ticket, ctx.samples, ctx.n // ctx.samples).chunk(2)
    # -gamma s (A + x_hat B), with x_hat = (x - m) s + (m - c) s,
    # as a gradient of the mean m and of the variance, each of n values.
    pull = -gamma * scale * ctx.n
    dmean = pull * (a + (mean - center) * scale * b)
    dvariance = pull * scale * b / 2
    return dgamma, dbeta, dmean, dvariance, *[None] * 7


owe.register_autograd(_backward_of_owe, setup_context=_keep_for_backward)


@torch.library.custom_op("syncaccum::take_back", mutates_args=())
def take_back(batch: Tensor, others: Tensor, key: Tensor, ticket: Tensor, samples: int, of_sample: int) -> Tensor:
    """What each value takes back, for a micro-batch's sums. Changes the books, which only this operator looks at."""
    number, forward, counts = ticket.tolist()
    return ledger_of(key).take_back(batch, samples, of_sample, Record(others, number, forward, bool(counts)))


@take_back.register_fake
def _(batch: Tensor, *_: Any) -> Any:
    return torch.empty_like(batch)
