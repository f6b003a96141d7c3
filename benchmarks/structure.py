"""How large are the package's files and functions, and how much of it is comment? Prints; measures no time."""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from pathlib import Path

APART = ("doctor", "integrations")
"""Folders that stand for themselves."""


def main(package: Path = Path("syncaccum")) -> None:
    paths = sorted(package.rglob("*.py"))
    core = [path for path in paths if not set(APART) & set(path.relative_to(package).parts)]
    texts = {path: path.read_text() for path in core}
    lines = {path: text.count("\n") for path, text in texts.items()}
    longest = max(lines, key=lambda path: lines[path])
    functions = [n for text in texts.values() for n in _measure_functions(text)]
    comments = [comment for text in texts.values() for comment in _find_comments(text)]
    code = sum(_count_code(text) for text in texts.values())
    print(f"files without {', '.join(APART)}: {len(core)}, {sum(lines.values())} lines")
    print(f"lines of a file: median {statistics.median(lines.values()):g}, longest {lines[longest]} ({longest})")
    tenths = statistics.quantiles(functions, n=10)
    print(f"lines of a function, docstring included: median {statistics.median(functions):g}, p90 {tenths[-1]:g}")
    print(f"comment lines per line of code: {len(comments) / code:.3f}")
    print(f"words in a line of comment: mean {statistics.mean(len(c.split()) for c in comments):.1f}")
    doctor = [path for path in paths if "doctor" in path.parts]
    print(f"doctor: {sum(path.read_text().count(chr(10)) for path in doctor)} lines")


def _measure_functions(text: str) -> list[int]:
    nodes = ast.walk(ast.parse(text))
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno is not None]


def _find_comments(text: str) -> list[str]:
    """Without those that are for tools."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    return [c for c in comments if not c.startswith(("type:", "noqa", "fmt:"))]


def _count_code(text: str) -> int:
    """Lines with anything but a comment, a docstring or nothing."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    numbered = enumerate(text.splitlines(), start=1)
    return sum(n not in docstrings and bool(line.strip()) and not line.strip().startswith("#") for n, line in numbered)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
