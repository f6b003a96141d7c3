"""The tables of the experiment: gaps to the large batch, gradients, memory, and exact beside permuted references."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from benchmarks.equivalence.cases import ANOTHER_WINDOW, POLICIES, REFERENCE, TASKS, Case
from benchmarks.equivalence.gradients import Fidelity
from benchmarks.equivalence.memory import Peak
from benchmarks.equivalence.spread import Spread
from benchmarks.equivalence.summary import Group, Summary, find_summary, list_sizes

_MIB = 2**20
_TITLE_WIDTH = 150  # a table's title may be longer than its rows


def build_gap_table(summaries: Sequence[Summary], setting: Group) -> Table:
    """A row for each policy, a column for each micro-batch."""
    task, sizes = TASKS[setting.task], list_sizes(summaries, setting)
    origin = "settings chosen on it" if task.chosen_on else "held out"
    table = Table(
        title=f"{setting.task} ({origin}), lr {setting.lr:g}, window {setting.window}, {setting.steps} steps, "
        f"{setting.ranks} rank(s){_describe_rest(setting)}: gap to the large batch in {_name_unit(setting.task)} "
        "+- standard error [spread over seeds; seeds] ms per step",
        title_justify="left",
        min_width=_TITLE_WIDTH,
    )
    table.add_column("policy")
    for size in sizes:
        table.add_column(f"micro-batch {size}", justify="right")
    whole = find_summary(summaries, setting, REFERENCE, setting.window)
    table.add_row("large batch", *[describe_mean(whole)] * len(sizes))
    for policy in POLICIES:
        found = [find_summary(summaries, setting, policy, size) for size in sizes]
        if any(found):
            table.add_row(policy, *map(describe_gap, found))
    return table


def _describe_rest(setting: Group) -> str:
    return f", each epoch's last window {setting.rest}" if setting.rest else ""


def _name_unit(task: str) -> str:
    return "points" if TASKS[task].unit == "%" else TASKS[task].unit


def describe_gap(summary: Summary | None) -> str:
    """``-0.31 +- 0.12 [0.30; 5] 21``."""
    if summary is None:
        return ""
    error = "" if summary.gap_error is None else f" +- {summary.gap_error:.2f}"
    gap = "failed" if summary.gap is None else f"{summary.gap:+.2f}{error}"
    lost = f" {summary.failed} failed" if summary.failed else ""
    return f"{gap} [{_describe_spread(summary)}{summary.seeds}{lost}] {summary.milliseconds:.0f}"


def describe_mean(summary: Summary | None) -> str:
    """``97.85 [0.30; 5] 2``."""
    if summary is None or summary.mean is None:
        return "failed"
    return f"{summary.mean:.2f} [{_describe_spread(summary)}{summary.seeds}] {summary.milliseconds:.0f}"


def _describe_spread(summary: Summary) -> str:
    return "" if summary.spread is None else f"{summary.spread:.2f}; "


def build_gradient_table(fidelities: Sequence[Fidelity]) -> Table:
    """Relative error and cosine to the large batch's gradient; medians over its trajectory."""
    table = Table(title="gradients beside the large batch's, medians: relative error, cosine", title_justify="left")
    table.add_column("policy")
    columns = list(dict.fromkeys((f.case.task, f.case.micro_batch, f.case.ranks) for f in fidelities))
    for task, size, ranks in columns:
        table.add_column(f"{task} {size}" + (f", {ranks} ranks" if ranks > 1 else ""), justify="right")
    cells = {(f.case.policy, f.case.task, f.case.micro_batch, f.case.ranks): _describe_fidelity(f) for f in fidelities}
    for policy in (ANOTHER_WINDOW, *POLICIES):
        row = [cells.get((policy, *column), "") for column in columns]
        if any(row):
            table.add_row(policy, *row)
    return table


def _describe_fidelity(fidelity: Fidelity) -> str:
    if fidelity.error is None or fidelity.cosine is None:
        return "overflow"
    return f"{fidelity.error:.2g}, {fidelity.cosine:.3f}"


def build_memory_table(peaks: Sequence[Peak]) -> Table:
    """MiB at the peak of a step, above what was there before it."""
    table = Table("task", "policy", "micro-batch", "peak of a step, MiB", title="memory", title_justify="left")
    for peak in peaks:
        case = peak.case
        table.add_row(case.task, case.policy, str(case.micro_batch), f"{peak.bytes / _MIB:.1f}")
    return table


def build_spread_table(spreads: Sequence[Spread]) -> Table:
    """Whether exact is as close to the reference as that is to itself in another order."""
    table = Table(
        "exact, float32",
        "largest difference",
        "of the permuted, largest",
        "rms",
        "of the permuted, rms",
        "",
        title="losses of exact beside those of the reference with its order permuted inside each batch: differences",
        title_justify="left",
    )
    for spread in spreads:
        table.add_row(
            _describe(spread.exact),
            f"{spread.exact_largest:.1e}",
            f"{max(spread.permuted_largest):.1e}",
            f"{spread.exact_rms:.1e}",
            f"{min(spread.permuted_rms):.1e} to {max(spread.permuted_rms):.1e}",
            "inside" if spread.inside else "OUTSIDE",
        )
    return table


def _describe(case: Case) -> str:
    return f"{case.task}, lr {case.lr:g}, micro-batch {case.micro_batch}, {case.ranks} rank(s), seed {case.seed}"
