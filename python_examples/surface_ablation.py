"""What each part of surface reconstruction does: one thing changed at a time, with paired seeds.

    python python_examples/surface_ablation.py --out DIR --quick
    python python_examples/surface_ablation.py SCANS --out DIR --scans homer,rocker-arm

SCANS is a folder as for surface_table.py: NAME.ply, and the true surfaces in truth/NAME.ply;
without it there is one synthetic scan. Every variant is the preset "fast" with its schedules
stretched to --steps, and the changes that VARIANTS names. Differences of two variants are paired
by scan and seed; where sizes are the same, a seed also fixes the start of the network and the
samples. All take the same steps; what these cost stands beside it.

runs.csv       every training: distances, pieces, genus, CPU seconds
ablation.csv   per variant, over all pairs: means, and by how many percent the point-to-surface
               distance is larger than that of "ours", with a 95 % interval (Student's t)
ablation.png   those percents

The measures are those of ``levelset-ext compare``, lengths over the diagonal of the truth.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from _shared import (
    BLUE,
    GREY,
    Run,
    arguments,
    chosen_variants,
    command,
    interval,
    pyplot,
    save_picture,
    write_ablation,
)
from surface_table import Scan, Setting, read_scans, scored

from levelset_ext.errors import InputError
from levelset_ext.geometry import extract_mesh
from levelset_ext.recipes.progress import say
from levelset_ext.recipes.reconstruct import ReconstructConfig, Training, preset

# Name: what differs from the preset "fast".
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "no waves": {"frequencies": ()},
    "Adam": {"optimizer": "adam", "learning_rate": 3e-3},
    "distance to points": {"distance": "points"},
    "p = 1": {"p": 1.0},
    "flat rows count": {"min_slope": 0.0},
    "lambda 1 throughout": {"lam_last": 1.0},
    "lambda 5 throughout": {"lam_first": 5.0},
    "a tenth of the other levels": {"general": 102},
    "half of the samples": {"projected": 256, "general": 512, "cloud_points": 512},
    "softplus": {"activation": "softplus"},
    "relu": {"activation": "relu"},
    "half the learning rate": {"learning_rate": 2.5e-3},
}
QUICK = ("ours", "no waves", "Adam")
MEASURES = ("point_to_surface", "normal_consistency", "components", "genus", "cpu_seconds")
FAR = 60.0  # percent


def config_of(name: str, steps: int, seed: int, quick: bool) -> ReconstructConfig:
    config = replace(preset("fast", steps, seed), **VARIANTS[name])
    if quick:
        config = replace(config, width=32, hidden_layers=2, pool=2000, resolution=64)
    return config


def measured(name: str, scan: Scan, config: ReconstructConfig, how: Setting) -> dict[str, Any]:
    """Trains a network and compares its mesh with the truth."""
    began = time.process_time()
    training = Training(scan.cloud, config)
    try:
        for _ in range(config.steps):
            training.advance()
    except RuntimeError as error:  # diverged, and nothing helped: that is a result too
        say(f"{scan.name}, {name}: {error}")
        return {**dict.fromkeys(MEASURES, math.nan), "cpu_seconds": time.process_time() - began}
    spent = time.process_time() - began
    box = (training.low.tolist(), training.high.tolist())
    mesh = extract_mesh(training.network, box, resolution=config.resolution)
    compared = scored(name, mesh.vertices, mesh.faces, scan, how)
    found = dict.fromkeys(MEASURES, math.nan) if compared is None else compared
    return {**{key: found[key] for key in MEASURES if key != "cpu_seconds"}, "cpu_seconds": spent}


def summary(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """A row per variant: means over scans and seeds, and how much further away than the first."""
    of = {name: [run for run in runs if run["variant"] == name] for name in names}
    rows = []
    for name in names:
        row: dict[str, Any] = {"variant": name, "runs": len(of[name])}
        row["scans"] = " ".join(dict.fromkeys(run["scan"] for run in of[name]))
        row["steps"] = of[name][0]["steps"]
        for measure in ("point_to_surface", "normal_consistency", "cpu_seconds"):
            row[measure] = interval([run[measure] for run in of[name]])[0]
        row["torn"] = sum(run["components"] != 1 for run in of[name])
        pairs = zip(of[name], of[names[0]], strict=True)
        percent = [100 * (a["point_to_surface"] / b["point_to_surface"] - 1) for a, b in pairs]
        row["further"], row["further_half"] = interval(percent)
        rows.append(row)
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The percents; one beyond FAR is a number at the edge."""
    figure, axis = pyplot().subplots(figsize=(6.5, 0.32 * len(rows) + 1.2))
    for at, row in enumerate(rows[1:]):
        mean, half = row["further"], row["further_half"]
        if not mean <= FAR:
            text = f"{mean:.0f} \u00b1 {half:.0f} \u25b8"
            axis.text(FAR, at, text, va="center", ha="right", color=BLUE)
            continue
        told = abs(mean) > half
        axis.errorbar(
            mean, at, xerr=half, fmt="o", color=BLUE if told else GREY, capsize=3, markersize=4
        )
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows) - 1), [row["variant"] for row in rows[1:]])
    axis.invert_yaxis()
    axis.set_xlim(right=FAR + 1)
    own = 1e4 * rows[0]["point_to_surface"]
    axis.set(
        title=f"point to surface, ours {own:.1f} of 10 000 diagonals",
        xlabel="percent further away than ours",
    )
    save_picture(figure, path)


