"""DistributedDataParallel around a lockstep: K forwards that it must take for one."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from syncaccum.errors import LockstepError
from syncaccum.torch_private import (
    ddp_in_forward,
    prepare_for_backward,
    rebuild_buckets,
    set_ddp_in_forward,
    tensors_in,
)


class Wrappers:
    """The DDP modules in and around what lockstep was given, while it runs.

    DDP broadcasts buffers in the first forward, and gets its reducer ready in the last. Otherwise each forward would
    do both, and ranks with different numbers of micro-batches would wait forever.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        self._count = count
        self._inside = [_Wrapper(module) for module in model.modules() if isinstance(module, DistributedDataParallel)]
        # Lockstep may be called from inside of the wrapper's own forward.
        # DDP keeps one note for the process: maybe another thread's.
        active = ddp_in_forward()
        self._around = active if active is not None and _contains(active, model) else None
        self._active = [self._around] * count  # by micro-batch
        self._running = 0

    def refuse_others(self, layer: nn.Module) -> None:
        """Raise where the forward calls a DDP that lockstep does not know: it would reduce K times."""
        ddp = ddp_in_forward()
        if ddp is None or ddp is self._around or any(ddp is wrapper.ddp for wrapper in self._inside):
            return
        if _contains(ddp, layer):
            raise LockstepError("the forward calls a DistributedDataParallel: pass that as lockstep's model")

    @property
    def reduce_in_backward(self) -> bool:
        """Whether one communicates in the backward of a forward that runs now."""
        return torch.is_grad_enabled() and any(wrapper.ddp.require_backward_grad_sync for wrapper in self._inside)

    def refuse_around(self) -> None:
        """Raise in the forward of a wrapper around the model."""
        if self._around is not None:
            raise LockstepError(
                "lookahead inside the forward of DistributedDataParallel, which sees no backward in there and would "
                "reduce nothing: call lookahead outside, with the wrapper as its model"
            )

    def enter(self) -> None:
        for wrapper in self._inside:
            wrapper.enter()

    def leave(self) -> None:
        for wrapper in self._inside:
            wrapper.leave()
        if self._inside:
            set_ddp_in_forward(self._around)

    def begin_turn(self, index: int) -> None:
        """A micro-batch goes on: DDP is to treat it as its place among the others asks for."""
        if not self._inside:
            return
        # Each micro-batch finds DDP's note as it left it.
        self._active[self._running] = ddp_in_forward()
        set_ddp_in_forward(self._active[index])
        self._running = index
        for wrapper in self._inside:
            wrapper.set_flags(first=index == 0, last=index == self._count - 1)

    def go_alone(self, *, last: bool) -> None:
        """A micro-batch runs on its own, after a first pass in which buffers were broadcast."""
        for wrapper in self._inside:
            wrapper.set_flags(first=False, last=last)

    def prepare_to_go_alone(self) -> None:
        """Collective, while all ranks are at the same point.

        In its first forward after a backward DDP talks about its buckets. A rank with fewer micro-batches comes later.
        """
        if torch.is_grad_enabled():
            for wrapper in self._inside:
                rebuild_buckets(wrapper.ddp)

    def end(self) -> None:
        """All micro-batches came through."""
        for wrapper in self._inside:
            wrapper.prepare_for_all()


def _contains(ddp: DistributedDataParallel, module: nn.Module) -> bool:
    return any(module is one for one in ddp.modules())


class _Wrapper:
    """One DDP, and what its settings were."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.ddp = ddp
        self._flags: tuple[bool, bool] | None = None
        self._hook: RemovableHandle | None = None
        self._outputs: list[Tensor] = []
        self._is_prepared = False

    def enter(self) -> None:
        with _lock:
            if _users.setdefault(self.ddp, self) is not self:
                raise LockstepError(
                    "two locksteps in two threads go through one DistributedDataParallel, which gets ready for one "
                    "backward at a time: begin the second after the backward of the first"
                )
        self._flags = self.ddp.require_forward_param_sync, self.ddp.require_backward_grad_sync
        # DDP then walks the graph behind a forward's outputs.
        if self.ddp.find_unused_parameters and not self.ddp.static_graph:
            self._hook = self.ddp.register_forward_hook(self._keep_outputs)

    def leave(self) -> None:
        if self._flags is not None:
            self.set_flags(first=True, last=True)
        if self._hook is not None:
            self._hook.remove()
        self._outputs = []
        with _lock:
            if _users.get(self.ddp) is self:
                del _users[self.ddp]

    def set_flags(self, *, first: bool, last: bool) -> None:
        assert self._flags is not None
        forward_sync, backward_sync = self._flags
        # Only ever off, never on: no_sync() of the user stays.
        self.ddp.require_forward_param_sync = forward_sync and first
        self.ddp.require_backward_grad_sync = backward_sync and last

    def _keep_outputs(self, ddp: Any, args: Any, output: Any) -> None:
        self._outputs += tensors_in(output)
        self._is_prepared = torch.is_grad_enabled() and self.ddp.require_backward_grad_sync

    def prepare_for_all(self) -> None:
        """Look for unused parameters behind all outputs: DDP has looked behind the last micro-batch's."""
        if self._is_prepared:
            prepare_for_backward(self.ddp, self._outputs)


_lock = threading.Lock()
_users: weakref.WeakKeyDictionary[DistributedDataParallel, _Wrapper] = weakref.WeakKeyDictionary()
"""Which lockstep a DDP serves."""
