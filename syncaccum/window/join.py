"""join: DistributedDataParallel on ranks with unequal numbers of micro-batches, which all take part in all commits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

from syncaccum.errors import CommitError
from syncaccum.layer import surroundings
from syncaccum.ranks.connect import connect
from syncaccum.ranks.groups import resolve_group
from syncaccum.torch_private import set_join_settings
from syncaccum.window.commit import OnNonFinite, commit_layers
from syncaccum.window.layers import tracking_layers

# What a rank with inputs will do, as two numbers to sum:
# does it commit, and does that discard NaN and Inf?
_FORWARD, _COMMIT, _DISCARDING_COMMIT = (0.0, 0.0), (1.0, 0.0), (1.0, 1.0)


@contextmanager
def join(ddp: DistributedDataParallel) -> Iterator[None]:
    """Use instead of ``ddp.join()`` where ranks have unequal numbers of micro-batches.

    A rank whose inputs are used up stays at the end of the block until all ranks are there. Meanwhile it takes part
    in what the others do: in DDP's reductions with zero gradients, as under ``ddp.join()``, and in every commit with
    what is left in its window. So each commit's statistics are those of the global batch of that step, whoever still
    had data, and equal on every rank. In the end all ranks have the parameters of those that ran longest.

    While a rank has inputs, it must commit after as many micro-batches as the others. Gradients of a window that it
    could not finish are lost, as under ``ddp.join()``; its statistics go into the next commit. DDP divides the sum of
    gradients by the number of all ranks, also of those that wait. Not with ``lockstep``, which takes empty
    micro-batches instead.

    Collective: every rank of the wrapper's group enters and leaves the block. Each forward of the wrapper and each
    commit inside costs two all-reduces of one number more, which tell the waiting ranks what comes.

    Args:
        ddp: the wrapper itself, around a model with SyncAccumBatchNorm layers.

    Raises:
        TypeError: it is not a DistributedDataParallel.
        RuntimeError: this process is in a join already.
        NoLayersError: the model has no SyncAccumBatchNorm that tracks statistics.
        CommitError: some ranks commit while others go on with their window; a commit of something else than this
            model; what a commit raises, on all ranks alike, also on those that wait.

    Example::

        >>> ddp = DistributedDataParallel(syncaccum.convert_sync_accum(model))
        >>> handle = syncaccum.commit_on_step(ddp, optimizer)
        >>> with join(ddp):
        ...     for x, y in micro_batches:  # more on some ranks than on others
        ...         loss_fn(ddp(x), y).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(f"join takes a DistributedDataParallel, got {type(ddp).__name__}")
    # A rank cannot wait for two joins at once.
    if surroundings.open_join() is not None:
        raise RuntimeError("join inside join: this process can be in one at a time")
    joinable = _Joinable(ddp)
    context = Join([joinable])
    # DDP shall act as in its own join, but for one thing.
    # It would announce forwards by itself, and know nothing of commits.
    # Not the first joinable, it leaves that to us.
    set_join_settings(ddp, enable=True, throw_on_early_termination=False, is_first_joinable=False)
    handle = ddp.register_forward_pre_hook(lambda *_: joinable.announce(_FORWARD))
    try:
        with surroundings.joining(joinable):
            yield
            with warnings.catch_warnings(), context:
                # Leaving it waits for the others. torch then sets a
                # filter of warnings, which must not stay.
                pass
    finally:
        handle.remove()
        set_join_settings(ddp, enable=False)


class _Joinable(Joinable):
    """What torch's Join runs. One iteration is a forward with its backward, or a commit.

    Ranks with inputs announce each iteration. Ranks without inputs wait for that, and then do their part of it.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        super().__init__()
        self.model = ddp
        self._layers: list[nn.Module] = [layer for _, layer in tracking_layers(ddp)]
        self._transport = connect(resolve_group(self.join_process_group), call="join")
        self._waiting = False

    def join_hook(self, **_: Any) -> JoinHook:
        forward = self.model.join_hook(divide_by_initial_world_size=True)  # type: ignore[no-untyped-call]
        # DDP's hook does the forward's part; ours chooses.
        return _Hook(self, forward)

    @property
    def join_device(self) -> torch.device:
        device: torch.device = self.model.join_device
        return device

    @property
    def join_process_group(self) -> Any:
        return self.model.join_process_group

    def announce_commit(self, layers: Sequence[nn.Module], *, discards: bool) -> None:
        # A waiting rank commits because others have announced it.
        if self._waiting:
            return
        # Waiting ranks can only commit the model that they know.
        if list(layers) != self._layers:
            raise CommitError("inside join only its model can be committed, as a whole: commit(ddp)")
        self.announce(_DISCARDING_COMMIT if discards else _COMMIT)

    def announce(self, kind: tuple[float, float]) -> None:
        """Say on a rank that has inputs what it is about to do. Collective, with those that wait."""
        # torch's all-reduce tells the waiting ranks that something comes,
        # and our own then says what.
        work = Join.notify_join_context(self)
        assert work is not None  # it is the first and only joinable
        work.wait()
        self._exchange(kind, present=1.0)

    def shadow(self, forward: JoinHook) -> None:
        """Do on a rank that waits what the others have announced. Collective."""
        self._waiting = True
        # Adds zeros: what the others do decides.
        kind = self._exchange(_FORWARD, present=0.0)
        if kind == _FORWARD:
            forward.main_hook()
            return
        on_nonfinite: OnNonFinite = "discard" if kind == _DISCARDING_COMMIT else "raise"
        commit_layers(tracking_layers(self.model), on_nonfinite=on_nonfinite)

    def _exchange(self, kind: tuple[float, float], *, present: float) -> tuple[float, float]:
        """What all ranks with inputs are about to do; raises on every rank if they are at odds."""
        device = self._transport.choose_device(self.join_device)
        message = torch.tensor([*kind, present], dtype=torch.float64, device=device)
        self._transport.all_reduce(message)
        commits, discards, ranks = message.tolist()
        # All ranks judge the same sums, and raise together.
        if commits not in (0.0, ranks):
            raise CommitError(
                f"{commits:.0f} of {ranks:.0f} ranks that still have inputs commit and the others go on with their "
                "window: inside join every rank must commit after as many micro-batches as the others"
            )
        if not commits:
            return _FORWARD
        return _DISCARDING_COMMIT if discards else _COMMIT


class _Hook(JoinHook):
    def __init__(self, joinable: _Joinable, forward: JoinHook) -> None:
        self._joinable = joinable
        self._forward = forward

    def main_hook(self) -> None:
        self._joinable.shadow(self._forward)

    def post_hook(self, is_last_joiner: bool) -> None:
        self._forward.post_hook(is_last_joiner)
