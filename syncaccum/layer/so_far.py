"""Policy "window": a training forward that sees this window so far, and a backward that pays what the window owes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from syncaccum.layer.accumulate import bring_window_home
from syncaccum.layer.ledger import Ledger, Record, pay
from syncaccum.layer.memory_order import make_dense
from syncaccum.layer.passes import normalize
from syncaccum.layer.policies import Window, ask_if_untrained, copy_committed
from syncaccum.layer.samples import distance, take_sample
from syncaccum.layer.state import Accumulating, match_width
from syncaccum.moments import pack_statistics
from syncaccum.torch_private import is_transformed, runs_in_backward, saved_tensor_hooks

# Chosen on the tasks mlp, resnet and denoise of docs/experiment.md.
_PRIOR_SAMPLES = 16.0
"""The last window's statistics count for so many samples."""

_UNTRAINED_SAMPLES = 1.0
"""Running statistics of 0 and 1 that nothing was ever folded into count for so many."""


@torch.compiler.disable(recursive=True)  # type: ignore[untyped-decorator,no-untyped-call]
def normalize_so_far(
    layer: Accumulating, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, counts: bool
) -> tuple[Tensor, Tensor]:
    """Normalise a micro-batch with values under policy "window"; also its packed moments.

    Not compiled: the books are Python's, and a compiled graph breaks here. With ``create_graph=True`` the gradient has
    the micro-batch's own share in the statistics, and the books stay as they are.

    Raises:
        RuntimeError: a checkpoint runs a forward again that is not known.
    """
    match_width(layer)
    ledger = layer._accumulation.ledger
    assert ledger is not None
    n = x.numel() // x.shape[1]
    x = make_dense(x)
    policy = Window(eps, _find_again(layer, ledger, x) if runs_in_backward() else _note(layer, ledger, x))
    balance = _Balance(ledger, n, ledger.window_number if counts else None, policy.others[0])
    return normalize(x, weight, bias, policy, balance)


def _note(layer: Accumulating, ledger: Ledger, x: Tensor) -> Tensor:
    """The others of a micro-batch, kept where a checkpoint may run its forward again."""
    others = _count_others(layer, ledger, x)
    if ledger.records and ledger.records[0].number != ledger.window_number:
        ledger.records.clear()
    # The two kinds of checkpoints: one runs without gradients,
    # the other one with hooks on what is saved.
    if not is_transformed() and (not torch.is_grad_enabled() or saved_tensor_hooks() is not None):
        ledger.records.append(Record(ledger.window_number, take_sample(x), others))
    return others


def _find_again(layer: Accumulating, ledger: Ledger, x: Tensor) -> Tensor:
    """The others of a micro-batch when its forward ran the first time. The window has moved on since."""
    distances = [distance(x, record.sample) for record in ledger.records]
    nearest = int(torch.stack(distances).argmin()) if distances else 0
    if not distances or distances[nearest] > 1:
        name = layer._accumulation.name or type(layer).__name__
        raise RuntimeError(
            f"torch.utils.checkpoint runs the forward of layer {name} again, "
            "with other values than any forward of this window: call backward() before commit, let the checkpoint "
            'preserve random states, or use normalization="renorm"'
        )
    return ledger.records[nearest].others


def _count_others(layer: Accumulating, ledger: Ledger, x: Tensor) -> Tensor:
    """Packed moments of all that a micro-batch is counted together with: this window's earlier ones, and the prior."""
    bring_window_home(layer._accumulation, x.device)
    window = layer._accumulation.window
    # A sample has so many values per channel.
    values = x[0, 0].numel()
    if ledger.knows_last:
        return torch.add(window, ledger.last.to(x.device), alpha=_PRIOR_SAMPLES * values)
    return window + pack_statistics(1, *copy_committed(layer)) * (_count_committed(layer) * values)


def _count_committed(layer: Accumulating) -> Tensor | float:
    """For how many samples the committed statistics stand, where the last window's are not known."""
    untrained = ask_if_untrained(layer)
    if isinstance(untrained, Tensor):
        return torch.where(untrained, _UNTRAINED_SAMPLES, _PRIOR_SAMPLES)
    return _UNTRAINED_SAMPLES if untrained else _PRIOR_SAMPLES


@dataclass(frozen=True)
class _Balance:
    """From a micro-batch's sums of dy and dy*x_hat to A and B, what each value takes back."""

    ledger: Ledger
    n: int
    number: float | None
    """Of the window that the forward counts in; None if it does not count."""
    others: Tensor
    """How many values of others its statistics are of."""

    def __call__(self, sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        batch = torch.cat(sums)
        feedback = None
        if self.number is not None:
            feedback = pay(self.ledger.sums, self.ledger.counts, batch, self.n, self.number)
        if feedback is None:
            # Its own share in the statistics, as if the others were constants.
            feedback = batch / (self.others + self.n)
        first, second = feedback.chunk(2)
        return first, second
