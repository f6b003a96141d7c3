"""What goes into a model's open windows, and what does not: discard, not_counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from syncaccum.window.layers import tracking_layers
from syncaccum.window.uninterrupted import run_uninterrupted, steps_of_drop


def discard(model: nn.Module) -> None:
    """Drop the open window of every layer; running statistics stay as they are.

    For a window that must not count: after an out-of-memory retry, a skipped batch, a NaN. Not collective, but
    the ranks should agree: each drops its own part of the global batch.

    Raises:
        NoLayersError: the model has no SyncAccumBatchNorm that tracks statistics.
    """
    # All windows or none, also if a signal comes.
    run_uninterrupted(steps_of_drop([layer._accumulation for _, layer in tracking_layers(model)]))


@contextmanager
def not_counted(model: nn.Module) -> Iterator[None]:
    """A context in which training forwards of the model accumulate nothing.

    They normalise and differentiate as ever. For forwards whose data is not a part of the global batch: a second pass
    at perturbed weights (SAM), adversarial or synthetic images, a look at the loss. Not collective. It may be nested,
    and entered in several threads: a forward counts when all have left.

    Raises:
        NoLayersError: the model has no SyncAccumBatchNorm that tracks statistics.

    Example::

        >>> model = syncaccum.convert_sync_accum(model)
        >>> x, y = micro_batches[0]
        >>> loss_fn(model(x), y).backward()
        >>> with not_counted(model):
        ...     loss_fn(model(x + 0.1 * x.abs()), y).backward()
        >>> optimizer.step()
        >>> report = syncaccum.commit(model)  # of x alone
    """
    states = [layer._accumulation for _, layer in tracking_layers(model)]
    for state in states:
        # A count, not a flag: the contexts may be nested.
        state.uncounted += 1
    try:
        yield
    finally:
        for state in states:
            state.uncounted -= 1