def plan(args: argparse.Namespace) -> tuple[list[str], int, int]:
    """Variants, seeds and steps of the command line."""
    names = chosen_variants(args.variants, VARIANTS, QUICK if args.quick else VARIANTS)
    seeds = args.seeds if args.seeds is not None else (2 if args.quick else 3)
    steps = args.steps if args.steps is not None else (30 if args.quick else 1500)
    for what, value in (("seeds", seeds), ("steps", steps)):
        if value < 1:
            raise InputError(f"{what}: expected at least 1, got {value}")
    return names, seeds, steps


def work(argv: Sequence[str] | None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, metavar="SCANS", help="scans and truths")
    parser.add_argument("--scans", default="", metavar="A,B", help="only these of SCANS")
    parser.add_argument("--variants", metavar="A,B", help="only these, and ours")
    parser.add_argument("--seeds", type=int, help="trainings of a variant and scan (default: 3)")
    parser.add_argument("--steps", type=int, help="of every training (default: 1500)")
    args = parser.parse_args(argv)
    names, seeds, steps = plan(args)
    wanted = [name.strip() for name in args.scans.split(",") if name.strip()]
    scans = read_scans(args.folder, wanted, args.quick, args.seed)
    how = Setting()
    if args.quick:
        how = replace(how, samples=2000, surface_samples=2000, dense_samples=20_000)
    plans = {
        (scan.name, name, args.seed + k): config_of(name, steps, args.seed + k, args.quick)
        for k in range(seeds)
        for scan in scans
        for name in names
    }
    settings = {
        "measure": asdict(how),
        "clouds": {scan.name: scan.raw.digest for scan in scans},
        "plans": {f"{scan}, {name}, {k}": asdict(c) for (scan, name, k), c in plans.items()},
    }
    run = Run(args.out, "surface-ablation", settings, len(plans), args.resume)
    of = {scan.name: scan for scan in scans}
    runs = []
    for (scan, name, seed), config in plans.items():

        def one(
            scan: str = scan, name: str = name, config: ReconstructConfig = config
        ) -> dict[str, Any]:
            return measured(name, of[scan], config, how)

        found = run.unit(f"{scan}-{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}", one)
        figures = {measure: found[measure] for measure in MEASURES}
        runs.append({"scan": scan, "variant": name, "seed": seed, "steps": steps, **figures})
    write_ablation(args.out, runs, summary(runs, names), draw)


def main(argv: Sequence[str] | None = None) -> int:
    return command(work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
