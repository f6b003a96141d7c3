"""How far the clock of each rank is from rank 0's."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

# The quickest of these exchanges counts: what delays a message only widens the bound.
_EXCHANGES = 20


@dataclass(frozen=True)
class Skew:
    """``offset`` seconds ahead of rank 0's clock, true within ``bound`` seconds either way."""

    offset: float = 0.0
    bound: float = 0.0


def measure_skew() -> Skew:
    r"""This rank's, as NTP does. Collective, over the default process group's backend for CPU tensors.

    This rank notes :math:`t_0`, rank 0 on arrival :math:`t_1` and on return :math:`t_2`, this rank :math:`t_3`; then

    .. math:: \theta_0 - \theta = \tfrac{1}{2} \left((t_1 - t_0) + (t_2 - t_3)\right)
              \pm \tfrac{1}{2} \left((t_3 - t_0) - (t_2 - t_1)\right)

    Point-to-point, past the transport, which has only collectives: those let no rank tell when its message arrived,
    so the bound would be the whole time for which the slowest rank made the others wait.

    Source: RFC 5905, section 8.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        for peer in range(1, size):
            for _ in range(_EXCHANGES):
                _answer(peer)
        return Skew()
    return min((_ask() for _ in range(_EXCHANGES)), key=lambda skew: skew.bound)


def _answer(peer: int) -> None:
    times = torch.zeros(2, dtype=torch.int64)
    dist.recv(times, peer)
    times[0] = time.time_ns()
    times[1] = time.time_ns()
    dist.send(times, peer)


def _ask() -> Skew:
    times = torch.zeros(2, dtype=torch.int64)
    left = time.time_ns()
    dist.send(times, 0)
    dist.recv(times, 0)
    back = time.time_ns()
    arrived, returned = times.tolist()
    # In integers: nanoseconds since 1970 do not fit a float64.
    offset = -((arrived - left) + (returned - back)) / 2
    bound = ((back - left) - (returned - arrived)) / 2
    return Skew(offset * 1e-9, bound * 1e-9)
