"""Accelerate: a call after prepare() that converts, commits after each real step, and keeps windows in checkpoints."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import nn

from syncaccum.errors import LockstepError
from syncaccum.layer import surroundings
from syncaccum.layer.convert import convert_sync_accum
from syncaccum.layer.settings import DEFAULT_POLICY
from syncaccum.window.commit import CommitReport, OnNonFinite
from syncaccum.window.counted import discard
from syncaccum.window.saved import gather_window_state_dict, load_window_state_dict
from syncaccum.window.step_hook import CommitHandle, commit_on_step


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

    To load a checkpoint that was saved without ``sync_accum``, call ``load_state()`` before it.

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
        A handle; ``handle.remove()`` ends commits and checkpoints of windows. ``handle.report`` is what the last
        commit did.

    Raises:
        NoLayersError: the model has no BatchNorm that tracks statistics.
        ValueError: the model was not prepared; or what :func:`convert_sync_accum` and :func:`commit_on_step` raise.
            From ``load_state()``: windows of another model.
        LockstepError: from the forward: the exact mode with ``gradient_accumulation_steps`` of more than 1.

    Example::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        sync_accum(accelerator, model, optimizer)
    """
    windows = _Windows.of(accelerator)
    windows.add(model)
    convert_sync_accum(model, normalization=normalization)
    discard(model)
    commits = commit_on_step(model, optimizer, timeout=timeout, on_nonfinite=on_nonfinite)
    refusal = model.register_forward_pre_hook(lambda *_: _refuse_part_of_window(accelerator))
    return SyncAccumHandle(windows, model, commits, refusal)


class SyncAccumHandle:
    """What ``sync_accum`` returns: ``remove()`` ends it."""

    def __init__(self, windows: _Windows, model: nn.Module, commits: CommitHandle, refusal: Any) -> None:
        self._windows = windows
        self._model = model
        self._commits = commits
        self._refusal = refusal

    @property
    def report(self) -> CommitReport | None:
        """Of the last commit; None before the first."""
        return self._commits.report

    def remove(self) -> None:
        """Commit no more, and leave checkpoints alone."""
        self._commits.remove()
        self._refusal.remove()
        self._windows.remove(self._model)


class _Windows:
    """The open windows of an accelerator's models, one object among those that ``save_state()`` takes along.

    Accelerate loads these last. Weights that are loaded end a window, so the order matters.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._ours: list[nn.Module] = []

    @classmethod
    def of(cls, accelerator: Any) -> _Windows:
        """The accelerator's own. A second one would make a second file, which a checkpoint may not have."""
        found = [one for one in accelerator._custom_objects if isinstance(one, cls)]
        return found[0] if found else cls(accelerator)

    def add(self, model: nn.Module) -> None:
        """Raises ValueError where ``prepare()`` has not seen the model."""
        ours = self._accelerator.unwrap_model(model)
        if all(ours is not prepared for prepared in self._prepared()):
            raise ValueError("the model is none of the accelerator's: call sync_accum after prepare(model)")
        # Those that free_memory() gave up are held no longer.
        self._ours = [one for _, one in self._placed() if one is not ours] + [ours]
        if all(one is not self for one in self._accelerator._custom_objects):
            self._accelerator.register_for_checkpointing(self)

    def remove(self, model: nn.Module) -> None:
        ours = self._accelerator.unwrap_model(model)
        self._ours = [one for one in self._ours if one is not ours]
        if not self._ours and self in self._accelerator._custom_objects:
            self._accelerator._custom_objects.remove(self)

    def state_dict(self) -> dict[str, Any]:
        """By a model's place among those that were prepared. Collective: ``save_state()`` calls it on every rank."""
        return {str(place): gather_window_state_dict(model) for place, model in self._placed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for place, model in self._placed():
            load_window_state_dict(model, state[str(place)])

    def _placed(self) -> list[tuple[int, nn.Module]]:
        return [(i, one) for i, one in enumerate(self._prepared()) if any(one is ours for ours in self._ours)]

    def _prepared(self) -> list[nn.Module]:
        return [self._accelerator.unwrap_model(one) for one in self._accelerator._models]


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
