"""Whole windows in Lightning: lockstep or lookahead in the place of a strategy's training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from syncaccum.exact.lockstep import lockstep
from syncaccum.exact.lookahead import lookahead


class WholeWindows:
    """Splits each batch of a trainer into micro-batches. ``remove()`` ends it.

    It takes the place of the strategy's ``training_step``, and not of the model's: the strategy calls the latter
    inside DistributedDataParallel's forward, where no lookahead can be.
    """

    def __init__(self, trainer: Any, mode: str, micro_batch: int) -> None:
        self._trainer = trainer
        self._micro_batch = micro_batch
        self._strategy = strategy = trainer.strategy
        self._step, self._backward = strategy.training_step, strategy.backward
        self._ahead: Iterator[Tensor] = iter(())
        self._run_walked = self._run_exact if mode == "exact" else self._look_ahead
        strategy.training_step = self._run
        strategy.backward = self._walk

    def remove(self) -> None:
        """Give the strategy back its own step."""
        vars(self._strategy).pop("training_step", None)
        vars(self._strategy).pop("backward", None)
        self._ahead = iter(())

    def _run(self, batch: Any, *args: Any) -> Any:
        # Averaged weights get their statistics in an epoch without backwards.
        # That is one window, and Lightning says so by accumulate_grad_batches.
        if self._trainer.fit_loop._skip_backward:
            with torch.no_grad():
                return self._run_exact(batch, *args)
        self._refuse_parts()
        return self._run_walked(batch, *args)

    def _run_exact(self, batch: Any, *args: Any) -> Any:
        parts = self._split(batch)
        results = lockstep(self._strategy.model, lambda part: self._step(part[0], *args), parts)
        return _put_together(results, _weigh(results, parts))

    def _look_ahead(self, batch: Any, *args: Any) -> Any:
        parts = self._split(batch)
        results: list[Any] = []

        def forward(part: tuple[Any, float]) -> Tensor:
            result = self._step(part[0], *args)
            # The first pass knows all losses, the second begins with one.
            if not torch.is_grad_enabled():
                results.append(result)
            return _loss(result) * part[1]

        # Lightning empties the gradients between the step and its backward.
        # So no backward may have run yet, when this returns.
        self._ahead = lookahead(self._strategy.model, forward, parts)
        first = next(self._ahead)
        return _put_together(results, first + (_weigh(results, parts) - first).detach())

    def _walk(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._backward(loss, *args, **kwargs)
        for later in self._ahead:
            self._backward(later, *args, **kwargs)

    def _refuse_parts(self) -> None:
        # Asked in each step: a callback may change the first, and a model the second.
        if self._trainer.accumulate_grad_batches != 1 or not self._trainer.lightning_module.automatic_optimization:
            raise ValueError(
                "the modes 'exact' and 'lookahead' of SyncAccumCallback take a batch of the loader for the whole "
                "window, and optimize automatically: leave accumulate_grad_batches at 1, with a larger batch_size; "
                "or, in manual optimization, call syncaccum.lockstep or lookahead in training_step"
            )

    def _split(self, batch: Any) -> list[tuple[Any, float]]:
        """Micro-batches, and the share of each in the batch."""
        sizes: list[int] = []
        apply_to_collection(batch, Tensor, lambda tensor: sizes.append(len(tensor)))
        if len(set(sizes)) != 1:
            raise ValueError(
                f"a batch cannot be cut into micro-batches: its tensors have {sizes or 'no'} examples. All must have "
                "the same, in their first dimension"
            )
        whole, most = sizes[0], self._micro_batch
        return [
            (apply_to_collection(batch, Tensor, lambda tensor, i=i: tensor[i : i + most]), min(most, whole - i) / whole)
            for i in range(0, whole, most)
        ]


def _weigh(results: Sequence[Any], parts: Sequence[tuple[Any, float]]) -> Tensor:
    """The loss of the whole window, from the means of its micro-batches."""
    return torch.stack([_loss(result) * share for result, (_, share) in zip(results, parts, strict=True)]).sum()


def _loss(result: Any) -> Tensor:
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"training_step returned {type(loss).__name__} for a micro-batch, in the place of a loss: a window that is "
            "run as one cannot leave a part of itself out"
        )
    return loss


def _put_together(results: Sequence[Any], loss: Tensor) -> Any:
    """What training_step would have returned: the loss, and all else as lists, by micro-batch."""
    if not isinstance(results[0], Mapping):
        return loss
    return {**{key: [result[key] for result in results] for key in results[0]}, "loss": loss}
