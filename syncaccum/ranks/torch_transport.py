"""Collectives over a torch process group: gloo, NCCL and others."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

# DDP imports this module. Its functions then keep the default group of that moment as a default argument, for good.
# destroy_process_group() would no longer end gloo's threads, and one may abort the process while Python exits.
# Imported here, before a group exists in most programs, it keeps nothing.
import torch.distributed.nn.functional
from torch import Tensor

from syncaccum.ranks.transport import SHORTEST, count_down, lost_peer

_NOBODYS_TAG = 2**30 + 1
"""Of messages that nobody sends: torch's own count up from 0, and so do users'."""


class TorchTransport:
    """Sums over a ProcessGroup."""

    def __init__(self, group: dist.ProcessGroup, timeout: float | None, call: str) -> None:
        self._group = group
        self._remaining = count_down(timeout)
        self.call = call
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def choose_device(self, device: torch.device) -> torch.device:
        reachable = self._list_backends()
        if device.type in reachable:
            return device
        return torch.device("cpu" if "cpu" in reachable else next(iter(reachable)))

    def _list_backends(self) -> dict[str, str]:
        """By kind of device; torch says "cpu:gloo,cuda:nccl"."""
        return dict(pair.split(":") for pair in dist.get_backend_config(self._group).split(","))

    def all_reduce(self, flat: Tensor) -> None:
        try:
            if self._remaining is None:
                dist.all_reduce(flat, group=self._group)
            else:
                # Not by waiting less long: peers that come late would still apply it.
                options = dist.AllreduceOptions()
                options.timeout = timedelta(seconds=self._remaining())
                self._group.allreduce([flat], options).wait()
        except RuntimeError as error:
            self._hang_up(flat.device.type)
            raise lost_peer(self) from error

    def _hang_up(self, device_type: str) -> None:
        """Close gloo's connections, so that peers that wait for this rank, and not for the lost one, learn of it too.

        gloo closes one connection when a peer closes it, all when something times out, and none when asked: torch's
        ``abort()`` does nothing there. So something times out.
        """
        if self._list_backends().get(device_type) != "gloo":
            return
        with suppress(RuntimeError):  # which is the time-out
            nothing = torch.zeros(1, device=device_type)
            self._group.recv_anysource([nothing], _NOBODYS_TAG).wait(timedelta(seconds=SHORTEST))
