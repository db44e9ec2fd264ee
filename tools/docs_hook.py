"""What mkdocs is told beyond mkdocs.yml: links that leave docs/, formulas, and the notation of
docstrings.

The pages under docs/ are read in two places, in the repository and on the site. A link to a file of
the repository, such as ``../python_examples/quickstart.py``, is one only in the first; on the site
its text stays, and the build fails if the file is not there. Docstrings are written for ``help()``:
``:func:`name``` and a bare ``*event`` are turned into what Markdown means by them. Formulas are
written in TeX and become MathML, which browsers draw themselves: no script and nothing to fetch.
"""

from __future__ import annotations

import html
import logging
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`(~?)([\w.]+)`")
STAR = re.compile(r"(?<![*`\w\\])\*(?=\w+[,)\]])")
CODE = re.compile(r"(``[^`]+``|`[^`\n]+`)")
ROOT = Path(__file__).resolve().parents[1]
RETURNS = re.compile(r"^Returns:\n((?:    .*\n|\n)*(?:    .*)?)", re.M)
log = logging.getLogger("mkdocs.plugins.docs_hook")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page: links to files outside docs/ become code."""
    folder = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        place = posixpath.normpath(posixpath.join("docs", folder, target))
        if place.startswith("docs/"):
            return match[0]  # mkdocs checks these itself
        if place.startswith("..") or not (ROOT / place).exists():
            log.warning(f"{page.file.src_uri}: links to {target}, which is not in the repository")
        return f"`{place}`" if text.strip("`./") == target.strip("./") else text

    return LINK.sub(link, markdown)


# As pymdownx.arithmatex marks them; escaped, as they may hold < and &.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page: formulas become MathML."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        drawn = convert(html.unescape(match[3]).strip(), display=display)
        return f'<{match[1]} class="formula">{drawn}</{match[1]}>'

    return FORMULA.sub(formula, content)


class Notation(griffe.Extension):
    """Rewrites the docstrings that the API pages show."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, obj)


def as_markdown(text: str, obj: Any = None) -> str:
    """A docstring with its cross-references and stars as Markdown has them."""
    module = obj.module.path if obj is not None else "levelset_ext"

    def reference(match: re.Match[str]) -> str:
        name = match[2]
        shown = name.rsplit(".", 1)[-1] if match[1] else name
        path = name if name.startswith("levelset_ext.") else f"{module}.{name}"
        if path == "levelset_ext.false_position":
            path = "levelset_ext.samplers.false_position"
        if (ROOT / path.replace(".", "/")).with_suffix(".py").exists():
            path += "." + path.rsplit(".", 1)[-1]  # a function with the name of its file
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

    # Left to the parser, all before a colon in the first line would be taken for a type.
    text = RETURNS.sub(
        lambda m: f'<span class="doc-section-title">Returns:</span>\n\n{textwrap.dedent(m[1])}',
        text,
    )
    parts = CODE.split(ROLE.sub(reference, text))
    return "".join(p if i % 2 else STAR.sub(r"\\*", p) for i, p in enumerate(parts))
