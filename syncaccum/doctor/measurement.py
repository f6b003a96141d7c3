"""What only the group itself can show: clocks, a commit, all-reduces, and the layers of the user's model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from syncaccum.doctor.all_reduce import AllReduce, time_all_reduces
from syncaccum.doctor.clock import Skew, measure_skew
from syncaccum.doctor.known_answer import measure_commit_error
from syncaccum.doctor.layers import Layers, compare_layers
from syncaccum.doctor.placement import Placement
from syncaccum.integrations import mpi
from syncaccum.transport import Group, resolve_group, transport_over


@dataclass(frozen=True)
class Measurement:
    """By one rank. ``commit_errors`` and ``all_reduces`` are by transport: gloo or nccl, and mpi."""

    error: str = ""
    """Why there is no more than this: the group broke."""
    skew: Skew = field(default_factory=Skew)
    commit_errors: dict[str, float] = field(default_factory=dict)
    all_reduces: dict[str, list[AllReduce]] = field(default_factory=dict)
    layers: Layers | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Measurement:
        return cls(
            fields["error"],
            Skew(**fields["skew"]),
            fields["commit_errors"],
            {name: [AllReduce(**one) for one in several] for name, several in fields["all_reduces"].items()},
            Layers(**fields["layers"]) if fields["layers"] else None,
        )


def measure(placement: Placement, device: torch.device, timeout: float, factory: str | None) -> Measurement:
    """Collective over the default process group, if there is one, and over MPI's world where MPI started the ranks.

    Args:
        placement: of this rank.
        device: of this rank's layers and messages.
        timeout: of a commit, in seconds.
        factory: of the user's model, or None.

    Raises:
        RuntimeError: a peer is gone or hangs; CommitError is one.
    """
    groups: dict[str, Group] = {name_transport(placement, device): None}
    if placement.launcher == "mpi":
        groups["mpi"] = mpi.world()
    rank, size = placement.rank, placement.size
    return Measurement(
        skew=measure_skew() if dist.is_initialized() else Skew(),
        commit_errors={
            name: measure_commit_error(group, rank, size, device, timeout) for name, group in groups.items()
        },
        all_reduces={
            name: time_all_reduces(transport_over(resolve_group(group)), device)
            for name, group in groups.items()
            if size > 1
        },
        layers=compare_layers(factory, resolve_group(None)) if factory else None,
    )


def name_transport(placement: Placement, device: torch.device) -> str:
    if placement.launcher == "alone":
        return "one process"
    return "nccl" if device.type == "cuda" else "gloo"
