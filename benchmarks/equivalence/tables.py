"""The tables of the experiment: every case, all policies side by side, and exact beside the permuted references."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from benchmarks.equivalence.cases import POLICIES, REFERENCE, Case
from benchmarks.equivalence.results import Result
from benchmarks.equivalence.spread import Spread

_REPORTED_STEPS = (1, 10, 100)


def build_case_table(task: str, results: Sequence[Result]) -> Table:
    """One row for each case of a task."""
    table = Table(title=f"{task}: distances are of all weights from the reference's, relative", title_justify="left")
    for column in ("dtype", "lr", "seed", "policy", "micro-batch", "ranks", "final loss", "test"):
        table.add_column(column)
    for step in _REPORTED_STEPS:
        table.add_column(f"distance@{step}", justify="right")
    table.add_column("seconds", justify="right")
    for result in results:
        case = result.case
        distances = [result.distances.get(step) for step in _REPORTED_STEPS]
        table.add_row(
            case.dtype,
            f"{case.lr:g}",
            str(case.seed),
            case.policy,
            str(case.micro_batch),
            str(case.ranks),
            _format_loss(result),
            format_score(task, result.score),
            *["" if distance is None else f"{distance:.1e}" for distance in distances],
            f"{result.seconds:.1f}",
        )
    return table


def build_overview(results: Sequence[Result]) -> Table:
    """Final loss and test score by setting and policy, on one rank in the first dtype; means over seeds."""
    table = Table(title="final training loss, test score; means over seeds", title_justify="left")
    for column in ("task", "lr", "micro-batch", REFERENCE, *POLICIES):
        table.add_column(column)
    shown = [r for r in results if r.case.ranks == 1 and r.case.dtype == results[0].case.dtype]
    settings = dict.fromkeys((r.case.task, r.case.lr, r.case.micro_batch) for r in shown if r.case.policy != REFERENCE)
    for task, lr, micro_batch in settings:
        here = [r for r in shown if (r.case.task, r.case.lr) == (task, lr) and not r.case.permutation]
        seeds = {r.case.seed for r in here if r.case.micro_batch == micro_batch and r.case.policy != REFERENCE}
        cells = [
            _summarize(
                [
                    r
                    for r in here
                    if r.case.policy == policy
                    and r.case.seed in seeds
                    and (policy == REFERENCE or r.case.micro_batch == micro_batch)
                ]
            )
            for policy in (REFERENCE, *POLICIES)
        ]
        table.add_row(task, f"{lr:g}", str(micro_batch), *cells)
    return table


def _summarize(results: Sequence[Result]) -> str:
    trained = [(r.final_loss, r.score) for r in results if r.final_loss is not None and r.score is not None]
    failed = sorted(r.outcome for r in results if r.final_loss is None)
    if failed or not trained:
        return ", ".join(failed)
    loss, score = (sum(values) / len(values) for values in zip(*trained, strict=True))
    return f"{loss:.3g}\n{format_score(results[0].case.task, score)}"


def _format_loss(result: Result) -> str:
    return result.outcome if result.final_loss is None else f"{result.final_loss:.4g}"


def format_score(task: str, score: float | None) -> str:
    if score is None:
        return ""
    return f"{score:.2f} dB" if task == "denoise" else f"{score:.1%}"


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
