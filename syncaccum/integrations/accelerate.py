"""Accelerate: one call after prepare() that converts, commits after each real step, and keeps windows in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from syncaccum.errors import LockstepError
from syncaccum.layer import surroundings
from syncaccum.layer.convert import convert_sync_accum
from syncaccum.layer.settings import DEFAULT_POLICY
from syncaccum.window.commit import OnNonFinite
from syncaccum.window.counted import discard
from syncaccum.window.saved import gather_window_state_dict, load_window_state_dict
from syncaccum.window.step_hook import commit_on_step


def sync_accum(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    *,
    normalization: str = DEFAULT_POLICY,
    timeout: float | timedelta | None = None,
    on_nonfinite: OnNonFinite = "raise",
) -> SyncAccumHandle:
    """BatchNorm statistics of the global batch, over the micro-batches of ``accumulate()`` and all ranks.

    Call it after ``prepare()``. Each optimizer step commits its window, also the short one at the loader's end. Steps
    that ``accumulate()`` or gradient scaling skips leave the window open. ``save_state()`` and ``load_state()`` take
    open windows along, over any number of ranks. A training function that runs again, as under
    ``find_executable_batch_size``, starts with empty windows.

    **The exact mode** (:func:`lockstep`, :func:`lookahead`) takes a whole window at once, so it is refused where
    ``gradient_accumulation_steps`` is more than 1: it would take each micro-batch for a window.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        model: what ``prepare()`` returned for the model.
        optimizer: what ``prepare()`` returned for the optimizer, or several that step for the same window.
        normalization: the policy, see :class:`SyncAccumBatchNorm`.
        timeout: of each commit, see :func:`commit`.
        on_nonfinite: "raise" or "discard", see :func:`commit_on_step`.

    Returns:
        A handle; ``handle.remove()`` ends commits and checkpoints of windows.

    Raises:
        NoLayersError: the model has no BatchNorm that tracks statistics.
        ValueError: the model was not prepared; or what :func:`convert_sync_accum` and :func:`commit_on_step` raise.
            From ``load_state()``: windows of another model.
        LockstepError: from the forward: the exact mode with ``gradient_accumulation_steps`` of more than 1.

    Example::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        sync_accum(accelerator, model, optimizer)
    """
    if _find_place(accelerator, accelerator._models, model) is None:
        raise ValueError("the model is none that the accelerator has prepared: call sync_accum after prepare(model)")
    convert_sync_accum(model, normalization=normalization)
    discard(model)
    commits = commit_on_step(model, optimizer, timeout=timeout, on_nonfinite=on_nonfinite)
    windows = _Windows(accelerator, model)
    return SyncAccumHandle(
        [
            commits,
            accelerator.register_save_state_pre_hook(windows.save),
            accelerator.register_load_state_pre_hook(windows.load),
            model.register_forward_pre_hook(lambda *_: _refuse_part_of_window(accelerator)),
        ]
    )


class SyncAccumHandle:
    """What ``sync_accum`` returns: ``remove()`` ends it."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Commit no more, and leave checkpoints alone."""
        for handle in self._handles:
            handle.remove()


class _Windows:
    """The open windows of a model in the folders of ``save_state()``."""

    def __init__(self, accelerator: Any, model: nn.Module) -> None:
        self._accelerator = accelerator
        self._model = model

    def save(self, models: list[nn.Module], weights: Any, folder: str) -> None:
        """Collective: ``save_state()`` calls it on every rank."""
        if (path := self._locate(models, folder)) is not None:
            # All ranks gather, whoever of them writes.
            self._accelerator.save(gather_window_state_dict(self._model), path)

    def load(self, models: list[nn.Module], folder: str) -> None:
        path = self._locate(models, folder)
        # A checkpoint from before sync_accum has none.
        if path is not None and path.exists():
            load_window_state_dict(self._model, torch.load(path, map_location="cpu", weights_only=True))
        elif path is not None:
            discard(self._model)

    def _locate(self, models: list[nn.Module], folder: str) -> Path | None:
        """A file for each model. None where the accelerator has given it up: free_memory(), before another try."""
        place = _find_place(self._accelerator, models, self._model)
        return None if place is None else Path(folder) / f"syncaccum_windows_{place}.pt"


def _find_place(accelerator: Any, models: Sequence[nn.Module], model: nn.Module) -> int | None:
    wanted = accelerator.unwrap_model(model)
    places = (index for index, one in enumerate(models) if accelerator.unwrap_model(one) is wanted)
    return next(places, None)


def _refuse_part_of_window(accelerator: Any) -> None:
    # A lockstep runs compiled models as they were written.
    if torch.compiler.is_compiling():
        return
    steps = accelerator.gradient_accumulation_steps
    if steps != 1 and surroundings.lockstep_here() is not None:
        raise LockstepError(
            f"the exact mode under Accelerator(gradient_accumulation_steps={steps}) would take each micro-batch for a "
            "whole window, with wrong gradients: leave gradient_accumulation_steps at 1, and give lockstep or "
            "lookahead all micro-batches of the window"
        )
