"""What the site has beyond pages that a forge shows: the notebook, the reference, links and pictures from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import basename
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

_ROOT = Path(__file__).parent.parent.parent
# The target of a link that leaves docs/: every page lies right in it.
_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]*)")
# A row of reference.md: its name, and the module that it is in.
_ROW = re.compile(r"^\| \[`(\w+)`\]\(\.\./(syncaccum/\S+)\.py\)", re.MULTILINE)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Make pages of notebooks, and take pictures along that pages show from elsewhere."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        _add_notebook(file, files, config)
    shown = {target for file in files.documentation_pages() for target in _OUTSIDE.findall(file.content_string)}
    for target in sorted(shown):
        if target.endswith(".png"):
            files.append(File.generated(config, _place(target), abs_src_path=str(_ROOT / target)))
    return files


def _add_notebook(file: File, files: Files, config: MkDocsConfig) -> None:
    # With the outputs that are in it; a test runs it.
    page, resources = MarkdownExporter().from_filename(file.abs_src_path)
    for name, drawing in resources["outputs"].items():
        files.append(File.generated(config, _place(name), content=drawing))
        page = page.replace(f"![png]({name})", f"![drawn by the cell above]({_place(name)})")
    files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=page))


def _place(picture: str) -> str:
    return f"pictures/{basename(picture)}"


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Let links lead to what the site has: pictures, the notebook's page; or else to the repository."""
    if page.file.src_uri == "reference.md":
        markdown = _add_docstrings(markdown)
    markdown = re.sub(r"\]\(([\w-]+)\.ipynb\)", r"](\1.md)", markdown)
    return _OUTSIDE.sub(lambda found: f"]({_find_outside(found[1], config)}", markdown)


def _find_outside(target: str, config: MkDocsConfig) -> str:
    if target.endswith(".png"):
        return _place(target)
    kind = "tree" if (_ROOT / target).is_dir() else "blob"
    return f"{config.extra['repository']}/{kind}/main/{target}"


def _add_docstrings(markdown: str) -> str:
    """Below each section's table, the docstrings of its names; the names lead there."""
    first, *sections = re.split(r"^(?=## )", markdown, flags=re.MULTILINE)
    return "".join([first, *map(_add_docstrings_of_section, sections)])


def _add_docstrings_of_section(section: str) -> str:
    names = [_identify(*found) for found in _ROW.findall(section)]
    linked = _ROW.sub(lambda found: f"| [`{found[1]}`](#{_identify(found[1], found[2])})", section)
    return linked.rstrip() + "\n\n" + "".join(map(_ask_for_docstring, names))


def _identify(name: str, module: str) -> str:
    package = module.replace("/", ".") if module.startswith("syncaccum/integrations/") else "syncaccum"
    return f"{package}.{name}"


def _ask_for_docstring(name: str) -> str:
    # What a framework calls of a callback is nobody else's.
    members = "    options: {members: false}\n" if name.startswith("syncaccum.integrations") else ""
    return f"::: {name}\n{members}\n"
