"""What a training writes down on its way: one row for every so many steps, as a CSV table, and the
picture of it."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from levelset_ext.recipes.observers import Moment, Observer, Run
from levelset_ext.whole_files import write_whole

__all__ = ["History", "HistoryPicture", "HistoryTable", "draw_history", "read_history"]

# Columns with a meaning of their own, around those that an objective adds.
_FIRST = ("step", "epoch", "loss", "lr", "gradient_norm", "skipped")
_LAST = ("clean_accuracy", "seconds", "samples_per_second")


class History:
    """Rows of means over the steps since the row before.

    A figure that is not a number in a step (the distance to a boundary that no example reached)
    does not count in that step; one that never was a number is NaN, an empty cell of the table.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._sums: dict[str, list[float]] = {}
        self._steps = 0
        self._samples = 0
        self._seconds = 0.0
        self._skipped = 0

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "rows": [dict(row) for row in self.rows],
            "sums": {name: list(pair) for name, pair in self._sums.items()},
            "open": [self._steps, self._samples, self._seconds, self._skipped],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.rows = [dict(row) for row in state["rows"]]
        self._sums = {name: list(pair) for name, pair in state["sums"].items()}
        self._steps, self._samples, self._seconds, self._skipped = state["open"]

    def add(
        self, figures: Mapping[str, float], *, samples: int, seconds: float, skipped: bool
    ) -> None:
        """One step: its figures, how many examples it saw, how long it took."""
        for name, value in figures.items():
            pair = self._sums.setdefault(name, [0.0, 0.0])
            if math.isfinite(value):
                pair[0] += value
                pair[1] += 1
        self._steps += 1
        self._samples += samples
        self._seconds += seconds
        self._skipped += skipped

    def close(self, step: int, epoch: float, seconds: float, accuracy: float | None) -> None:
        """Turns the steps since the row before into a row. Nothing to do if there are none."""
        if self._steps == 0:
            return
        row = {"step": step, "epoch": epoch, "skipped": self._skipped}
        for name, (total, count) in self._sums.items():
            row[name] = total / count if count else math.nan
        if accuracy is not None:
            row["clean_accuracy"] = accuracy
        row["seconds"] = seconds
        row["samples_per_second"] = self._samples / max(self._seconds, 1e-9)
        self.rows.append(row)
        self._sums, self._steps, self._samples, self._seconds, self._skipped = {}, 0, 0, 0.0, 0

    def means(self, after: int) -> dict[str, float]:
        """Figures over all steps after the given one, each row counted by its steps."""
        sums: dict[str, list[float]] = {}
        before = 0
        for row in self.rows:
            steps, before = row["step"] - before, int(row["step"])
            for name, value in row.items():
                if row["step"] > after and math.isfinite(value) and name not in _NOT_MEANS:
                    pair = sums.setdefault(name, [0.0, 0.0])
                    pair[0] += steps * value
                    pair[1] += steps
        return {name: total / count for name, (total, count) in sums.items()}

    def write(self, path: Path) -> None:
        """The table as a file, whole or not at all."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        own = [name for name in names if name not in (*_FIRST, *_LAST)]
        _write_table(path, [*_FIRST, *own, *_LAST], self.rows)


RESERVED = (*_FIRST, *_LAST)
_NOT_MEANS = ("step", "epoch", "skipped", "lr", *_LAST)


class HistoryTable(Observer):
    """``history.csv``: the figures of every so many steps, as they are in that step.

    Which steps depends on the length of the run alone. The file is written with every checkpoint,
    so a run that goes on finds the rows up to where it goes on.
    """

    vital = True
    ROWS = 500  # about so many

    def begin(self, run: Run) -> None:
        self.path, self.every = run.out / "history.csv", max(1, round(run.steps / self.ROWS))
        self.rows: list[dict[str, float]] = []
        if run.first and self.path.exists():
            self.rows = [row for row in read_history(self.path) if row["step"] <= run.first]
        spent = self.rows[-1].get("seconds", 0.0) if self.rows else 0.0
        self.began = time.monotonic() - spent

    def due(self, step: int, *, last: bool, saved: bool) -> bool:
        return last or saved or step % self.every == 0

    def see(self, moment: Moment) -> None:
        if moment.last or moment.step % self.every == 0:
            seconds = time.monotonic() - self.began
            self.rows.append({"step": moment.step, **moment.figures, "seconds": seconds})
        if moment.saved and self.rows:
            _write_table(self.path, list(self.rows[-1]), self.rows)


class HistoryPicture(Observer):
    """``history.png``, drawn from ``history.csv`` at the end if matplotlib is there."""

    def begin(self, run: Run) -> None:
        self.out = run.out

    def done(self, pictures: Mapping[str, Path], metrics: Mapping[str, Any]) -> None:
        draw_history(self.out / "history.csv", self.out / "history.png")


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a table; an empty cell is no entry."""
    with path.open(newline="") as stream:
        return [
            {name: float(cell) for name, cell in row.items() if cell}
            for row in csv.DictReader(stream)
        ]


