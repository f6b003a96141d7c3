"""The doctor's report: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from syncaccum.doctor.measurement import TOLERANCE
from syncaccum.doctor.rank import Finding, Rank, name_ranks, sort_findings

_COLUMNS = "rank", "host", "address", "interface", "gpus", "python", "torch", "cuda", "nccl", "mpi", "syncaccum", "cpu"


@dataclass
class Report:
    """What is known so far. ``timeout`` is in seconds; ``backend`` is empty without a group."""

    timeout: float
    as_json: bool = False
    backend: str = ""
    ranks: dict[int, Rank] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, findings: Iterable[Finding]) -> None:
        self.findings = sort_findings([*self.findings, *findings])

    @property
    def is_healthy(self) -> bool:
        return all(finding.severity != "problem" for finding in self.findings)

    def render(self) -> str:
        """As one JSON object, times in seconds, or as text."""
        if not self.as_json:
            return self.render_text()
        whole = {
            "healthy": self.is_healthy,
            "timeout": self.timeout,
            "ranks": [{**asdict(rank), "backend": self.backend} for rank in self.ranks.values()],
            "commit_tolerance": TOLERANCE,
            "layers": next((rank.layers for rank in self.ranks.values() if rank.layers), None),
            "findings": [asdict(finding) for finding in self.findings],
        }
        return json.dumps(whole, indent=1, allow_nan=False)

    def render_text(self) -> str:
        """A table of the ranks, what was measured, and the findings with their remedies."""
        ranks, lines = list(self.ranks.values()), ["syncaccum doctor"]
        if ranks:
            nodes = len({rank.network for rank in ranks})
            lines[0] += f": {len(ranks)} of {ranks[0].size} rank(s), on {nodes} node(s), {self.backend}".rstrip(", ")
            rows = [_COLUMNS, *([str(getattr(rank, name)) for name in _COLUMNS] for rank in ranks)]
            columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
            padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
            lines += ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]
        for transport in dict.fromkeys(name for rank in ranks for name in rank.commit_errors):
            error = max(rank.commit_errors.get(transport, 0.0) for rank in ranks)
            verdict = f"{'as' if error <= TOLERANCE else 'NOT as'} nn.BatchNorm on the global batch"
            lines.append(f"commit over {transport}: {verdict}, relative error {error:.1e}, limit {TOLERANCE:g}")
        for finding in self.findings:
            where = f" ({name_ranks(finding.ranks)})" if finding.ranks else ""
            lines.append(f"{finding.severity.upper()}{where}: {finding.what}\n    remedy: {finding.remedy}")
        return "\n".join([*lines, "no problem found"] if self.is_healthy else lines)
