"""What the doctor finds: how bad it is, on which ranks, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, get_args

Severity = Literal["problem", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing to know about a job. Only a problem makes the doctor exit non-zero. No ranks: it is the whole job's."""

    severity: Severity
    what: str
    remedy: str
    ranks: tuple[int, ...] = ()


class ProblemError(Exception):
    """A problem after which this rank cannot go on."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.finding = Finding("problem", what, remedy)


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Worst first; findings that differ only in their ranks become one."""
    ranks: dict[Finding, set[int]] = {}
    for finding in findings:
        ranks.setdefault(replace(finding, ranks=()), set()).update(finding.ranks)
    merged = [replace(finding, ranks=tuple(sorted(of))) for finding, of in ranks.items()]
    return sorted(merged, key=lambda finding: get_args(Severity).index(finding.severity))


def name_ranks(ranks: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 0, 2-5``: short also for thousands."""
    runs = groupby(enumerate(sorted(ranks)), lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(run) for _, run in runs)]
    named = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)
    return f"rank {named}" if named.isdecimal() else f"ranks {named}"
