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

from levelset_ext import build_info

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
    content = json.loads(file.read_text())
    return {name: content[name] for name in names if name in content}


def one(folder: Path, name: str, strongly: bool) -> dict[str, Any]:
    settings = json.loads((folder / name / "config.json").read_text())["settings"]
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
        with (folder / name / "history.csv").open(newline="") as stream:
            found = list(csv.DictReader(stream))
        if "crossed" not in found[0]:  # no search for boundary points
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
    result = {
        "build": build_info(),
        "runs": {
            name: one(args.folder, name, name not in args.without_autoattack) for name in args.names
        },
        "what": "levelset-ext train, preset fast, then levelset-ext attack",
    }
    args.json.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    rows = history(args.folder, args.names)
    with args.history.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]) if rows else ["run"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
