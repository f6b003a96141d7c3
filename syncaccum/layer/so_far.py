"""Policy "window": a training forward that sees this window so far, and a backward that pays what the window owes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from syncaccum.layer import gpu
from syncaccum.layer.accumulate import bring_window_home
from syncaccum.layer.balance import Due
from syncaccum.layer.ledger import Ledger
from syncaccum.layer.memory_order import is_on_cpu, is_on_cuda, make_dense
from syncaccum.layer.passes import normalize
from syncaccum.layer.policies import Normalizer, Window, copy_committed
from syncaccum.layer.repeat import has_node
from syncaccum.layer.replay import Record, number_forward
from syncaccum.layer.so_far_compiled import normalize_compiled
from syncaccum.layer.so_far_fused import Sizes, find_vectors, pay
from syncaccum.layer.state import Accumulating, match_width, name_of
from syncaccum.moments import drop_if_nonfinite, pack_statistics
from syncaccum.torch_private import buffers_of, has_no_values, is_transformed, runs_in_backward, saved_tensor_hooks

_COMMITTED_SAMPLES = 4
"""Committed statistics count for so many samples in a first window."""

_UNTRAINED_VALUES = 1
"""Running statistics of 0 and 1 that nothing was ever folded into count for so many values. A sample of an image has
hundreds, and these would drown its own."""


def normalize_so_far(
    layer: Accumulating,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    counts: bool,
    is_given: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalise a micro-batch with values under policy "window"; also its packed moments.

    Args:
        counts: whether the micro-batch goes into the window.
        is_given: whether the layer's statistics are the caller's, see `given`: they have no window.
    """
    if torch.compiler.is_compiling():
        state = layer._accumulation
        assert state.ledger is not None
        # Whether a window before is known can change: the operator asks.
        committed = _count_committed(layer, x)
        return normalize_compiled(x, weight, bias, eps, state.window, committed, state.ledger.key, counts)
    visit = _Visit(layer, x, eps, counts, is_given, has_node(x, weight, bias))
    x = make_dense(x)
    if is_on_cuda(x) and (done := visit.normalize_fused(layer, x, weight, bias)) is not None:
        return done
    visit.count_others(layer, x)
    return normalize(x, weight, bias, visit, visit)


