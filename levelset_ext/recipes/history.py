"""What a training writes down on its way: one row for every so many steps, as a CSV table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from levelset_ext.whole_files import write_whole

__all__ = ["History"]

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
        columns = [*_FIRST, *own, *_LAST]
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(columns)
        for row in self.rows:
            table.writerow([_cell(row.get(name, math.nan)) for name in columns])
        write_whole(path, lambda stream: stream.write(text.getvalue().encode()))


RESERVED = (*_FIRST, *_LAST)
_NOT_MEANS = ("step", "epoch", "skipped", "lr", *_LAST)


def _cell(value: float) -> str:
    return f"{value:.7g}" if math.isfinite(value) else ""
