"""Reading result files, and numbers as text."""

from __future__ import annotations

import csv
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.results.registry import FILES, ROOT

NOT_RUN = "not run"


class Files:
    """The files under benchmarks/results; one that is not there reads as None."""

    def __init__(self, root: Path = ROOT) -> None:
        self.folder = root / FILES

    def json(self, name: str) -> Any:
        file = self.folder / name
        return json.loads(file.read_text()) if file.exists() else None

    def csv(self, name: str) -> list[dict[str, str]] | None:
        file = self.folder / name
        if not file.exists():
            return None
        with file.open(newline="") as stream:
            return list(csv.DictReader(stream))


@dataclass(frozen=True)
class Comparison:
    """Ours against the best of the others, on one measure.

    text: how a figure is written. low: less is better. near: figures no further apart than this
    say nothing.
    """

    what: str
    ours: float
    who: str
    other: float
    text: Callable[[float], str]
    low: bool
    near: float = 0.0

    @property
    def verdict(self) -> str:
        if not abs(self.ours - self.other) > self.near:
            return "even"
        return "ahead" if (self.ours < self.other) == self.low else "behind"


@dataclass
class Book:
    """What the sections of the page share: the files, and what they found in comparisons."""

    files: Files
    found: list[Comparison] = field(default_factory=list)

    def compare(
        self,
        what: str,
        ours: float,
        others: dict[str, float],
        text: Callable[[float], str],
        *,
        low: bool,
        near: float = 0.0,
        rows: int | None = None,
    ) -> None:
        """Notes ours against the best of the others; NaN is no figure. Accuracies in percent, each
        counted on so many ``rows``, are near each other within the 95 % interval of a difference.
        """
        known = {name: value for name, value in others.items() if math.isfinite(value)}
        if not known or not math.isfinite(ours):
            return
        best = (min if low else max)(known, key=known.__getitem__)
        if rows is not None:
            near = math.hypot(half_width(ours, rows), half_width(known[best], rows))
        self.found.append(Comparison(what, ours, best, known[best], text, low, near))

    def of(self, verdict: str) -> list[Comparison]:
        return [one for one in self.found if one.verdict == verdict]


def example(name: str) -> Any:
    """A script of python_examples, which has figures of its own."""
    folder = str(ROOT / "python_examples")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first ``left`` columns are text, the others numbers."""
    lines = [_row(head), "|" + "---|" * left + "---:|" * (len(head) - left)]
    return "\n".join([*lines, *map(_row, rows)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def number(value: Any) -> float:
    """A figure of a file; NaN for none."""
    if value in (None, ""):
        return math.nan
    return float(value)


def fixed(digits: int, unit: str = "") -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}{unit}" if math.isfinite(value) else "-"


def small(value: float) -> str:
    """Two digits, as 5.1e-4."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(value: float, digits: int = 1) -> str:
    """A fraction in percent."""
    return fixed(digits)(100 * value)


def seconds(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    if value < 1e-3:
        return f"{1e6 * value:.0f} us"
    if value < 1:
        return f"{1e3 * value:.3g} ms"
    return f"{value:.3g} s"


def bold_best(values: Sequence[float], text: Callable[[float], str], low: bool) -> list[str]:
    """The texts of some figures, the best ones bold."""
    known = [value for value in values if math.isfinite(value)]
    best = text((min if low else max)(known)) if len(known) > 1 else None
    return [f"**{text(v)}**" if text(v) == best else text(v) for v in values]


def interval(share: float, rows: int) -> tuple[float, float]:
    """95 % interval of a share counted on so many rows (Wilson), as shares."""
    from scipy.stats import binomtest

    found = binomtest(round(share * rows), rows).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def half_width(value: float, rows: int) -> float:
    """Half of the 95 % interval of an accuracy in percent."""
    low, high = interval(value / 100, rows)
    return 50 * (high - low)


def with_interval(value: float, rows: int) -> str:
    """An accuracy in percent with its 95 % interval."""
    if not math.isfinite(value):
        return "-"
    low, high = interval(value / 100, rows)
    return f"{value:.1f} ({100 * low:.1f} to {100 * high:.1f})"
