"""How large are the package's files and functions, how much of it is comment, and which imports go in circles?

Prints; measures no time. Imports inside functions and for types alone are counted, too.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator, Set
from pathlib import Path

APART = ("doctor", "integrations")
"""Folders that stand for themselves."""
STORIES = {
    "a forward": "a training forward, from top to bottom",
    "a commit": "a commit, from top to bottom",
    "lockstep": "lockstep",
    "where a NaN is found": "where a NaN is found and named",
    "a subclass": "a subclass with a forward of its own",
}
"""By name, the row of CONTRIBUTING.md that says which files to open."""


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
    for story, files in read_stories().items():
        print(f"files to open for {story}: {len(files)} ({', '.join(files)})")
    cycles = find_cycles({path: path.read_text() for path in paths}, package)
    print(f"import cycles, late and typing imports counted: {len(cycles)}")
    for cycle in cycles:
        print(f"  {', '.join(cycle)}")
    doctor = [path for path in paths if "doctor" in path.parts]
    print(f"doctor: {sum(path.read_text().count(chr(10)) for path in doctor)} lines")


def read_stories(page: Path = Path("CONTRIBUTING.md")) -> dict[str, list[str]]:
    """The files that a reader opens, as the page's map of them says."""
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", page.read_text(), re.MULTILINE))
    return {story: re.findall(r"[\w/]+\.(?:py|cpp)", rows[row]) for story, row in STORIES.items()}


def find_cycles(texts: dict[Path, str], package: Path) -> list[list[str]]:
    """Modules that import each other, by whatever way: each group of them once."""
    names = {_name_module(path, package): path for path in texts}
    imports = {
        name: {found for found in _find_imports(texts[path], names.keys()) if found != name}
        for name, path in names.items()
    }
    reached = {name: _reach(name, imports) for name in imports}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in imports}
    return [sorted(group) for group in groups if group]


def _name_module(path: Path, package: Path) -> str:
    parts = (package.name, *path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _find_imports(text: str, modules: Set[str]) -> Iterator[str]:
    """Of these modules those that a file names. Python also runs each package around them, which has no own code."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield from (name for name in (submodule if submodule in modules else node.module,) if name in modules)


def _reach(start: str, imports: dict[str, set[str]]) -> set[str]:
    """What a module imports, and what that imports, and so on."""
    reached: set[str] = set()
    ahead = [start]
    while ahead:
        new = imports[ahead.pop()] - reached
        reached |= new
        ahead += new
    return reached


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
