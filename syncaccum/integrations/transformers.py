"""Hugging Face's Trainer: a callback that converts and commits, and a Trainer that takes whole windows."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from syncaccum.exact.lockstep import lockstep
from syncaccum.exact.lookahead import lookahead
from syncaccum.layer.convert import convert_sync_accum
from syncaccum.layer.settings import DEFAULT_POLICY
from syncaccum.window.commit import CommitReport, OnNonFinite
from syncaccum.window.counted import discard
from syncaccum.window.saved import gather_window_state_dict, load_window_state_dict
from syncaccum.window.step_hook import CommitHandle, commit_on_step


class SyncAccumTrainerCallback(TrainerCallback, ExportableState):
    """BatchNorm statistics of the global batch, over ``gradient_accumulation_steps`` micro-batches and all ranks.

    Converts the model when training begins. Each optimizer step commits its window, also the short one at an epoch's
    end. Training that begins anew, as in the retries of ``auto_find_batch_size``, starts with empty windows. The
    Trainer writes checkpoints between windows. What the next window starts with is in their ``trainer_state.json``.

    Args:
        normalization: the policy, see :class:`SyncAccumBatchNorm`.
        timeout: of each commit, see :func:`commit`.
        on_nonfinite: "raise" or "discard", see :func:`commit_on_step`.

    Raises:
        NoLayersError: when training begins, the model has no BatchNorm that tracks statistics.

    Example::

        trainer = Trainer(model, arguments, train_dataset=images, callbacks=[SyncAccumTrainerCallback()])
        trainer.train()
    """

    def __init__(
        self,
        normalization: str = DEFAULT_POLICY,
        *,
        timeout: float | timedelta | None = None,
        on_nonfinite: OnNonFinite = "raise",
    ) -> None:
        self._normalization = normalization
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        self._settings: dict[str, Any] = {"timeout": seconds, "on_nonfinite": on_nonfinite}
        self._handle: CommitHandle | None = None
        self._report: CommitReport | None = None
        self._windows = ""

    @property
    def report(self) -> CommitReport | None:
        """Of the last commit; None before the first."""
        return (self._handle and self._handle.report) or self._report

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of this, see transformers' ``ExportableState``."""
        arguments = {"normalization": self._normalization, **self._settings}
        return {"args": arguments, "attributes": {"_windows": self._windows}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Convert, drop what a training that failed has left, take up a checkpoint's, and hook the optimizer."""
        model = convert_sync_accum(kwargs["model"], normalization=self._normalization)
        discard(model)
        # A checkpoint from before this callback has no entry of it.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step > 0 and (windows := saved["attributes"]["_windows"]):
            load_window_state_dict(model, _decode(windows))
        self._let_go()
        self._handle = commit_on_step(model, kwargs["optimizer"], **self._settings)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what a checkpoint of this step is to hold. Collective where it is saved: each rank decides alike."""
        if control.should_save:
            self._windows = _encode(gather_window_state_dict(kwargs["model"]))

    # Checkpoints of an epoch.
    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Commit no more."""
        self._let_go()

    def _let_go(self) -> None:
        if self._handle is not None:
            self._report = self.report
            self._handle.remove()
            self._handle = None


def _encode(state: Mapping[str, Tensor]) -> str:
    """Tensors for a JSON file. Most are zeros between two windows, and take no room."""
    content = io.BytesIO()
    torch.save({name: value.cpu() for name, value in state.items()}, content)
    return base64.b64encode(zlib.compress(content.getvalue())).decode()


def _decode(text: str) -> dict[str, Tensor]:
    content = io.BytesIO(zlib.decompress(base64.b64decode(text)))
    state: dict[str, Tensor] = torch.load(content, map_location="cpu", weights_only=True)
    return state


class SyncAccumTrainer(Trainer):
    """A Trainer whose BatchNorm layers normalise with the whole global batch: the large batch's training.

    A window is what it always was, ``gradient_accumulation_steps`` batches on each rank. They are kept until the last
    has come, and then go through the model together, by :func:`lockstep` (``sync_accum_mode="exact"``) or
    :func:`lookahead`. Losses are computed and scaled as by Trainer. To use it with a Trainer of your own, name both:
    ``class MyTrainer(SyncAccumTrainer, OtherTrainer)``.

    Needs :class:`SyncAccumTrainerCallback`, too, and adds it where it is not among the callbacks.
    """

    sync_accum_mode: Literal["exact", "lookahead"] = "exact"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._window: list[Any] = []
        if not any(isinstance(one, SyncAccumTrainerCallback) for one in self.callback_handler.callbacks):
            self.add_callback(SyncAccumTrainerCallback())

    def get_train_dataloader(self) -> Any:
        """Forget what a training that failed has kept: each training begins here."""
        self._window = []
        return super().get_train_dataloader()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Keep the inputs; with the window's last ones, run and walk them all. Returns the loss of those that ran."""
        self._window.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        window, self._window = self._window, []
        step = super().training_step
        with self._losses_kept() as (kept, backward):

            def forward(inputs: dict[str, Any]) -> Tensor:
                step(model, inputs, num_items_in_batch)
                return kept.pop()

            if self.sync_accum_mode == "exact":
                total = torch.stack(lockstep(model, forward, window)).sum()
                backward(total)
                return total.detach()
            total = torch.zeros((), device=self.args.device)
            for loss in lookahead(model, forward, window):
                backward(loss)
                total += loss.detach()
            return total

    @contextmanager
    def _losses_kept(self) -> Iterator[tuple[list[Tensor], Any]]:
        """Let Trainer's step hand over its scaled loss, where it would walk it backward."""
        kept: list[Tensor] = []
        backward = self.accelerator.backward
        # On the instance: it hides the method, which stays.
        self.accelerator.backward = lambda loss, **kwargs: kept.append(loss)
        try:
            yield kept, backward
        finally:
            del self.accelerator.backward
