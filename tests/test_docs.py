"""The pages under docs/ and the README: their Python runs and prints what they say, their commands
parse, their links lead somewhere. docs/geometry.md has a test of its own."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from test_geometry_examples import same_text

from levelset_ext import cli
from levelset_ext.objectives import OBJECTIVES
from levelset_ext.recipes.train_presets import PRESETS

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
TESTED_ELSEWHERE = {"docs/geometry.md"}
NOT_RUN_AT_MOST = 3

BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```python\n(?P<code>.*?)^```\n"
    r"(?:```text\n(?P<quoted>.*?)^```\n)?",
    re.S | re.M,
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)  # language and text
# A picture or a link, not one of the reference pages' [text][name].
LINK = re.compile(r"\]\(([^)\s]+)\)")
REFERENCE = re.compile(r"\]\[(levelset_ext[\w.]*)\]|^::: (levelset_ext[\w.]*)$", re.M)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> list[re.Match[str]]:
    found = list(BLOCK.finditer(text_of(page)))
    assert len(found) == text_of(page).count("```python"), f"{page}: a block that is not closed"
    return found


def pages_with_python() -> list[str]:
    return [p for p in PAGES if p not in TESTED_ELSEWHERE and "```python" in text_of(p)]


def run_page(page: str) -> None:
    """Runs the blocks of a page one after the other in one namespace."""
    names: dict[str, Any] = {"__name__": "__page__"}
    for block in blocks(page):
        if block["reason"]:
            continue
        line = text_of(page).count("\n", 0, block.start("code"))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + block["code"], page, "exec"), names)
        if block["quoted"] is not None:
            told = printed.getvalue()
            assert same_text(told, block["quoted"]), f"{page}, line {line}: printed\n{told}"


@pytest.mark.parametrize("page", pages_with_python())
def test_the_python_of_a_page_runs_and_prints_what_it_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sklearn" in text_of(page):
        pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    dtype = torch.get_default_dtype()
    run_page(page)
    assert torch.get_default_dtype() == dtype


def test_few_blocks_are_left_out() -> None:
    left_out = [f"{p}: {b['reason']}" for p in PAGES for b in blocks(p) if b["reason"]]
    print("\n".join(left_out) or "every block is run")
    assert len(left_out) <= NOT_RUN_AT_MOST, left_out


def test_a_wrong_page_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 2\n```\n\n```python\nprint('x is', x)\n```\n```text\nx is 2\n```\n"
    )
    run_page("page.md")
    page.write_text(page.read_text().replace("x is 2", "x is 3"))
    with pytest.raises(AssertionError, match=r"page\.md, line 5: printed\s+x is 2"):
        run_page("page.md")
    page.write_text("<!-- not run: it is wrong -->\n```python\nraise ValueError\n```\n")
    run_page("page.md")
    page.write_text("```python\nraise ValueError('here')\n```\n")
    with pytest.raises(ValueError, match="here"):
        run_page("page.md")


# --- commands -------------------------------------------------------------------------------------


def commands(page: str) -> list[list[str]]:
    """The arguments of every levelset-ext command in the shell blocks of a page."""
    found = []
    for language, block in FENCED.findall(text_of(page)):
        if language not in ("", "sh", "bash"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "levelset-ext":
                found.append(words[1:])
            elif words and words[0] == "torchrun":
                found.append(words[words.index("levelset_ext") + 1 :])
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise AssertionError(message)


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)])
def test_the_commands_of_a_page_parse(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_Parser", _Parser)
    for words in commands(page):
        args = cli._parser().parse_args(words)
        if getattr(args, "preset", None) is not None:
            assert args.preset in ("fast", "paper"), words
        if args.command == "train":
            assert args.objective in OBJECTIVES, words
    assert set(PRESETS) == {"fast", "paper"}


def test_wrong_commands_do_not_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_Parser", _Parser)
    for wrong in (
        ["reconstruct", "a.ply"],
        ["bench", "speed"],
        ["curve", "--out", "x", "--stps", "3"],
    ):
        with pytest.raises(AssertionError):
            cli._parser().parse_args(wrong)


def test_every_command_is_on_the_page_of_commands() -> None:
    known = next(
        a.choices for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)
    )
    assert known is not None
    assert {words[0] for words in commands("docs/api/cli.md")} == set(known)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in [*PAGES, "CONTRIBUTING.md"]:
        named = {
            target
            for words in re.findall(r"^make ([a-z -]+)|`make ([a-z -]+)`", text_of(page), re.M)
            for target in "".join(words).split()
        }
        assert named <= targets, f"{page}: {named - targets}"


# --- links, names and figures ---------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    for link in LINK.findall(FENCED.sub("", text_of(page))):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {link}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path.read_text()), f"{page}: {link}"


def anchors(text: str) -> set[str]:
    """Headings as both GitHub and mkdocs name them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize("page", [p for p in PAGES if REFERENCE.search(text_of(p))])
