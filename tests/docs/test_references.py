"""Documents name commands, files and pages that are there."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.docs.blocks import ROOT

_PATTERNS = ("*.md", "docs/*.md", "docs/*.ipynb", "launch/*.md")
_DOCUMENTS = sorted(str(path.relative_to(ROOT)) for pattern in _PATTERNS for path in ROOT.glob(pattern))
_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
_PACKAGES = ("syncaccum", "benchmarks", "launch", "tests")
# A path as documents write it: with a folder of ours in front, or a shell script's name.
_PATH = re.compile(rf"(?:{'|'.join(_PACKAGES)}|docker|docs)/[\w./-]*")
_LEFT_BY_RUNS = "runs/"


def _walk(document: str) -> Iterator[Token]:
    for token in MarkdownIt().enable("table").parse(_read(ROOT / document)):
        yield token
        yield from token.children or ()


def _read(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("document", _DOCUMENTS)
def test_commands_are_there(document: str) -> None:
    for token in _walk(document):
        if token.type == "fence" and token.info == "sh":
            for line in token.content.splitlines():
                _check_command(shlex.split(line, comments=True))
        if token.type == "code_inline":
            _check_command(token.content.split())


def _check_command(words: list[str]) -> None:
    if len(words) > 1 and words[0] == "make" and re.fullmatch("[a-z-]+", words[1]):
        assert words[1] in _TARGETS, f"make {words[1]}"
    for word, following in pairwise(words):
        if word == "-m" and following.split(".")[0] in _PACKAGES:
            assert importlib.util.find_spec(following) is not None, f"-m {following}"
    for word in words:
        if _PATH.fullmatch(word) and not word.startswith(_LEFT_BY_RUNS):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("document", _DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    for token in _walk(document):
        target = token.attrGet("href" if token.type == "link_open" else "src")
        if isinstance(target, str) and "://" not in target:
            assert (folder / target.split("#")[0]).exists(), target


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        for token in _walk(str(page.relative_to(ROOT))):
            target = token.attrGet("href")
            if isinstance(target, str) and target.endswith((".md", ".ipynb")) and "://" not in target:
                found = (page.parent / target).resolve()
                if found not in reached:
                    ahead.append(found)
    pages = {path.resolve() for pattern in ("*.md", "*.ipynb") for path in Path(ROOT / "docs").glob(pattern)}
    assert pages <= reached, pages - reached
