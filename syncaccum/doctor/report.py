"""The doctor's report: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch.distributed as dist

from syncaccum.doctor.findings import Finding, name_ranks, sort_findings
from syncaccum.doctor.measurement import TOLERANCE
from syncaccum.doctor.rank import Rank

_COLUMNS = ("rank", "host", "address", "interface", "gpu", "python", "torch", "cuda", "nccl", "mpi", "syncaccum")


@dataclass
class Report:
    """What is known so far. ``timeout`` is in seconds; ``backend`` is empty without a group."""

    timeout: float
    backend: str = ""
    ranks: dict[int, Rank] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, findings: Iterable[Finding]) -> None:
        self.findings = sort_findings([*self.findings, *findings])

    @property
    def is_healthy(self) -> bool:
        return all(finding.severity != "problem" for finding in self.findings)


def render_json(report: Report) -> str:
    """One object; times in seconds. What the ranks found is among the report's findings."""
    ranks = [{**asdict(rank), "backend": report.backend} for rank in report.ranks.values()]
    whole = {
        "healthy": report.is_healthy,
        "timeout": report.timeout,
        "default_timeout": dist.default_pg_timeout.total_seconds(),
        "ranks": [{name: value for name, value in rank.items() if name != "findings"} for rank in ranks],
        "commit_tolerance": TOLERANCE,
        "layers": next((rank.layers for rank in report.ranks.values() if rank.layers), None),
        "findings": [asdict(finding) for finding in report.findings],
    }
    return json.dumps(whole, indent=1, allow_nan=False)


def render_text(report: Report) -> str:
    """A table of the ranks, what was measured, and the findings with their remedies."""
    ranks, lines = list(report.ranks.values()), ["syncaccum doctor"]
    if ranks:
        nodes = len({rank.network for rank in ranks})
        lines[0] += f": {len(ranks)} of {ranks[0].size} rank(s), on {nodes} node(s), {report.backend}".rstrip(", ")
        lines += _align([_COLUMNS, *([str(getattr(rank, name)) for name in _COLUMNS] for rank in ranks)])
    for transport in dict.fromkeys(name for rank in ranks for name in rank.commit_errors):
        error = max(rank.commit_errors.get(transport, 0.0) for rank in ranks)
        verdict = f"{'as' if error <= TOLERANCE else 'NOT as'} nn.BatchNorm on the global batch"
        lines.append(f"commit over {transport}: {verdict}, relative error {error:.1e}, limit {TOLERANCE:g}")
    for finding in report.findings:
        where = f" ({name_ranks(finding.ranks)})" if finding.ranks else ""
        lines.append(f"{finding.severity.upper()}{where}: {finding.what}\n    remedy: {finding.remedy}")
    return "\n".join([*lines, "no problem found"] if report.is_healthy else lines)


def _align(rows: Iterable[Iterable[str]]) -> list[str]:
    """Columns side by side; one that is empty below its heading is left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]
