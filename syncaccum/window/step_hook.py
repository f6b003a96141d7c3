"""commit_on_step: commit after every optimizer step, from a hook."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.optim import Optimizer

from syncaccum.errors import CommitError
from syncaccum.layer.state import Accumulating
from syncaccum.window.commit import CommitReport, OnNonFinite, check_on_nonfinite, commit_layers, to_seconds
from syncaccum.window.layers import tracking_layers
from syncaccum.window.optimizers import find_optimizers, hook_step
from syncaccum.window.overlap import Overlap, watch

# A GAN's critic takes up to 100 steps in a round.
# Twice as many look like a mistake.
_UNEVEN_AFTER = 200


def commit_on_step(
    model: nn.Module,
    optimizer: Any,
    *,
    timeout: float | timedelta | None = None,
    on_nonfinite: OnNonFinite = "raise",
    overlap: bool = False,
) -> CommitHandle:
    """Commit the model's windows after each ``optimizer.step()``: one window for one step.

    The step that follows the last micro-batch's backward closes the window. Registering is not collective. Each step
    is: all ranks must step equally often. Inside ``syncaccum.join`` ranks without inputs take part by themselves.

    **Wrappers** are seen through, also those that are no torch Optimizer: the hook is on the innermost optimizer, in
    whatever attribute it is kept (accelerate's, timm's Lookahead, SAM, fastai's OptimWrapper, PostLocalSGDOptimizer).
    So a wrapper that steps it in some of its calls only commits in those. A step that calls its parent class's step
    commits once. A copy of an optimizer, by deepcopy or pickle, does not carry the hook.

    **Several optimizers** that step for the same window, as a list, tuple, set or dict: one commit for each round. A
    round is over when each of them has stepped at least once since the last commit, in any order. Where one steps
    more often, as the critic of a GAN, the window holds all micro-batches of the round. To commit each part of a model
    with its own steps, call ``commit_on_step`` for each submodule with its own optimizer. To commit a model after
    every step of either of two optimizers, call it once for each of the two.

    **A second call** for the same optimizer, or one of the same, and the same layers replaces the first. So a training
    function that runs again does not commit twice.

    **Skipped steps**: where GradScaler skips a step, the window stays open and is committed with the next one. A round
    waits for a step that was skipped. The ranks of DDP skip the same steps, because they judge the same gradients.
    A fused optimizer is called even then and does nothing: its window is committed.

    **NaN or Inf** in some rank's window, as after an overflow: all ranks of the layers' group find it alike, in the
    hook, when the optimizer has moved the weights. With ``on_nonfinite="raise"`` the step raises and the window is
    kept, so every later step raises, too, until ``discard(model)``. With ``"discard"`` the windows of all layers
    of that group are dropped on all its ranks, running statistics stay as they are, and training goes on. Dropped are
    all micro-batches since the last commit, those of skipped steps included. Other errors are raised with both.

    **Overlap**: with ``overlap=True`` windows are sent when the last micro-batch's backward begins, and the step waits
    for what is left of their all-reduce. Statistics are the same, to the last bit, and so are errors, which the step
    raises. The last micro-batch is one whose backward reduces gradients: outside of DDP's ``no_sync()``. Pass the
    DistributedDataParallel itself, or a model that holds it. Without one call ``handle.start_commit()``.

    - The first step sends by itself, because ranks compare first whether all of them overlap. So do steps inside
      ``join``, whose waiting ranks know of commits alone, and of ``lockstep`` and ``lookahead``, which have messages of
      their own in the backward; in ``lockstep`` call ``handle.start_commit()`` between forward and backward.
    - Another backward that reduces, as after a skipped step, sends the windows anew, and what was sent before is
      dropped. So without ``no_sync()`` each micro-batch sends, and statistics are right all the same.
    - A training forward between that backward and the step comes too late for this window and goes into the next one.
      ``discard`` comes too late for what was sent: that is committed, so that statistics stay equal on all ranks. Both
      are warned of. Where no step follows, ``discard`` drops all.
    - Windows stay in the layers until the step: checkpoints that are saved meanwhile have them, and a ``commit`` by
      hand takes them. ``remove()`` leaves them open.
    - ``timeout`` counts from the sending on. MPI communicators exchange at once, in the backward.

    Args:
        model: a module with SyncAccumBatchNorm layers, also inside DDP or torch.compile wrappers.
        optimizer: a torch.optim.Optimizer, a wrapper around one, or a list, tuple, set or dict of them.
        timeout: of each commit, as for ``commit``.
        on_nonfinite: "raise" or "discard", the same on all ranks.
        overlap: whether to send windows before the step, the same on all ranks.

    Returns:
        A handle; ``handle.remove()`` ends it for all optimizers. It is also a context manager that does so at its end.
        ``handle.report`` is what the last commit did.

    Raises:
        ValueError: the timeout is not a positive number, ``on_nonfinite`` is none of the two, or the list is empty.
        NoLayersError: the model has no SyncAccumBatchNorm that tracks statistics.
        TypeError: an optimizer is no torch.optim.Optimizer and holds none, or has no ``step``, so that a
            hook could never fire; call ``commit(model)`` after each of its steps instead.

        Each ``optimizer.step()`` raises what ``commit`` does, after the weights have moved.

    Warns:
        UserWarning: from the step, on every rank, once for each discarded window, naming the layers and ranks of the
            NaN or Inf (Python by default prints equal warnings once); and when one of several optimizers has
            taken 200 steps in a round and another none. With ``overlap``, once for each kind, on the rank that it
            concerns: what came too late for a window that was sent, and a step that nothing was sent for.

    Example::

        >>> model = syncaccum.convert_sync_accum(model)
        >>> handle = syncaccum.commit_on_step(model, optimizer, on_nonfinite="discard")
        >>> for x, y in micro_batches:
        ...     loss_fn(model(x), y).backward()
        >>> optimizer.step()  # commits
        >>> optimizer.zero_grad()
    """
    # Raise what is wrong now, and not in the first step.
    tracking_layers(model)
    to_seconds(timeout)
    check_on_nonfinite(on_nonfinite)
    optimizers = find_optimizers(optimizer)
    # A list: remove() changes the set.
    for other in list(_registered):
        if other.is_replaced_by(model, optimizers):
            other.remove()
    handle = CommitHandle(model, optimizers, to_seconds(timeout), on_nonfinite, overlap)
    _registered.add(handle)
    return handle


class CommitHandle:
    """What ``commit_on_step`` returns: ``remove()`` ends it.

    Attributes:
        report: of the last commit after a step; None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Collection[Optimizer],
        timeout: float | None,
        on_nonfinite: OnNonFinite,
        overlap: bool = False,
    ) -> None:
        self.report: CommitReport | None = None
        self._model = model
        self._timeout = timeout
        self._on_nonfinite = on_nonfinite
        # Weak: a round must not wait for an optimizer that is gone.
        self._optimizers = WeakSet(optimizers)
        self._stepping: WeakSet[Optimizer] = WeakSet()
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._hooks = [hook for optimizer in optimizers for hook in hook_step(optimizer, self._begin, self._end)]
        self._overlap = Overlap(timeout) if overlap else None
        if overlap:
            self._hooks += watch(model, self.start_commit)

    def remove(self) -> None:
        """Commit no more after steps, of any of the optimizers."""
        for hook in self._hooks:
            hook.remove()
        if self._overlap is not None:
            self._overlap.forget()
        _registered.discard(self)

    def start_commit(self) -> None:
        """Send the windows now, if they are to overlap: the next step takes what is in them now.

        For models without DistributedDataParallel: call it before the last micro-batch's backward, when its forward is
        done. Inside DDP's it is called by itself. Collective: all ranks call it equally often, at the same place among
        their other collectives.

        Raises:
            RuntimeError: ``commit_on_step`` was called without ``overlap=True``.
        """
        if self._overlap is None:
            raise RuntimeError("nothing is sent before the step: call commit_on_step(..., overlap=True)")
        try:
            layers = tracking_layers(self._model)
        except CommitError:
            return  # the step raises it
        self._overlap.start(layers)

    def __enter__(self) -> CommitHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def is_replaced_by(self, model: nn.Module, optimizers: Collection[Optimizer]) -> bool:
        """Whether a registration for these leaves nothing to do for this one."""
        # Where this one has more layers, they still need their commits.
        return not self._optimizers.isdisjoint(optimizers) and _layers(self._model) <= _layers(model)

    def _begin(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepping.add(optimizer)

    def _end(self, optimizer: Optimizer, *_: Any) -> None:
        # A step that called its parent's step ends a second time.
        if optimizer not in self._stepping:
            return
        self._stepping.discard(optimizer)
        self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        if len(self._steps) == len(self._optimizers):
            # First: if the commit raises, the next round starts anew.
            self._steps.clear()
            sent = None if self._overlap is None else self._overlap.layers
            layers = tracking_layers(self._model) if sent is None else sent
            self.report = commit_layers(layers, self._timeout, self._on_nonfinite, self._overlap)
        # Equal, not more: once in a round.
        elif self._steps[optimizer] == _UNEVEN_AFTER:
            _warn_of_uneven_steps()


def _layers(model: nn.Module) -> set[Accumulating]:
    return {module for module in model.modules() if isinstance(module, Accumulating)}


def _warn_of_uneven_steps() -> None:
    warnings.warn(
        f"one optimizer has taken {_UNEVEN_AFTER} steps since the last commit and another of the same commit_on_step "
        "none, so nothing was committed: list only optimizers that step for the same window, or call commit_on_step "
        "for each submodule with its own optimizer",
        stacklevel=2,
    )


_registered: WeakSet[CommitHandle] = WeakSet()
"""Weak, so that a handle goes with its optimizers: it is their hooks that keep it alive."""
