"""Running statistics that torch.func.functional_call gives a layer in the place of its own.

They are the caller's, and have no window. A training forward folds its micro-batch into them at once, as nn.BatchNorm
does. The layer's own window and statistics stay as they are.
"""

from __future__ import annotations

from torch import Tensor

from syncaccum.errors import LockstepError
from syncaccum.layer.accumulate import refuse_vmap
from syncaccum.layer.notices import warn_once
from syncaccum.layer.state import Accumulating, name_of
from syncaccum.moments import Moments
from syncaccum.torch_private import (
    buffers_of,
    given_to_functional_call,
    has_no_values,
    outside_transforms,
    runs_in_backward,
    take_out_of_transforms,
)


def has_given_statistics(layer: Accumulating) -> bool:
    """Whether the running statistics that the layer has now are the caller's. Not to be asked in compiled forwards."""
    state, mean = layer._accumulation, buffers_of(layer)["running_mean"]
    if mean is None or mean is state.home or getattr(layer, "_is_replica", False) or has_no_values(mean):
        return False
    if any(mean is tensor for tensor in given_to_functional_call()):
        return True
    # Moved, or assigned.
    state.home = mean
    return False


def refuse_given_statistics(layer: Accumulating) -> None:
    """Raise where micro-batches run together: they have one commit, which is of the layer's own statistics."""
    raise LockstepError(
        f"torch.func.functional_call gives layer {name_of(layer)} other running "
        "statistics: lockstep and lookahead take the model's own. Give functional_call the parameters alone"
    )


def fold_in(layer: Accumulating, sums: Tensor) -> None:
    """Fold a micro-batch's packed moments into the statistics that the layer has now. Not collective.

    Raises:
        ValueError: one value per channel, which has no variance, as nn.BatchNorm.
        RuntimeError: under ``torch.vmap``.
    """
    refuse_vmap(layer, sums)
    if runs_in_backward():
        return
    warn_once(
        layer,
        "given",
        "has running statistics that torch.func.functional_call gave it: each training forward updates them at once, "
        "as nn.BatchNorm's does, and goes into no window. To accumulate, give functional_call the parameters alone",
    )
    with outside_transforms():
        moments = Moments.unpack(take_out_of_transforms(sums))
        # A micro-batch without values has nothing to say.
        if moments.count > 0:
            _fold(layer, moments)


def _fold(layer: Accumulating, moments: Moments) -> None:
    if moments.count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got 1, in {layer}")
    mean, var, batches = (
        None if buffer is None else take_out_of_transforms(buffer)
        for buffer in (buffers_of(layer)[name] for name in ("running_mean", "running_var", "num_batches_tracked"))
    )
    if batches is not None:
        batches.add_(1)
    factor = layer.momentum
    if factor is None:
        # Without a counter it is 0, as in nn.BatchNorm.
        factor = 0.0 if batches is None else 1.0 / int(batches)
    unbiased = moments.variance * (moments.count / (moments.count - 1))
    for statistic, new in ((mean, moments.mean), (var, unbiased)):
        if statistic is not None:
            statistic.lerp_(new.to(statistic), factor)
