"""Trainings and attacks of ``levelset-ext``, in the files that the results page reads.

    python benchmarks/collect_robust.py DIR NAME ... --json FILE --history FILE

DIR/NAME is a training, DIR/NAME-pgd and DIR/NAME-autoattack are attacks on its network. The second
may be missing for the names of --without-autoattack alone.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from _command import check_writable, command

from levelset_ext import build_info
from levelset_ext.errors import InputError
from levelset_ext.recipes.files import read_json

TRAINING = (
    "clean_accuracy", "epochs", "last_epoch", "peak_memory_gb", "skipped_steps", "steps",
    "test_rows", "threads", "training_seconds", "cpu_seconds",
)  # fmt: skip
ATTACK = (
    "alarms", "attacks", "clean_accuracy", "every", "robust_accuracy", "rows", "seconds",
    "settings",
)  # fmt: skip
HISTORY = (
    "step", "epoch", "crossed", "converged", "accuracy", "distance", "clean_accuracy",
)  # fmt: skip


def read(file: Path, names: tuple[str, ...]) -> dict[str, Any]:
    content = read_json(file)
    return {name: content[name] for name in names if name in content}


def one(folder: Path, name: str, strongly: bool) -> dict[str, Any]:
    settings = read_json(folder / name / "config.json")["settings"]
    strong = folder / f"{name}-autoattack" / "metrics.json"
    return {
        "objective": settings["objective"],
        "settings": settings,
        "training": read(folder / name / "metrics.json", TRAINING),
        "pgd": read(folder / f"{name}-pgd" / "metrics.json", ATTACK),
        "autoattack": read(strong, ATTACK) if strongly else None,
    }


def history(folder: Path, names: list[str]) -> list[dict[str, str]]:
    rows = []
    for name in names:
        file = folder / name / "history.csv"
        try:
            with file.open(newline="") as stream:
                found = list(csv.DictReader(stream))
        except OSError as error:
            raise InputError(
                f"{file}: expected the history of a training ({error.strerror})"
            ) from None
        if not found or "crossed" not in found[0]:  # no search for boundary points
            continue
        for row in found:
            values = {key: row[key] or "nan" for key in HISTORY}
            both = float(values["crossed"]) * float(values["converged"])
            rows.append({"run": name, **values, "both": f"{both:.6g}"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--without-autoattack", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--json", required=True, type=Path, metavar="FILE")
    parser.add_argument("--history", required=True, type=Path, metavar="FILE")
    args = parser.parse_args()
    for name in ("json", "history"):
        check_writable(name, getattr(args, name))
    result = {
        "build": build_info(),
        "runs": {
            name: one(args.folder, name, name not in args.without_autoattack) for name in args.names
        },
        "what": "levelset-ext train, preset fast, then levelset-ext attack",
    }
    rows = history(args.folder, args.names)
    args.json.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    with args.history.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]) if rows else ["run"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    raise SystemExit(command(main))
