"""The reference lists every public name, beside the file that defines it."""

from __future__ import annotations

import ast
import re
from collections import Counter

import syncaccum
from tests.docs.blocks import ROOT

_ROWS = re.findall(r"^\| \[`(\w+)`\]\(\.\./(\S+\.py)\) \|", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)
_INTEGRATIONS = "syncaccum/integrations/"
_PARTS_OF_OTHERS = {"__init__", "lightning_windows", "parts"}


def _read_definitions(path: str) -> set[str]:
    found = ast.parse((ROOT / path).read_text()).body
    return {node.name for node in found if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_each_name_has_one_row() -> None:
    listed = Counter(name for name, path in _ROWS if not path.startswith(_INTEGRATIONS))
    assert listed == Counter(syncaccum.__all__)


def test_each_integration_has_a_row() -> None:
    modules = {path.stem for path in (ROOT / _INTEGRATIONS).glob("*.py")}
    listed = {
        path.removeprefix(_INTEGRATIONS).removesuffix(".py") for _, path in _ROWS if path.startswith(_INTEGRATIONS)
    }
    assert listed == modules - _PARTS_OF_OTHERS


def test_each_name_is_defined_where_its_row_leads() -> None:
    for name, path in _ROWS:
        assert name in _read_definitions(path), f"{name} in {path}"
