"""SyncAccumBatchNorm: a BatchNorm that accumulates each micro-batch and normalises it under a policy."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from syncaccum.layer import surroundings
from syncaccum.layer.accumulate import accumulate, is_counted
from syncaccum.layer.given import fold_in, has_given_statistics, refuse_given_statistics
from syncaccum.layer.notices import note_forward, note_uncounted_forward
from syncaccum.layer.passes import normalize
from syncaccum.layer.policies import choose_policy
from syncaccum.layer.repeat import watch_repeats
from syncaccum.layer.settings import DEFAULT_POLICY, Setting, check_momentum
from syncaccum.layer.so_far import normalize_so_far
from syncaccum.layer.state import TRACED_AS, Accumulating, adopt, has_statistics, name_of, tracks
from syncaccum.moments import Moments
from syncaccum.ranks.groups import Group
from syncaccum.window.commit import commit_layers


class SyncAccumBatchNorm(Accumulating):
    r"""Batch normalization whose running statistics are those of the global batch.

    A training forward adds the micro-batch's sums to this layer's window, locally, and normalises under the
    policy. ``syncaccum.commit(model)`` all-reduces the windows of all layers once and folds them in:

    .. math::
        \text{running\_mean} &\leftarrow (1-f)\,\text{running\_mean} + f\,m \\
        \text{running\_var}  &\leftarrow (1-f)\,\text{running\_var}  + f\,v\,n/(n-1)

    with m, v (population) and n of the *global batch* (every value of the channel in all micro-batches of all
    ranks since the last commit) and f = ``momentum``, or 1/``num_batches_tracked`` where momentum is None: what
    :class:`torch.nn.BatchNorm2d` does with ``torch.cat`` of all of them.

    Window sums are float64, whatever the dtype of the data. No forward or backward communicates, those of
    ``syncaccum.lockstep`` aside. In eval mode, or with ``track_running_stats=False``, the layer is a plain BatchNorm.

    Three kinds of training forward go into no window: one that ``torch.utils.checkpoint`` runs again in backward; one
    while ``momentum`` is set to 0, unless the layer had 0 from the start; and one inside ``syncaccum.not_counted``.

    Args:
        num_features: C, the size of dimension 1 of the input.
        eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`; momentum in [0, 1].
        process_group: the ranks that make up the global batch: a ProcessGroup; a DeviceMesh of one dimension, as
            ``mesh["dp"]``; an mpi4py communicator, whose reductions are in host memory, and which nobody else should
            use at the same time (``comm.Dup()``); or None for the default group if one is initialised at commit time,
            else this process alone.
        normalization: what a training forward normalises with.

            - ``"window"`` (default): this window's micro-batches so far, with the windows before counted as 1 to 16
              samples; each micro-batch's backward pays what the window owes so far (balanced feedback). Trains from
              scratch, down to one value per channel.
            - ``"renorm"``: the committed statistics, approached from the micro-batch's own; the gradient flows through
              the latter. Trains from scratch, too; farther from the large batch, and calmer at high learning rates.
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
        RuntimeError: in a training forward under ``torch.vmap``, and in a checkpoint's second forward if what the first
            one used is not known any more.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167); for ``"renorm"`` Ioffe 2017 (arXiv:1702.03275).

    Example::

        >>> layer = SyncAccumBatchNorm(64)
        >>> for micro_batch in torch.randn(3, 8, 64, 7, 7):
        ...     output = layer(micro_batch)
        >>> layer.update_stats()
        >>> layer.num_batches_tracked
        tensor(1)
    """

    _made_from: tuple[type[SyncAccumBatchNorm], type, frozenset[str]] | None = None
    """In a class that conversion made: our base, the class to go back to, and the names left to the layer."""

    normalization = Setting()
    r_max = Setting()
    d_max = Setting()
    prior_count = Setting()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Group = None,
        normalization: str = DEFAULT_POLICY,
        *,
        r_max: float = 1.5,
        d_max: float = 0.5,
        prior_count: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # nn.BatchNorm's constructor takes any number for it.
        check_momentum(momentum)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        adopt(self, process_group, normalization, r_max, d_max, prior_count)
        # torch.fx asks the instance.
        # The class keeps its own module, for pickles.
        self.__dict__["__module__"] = TRACED_AS

    @property
    def process_group(self) -> Group:
        """The ranks that make up this layer's global batch; None for the default group."""
        return self._accumulation.handle.group

    @property
    def window(self) -> Moments:
        """A snapshot of the sums of the open window on this rank, float64; not collective."""
        # A copy: forwards add to the window in place.
        return Moments.unpack(self._accumulation.window.clone())

    @property
    def _window(self) -> Tensor:
        """The packed moments of the open window: the tensor itself, where ``window`` gives a copy."""
        return self._accumulation.window

    def update_stats(self) -> None:
        """Commit this layer alone. Collective: every rank of its group calls it; see :func:`syncaccum.commit`.

        In a model, ``syncaccum.commit(model)`` sends one message for all layers instead of one for each. Does
        nothing without running statistics, and where no rank has accumulated anything.

        Raises:
            CommitError: and its kinds, as :func:`syncaccum.commit`.
        """
        if has_statistics(self):
            commit_layers([(type(self).__name__, self)])

    def discard(self) -> None:
        """Drop the open window of this layer. Not collective, but every rank should."""
        self._accumulation.drop()

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; in training, also accumulate. Not collective, outside of ``lockstep``."""
        _check_input(self, input)
        # nn.BatchNorm's own rules: averages change in training only.
        # Without running statistics, eval uses the batch's, too.
        counts = self.training and tracks(self)
        uses_batch = self.training or self.running_mean is None
        if counts or (uses_batch and is_together(self)):
            return normalize_and_accumulate(self, input, self.weight, self.bias, self.eps, counts=counts)
        # A warning would break a compiled graph in two.
        if not torch.compiler.is_compiling():
            note_uncounted_forward(self)
        # All that is left is what nn.BatchNorm does.
        return super().forward(input)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks of a layer before it compiles its forward."""
        raise RuntimeError(
            f"torch.jit.script cannot compile layer {name_of(self)}, which accumulates in Python: give it a copy "
            "without, revert_sync_accum(copy.deepcopy(model)), or use torch.jit.trace in eval mode"
        )

    def extra_repr(self) -> str:
        inherited: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{inherited}, normalization={self._accumulation.normalization!r}"

    def _check_input_dim(self, input: Tensor) -> None:
        if not 2 <= input.dim() <= 5:
            raise ValueError(f"expected 2D to 5D input (got {input.dim()}D input), in {self}")


def is_together(layer: Accumulating) -> bool:
    """Whether this forward is part of a lockstep or a lookahead: of a window, even without running statistics.

    Never in compiled code: they make compiled models run as they were written.
    """
    return not torch.compiler.is_compiling() and surroundings.participant_for(layer) is not None


def normalize_and_accumulate(
    layer: Accumulating, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, counts: bool
) -> Tensor:
    """A training forward: under the layer's policy, or together with the others of a lockstep.

    Args:
        counts: whether the layer has running statistics to accumulate for. The forward may still be one of those
            that do not count, see `is_counted`.
    """
    counts = counts and is_counted(layer)
    is_given = False
    if not torch.compiler.is_compiling():
        # Not to be traced: these ask the process and the thread.
        surroundings.refuse_ddps_own_join()
        is_given = has_given_statistics(layer)
        if (participant := surroundings.participant_for(layer)) is not None:
            if is_given:
                refuse_given_statistics(layer)
            return participant.normalize(layer, input, weight, bias, eps, counts=counts)
        if not is_given:
            note_forward(layer)
    output, sums = _normalize(layer, input, weight, bias, eps, counts=counts, is_given=is_given)
    # Last: a forward that raises leaves the window as it was.
    if counts:
        (fold_in if is_given else accumulate)(layer, sums)
    return output


def _normalize(
    layer: Accumulating,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    counts: bool,
    is_given: bool,
) -> tuple[Tensor, Tensor]:
    """Normalise under the layer's policy; also the micro-batch's packed moments."""
    # numel / C: how many values each channel has.
    n = input.numel() // layer.num_features
    if n > 0 and layer._accumulation.normalization == "window":
        return normalize_so_far(layer, input, weight, bias, eps, counts=counts, is_given=is_given)
    policy = choose_policy(layer, n, eps)
    if n > 0 and not (is_given or torch.compiler.is_compiling()):
        policy = watch_repeats(layer, policy, input, weight, bias)
    return normalize(input, weight, bias, policy)


def _check_input(layer: SyncAccumBatchNorm, input: Tensor) -> None:
    layer._check_input_dim(input)
    if not input.is_floating_point():
        raise ValueError(f"expected a floating-point input, got {input.dtype}, in {layer}")
    # To torch.jit.trace sizes are tensors, and a comparison is a warning.
    channels: Any = input.shape[1]
    if not isinstance(channels, Tensor) and channels != layer.num_features:
        raise ValueError(
            f"expected {layer.num_features} channels in dimension 1, got input size {tuple(input.shape)}, in {layer}"
        )
