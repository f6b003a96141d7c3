"""What a rank knows about itself before it meets the others."""

from __future__ import annotations

import dataclasses
import platform
import socket
from dataclasses import dataclass
from typing import Any

import torch

import syncaccum
from syncaccum.doctor.findings import Finding
from syncaccum.doctor.network import find_endpoint, identify_network
from syncaccum.doctor.placement import Placement


@dataclass(frozen=True)
class Facts:
    """One rank. Versions are empty where the part is not there or not in use."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    network: str
    """Equal for two ranks exactly if they share a loopback interface."""
    address: str
    """Where gloo will listen, and on which interface, and why there."""
    interface: str
    address_reason: str
    is_loopback: bool
    gpus: int
    gpu: str
    python: str
    torch: str
    syncaccum: str
    cuda: str
    nccl: str
    mpi: str
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Facts:
        findings = (Finding(**{**f, "ranks": tuple(f["ranks"])}) for f in fields["findings"])
        return cls(**{**fields, "findings": tuple(findings)})


def gather_facts(placement: Placement) -> Facts:
    """This rank's. Not collective, and takes as long as the machine's resolver does."""
    endpoint, findings = find_endpoint()
    gpus = torch.cuda.device_count()
    return Facts(
        rank=placement.rank,
        size=placement.size,
        local_rank=placement.local_rank,
        local_size=placement.local_size,
        host=socket.gethostname(),
        network=identify_network(),
        address=endpoint.address,
        interface=endpoint.interface,
        address_reason=endpoint.reason,
        is_loopback=endpoint.is_loopback,
        gpus=gpus,
        gpu=torch.cuda.get_device_name(placement.local_rank) if gpus > placement.local_rank else "",
        python=platform.python_version(),
        torch=torch.__version__,
        syncaccum=syncaccum.__version__,
        cuda=torch.version.cuda or "",
        nccl=".".join(map(str, torch.cuda.nccl.version())) if gpus else "",  # type: ignore[no-untyped-call]
        mpi=_name_mpi_library() if placement.launcher == "mpi" else "",
        findings=tuple(dataclasses.replace(finding, ranks=(placement.rank,)) for finding in findings),
    )


def _name_mpi_library() -> str:
    from mpi4py import MPI

    # Open MPI's goes on after a comma, MPICH's after a line, and pads with tabs.
    return " ".join(MPI.Get_library_version().splitlines()[0].split(",")[0].split())