class _Visit:
    """One forward: as a policy it says what to normalise with, and as a `Balance` what its backward takes back."""

    def __init__(self, layer: Accumulating, x: Tensor, eps: float, counts: bool, is_given: bool, is_held: bool) -> None:
        match_width(layer)
        ledger = layer._accumulation.ledger
        assert ledger is not None
        self._ledger, self._eps = ledger, eps
        self._samples, self._of_sample = x.shape[0], _values_of_sample(x)
        has_values = not has_no_values(x)
        # Transforms of torch.func, and shapes alone, have no books.
        is_plain = has_values and not (is_given or is_transformed())
        self._layer = layer if is_plain and runs_in_backward() else None
        # Where a checkpoint may run this again. If it is the reentrant one,
        # or all is frozen, no graph of ours keeps the record.
        self._holds = is_plain and not is_held
        self._keeps = is_plain and (not torch.is_grad_enabled() or saved_tensor_hooks() is not None)
        if has_values and not (is_given or getattr(layer, "_is_replica", False)):
            bring_window_home(layer._accumulation, x.device)
        self._counts, self._is_plain, self._is_given = counts and is_plain, is_plain, is_given
        self._record: Record

    def count_others(self, layer: Accumulating, x: Tensor) -> None:
        """Look at what the micro-batch is counted together with."""
        self._begin(_count_committed(layer, x) if self._is_given else _count_others(layer, self._ledger, x))

    def _begin(self, others: Tensor) -> None:
        self._record = Record(others, self._ledger.number, number_forward(), self._counts)

    def normalize_fused(
        self, layer: Accumulating, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """All of it by kernels on a GPU; None where none does it. A second forward is looked up by hand."""
        is_replica = getattr(layer, "_is_replica", False)
        if not self._is_plain or self._layer is not None or is_replica:
            return None
        sizes = Sizes(self._samples, self._of_sample, _COMMITTED_SAMPLES * self._of_sample, _UNTRAINED_VALUES)
        with torch.no_grad():
            found = find_vectors(layer, self._ledger, x, weight, bias, self._eps, sizes, counts=self._counts)
        if found is None:
            return None
        packed, others, vectors = found
        self._begin(others)
        if self._keeps:
            self._ledger.records.add(self._record, packed, hold=self._holds)
        if self._counts:
            self._ledger.note_samples(self._samples)
        (y,) = gpu.normalize([x], vectors._replace(pay=self._pay_fused), weight, bias, self.take_back, self)
        return y, packed

    def _pay_fused(self, dy: Tensor, dy_xmu: Tensor, scale: Tensor) -> tuple[Tensor, Tensor] | None:
        arithmetic = partial(pay, dy, dy_xmu, scale, self._samples * self._of_sample)
        return self._ledger.pay(self._samples, self._of_sample, self._record, arithmetic)

    def normalizer(self, count: int, mean: Tensor, variance: Tensor) -> Normalizer:
        own = pack_statistics(count, mean, variance)
        if self._layer is not None:
            self._record = self._ledger.recall(own, name_of(self._layer))
        else:
            self.note(own, mean)
        return Window(self._eps, self._record.others).normalizer_of(own)

    @property
    def window(self) -> Window | None:
        return Window(self._eps, self._record.others) if self._layer is None else None

    def note(self, own: Tensor, mean: Tensor) -> None:
        if self._keeps:
            self._ledger.records.add(self._record, own, hold=self._holds)
        if self._record.counts:
            self._ledger.note(mean, self._samples)

    def take_back(self, sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        first, second = self._ledger.take_back(torch.cat(sums), self._samples, self._of_sample, self._record).chunk(2)
        return first, second

    def ask(self) -> Due:
        return self._ledger.ask(self._samples, self._of_sample, self._record)

    def book(self, due: Due, sums: Tensor) -> None:
        self._ledger.book(due, sums, self._samples * self._of_sample, self._record)


def _count_others(layer: Accumulating, ledger: Ledger, x: Tensor) -> Tensor:
    """Packed moments of all that a micro-batch is counted together with: this window's earlier ones, and the prior."""
    # One micro-batch with NaN or Inf spoils no other: where a scaler
    # skips the step, no commit would ever end this window.
    window = drop_if_nonfinite(layer._accumulation.window.to(x.device))
    if ledger.knows_prior:
        return torch.add(window, ledger.prior.to(x.device), alpha=_values_of_sample(x))
    return window + _count_committed(layer, x)


def _count_committed(layer: Accumulating, x: Tensor) -> Tensor:
    """The committed statistics as packed moments of so many values as they count for in a first window."""
    untrained, trained = _ask_if_untrained(layer), _COMMITTED_SAMPLES * _values_of_sample(x)
    values: Tensor | int
    if isinstance(untrained, Tensor):
        values = torch.where(untrained, _UNTRAINED_VALUES, trained)
    else:
        values = _UNTRAINED_VALUES if untrained else trained
    return pack_statistics(values, *copy_committed(layer))


def _ask_if_untrained(layer: Accumulating) -> bool | Tensor:
    """Whether the layer never had a commit: a boolean, or on a GPU a tensor that need not be waited for."""
    batches = buffers_of(layer)["num_batches_tracked"]
    # Without a counter nobody can tell: believe the statistics.
    if batches is None:
        return False
    if is_on_cpu(batches) and not torch.compiler.is_compiling() and not has_no_values(batches):
        # On a GPU item() would wait for the device.
        return batches.item() == 0
    return batches == 0


def _values_of_sample(x: Tensor) -> int:
    """Per channel."""
    return x.numel() // (x.shape[0] * x.shape[1])