def test_reference_names_exist(page: str) -> None:
    names = {a or b for a, b in REFERENCE.findall(text_of(page))}
    for name in sorted(names):
        parts = name.split(".")
        found: Any = importlib.import_module(parts[0])
        for k, part in enumerate(parts[1:], 2):
            # A function may hide the module that has its name, so modules come first.
            try:
                found = importlib.import_module(".".join(parts[:k]))
            except ImportError:
                found = getattr(found, part)
        assert found.__doc__, f"{page}: {name} has no docstring"


def test_the_reference_is_complete() -> None:
    """What a module lists in __all__ is on the page of that module."""
    import levelset_ext as ls
    from levelset_ext import objectives

    pages = {
        "docs/api/index.md": set(ls.__all__) - {"attacks", "geometry", "losses", "networks", "ops"},
        "docs/api/losses.md": {*ls.losses.__all__, *objectives.__all__} - {"OBJECTIVES"},
        "docs/api/networks.md": set(ls.networks.__all__) - {"CLASSIFIERS"},
        "docs/api/geometry.md": set(ls.geometry.__all__),
        "docs/api/attacks.md": set(ls.attacks.__all__) - {"ATTACKS", "OBJECTIVES"},
        "docs/api/ops.md": set(ls.ops.__all__),
    }
    for page, names in pages.items():
        missing = {n for n in names if not re.search(rf"\b{n}\b", text_of(page))}
        assert not missing, f"{page}: {sorted(missing)}"


def test_files_of_figures_exist() -> None:
    for page in PAGES:
        for name in re.findall(
            r"`((?:benchmarks|python_examples|csrc|tests)/[\w./-]+)`", text_of(page)
        ):
            assert (ROOT / name).exists(), f"{page}: {name}"


# --- the site -------------------------------------------------------------------------------------


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("griffe")
    pytest.importorskip("latex2mathml")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("docs_hook")


def test_docstrings_become_markdown(hook: Any) -> None:
    written = "A :class:`~levelset_ext.LevelSetResult` of (n, *event); ``*x`` and 2 * 3 stay.\n"
    assert hook.as_markdown(written) == (
        'A <autoref identifier="levelset_ext.LevelSetResult" optional><code>LevelSetResult</code>'
        "</autoref> of (n, \\*event); ``*x`` and 2 * 3 stay.\n"
    )
    assert 'identifier="levelset_ext.losses.robust.robust"' in hook.as_markdown(
        ":func:`levelset_ext.losses.robust`"
    )
    told = hook.as_markdown(
        "Returns:\n    One: two.\n\n    Three.\n\nRaises:\n    ValueError: no.\n"
    )
    assert told.endswith("</span>\n\nOne: two.\n\nThree.\n\nRaises:\n    ValueError: no.\n")


def test_formulas_become_mathml(hook: Any) -> None:
    markdown = pytest.importorskip("markdown")
    pytest.importorskip("pymdownx")
    text = "Let $l<d$ and\n\n$$J^{+}=J^T$$\n\nbut `$x$` stays, and so do 5 $ and 6 $."
    extensions, options = ["pymdownx.arithmatex"], {"pymdownx.arithmatex": {"generic": True}}
    html = markdown.markdown(text, extensions=extensions, extension_configs=options)
    told = hook.on_page_content(html)
    assert told.count("<math") == told.count("</math>") == 2
    assert 'display="block"' in told
    assert "<mo>&#x0003C;</mo>" in told  # l < d, once escaped
    assert "<msup>" in told
    assert "arithmatex" not in told
    assert "\\(" not in told
    assert "<code>$x$</code>" in told
    assert "5 $ and 6 $" in told


@pytest.mark.parametrize("page", [p for p in PAGES if "$$" in text_of(p)])
def test_formulas_of_a_page_are_known_to_the_converter(page: str) -> None:
    """What it does not know it would show as it is written."""
    convert = pytest.importorskip("latex2mathml.converter").convert
    text = re.sub(r"`[^`]*`", "", FENCED.sub("", text_of(page)))
    formulas = [a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$(\S.*?)\$", text, re.S)]
    assert formulas
    for formula in formulas:
        assert "\\" not in convert(formula), f"{page}: {formula}"


def test_links_that_leave_the_docs_become_text(hook: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Page:
        class file:
            src_uri = "tutorials/curve.md"

    def on_site(text: str) -> str:
        return str(hook.on_page_markdown(text, Page))

    assert on_site("[a](../faq.md#x) ![b](../images/demo.png)").startswith("[a](../faq.md#x) ![b]")
    assert on_site("see [the file](../../setup.py)") == "see the file"
    assert on_site("[../../setup.py](../../setup.py)") == "`setup.py`"
    assert not caplog.records
    on_site("[gone](../../no_such_file.py)")
    assert "links to ../../no_such_file.py, which is not in the repository" in caplog.text
