"""What ranks tell rank 0, as JSON: who they are, what they measured, what they found and its remedy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, is_dataclass, replace
from itertools import groupby
from typing import Any, Literal, get_args, get_origin, get_type_hints

Severity = Literal["problem", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing to know about a job. Only a problem makes the doctor exit non-zero. No ranks: it is the whole job's."""

    severity: Severity
    what: str
    remedy: str
    ranks: tuple[int, ...] = ()


class ProblemError(Exception):
    """A problem after which this rank cannot go on: ``args`` are what it is, and the remedy."""


@dataclass
class Rank:
    """Ranks that share loopback have one ``network``; gloo will listen on ``address``; one of a node ``speaks``."""

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
    python: str = ""
    torch: str = ""
    syncaccum: str = ""
    cuda: str = ""
    nccl: str = ""
    mpi: str = ""
    cpu: str = ""
    commit_errors: dict[str, float] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, what: str, remedy: str, severity: Severity = "problem") -> None:
        self.findings.append(Finding(severity, what, remedy, (self.rank,)))


def read_rank(number: int, note: bytes) -> Rank:
    """ValueError, or RecursionError, where the note is not that rank's: others may write to the same store."""
    rank: Rank = _read(Rank, json.loads(note))
    if rank.rank != number:
        raise ValueError(f"it is of rank {rank.rank}")
    return rank


def _read(hint: Any, value: Any) -> Any:
    """The value, if all its parts are as the type says."""
    parts, kind = get_args(hint), get_origin(hint)
    if isinstance(hint, type) and is_dataclass(hint):
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


def name_ranks(ranks: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 0, 2-5``: short also for thousands."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(sorted(ranks)), lambda pair: pair[1] - pair[0])]
    named = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank {named}" if named.isdecimal() else f"ranks {named}"


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Worst first; findings that differ only in their ranks become one."""
    ranks: dict[Finding, set[int]] = {}
    for finding in findings:
        ranks.setdefault(replace(finding, ranks=()), set()).update(finding.ranks)
    merged = [replace(finding, ranks=tuple(sorted(of))) for finding, of in ranks.items()]
    return sorted(merged, key=lambda finding: get_args(Severity).index(finding.severity))
