"""One rank: what it knows and measured, which it tells rank 0 as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from syncaccum.doctor.findings import Finding, Severity


@dataclass
class Rank:
    """Two ranks have one ``network`` exactly if they share a loopback interface. gloo will listen on ``address``.

    Versions are empty where the part is not there or not in use; commit errors are by transport. Where there is no
    report of all ranks, one rank of each node ``speaks``.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "alone"
    speaks: bool = True
    host: str = ""
    network: str = ""
    address: str = ""
    interface: str = ""
    address_reason: str = ""
    is_loopback: bool = False
    gpus: int = 0
    gpu: str = ""
    python: str = ""
    torch: str = ""
    syncaccum: str = ""
    cuda: str = ""
    nccl: str = ""
    mpi: str = ""
    commit_errors: dict[str, float] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, what: str, remedy: str, severity: Severity = "problem") -> None:
        self.findings.append(Finding(severity, what, remedy, (self.rank,)))


def read_rank(number: int, note: bytes) -> Rank:
    """Raises ValueError where the note is not that rank's: other programs may write to the same store."""
    try:
        rank: Rank = _read(Rank, json.loads(note))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if rank.rank != number:
        raise ValueError(f"it is of rank {rank.rank}")
    return rank


def _read(hint: Any, value: Any) -> Any:
    """The value, if all its parts are as the type says."""
    parts, kind = get_args(hint), get_origin(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        if isinstance(value, dict) and value.keys() == hints.keys():
            return hint(**{name: _read(hints[name], part) for name, part in value.items()})
    elif kind in (list, tuple) and isinstance(value, list):
        return kind(_read(parts[0], part) for part in value)
    elif kind is dict and isinstance(value, dict):
        return {name: _read(parts[1], part) for name, part in value.items()}
    elif value in parts or (type(value) is hint and (hint is not float or math.isfinite(value))):
        return value
    raise ValueError(f"{value!r:.60} is no {getattr(hint, '__name__', hint)}")
