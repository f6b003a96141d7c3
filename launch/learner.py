"""The learner: what trains, one optimizer step per global batch, and what is tested."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from launch.arguments import Arguments
from launch.digits import Images, load_split
from launch.models import build_model
from launch.placement import Placement
from launch.processes import from_every_rank, sum_over_ranks
from launch.progress import Sums
from launch.schedule import global_batches, micro_batches, rank_share
from syncaccum import (
    NonFiniteStatisticsError,
    commit_on_step,
    convert_sync_accum,
    load_window_state_dict,
    window_state_dict,
)
from syncaccum.integrations import mpi


class DivergedError(RuntimeError):
    """Training left the finite numbers; every rank raises it at the same step."""


class Learner:
    """Model, optimizer and data of this rank."""

    def __init__(self, arguments: Arguments, placement: Placement, device: torch.device) -> None:
        self._arguments, self._placement, self._device = arguments, placement, device
        train, test = load_split(device, getattr(torch, arguments.dtype))
        self._train = Images(*(t[: arguments.train_images] for t in (train.pixels, train.classes)))
        self._test = test
        torch.manual_seed(arguments.seed)
        torch.backends.cudnn.deterministic = True  # a resumed run is to give the same bits
        self._model = build_model(arguments.model).to(device, getattr(torch, arguments.dtype))
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=arguments.lr, momentum=arguments.momentum)
        if arguments.normalization != "none":
            group = mpi.world() if arguments.transport == "mpi" else None
            convert_sync_accum(self._model, group, arguments.normalization)
            commit_on_step(self._model, self._optimizer)
        self._parallel: nn.Module = self._model
        if placement.launched:
            self._parallel = DistributedDataParallel(self._model)
            self._settle_buckets()

    def _settle_buckets(self) -> None:
        """Let DDP see one backward pass that has no effect.

        DDP reorders its messages after the first one, and with three ranks or more the order decides how sums are
        rounded: without this, the first step of a resumed run would differ from the same step in the middle of an
        uninterrupted one.
        """
        self._parallel.eval()
        torch.autograd.backward(self._parallel(self._train.pixels[:1]).sum())
        self._optimizer.zero_grad()

    def batches(self, epoch: int) -> list[list[int]]:
        """The global batches of an epoch, in order; the same ones on every rank."""
        return global_batches(len(self._train), self._arguments.window, self._arguments.seed, epoch)

    def step(self, batch: Sequence[int]) -> Sums:
        """One optimizer step on the mean loss of a global batch; the batch's sums, alike on every rank.

        Collective. Also closes the accumulation window: the optimizer's hook commits.
        """
        self._parallel.train()
        share = rank_share(batch, self._placement.rank, self._placement.size)
        parts = micro_batches(share, self._arguments.micro_batch)
        sums = Sums()
        for part in parts[:-1]:
            with self._no_sync():
                sums += self._accumulate(part, len(batch))
        sums += self._accumulate(parts[-1], len(batch))
        sums = self._reduce(sums)
        if not math.isfinite(sums.loss):
            raise DivergedError("the loss is not finite")
        try:
            self._optimizer.step()
        except NonFiniteStatisticsError as error:
            raise DivergedError(str(error)) from error
        self._optimizer.zero_grad()
        return sums

    def _no_sync(self) -> AbstractContextManager[None]:
        if isinstance(self._parallel, DistributedDataParallel):
            no_sync: AbstractContextManager[None] = self._parallel.no_sync()
            return no_sync
        return nullcontext()

    def _accumulate(self, part: Sequence[int], batch_size: int) -> Sums:
        """Add a micro-batch's share of the gradient of the global batch's mean loss."""
        chosen = torch.as_tensor(part, dtype=torch.int64, device=self._device)
        classes = self._train.classes[chosen]
        logits = self._parallel(self._train.pixels[chosen])
        loss = F.cross_entropy(logits, classes, reduction="sum")
        # DDP divides the sum over ranks by their number, whatever each has contributed.
        torch.autograd.backward(loss * (self._placement.size / batch_size))
        return _count(loss, logits, classes)

    def test(self) -> Sums:
        """Sums over the test images, on the committed running statistics. Collective."""
        self._parallel.eval()
        share = rank_share(range(len(self._test)), self._placement.rank, self._placement.size)
        here = slice(share[0], share[-1] + 1)
        classes = self._test.classes[here]
        with torch.no_grad():
            # Through DDP: with plain BatchNorm ranks differ in statistics, and DDP hands out rank 0's.
            logits = self._parallel(self._test.pixels[here])
            loss = F.cross_entropy(logits, classes, reduction="sum")
        return self._reduce(_count(loss, logits, classes))

    def _reduce(self, sums: Sums) -> Sums:
        return Sums(*sum_over_ranks([sums.loss, sums.correct, sums.images], self._placement, self._device))

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, between two steps. Collective."""
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rng": from_every_rank(self._rng_state(), self._placement),
            "windows": from_every_rank(self._windows(), self._placement),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if len(state["rng"]) == self._placement.size:
            self._set_rng_state(state["rng"][self._placement.rank])
        if self._arguments.normalization == "window":
            # In the order of the ranks: to each its own, or dealt out.
            windows = state["windows"]
            shares = {name: torch.stack([own[name] for own in windows]) for name in windows[0]}
            load_window_state_dict(self._model, shares)

    def _windows(self) -> dict[str, Tensor]:
        """Empty now, but under policy "window" they know the windows before."""
        return window_state_dict(self._model) if self._arguments.normalization == "window" else {}

    def _rng_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def _set_rng_state(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self._device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self._device)


def _count(loss: Tensor, logits: Tensor, classes: Tensor) -> Sums:
    correct = (logits.detach().argmax(1) == classes).sum()
    return Sums(loss.item(), correct.item(), float(len(classes)))
