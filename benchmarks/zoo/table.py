"""docs/zoo.md: what `make zoo` found, a row for each family, and what fails with its remedy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.zoo.trial import TOLERANCE

_PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"

_REMEDIES: dict[str, str] = {}
"""For a failure, by a part of its message."""

_HEAD = """\
# The zoo

Models of {libraries}.
Each is built without a download, and small: of each family one of each beginning of its models' names.

**{passed} of {tried} pass.** Each was

- converted by `convert_sync_accum`, with no BatchNorm that tracks statistics left behind;
- trained for two windows with frozen weights, each of a micro-batch of two examples and one of one, forward and
  backward. In a window no running statistics moved;
- committed, and compared with nn.BatchNorm in float64 on the whole window that each layer saw. The largest difference
  is {error:.0e} of what it saw, and more than {tolerance:.0e} fails. Running statistics are kept in float32;
- put in eval mode, and reverted: eval gave the same bits before and after, and keys and classes are the first ones.

`make zoo` does it again and writes this page. Layers that no micro-batch reached, such as those of an unused head, are
in brackets.
"""


def write_page(found: dict[str, Any]) -> None:
    """Write the page anew, of all that was tried."""
    _PAGE.write_text("\n".join(write_lines(found)) + "\n")


def write_lines(found: dict[str, Any]) -> Iterator[str]:
    tried = {name: [one for one in library["models"] if one["outcome"]] for name, library in found.items()}
    everything = [one for models in tried.values() for one in models]
    passed = [one["outcome"] for one in everything if not one["outcome"]["failure"]]
    yield _HEAD.format(
        libraries=", ".join(f"{library['package']} {library['version']}" for library in found.values()),
        passed=len(passed), tried=len(everything), tolerance=TOLERANCE, error=max(one["error"] for one in passed),
    )  # fmt: skip
    yield from _write_failures(everything)
    for name, models in tried.items():
        yield f"\n## {found[name]['package']}\n"
        yield f"{len(models)} models, with torch {found[name]['torch']}.\n"
        yield "| family | models: layers | result |"
        yield "|---|---|---|"
        by_family = defaultdict(list)
        for one in models:
            by_family[one["family"]].append(one)
        yield from (_write_row(family, ones) for family, ones in sorted(by_family.items()))


def _write_row(family: str, models: Iterable[Any]) -> str:
    described, failures = [], []
    for one in models:
        outcome = one["outcome"]
        unreached = f" ({outcome['unreached']})" if outcome["unreached"] else ""
        described.append(f"{one['name']}: {outcome['layers']}{unreached}")
        if outcome["failure"]:
            failures.append(f"{one['name']} fails")
    return f"| {family} | {', '.join(described)} | {', '.join(failures) or 'passes'} |"


def _write_failures(models: Iterable[Any]) -> Iterator[str]:
    failed = [one for one in models if one["outcome"]["failure"]]
    if not failed:
        return
    yield "| fails | why | remedy |"
    yield "|---|---|---|"
    for one in failed:
        message = one["outcome"]["failure"].replace("\n", " ").replace("|", "/")
        remedy = next((text for part, text in _REMEDIES.items() if part in message), "")
        yield f"| {one['name']} | {message} | {remedy} |"
