"""fastai: a callback that converts the model, and commits after each optimizer step."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from fastai.callback.core import Callback

from syncaccum.layer.convert import convert_sync_accum
from syncaccum.layer.settings import DEFAULT_POLICY
from syncaccum.window.commit import OnNonFinite
from syncaccum.window.counted import discard
from syncaccum.window.step_hook import CommitHandle, commit_on_step


class SyncAccumCallback(Callback):  # type: ignore[misc] # fastai has no types
    """BatchNorm statistics of the global batch, over the micro-batches of ``GradientAccumulation`` and all ranks.

    Converts the model when a fit begins, and starts with empty windows. Each optimizer step commits its window.
    Micro-batches that fastai leaves without a step, as at the end of a fit or of ``lr_find``, are dropped.

    Args:
        normalization: the policy, see :class:`SyncAccumBatchNorm`.
        timeout: of each commit, see :func:`commit`.
        on_nonfinite: "raise" or "discard", see :func:`commit_on_step`.

    Raises:
        NoLayersError: when a fit begins, the model has no BatchNorm that tracks statistics.

    Example::

        learner = Learner(loaders, model, cbs=[GradientAccumulation(64), SyncAccumCallback()])
        learner.fit_one_cycle(5)
    """

    def __init__(
        self,
        normalization: str = DEFAULT_POLICY,
        *,
        timeout: float | timedelta | None = None,
        on_nonfinite: OnNonFinite = "raise",
    ) -> None:
        self._normalization = normalization
        self._settings: dict[str, Any] = {"timeout": timeout, "on_nonfinite": on_nonfinite}
        self._handle: CommitHandle | None = None

    def before_fit(self) -> None:
        """Convert, drop what another fit has left, and hook the optimizer, which the learner has made by now."""
        model = convert_sync_accum(self.learn.model, normalization=self._normalization)
        discard(model)
        self._handle = commit_on_step(model, self.learn.opt, **self._settings)

    def after_fit(self) -> None:
        """Commit no more. fastai comes here also where a callback ends the fit early."""
        discard(self.learn.model)
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
