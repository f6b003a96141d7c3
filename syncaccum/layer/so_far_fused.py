"""Policy "window" on a GPU, by Triton kernels: one launch between two walks over the data, in each direction."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from syncaccum.layer import fused
from syncaccum.layer.balance import Due
from syncaccum.layer.gpu import Vectors
from syncaccum.layer.ledger import Ledger
from syncaccum.layer.memory_order import as_passes
from syncaccum.layer.state import Accumulating
from syncaccum.torch_private import buffers_of


class Sizes(NamedTuple):
    """How many values per channel count for what."""

    samples: int
    of_sample: int
    """Values in each."""
    trained: int
    """What committed statistics count for."""
    untrained: int
    """What statistics count for that nothing was ever folded into."""


def find_vectors(
    layer: Accumulating,
    ledger: Ledger,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sizes: Sizes,
    *,
    counts: bool,
) -> tuple[Tensor, Tensor, Vectors] | None:
    """Packed moments of a dense micro-batch, and of what it is counted together with; and what normalises it.

    Where it counts, the ledger's squares have it then. None where no kernel does this.
    """
    window, buffers = layer._accumulation.window, buffers_of(layer)
    prior = ledger.prior if ledger.knows_prior else None
    names = [] if ledger.knows_prior else ["running_mean", "running_var", "num_batches_tracked"]
    committed_mean, committed_variance, batches = [buffers[name] for name in names] or [None] * 3
    if not fused.takes(x, weight, bias, window, prior, ledger.squares, committed_mean, committed_variance):
        return None
    if batches is not None and (batches.device != x.device or batches.dtype != torch.int64):
        return None
    mean, variance = torch.batch_norm_update_stats(as_passes(x), None, None, 0.0)
    squares = ledger.squares if counts else None
    known = window, prior, committed_mean, committed_variance, batches, squares
    given = mean, variance, *known, weight, bias, *sizes, eps
    if (found := fused.run(torch.ops.syncaccum.find_window_vectors.default, *given)) is None:
        return None
    wide, narrow, divisor = found
    packed, others = wide.chunk(2)
    # The books say what each value takes back.
    return packed, others, fused.unpack(narrow, 1.0, weight, bias)._replace(divisor=divisor)


def pay(
    dy: Tensor, dy_xmu: Tensor, scale: Tensor, n: int, due: Due, owed: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The arithmetic of `Ledger.pay` for n values, from and to sums of dy and of dy (x - center)."""
    if fused.takes(dy, dy_xmu, scale, owed):
        (bits,) = struct.unpack("q", struct.pack("d", due.payers))
        given = dy, dy_xmu, scale, owed, bits, n if due.share else 0, due.owed is None
        found = fused.run(torch.ops.syncaccum.pay.default, *given)
        if found is not None:
            each, owed = found
            return (each[0], each[1]), owed
    sums = torch.cat((dy, dy_xmu * scale)).to(torch.float64)
    first, second = due.feedback(sums).chunk(2)
    return (first.to(scale.dtype), (second / scale).to(scale.dtype)), due.close(owed, sums)


def _find_window_vectors(
    mean: Tensor,
    variance: Tensor,
    window: Tensor,
    prior: Tensor | None,
    committed_mean: Tensor | None,
    committed_variance: Tensor | None,
    batches: Tensor | None,
    squares: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    samples: int,
    of_sample: int,
    trained: int,
    untrained: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = mean.numel()
    room = fused.make_room(mean, 2 + 4 * channels)
    vectors = mean, variance, window, prior, committed_mean, committed_variance, batches, squares, weight, bias, *room
    sizes = samples * of_sample, samples, of_sample, trained, untrained
    settings = {"KNOWS_PRIOR": prior is not None, "COUNTS": squares is not None, "EPS": eps}
    fused.launch("find_window_vectors", channels, mean, *vectors, *sizes, **settings)
    return room


def _pay(
    dy: Tensor, dy_xmu: Tensor, scale: Tensor, owed: Tensor, payers: int, n: int, again: bool
) -> tuple[Tensor, Tensor]:
    each, after = scale.new_empty(2, scale.numel()), torch.empty_like(owed)
    fused.launch("pay", scale.numel(), scale, dy, dy_xmu, scale, owed, after, each, payers, n, AGAIN=again)
    return each, after


fused.define(
    "find_window_vectors",
    "(Tensor mean, Tensor variance, Tensor window, Tensor? prior, Tensor? committed_mean, Tensor? committed_variance, "
    "Tensor? batches, Tensor(a!)? squares, Tensor? weight, Tensor? bias, int samples, int of_sample, int trained, "
    "int untrained, float eps) -> (Tensor, Tensor, Tensor)",
    _find_window_vectors,
    lambda mean, *_: fused.make_room(mean, 2 + 4 * mean.numel()),
)
fused.define(
    "pay",
    "(Tensor dy, Tensor dy_xmu, Tensor scale, Tensor owed, int payers, int n, bool again) -> (Tensor, Tensor)",
    _pay,
    lambda dy, dy_xmu, scale, owed, *_: (scale.new_empty(2, scale.numel()), torch.empty_like(owed)),
)
