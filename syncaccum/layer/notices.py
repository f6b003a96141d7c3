"""What a layer notices and says: commits that were forgotten, statistics that are not what a forward needs."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from syncaccum.layer.accumulation import Accumulation
from syncaccum.layer.replay import Record, number_forward
from syncaccum.layer.state import Accumulating, has_statistics, name_of, tracks
from syncaccum.torch_private import is_traced, runs_in_backward

# So many micro-batches without a commit: surely forgotten.
# Windows of some hundred are in use.
FORGOTTEN_AFTER = 1000

_NOTHING = torch.empty(0, device="cpu")


def note_forward(layer: Accumulating) -> None:
    """Note that a training forward uses the running statistics as they are now. Not called in compiled forwards.

    Raises:
        RuntimeError: it is a checkpoint's second forward, and the first one used other statistics, so that the
            gradient would be wrong; or the first one did not count, and then neither would. Or ``torch.jit.trace``
            looks on.
    """
    if is_traced():
        raise RuntimeError(
            f"torch.jit.trace cannot take layer {name_of(layer)} in training mode, where each micro-batch is "
            "normalised with other statistics: call model.eval() before, or use torch.compile"
        )
    state = layer._accumulation
    if state.used_since is None and not runs_in_backward():
        state.used_since = number_forward()
    if state.used_since is not None:
        return
    if state.ran_untracked:
        raise RuntimeError(
            f"torch.utils.checkpoint runs the forward of layer {name_of(layer)} again, but the first time it had "
            "track_running_stats=False, so nothing was counted. Some wrappers switch it off (fairscale's "
            "checkpoint_wrapper does): use torch.utils.checkpoint, under which this layer counts once"
        )
    # "batch" looks at no running statistics; "window" has a record.
    if state.normalization not in ("batch", "window"):
        refuse_other_statistics(state, name_of(layer), _NOTHING)


def leave_record(state: Accumulation, own: Tensor, *, hold: bool) -> Record:
    """Note which statistics a forward uses that may run again, and its packed moments, by which it is found then.

    Args:
        hold: whether nobody else holds the record for as long as the forward's graph lives.
    """
    assert state.used_since is not None
    record = Record(_NOTHING, state.used_since, state.used_since, counts=False)
    state.records.add(record, own, hold=hold)
    return record


def refuse_other_statistics(state: Accumulation, name: str, own: Tensor) -> None:
    """Raise in a checkpoint's second forward whose first one used other running statistics."""
    if state.used_since is not None:
        # To compare is to wait for a GPU: only if it can matter.
        if not state.records.has_others(state.used_since):
            return
        first = state.records.find(own)
        if first is None or first.number == state.used_since:
            return
    raise RuntimeError(
        f"torch.utils.checkpoint runs the forward of layer {name} again, but its running statistics were committed or "
        "loaded since the first time, so the gradient would be of something else: call backward() before commit, or "
        'use normalization="batch"'
    )


def note_uncounted_forward(layer: Accumulating) -> None:
    """Note a forward that goes into no statistics: one in eval mode, or one in training that tracks none."""
    if not layer.training:
        _warn_if_uncommitted(layer)
    elif has_statistics(layer) and not tracks(layer) and not runs_in_backward():
        layer._accumulation.ran_untracked = True


def _warn_if_uncommitted(layer: Accumulating) -> None:
    """Say in an eval forward that its statistics lack what training forwards have seen."""
    state = layer._accumulation
    # After a first commit, eval between two commits is ordinary.
    if state.is_open and not state.is_committed:
        warn_once(
            layer,
            "uncommitted",
            f"was fed {state.micro_batches} micro-batches in training mode, none of them committed, and is now used in "
            "eval mode: its running statistics do not know them. Call syncaccum.commit(model) first; to refresh "
            "statistics without training, as torch.optim.swa_utils.update_bn does, "
            "syncaccum.recalibrate(model, batches)",
        )


def note_export(layer: Accumulating) -> None:
    """Say of a training forward's exported graph where its window is."""
    # Under dynamo no Python runs, so none can warn.
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        warn_once(
            layer,
            "exported",
            "is exported in training mode: the graph accumulates in this model, so commit this model, and do not save "
            "the graph. To save a graph export it in eval mode",
        )


def warn_of_forgotten_commits(layer: Accumulating) -> None:
    """Say that a training loop seems to have no commit in it."""
    warn_once(
        layer,
        "forgotten",
        f"was fed {FORGOTTEN_AFTER} micro-batches that were never committed, so its running statistics stay as they "
        "were: call syncaccum.commit(model) after each optimizer step, or "
        "syncaccum.commit_on_step(model, optimizer) once",
    )


def warn_once(layer: Accumulating, kind: str, what: str) -> None:
    state = layer._accumulation
    if kind not in state.said:
        state.said.add(kind)
        warnings.warn(f"layer {name_of(layer)} {what} (the first such layer)", stacklevel=2)
