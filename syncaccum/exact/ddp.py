"""DistributedDataParallel around a lockstep: K forwards that it must take for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncaccum.errors import LockstepError
from syncaccum.exact.turns import Turns
from syncaccum.torch_private import ddp_in_forward


class Wrappers:
    """The DDP modules in and around what lockstep was given, while it runs."""

    def __init__(self, model: nn.Module) -> None:
        self._inside = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        # A loop owner may call lockstep from inside the wrapper's own forward.
        self._around = ddp_in_forward()

    def refuse_others(self) -> None:
        """Raise where the forward calls a DDP that lockstep does not know: it would reduce K times."""
        ddp = ddp_in_forward()
        if ddp is not None and ddp is not self._around and ddp not in self._inside:
            raise LockstepError("the forward calls a DistributedDataParallel: pass that as lockstep's model")

    @contextmanager
    def one_forward(self, turns: Turns) -> Iterator[None]:
        """Let DDP broadcast buffers in the first forward, and get its reducer ready in the last.

        Otherwise each forward would do both, and ranks with different numbers of micro-batches would wait forever.
        """
        before = [(ddp.require_forward_param_sync, ddp.require_backward_grad_sync) for ddp in self._inside]

        def set_flags(index: int) -> None:
            for ddp, (forward_sync, backward_sync) in zip(self._inside, before, strict=True):
                ddp.require_forward_param_sync = forward_sync and index == 0
                ddp.require_backward_grad_sync = backward_sync and index == turns.count - 1

        turns.on_turn = set_flags
        try:
            yield
        finally:
            for ddp, (forward_sync, backward_sync) in zip(self._inside, before, strict=True):
                ddp.require_forward_param_sync = forward_sync
                ddp.require_backward_grad_sync = backward_sync
