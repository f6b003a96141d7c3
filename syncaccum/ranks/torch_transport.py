"""Collectives over a torch process group: gloo, NCCL and others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

# DDP imports this module late, when a group exists.
# The module's functions have the default group as a default argument,
# and a default argument is kept for good.
# destroy_process_group() then no longer ends gloo's threads.
# One of them may abort the process while Python exits.
# Imported here, mostly before any group exists, it keeps none.
import torch.distributed.nn.functional
from torch import Tensor

from syncaccum.ranks.transport import SHORTEST, count_down, lost_peer

_NOBODYS_TAG = 2**30 + 1
"""A tag that no message has: torch counts its own up from 0, and so do users."""


class TorchTransport:
    """Sums over a ProcessGroup, on the device of the data where the group can."""

    def __init__(self, group: dist.ProcessGroup, timeout: float | None, call: str) -> None:
        self._group = group
        self._remaining = count_down(timeout)
        self.call = call
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def choose_device(self, device: torch.device) -> torch.device:
        reachable = self._list_backends()
        # gloo reaches both kinds of memory, NCCL only that of GPUs.
        if device.type in reachable:
            return device
        return torch.device("cpu" if "cpu" in reachable else next(iter(reachable)))

    def _list_backends(self) -> dict[str, str]:
        """By kind of device; torch says "cpu:gloo,cuda:nccl"."""
        return dict(pair.split(":") for pair in dist.get_backend_config(self._group).split(","))

    def all_reduce(self, flat: Tensor) -> None:
        self.start_all_reduce(flat)()

    def start_all_reduce(self, flat: Tensor) -> Callable[[], None]:
        with self._hanging_up(flat):
            if self._remaining is None:
                work = dist.all_reduce(flat, group=self._group, async_op=True)
            else:
                # The operation gets the limit, not the wait for it.
                # After a short wait, late peers would still get the sum.
                options = dist.AllreduceOptions()
                options.timeout = timedelta(seconds=self._remaining())
                work = self._group.allreduce([flat], options)

        def wait() -> None:
            with self._hanging_up(flat):
                work.wait()

        return wait

    @contextmanager
    def _hanging_up(self, flat: Tensor) -> Iterator[None]:
        """Make a failure ours, and let peers learn of it: they may wait for this rank, not for the lost one."""
        try:
            yield
        except RuntimeError as error:
            self._hang_up(flat.device.type)
            raise lost_peer(self) from error

    def _hang_up(self, device_type: str) -> None:
        """Close gloo's connections, so that peers that wait for this rank learn of the failure, too.

        When a peer goes, gloo closes the connection to that peer only. When an operation times out, gloo closes all of
        them. It has no call for that: torch's ``abort()`` does nothing with gloo. So an operation times out on purpose.
        """
        if self._list_backends().get(device_type) != "gloo":
            return
        with suppress(RuntimeError):  # which is the time-out
            nothing = torch.zeros(1, device=device_type)
            self._group.recv_anysource([nothing], _NOBODYS_TAG).wait(timedelta(seconds=SHORTEST))