# Drawn in a panel each, over the steps; what is missing in a table is left out. Losses go over
# orders of magnitude, shares do not.
_PANELS = (
    ("loss", lambda name: name.startswith("loss") or name.endswith("loss")),
    ("share", lambda name: name.endswith(("accuracy", "share", "converged", "found"))),
    ("lr", lambda name: name in ("lr", "learning_rate")),
    ("gradient norm", lambda name: name == "gradient_norm"),
)
_COLOURS = ("#2f6db3", "#c8423b", "#e08a1e", "#3b8f5a", "#7a5aa6", "#8a8f98")


def draw_history(table: Path, picture: Path) -> bool:
    """Draws a table as curves over the steps: losses, shares and accuracies, the learning rate.

    Returns:
        Whether it did: False without matplotlib or without rows.
    """
    try:  # not pyplot, whose backend is the caller's
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = read_history(table) if table.exists() else []
    names = [name for name in dict.fromkeys(name for row in rows for name in row)]
    panels = [(title, [n for n in names if belongs(n)]) for title, belongs in _PANELS]
    panels = [(title, some) for title, some in panels if some]
    if not panels:
        return False
    across = len(panels) if len(panels) <= 3 else 2
    count = -(-len(panels) // across)
    figure = Figure(figsize=(4.6 * across, 2.9 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, across, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, some) in zip(axes.flat, panels, strict=False):
        for name, colour in zip(some, _COLOURS * len(some), strict=False):
            points = [(row["step"], row[name]) for row in rows if name in row]
            mark = "." if len(points) < 40 else ""
            label = name.replace("_", " ")
            axis.plot(*zip(*points, strict=True), mark + "-", lw=1.2, color=colour, label=label)
        values = [row[name] for row in rows for name in some if name in row]
        if title == "share":
            axis.set_ylim(min(0.9, *values) - 0.02, 1.02)
        elif min(values) > 0 and max(values) > 20 * min(values):
            axis.set_yscale("log")
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(which="both", labelsize=8)
        axis.grid(True, lw=0.4, alpha=0.4)
        if len(some) > 1 or some[0].replace("_", " ") != title:
            axis.legend(fontsize=8, frameon=False)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    write_whole(
        picture,
        # Without the version of matplotlib, so that equal tables are equal pictures.
        lambda stream: figure.savefig(stream, format="png", dpi=120, metadata={"Software": ""}),
    )
    return True


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, float]]) -> None:
    """A table as a file, whole or not at all."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    for row in rows:
        table.writerow([_cell(row.get(name, math.nan)) for name in columns])
    write_whole(path, lambda stream: stream.write(text.getvalue().encode()))


def _cell(value: float) -> str:
    return f"{value:.7g}" if math.isfinite(value) else ""
