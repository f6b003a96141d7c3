"""Lightning: a callback that converts the model, and commits after each optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch.callbacks import Callback
from torch import Tensor

from syncaccum.errors import NoLayersError
from syncaccum.integrations.lightning_windows import WholeWindows
from syncaccum.integrations.parts import commit_parts_on_steps
from syncaccum.layer.convert import convert_sync_accum
from syncaccum.layer.settings import DEFAULT_POLICY
from syncaccum.window.commit import CommitReport, OnNonFinite
from syncaccum.window.counted import discard
from syncaccum.window.saved import gather_window_state_dict, load_window_state_dict
from syncaccum.window.step_hook import CommitHandle

_KEY = "syncaccum_windows"
"""Of the open windows in Lightning's checkpoints."""


class SyncAccumCallback(Callback):  # type: ignore[misc] # not installed where types are checked
    """BatchNorm statistics of the global batch, over ``accumulate_grad_batches`` micro-batches and all ranks.

    Converts the model when a fit begins, before the strategy wraps it. Each optimizer step commits its window, also
    the short one at an epoch's end. A step that gradient scaling skips leaves its window to the next. Open windows
    are in Lightning's checkpoints, and are dealt out over any number of ranks.

    **Several optimizers**, as in manual optimization: a layer is committed after the steps of the optimizer that has
    its weight; one that has none, with what is around it. So a GAN's two networks are committed each with its own.

    **Other modes.** ``mode="exact"`` and ``mode="lookahead"`` take the whole window as one batch: give the data
    loader the window's batch size, ``micro_batch`` the size that fits, and leave ``accumulate_grad_batches`` at 1.
    ``training_step`` stays as it is. It is called with each micro-batch, and its loss must be a mean over examples.
    Each tensor of a batch is cut along its first dimension.

    Args:
        normalization: the policy, see :class:`SyncAccumBatchNorm`.
        timeout: of each commit, see :func:`commit`.
        on_nonfinite: "raise" or "discard", see :func:`commit_on_step`.
        mode: "accumulate", or "exact" by :func:`lockstep`, or "lookahead" by :func:`lookahead`.
        micro_batch: examples in a micro-batch, for the latter two.

    Raises:
        ValueError: for an unknown mode, or one without ``micro_batch``. When a fit begins: ``sync_batchnorm=True``,
            which replaces layers, and what :func:`convert_sync_accum` raises. In the first step: a whole window with
            ``accumulate_grad_batches`` or manual optimization.
        NoLayersError: when training begins, the model has no BatchNorm that tracks statistics.

    Example::

        trainer = Trainer(callbacks=[SyncAccumCallback()], accumulate_grad_batches=4)
        trainer.fit(model, loader)
    """

    def __init__(
        self,
        normalization: str = DEFAULT_POLICY,
        *,
        timeout: float | timedelta | None = None,
        on_nonfinite: OnNonFinite = "raise",
        mode: Literal["accumulate", "exact", "lookahead"] = "accumulate",
        micro_batch: int | None = None,
    ) -> None:
        if mode not in ("accumulate", "exact", "lookahead"):
            raise ValueError(f"mode must be 'accumulate', 'exact' or 'lookahead', got {mode!r}")
        if (mode == "accumulate") != (micro_batch is None):
            raise ValueError(
                f"mode={mode!r} with micro_batch={micro_batch}: the modes 'exact' and 'lookahead' need the size of "
                "a micro-batch, and 'accumulate' has none, because each batch of the loader is one"
            )
        self._normalization = normalization
        self._mode = mode
        self._micro_batch = micro_batch
        self._settings: dict[str, Any] = {"timeout": timeout, "on_nonfinite": on_nonfinite}
        self._loaded: Mapping[str, Tensor] | None = None
        self._handles: Sequence[CommitHandle] = ()
        self._whole_windows: WholeWindows | None = None
        self._report: CommitReport | None = None

    @property
    def report(self) -> CommitReport | None:
        """Of the last commit, and of several optimizers' that of the last in their order; None before the first."""
        reports = [handle.report for handle in self._handles if handle.report is not None]
        return reports[-1] if reports else self._report

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Convert, before the strategy wraps the model."""
        if stage != "fit":
            return
        _refuse_layer_sync(trainer)
        # Of another fit, or of a checkpoint that was only validated.
        self._let_go()
        self._loaded = None
        convert_sync_accum(pl_module, normalization=self._normalization)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Convert what ``configure_model`` has built since ``setup``."""
        convert_sync_accum(pl_module, normalization=self._normalization)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start with the checkpoint's windows, or empty ones, and hook the optimizers."""
        # A fit that failed has left windows open.
        discard(pl_module)
        if self._loaded is not None:
            load_window_state_dict(pl_module, self._loaded)
            self._loaded = None
        self._handles = commit_parts_on_steps(pl_module, trainer.optimizers, **self._settings)
        if self._micro_batch is not None:
            self._whole_windows = WholeWindows(trainer, self._mode, self._micro_batch)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the open windows of all ranks in. Collective: Lightning calls it on each."""
        # A model that was only tested is not converted.
        with suppress(NoLayersError):
            checkpoint[_KEY] = gather_window_state_dict(pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the windows until training starts: the strategy may still move the model."""
        self._loaded = checkpoint.get(_KEY)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lightning calls no ``teardown`` then."""
        self._let_go()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Commit no more. Windows stay: a checkpoint may still be saved."""
        self._let_go()

    def _let_go(self) -> None:
        self._report = self.report
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        if self._whole_windows is not None:
            self._whole_windows.remove()
            self._whole_windows = None


def _refuse_layer_sync(trainer: Any) -> None:
    # torch would stop later: "only work with GPU modules". On a GPU it would replace our layers.
    if getattr(trainer.strategy, "_layer_sync", None) is not None:
        raise ValueError(
            "Trainer(sync_batchnorm=True) would replace the layers of SyncAccumCallback by torch's SyncBatchNorm: "
            "leave it out. The callback's statistics are those of all ranks, too"
        )
