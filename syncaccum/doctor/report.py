"""The doctor's report: a table for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from syncaccum.doctor.facts import Facts
from syncaccum.doctor.findings import Finding, name_ranks, sort_findings
from syncaccum.doctor.known_answer import TOLERANCE
from syncaccum.doctor.measurement import Measurement


@dataclass
class Report:
    """What is known so far. ``timeout`` is the doctor's, ``default_timeout`` torch's for a job's group; in seconds."""

    timeout: float
    default_timeout: float
    transport: str = ""
    """gloo or nccl; empty where no group was formed."""
    ranks: list[Facts] = field(default_factory=list)
    measurements: dict[int, Measurement] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, findings: Iterable[Finding]) -> None:
        self.findings = sort_findings([*self.findings, *findings])

    @property
    def is_healthy(self) -> bool:
        return all(finding.severity != "problem" for finding in self.findings)


def render_json(report: Report) -> str:
    """One object; sizes in bytes, times in seconds, bandwidths in bytes per second."""
    by_rank = []
    for facts in report.ranks:
        fields: dict[str, Any] = {**facts.to_json(), "backend": report.transport}
        del fields["findings"]  # they are among the report's
        if (measured := report.measurements.get(facts.rank)) is not None:
            fields["clock_offset"], fields["clock_bound"] = measured.skew.offset, measured.skew.bound
            fields["commit_errors"] = measured.commit_errors
        by_rank.append(fields)
    measured_by_rank_0 = report.measurements.get(0, Measurement())
    layers = measured_by_rank_0.layers
    return json.dumps(
        {
            "healthy": report.is_healthy,
            "timeout": report.timeout,
            "default_timeout": report.default_timeout,
            "ranks": by_rank,
            "commit_tolerance": TOLERANCE,
            "all_reduces": {
                transport: [
                    {**dataclasses.asdict(one), "bandwidth": one.bandwidth, "bus_bandwidth": one.bus_bandwidth}
                    for one in several
                ]
                for transport, several in measured_by_rank_0.all_reduces.items()
            },
            "layers": None if layers is None else dataclasses.asdict(layers),
            "findings": [dataclasses.asdict(finding) for finding in report.findings],
        },
        indent=1,
        allow_nan=False,
    )


def render_text(report: Report) -> str:
    """Tables of the ranks and of the all-reduces, then the findings with their remedies."""
    parts = [_render_title(report)]
    if report.ranks:
        parts.append(_render_ranks(report))
    if report.measurements:
        parts += [_render_commits(report), _render_all_reduces(report), _render_layers(report)]
    parts.append(_render_findings(report))
    return "\n\n".join(part for part in parts if part)


def _render_title(report: Report) -> str:
    title = "syncaccum doctor"
    if report.ranks:
        nodes = len({facts.network for facts in report.ranks})
        title += f": {len(report.ranks)} of {report.ranks[0].size} rank(s), on {nodes} node(s)"
    if report.transport:
        title += f", {report.transport}"
    return (
        f"{title}\ntimeout {report.timeout:g} s here; torch's default for a job's group is "
        f"{report.default_timeout:g} s, for which a rank that hangs holds up the others"
    )


def _render_ranks(report: Report) -> str:
    on_gpus = report.transport == "nccl"
    rows = [
        {
            "rank": str(facts.rank),
            "host": facts.host,
            "address": facts.address,
            "interface": facts.interface,
            "device": f"cuda:{facts.local_rank} {facts.gpu}" if on_gpus else "cpu",
            "python": facts.python,
            "torch": facts.torch,
            "cuda": facts.cuda,
            "nccl": facts.nccl,
            "mpi": facts.mpi,
            "syncaccum": facts.syncaccum,
            "clock from rank 0's": _render_skew(facts, report.measurements.get(facts.rank)),
        }
        for facts in report.ranks
    ]
    return _align([list(rows[0]), *(list(row.values()) for row in rows)])


def _render_skew(facts: Facts, measured: Measurement | None) -> str:
    if measured is None or facts.rank == 0:
        return ""
    return f"{measured.skew.offset * 1e3:+.3f} ms ± {measured.skew.bound * 1e3:.3f} ms"


def _render_commits(report: Report) -> str:
    errors: dict[str, float] = {}
    for measured in report.measurements.values():
        for transport, error in measured.commit_errors.items():
            errors[transport] = max(error, errors.get(transport, 0.0))
    return "\n".join(
        f"commit over {transport}: {'as' if error <= TOLERANCE else 'NOT as'} nn.BatchNorm on the global batch, "
        f"relative error {error:.1e}, limit {TOLERANCE:g}"
        for transport, error in errors.items()
    )


def _render_all_reduces(report: Report) -> str:
    by_transport = report.measurements.get(0, Measurement()).all_reduces
    rows = [
        [
            transport,
            one.what,
            f"{one.bytes:,}",
            f"{one.seconds * 1e3:.3f}",
            f"{one.bandwidth / 1e9:.3g}",
            f"{one.bus_bandwidth / 1e9:.3g}",
        ]
        for transport, several in by_transport.items()
        for one in several
    ]
    return _align([["all-reduce", "of", "bytes", "ms", "GB/s", "bus GB/s"], *rows]) if rows else ""


def _render_layers(report: Report) -> str:
    layers = report.measurements.get(0, Measurement()).layers
    if layers is None or layers.own_error or layers.mismatch:
        return ""
    return f"model: {layers.count} layers with {layers.channels:,} channels, the same on all ranks"


def _render_findings(report: Report) -> str:
    if not report.findings:
        return "no problem found"
    lines = []
    for finding in report.findings:
        where = f" ({name_ranks(finding.ranks)})" if finding.ranks else ""
        lines.append(f"{finding.severity.upper()}{where}: {finding.what}\n    remedy: {finding.remedy}")
    if report.is_healthy:
        lines.append("no problem found")
    return "\n".join(lines)


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side; one that is empty below its heading is left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    )
    return "\n".join(lines)
