"""fastai: a callback that converts the model, and commits after each step."""

from __future__ import annotations

from datetime import timedelta

from fastai.callback.core import Callback

from syncaccum.layer.convert import convert_sync_accum
from syncaccum.layer.settings import DEFAULT_POLICY
from syncaccum.window.commit import CommitReport, OnNonFinite, check_on_nonfinite, commit_layers, to_seconds
from syncaccum.window.counted import discard
from syncaccum.window.layers import tracking_layers


class SyncAccumCallback(Callback):  # type: ignore[misc] # fastai has no types
    """BatchNorm statistics of the global batch, over the micro-batches of ``GradientAccumulation`` and all ranks.

    Converts the model when a fit begins, and starts with empty windows. Each optimizer step commits its window.
    Micro-batches that fastai leaves without a step, as at the end of a fit or of ``lr_find``, are dropped.

    Args:
        normalization: the policy, see :class:`SyncAccumBatchNorm`.
        timeout: of each commit, see :func:`commit`.
        on_nonfinite: "raise" or "discard", see :func:`commit_on_step`.

    Attributes:
        report: of the last commit, a :class:`CommitReport`; None before the first.

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
        check_on_nonfinite(on_nonfinite)
        self._timeout = to_seconds(timeout)
        self._on_nonfinite: OnNonFinite = on_nonfinite
        self._was_skipped = False
        self.report: CommitReport | None = None

    def before_fit(self) -> None:
        """Convert, and drop what another fit has left."""
        self._was_skipped = False
        discard(convert_sync_accum(self.learn.model, normalization=self._normalization))

    def after_cancel_step(self) -> None:
        """A step that gradient scaling skips leaves its window to the next."""
        self._was_skipped = True

    def after_step(self) -> None:
        """Commit. fastai comes here after skipped steps, too, but not after those that accumulation puts off."""
        # No hook on the optimizer: fastai's own are none of torch's.
        if not self._was_skipped:
            self.report = commit_layers(tracking_layers(self.learn.model), self._timeout, self._on_nonfinite)
        self._was_skipped = False

    def after_fit(self) -> None:
        """Drop what no step came for. fastai comes here also where a callback ends the fit early."""
        discard(self.learn.model)
