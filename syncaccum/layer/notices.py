"""What a layer notices and says: commits that were forgotten, statistics that are not what a forward needs."""

from __future__ import annotations

import warnings

from syncaccum.layer.state import Accumulating, has_statistics, tracks
from syncaccum.torch_private import runs_in_backward

# So many micro-batches without a commit: surely forgotten.
# Windows of some hundred are in use.
FORGOTTEN_AFTER = 1000


def note_forward(layer: Accumulating) -> None:
    """Note that a training forward uses the running statistics as they are now. Not called in compiled forwards.

    Raises:
        RuntimeError: it is a checkpoint's second forward, and the first one used other statistics, so that the
            gradient would be wrong; or the first one did not count, and then neither would.
    """
    state = layer._accumulation
    if not runs_in_backward():
        state.has_normalised = True
    if state.has_normalised:
        return
    name = state.name or type(layer).__name__
    if state.ran_untracked:
        raise RuntimeError(
            f"torch.utils.checkpoint runs the forward of layer {name} again, but the first time it had "
            "track_running_stats=False, so nothing was counted. Some wrappers switch it off (fairscale's "
            "checkpoint_wrapper does): use torch.utils.checkpoint, under which this layer counts once"
        )
    # "batch" looks at no running statistics; "window" has a record.
    if state.normalization not in ("batch", "window"):
        raise RuntimeError(
            f"torch.utils.checkpoint runs the forward of layer {name} again, but its running statistics were "
            "committed or loaded since the first time, so the gradient would be of something else: call backward() "
            'before commit, or use normalization="batch"'
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
        _warn_once(
            layer,
            "uncommitted",
            f"was fed {state.micro_batches} micro-batches in training mode, none of them committed, and is now used in "
            "eval mode: its running statistics do not know them. Call syncaccum.commit(model) first; to refresh "
            "statistics without training, as torch.optim.swa_utils.update_bn does, "
            "syncaccum.recalibrate(model, batches)",
        )


def warn_of_forgotten_commits(layer: Accumulating) -> None:
    """Say that a training loop seems to have no commit in it."""
    _warn_once(
        layer,
        "forgotten",
        f"was fed {FORGOTTEN_AFTER} micro-batches that were never committed, so its running statistics stay as they "
        "were: call syncaccum.commit(model) after each optimizer step, or "
        "syncaccum.commit_on_step(model, optimizer) once",
    )


def _warn_once(layer: Accumulating, kind: str, what: str) -> None:
    state = layer._accumulation
    if kind not in state.said:
        state.said.add(kind)
        warnings.warn(f"layer {state.name or type(layer).__name__} {what} (the first such layer)", stacklevel=2)
