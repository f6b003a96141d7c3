"""SyncAccumBatchNorm: a BatchNorm that accumulates each micro-batch and normalises it under a policy."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncaccum import meeting, uneven
from syncaccum.moments import Moments
from syncaccum.normalization import POLICIES, Batch, Policy, Renorm, Running
from syncaccum.passes import normalize
from syncaccum.transport import Group, GroupHandle

# Micro-batches without a commit after which a model has surely forgotten to; windows of hundreds are in use.
_FORGOTTEN_AFTER = 1000


class SyncAccumBatchNorm(_BatchNorm):
    r"""Batch normalization whose running statistics are those of the global batch.

    A training forward adds the micro-batch's sums to this layer's window, locally, and normalises under the
    policy. ``syncaccum.commit(model)`` all-reduces the windows of all layers once and folds them in:

    .. math::
        \text{running\_mean} &\leftarrow (1-f)\,\text{running\_mean} + f\,m \\
        \text{running\_var}  &\leftarrow (1-f)\,\text{running\_var}  + f\,v\,n/(n-1)

    with m, v (population) and n of the *global batch* (every value of the channel in all micro-batches of all
    ranks since the last commit) and f = ``momentum``, or 1/``num_batches_tracked`` where momentum is None: what
    :class:`torch.nn.BatchNorm2d` does with ``torch.cat`` of all of them.

    No forward or backward communicates. In eval mode, or with ``track_running_stats=False``, the layer is a plain
    BatchNorm. A forward that ``torch.utils.checkpoint`` runs again in backward is not counted again.

    Args:
        num_features: C, the size of dimension 1 of the input.
        eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`; momentum in [0, 1].
        process_group: the ranks that make up the global batch: a ProcessGroup; an mpi4py communicator, whose
            reductions are in host memory, and which nobody else should use at the same time (``comm.Dup()``); or
            None for the default group if one is initialised at commit time, else this process alone.
        normalization: what a training forward normalises with; see :mod:`syncaccum.normalization`.

            - ``"renorm"``: the committed statistics, approached from the micro-batch's own; the gradient flows
              through the latter. Trains from scratch, down to one value per channel.
            - ``"batch"``: the micro-batch's own, exactly nn.BatchNorm's training forward.
            - ``"running"``: the committed statistics, held constant; for fine-tuning at small learning rates.
        r_max, d_max, prior_count: of ``"renorm"``: the clips of scale (>= 1) and shift (>= 0), and how many
            observations the committed statistics count for (>= 0).
        device, dtype: of parameters and running statistics.

    Shape:
        - Input: ``(N, C)`` or ``(N, C, *)`` with up to 5 dimensions; N may be 0. float64, float32, bfloat16 or
          float16.
        - Output: as the input, in its dtype and memory format.

    Raises:
        ValueError: at construction for an argument out of range; in forward for an input of another rank, width
            or dtype, or under ``"batch"`` for one value per channel, as nn.BatchNorm.

    Example::

        >>> layer = SyncAccumBatchNorm(64)
        >>> for micro_batch in torch.randn(3, 8, 64, 7, 7):
        ...     output = layer(micro_batch)
        >>> layer.update_stats()
        >>> layer.num_batches_tracked
        tensor(1)
    """

    _made_from: tuple[type[SyncAccumBatchNorm], type[_BatchNorm]] | None = None
    """Of a converted layer's class: what it adds to, and the class the layer came from and goes back to."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Group = None,
        normalization: str = "renorm",
        *,
        r_max: float = 1.5,
        d_max: float = 0.5,
        prior_count: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._adopt(process_group, normalization, r_max, d_max, prior_count)

    def _adopt(
        self,
        process_group: Group,
        normalization: str,
        r_max: float = 1.5,
        d_max: float = 0.5,
        prior_count: float = 1.0,
    ) -> None:
        """Give a BatchNorm's instance what this class adds to one; `_release` takes it away again."""
        _check_arguments(self.momentum, normalization, r_max, d_max, prior_count)
        self._group_handle = GroupHandle(process_group)
        self.normalization = normalization
        self.r_max = r_max
        self.d_max = d_max
        self.prior_count = prior_count
        # Plain attributes, not buffers: DDP overwrites buffers with rank 0's, FSDP and .half() cast them.
        self._window = torch.zeros(1 + 2 * self.num_features, dtype=torch.float64, device=self._stats_device())
        self._open_micro_batches = 0

    def _release(self) -> None:
        for name in (
            "_group_handle", "normalization", "r_max", "d_max", "prior_count", "_window", "_open_micro_batches",
        ):  # fmt: skip
            delattr(self, name)

    @property
    def process_group(self) -> Group:
        """The ranks that make up this layer's global batch; None for the default group."""
        return self._group_handle.group

    @property
    def window(self) -> Moments:
        """A snapshot of the sums of the open window on this rank, float64; not collective."""
        return Moments.unpack(self._window.clone())

    def update_stats(self) -> None:
        """Commit this layer alone. Collective: every rank of its group calls it; see :func:`syncaccum.commit`.

        In a model, ``syncaccum.commit(model)`` sends one message for all layers instead of one for each. Does
        nothing with ``track_running_stats=False``, and where no rank has accumulated anything.
        """
        from syncaccum.commit import commit_layers  # commit knows layers, so a layer asks for it late

        if self.track_running_stats:
            commit_layers([(type(self).__name__, self)])

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; in training, also accumulate. Not collective, outside of ``lockstep``."""
        self._check_input(input)
        if not self._takes_part():
            return super().forward(input)
        return self._accumulate_and_normalize(input, self.weight, self.bias, self.eps)

    def _takes_part(self) -> bool:
        """Whether a forward is ours, or plain nn.BatchNorm's."""
        if self.training and self.track_running_stats:
            return True
        uses_its_batch = self.training or self.running_mean is None
        return uses_its_batch and not torch.compiler.is_compiling() and meeting.current() is not None

    def _accumulate_and_normalize(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            uneven.refuse_ddps_own_join()
        participant = None if compiling else meeting.current()
        if participant is not None:
            return participant.normalize(self, input, weight, bias, eps)
        output, sums = normalize(input, weight, bias, self._choose_policy(input, eps))
        if compiling:
            self._window.add_(sums)  # alone: a Python counter would recompile the graph on every call
        elif not _runs_in_backward():
            self._accumulate(sums)
        return output

    def _accumulate(self, sums: Tensor) -> None:
        self._window.add_(sums)
        self._warn_if_forgotten()

    def _choose_policy(self, input: Tensor, eps: float) -> Policy:
        count = input.numel() // self.num_features
        if self.normalization == "batch" and count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)}; "
                f'normalization="renorm" accepts it, in {self}'
            )
        if self.normalization == "batch" and count > 1:
            return Batch(eps)
        # Straight from the dict, which is where nn.Module's lookup gets to in the end: this runs in every forward.
        mean, variance, batches = (
            cast(Tensor, self._buffers[name]) for name in ("running_mean", "running_var", "num_batches_tracked")
        )
        untrained = None
        if self.normalization == "renorm" and count > 1:
            if batches.is_cpu and not torch.compiler.is_compiling():
                # Known at once, without waiting for a device: no need to carry both cases.
                if batches.item() == 0:
                    return Batch(eps)
            else:
                untrained = batches == 0
        # Copies: a commit between forward and backward must not reach into this forward's gradient.
        mean, variance = mean.to(torch.float64, copy=True), variance.to(torch.float64, copy=True)
        if self.normalization == "renorm" and count > 0:
            return Renorm(eps, mean, variance, untrained, self.prior_count, self.r_max, self.d_max)
        return Running(eps, mean, variance)

    def discard(self) -> None:
        """Drop the open window of this layer. Not collective, but every rank should."""
        self._window.zero_()
        self._count_open_micro_batches(0)

    def _count_open_micro_batches(self, count: int) -> None:
        # Past nn.Module's own, which looks for parameters first: that alone would double a commit's local time.
        object.__setattr__(self, "_open_micro_batches", count)

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if "_window" in self.__dict__:  # not yet while nn.BatchNorm's constructor runs
            self.discard()

    def extra_repr(self) -> str:
        inherited: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{inherited}, normalization={self.normalization!r}"

    def _check_input(self, input: Tensor) -> None:
        self._check_input_dim(input)
        if not input.is_floating_point():
            raise ValueError(f"expected a floating-point input, got {input.dtype}, in {self}")
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels in dimension 1, got input size {tuple(input.shape)}, in {self}"
            )

    def _check_input_dim(self, input: Tensor) -> None:
        if not 2 <= input.dim() <= 5:
            raise ValueError(f"expected 2D to 5D input (got {input.dim()}D input), in {self}")

    def _stats_device(self) -> torch.device | None:
        return None if self.running_mean is None else self.running_mean.device

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # As integers, so that .half() and .to(dtype) leave the sums float64 and every bit as it was.
        bits = self._window.view(torch.int64)
        moved = fn(bits)
        if moved.dtype != torch.int64:  # type(dtype) casts even integers
            self._window = self._window.to(moved.device)
        elif moved.is_meta:
            self._window = moved.view(torch.float64)
        elif bits.is_meta or not torch.equal(moved.cpu(), bits.cpu()):  # to_empty() gives memory as it lay
            self._window = torch.zeros_like(self._window, device=moved.device)
        else:
            self._window = moved.view(torch.float64)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._made_from is None:
            return super().__reduce_ex__(protocol)
        # Classes made by conversion have no importable name: a pickle says what they were made from.
        from syncaccum.convert import make_instance

        return make_instance, self._made_from, self.__dict__

    def _warn_if_forgotten(self) -> None:
        global _last_warned
        self._count_open_micro_batches(self._open_micro_batches + 1)
        if self._open_micro_batches != _FORGOTTEN_AFTER:
            return
        # All layers of a model get here in the same forward; the first one speaks for them.
        speaker = _last_warned()
        if speaker is not None and speaker._open_micro_batches == _FORGOTTEN_AFTER:
            return
        _last_warned = weakref.ref(self)
        warnings.warn(
            f"{_FORGOTTEN_AFTER} micro-batches were accumulated and never committed, so running statistics stay as "
            "they were: call syncaccum.commit(model) after each optimizer step, or "
            f"syncaccum.commit_on_step(model, optimizer) once. First seen in {self}",
            stacklevel=2,
        )


def _no_layer() -> SyncAccumBatchNorm | None:
    return None


_last_warned: Callable[[], SyncAccumBatchNorm | None] = _no_layer


def _runs_in_backward() -> bool:
    """Whether autograd is running this forward again, as torch.utils.checkpoint makes it do, reentrant or not.

    The one use of a private name of torch; a test fails when its meaning changes.
    """
    return torch._C._current_graph_task_id() != -1


def _check_arguments(
    momentum: float | None, normalization: str, r_max: float, d_max: float, prior_count: float
) -> None:
    if normalization not in POLICIES:
        raise ValueError(f"normalization must be one of {', '.join(map(repr, POLICIES))}, got {normalization!r}")
    # Written so that NaN fails.
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], or None for the cumulative average, got {momentum}")
    if not r_max >= 1:
        raise ValueError(f"r_max must be at least 1, got {r_max}")
    if not d_max >= 0:
        raise ValueError(f"d_max must be at least 0, got {d_max}")
    if not 0 <= prior_count < math.inf:
        raise ValueError(f"prior_count must be finite and at least 0, got {prior_count}")
