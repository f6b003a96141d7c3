"""A page of text around a table, as wide as a terminal at most: by rich where it is installed, plain elsewhere."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

_GAP = "  "

_NARROWEST = 12
"""A column of text is folded to no less. Where the terminal has no room for that, lines are longer than it."""


@dataclass(frozen=True)
class Column:
    """A column of a table. Numbers are set to the right, and never folded."""

    header: str
    cells: Sequence[str]
    is_number: bool = True

    @property
    def heading(self) -> list[str]:
        """The header's words, each on a line of its own: it is mostly wider than what is below."""
        return re.findall(r"[^ -]+-?", self.header)

    @property
    def width(self) -> int:
        return max(map(len, (*self.heading, *self.cells)))


@dataclass(frozen=True)
class Page:
    """Paragraphs, a table, and paragraphs."""

    above: Sequence[str]
    columns: Sequence[Column]
    below: Sequence[str]


def render_page(page: Page, width: int) -> str:
    """The page as plain text, without colours."""
    try:
        from rich.console import Console
    except ImportError:
        return "\n".join(_render_plain(page, width))
    # Where there is no room for the table, rich would cut it.
    widths = _fit_widths(page.columns, width)
    width = max(width, sum(widths) + len(_GAP) * (len(widths) - 1))
    # Not for a terminal or a notebook, whatever the environment asks for.
    target = io.StringIO()
    console = Console(file=target, width=width, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(*make_renderables(page, width), sep="\n")
    return "\n".join(line.rstrip() for line in target.getvalue().splitlines())


def make_renderables(page: Page, width: int) -> list[Any]:
    """The page for a console of rich's. Needs rich."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    # Padding, and what the box puts between columns, are as wide as the gap.
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    widths = _fit_widths(page.columns, width)
    for column, heading, size in zip(page.columns, _stand(page.columns), widths, strict=True):
        table.add_column(Text("\n".join(heading)), justify="right" if column.is_number else "left", width=size)
    for row in _fold_rows(page.columns, widths):
        # As Text: a bracket in a string would be markup.
        table.add_row(*(Text("\n".join(lines)) for lines in row))
    return [*map(Text, page.above), table, *map(Text, page.below)]


def _render_plain(page: Page, width: int) -> Iterator[str]:
    widths = _fit_widths(page.columns, width)
    yield from _fill(page.above, width)
    yield from _render_row(page.columns, widths, _stand(page.columns))
    yield _GAP.join("-" * size for size in widths)
    for row in _fold_rows(page.columns, widths):
        yield from _render_row(page.columns, widths, row)
    yield from _fill(page.below, width)


def _fill(paragraphs: Sequence[str], width: int) -> Iterator[str]:
    for paragraph in paragraphs:
        # wrap() makes no line of an empty one.
        yield from textwrap.wrap(paragraph, width, break_on_hyphens=False) or [""]


def _stand(columns: Sequence[Column]) -> list[list[str]]:
    """The headings, all of so many lines, with what is empty on top."""
    tallest = max(len(column.heading) for column in columns)
    return [[""] * (tallest - len(column.heading)) + column.heading for column in columns]


def _fit_widths(columns: Sequence[Column], width: int) -> list[int]:
    """How wide each column may be: the widest one with text gives way first."""
    widths = [column.width for column in columns]
    texts = [index for index, column in enumerate(columns) if not column.is_number]
    while sum(widths) + len(_GAP) * (len(widths) - 1) > width:
        widest = max(texts, key=widths.__getitem__)
        if widths[widest] <= _NARROWEST:
            break
        widths[widest] -= 1
    return widths


def _fold_rows(columns: Sequence[Column], widths: Sequence[int]) -> Iterator[list[list[str]]]:
    """For each row, the lines of each cell. They end after a dot or the like; a part that is too long, anywhere."""
    fits = [re.compile(rf".{{1,{size}}}(?:(?<=[. _])|$)|.{{1,{size}}}") for size in widths]
    for row in zip(*(column.cells for column in columns), strict=True):
        yield [fit.findall(cell) for cell, fit in zip(row, fits, strict=True)]


def _render_row(columns: Sequence[Column], widths: Sequence[int], cells: Sequence[Sequence[str]]) -> Iterator[str]:
    for line in zip_longest(*cells, fillvalue=""):
        padded = [
            part.rjust(size) if column.is_number else part.ljust(size)
            for part, column, size in zip(line, columns, widths, strict=True)
        ]
        yield _GAP.join(padded).rstrip()
