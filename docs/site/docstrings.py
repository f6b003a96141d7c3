"""Our docstrings as Markdown: what they write in reStructuredText, for the site's reference."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

_MATH = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*| *$))*)", re.MULTILINE)
_CODE = re.compile(r"^( *)(.*):: *\n\n((?:\1 +.*\n?|\s*\n)+)", re.MULTILINE)
_RAISES = re.compile(r"^Raises:\n((?: +.*\n?|\s*\n)+)", re.MULTILINE)
_ROLE = re.compile(r":(\w+):`([^`]+)`")


class AsMarkdown(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            public = {str(name) for name in obj.package.exports or ()}
            obj.docstring.value = _to_markdown(obj.docstring.value, public)


def _to_markdown(text: str, public: set[str]) -> str:
    text = _MATH.sub(lambda found: f"{found[1]}{_set_formula(found[2], 'block')}\n\n", text)
    text = _CODE.sub(_fence, text)
    text = _RAISES.sub(_name_errors_first, text)
    return _ROLE.sub(lambda found: _set_role(found[1], found[2], public), text)


def _fence(found: re.Match[str]) -> str:
    indent, title, code = found[1], found[2], textwrap.dedent(found[3]).strip()
    language = "pycon" if code.startswith(">>>") else "python"
    lines = [f"**{title}**", "", f"```{language}", *code.splitlines(), "```", ""]
    return "\n".join(f"{indent}{line}" for line in lines) + "\n"


def _name_errors_first(found: re.Match[str]) -> str:
    """What begins with no error's name is no entry of the list; it goes below."""
    entries = [entry.rstrip() for entry in re.split(r"^(?=    \S)", found[1], flags=re.MULTILINE) if entry.strip()]
    named = [entry for entry in entries if re.match(r" +[\w.]+:", entry)]
    others = [" ".join(entry.split()) for entry in entries if entry not in named]
    return "\n".join(["Raises:", *named, "", *others, "", ""])


def _set_role(role: str, name: str, public: set[str]) -> str:
    if role == "math":
        return _set_formula(name, "inline")
    short = name.removeprefix("syncaccum.")
    return f"[`{name}`][syncaccum.{short}]" if short in public else f"`{name}`"


def _set_formula(latex: str, display: str) -> str:
    # MathML needs no script in the browser.
    # The converter takes "\_" in a text for two characters.
    latex = re.sub(r"\\(?:text|mathrm)\{([^}]*)\}", lambda found: found[0].replace(r"\_", "_"), latex)
    latex = latex.replace(r"\mathrm", r"\text").strip()
    return convert(rf"\begin{{align*}}{latex}\end{{align*}}" if "&" in latex else latex, display=display)
