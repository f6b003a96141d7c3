"""summary with rich: its table as text, and on rich's own consoles."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
from torch import nn

from syncaccum import commit, convert_sync_accum, summary

pytest.importorskip("rich")
from rich.console import Console


def make_model(name: str = "norm") -> nn.Module:
    torch.manual_seed(0)
    model: Any = convert_sync_accum(nn.ModuleDict({name: nn.BatchNorm1d(3), "frozen": nn.BatchNorm1d(3).eval()}))
    for _ in range(2):
        model[name](torch.randn(4, 3))
        commit(model)
    model[name](torch.randn(1200, 3))
    return model


def words(text: str) -> list[str]:
    """Without lines."""
    return [word for word in text.split() if set(word) - set("-─")]


def without_rich(monkeypatch: pytest.MonkeyPatch, table: object) -> str:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "rich.console", None)
        return str(table)


@pytest.mark.parametrize("columns", [200, 80])
def test_text_by_rich_says_what_the_plain_one_says(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = summary(make_model())
    by_rich = str(table)
    assert "─" * 10 in by_rich
    assert "\x1b" not in by_rich
    assert max(map(len, by_rich.splitlines())) <= columns
    plain = without_rich(monkeypatch, table)
    assert "─" not in plain
    assert words(by_rich) == words(plain)
    assert "1,200" in plain


def test_a_terminal_too_narrow_for_the_figures_gets_longer_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    table = summary(make_model("a_long_name_of_a_layer_that_is_to_be_folded"))
    by_rich = str(table)
    assert "1,200" in by_rich
    assert "…" not in by_rich


def test_rich_prints_it_in_the_width_of_its_console() -> None:
    name = "a_rather_long_name_of_a_layer_in_a_backbone_that_has_many_of_them"
    table = summary(make_model(name))
    for width in (150, 100):
        target = io.StringIO()
        Console(file=target, width=width, force_terminal=True, color_system="standard").print(table)
        printed = target.getvalue()
        assert "\x1b[1m" in printed  # bold headings
        assert "1,200" in printed
        assert (name in printed) == (width == 150)
        assert "…" not in printed
