"""The table of docs/pytorch.md and the tests of torch's tools agree: a row has tests, and a test has a row."""

from __future__ import annotations

import ast
import re

import pytest

from tests.docs.blocks import ROOT

_TESTS = ("tests/unit/test_torch_tools.py", "tests/distributed/test_torch_tools.py", "tests/distributed/test_fsdp.py")


def _read_rows() -> list[list[str]]:
    lines = [line for line in (ROOT / "docs/pytorch.md").read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _read_definitions(path: str) -> dict[str, str]:
    """By name, the source of what stands at the top of a file, decorators included."""
    source = (ROOT / path).read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts = [*node.decorator_list, node]
            found[node.name] = "\n".join(ast.get_source_segment(source, part) or "" for part in parts)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = ast.get_source_segment(source, node) or ""
    return found


_ROWS = _read_rows()
_DEFINITIONS = [_read_definitions(path) for path in _TESTS]
_TEST_NAMES = {name for definitions in _DEFINITIONS for name in definitions if name.startswith("test_")}


def _in_code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _read_with_helpers(test: str) -> str:
    """The source of a test, and of what it uses of its file."""
    definitions = next(d for d in _DEFINITIONS if test in d)
    used, ahead = set(), [test]
    while ahead:
        used.add(name := ahead.pop())
        ahead += [other for other in re.findall(r"\w+", definitions[name]) if other in definitions.keys() - used]
    return "\n".join(definitions[name] for name in used)


def test_each_row_has_tests_and_each_test_has_a_row() -> None:
    named = [_in_code(row[-1]) for row in _ROWS]
    assert all(named)
    assert {name for names in named for name in names} == _TEST_NAMES


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: str(row[0]))
def test_all_that_a_row_names_is_in_its_tests(row: list[str]) -> None:
    *told, tests = row
    source = "\n".join(_read_with_helpers(test) for test in _in_code(tests))
    for code in _in_code(" ".join(told)):
        for name in re.findall(r"[A-Za-z_]\w+", code.removeprefix("torch.distributed.")):
            assert re.search(rf"\b{name}\b", source), name
