"""What the doctor finds: how bad it is, on which ranks, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

Severity = Literal["problem", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing to know about a job. A problem makes the doctor exit non-zero; a warning or a note does not.

    ``ranks`` are those that have it; none where it is the job's as a whole.
    """

    severity: Severity
    what: str
    remedy: str
    ranks: tuple[int, ...] = ()


class ProblemError(Exception):
    """A problem after which this rank cannot go on."""

    def __init__(self, what: str, remedy: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(what)
        self.finding = Finding("problem", what, remedy, ranks)


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Worst first; findings that differ only in their ranks become one."""
    ranks: dict[Finding, set[int]] = {}
    for finding in findings:
        ranks.setdefault(replace(finding, ranks=()), set()).update(finding.ranks)
    merged = [replace(finding, ranks=tuple(sorted(of))) for finding, of in ranks.items()]
    return sorted(merged, key=lambda finding: get_args(Severity).index(finding.severity))


def name_ranks(ranks: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 0, 2-5``: short also for thousands."""
    runs: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], rank
        else:
            runs.append((rank, rank))
    several = len(runs) != 1 or runs[0][0] != runs[0][1]
    parts = (str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if several else ''} {', '.join(parts)}"
