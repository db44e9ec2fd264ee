"""``levelset-ext reconstruct`` and ``compare`` on every scan of a folder, in one JSON file.

    python benchmarks/reconstruct_scans.py SCANS --work DIR --json FILE [--preset fast]

SCANS holds NAME.ply and the surfaces they were taken from, truth/NAME.ply. Each run is a folder
DIR/NAME; what is finished there is not made again. Where the true surface is open, the mesh is
compared once more without what ``levelset-ext trim --distance 0.01`` takes off.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from levelset_ext import build_info
from levelset_ext.data.meshes import read_mesh

KEPT = ("cpu_seconds", "peak_memory_gb", "converged_share", "rank_deficient_rows", "steps")


def command(*words: str) -> str:
    """What a command of the package prints."""
    found = subprocess.run(
        [sys.executable, "-m", "levelset_ext", *words], check=True, stdout=subprocess.PIPE
    )
    return found.stdout.decode()


def one(scan: Path, truth: Path, args: argparse.Namespace) -> dict[str, Any]:
    out = args.work / scan.stem
    options = ("--preset", args.preset, "--seed", str(args.seed), "--device", args.device)
    command("reconstruct", str(scan), "--out", str(out), *options, "--resume")
    metrics = json.loads((out / "metrics.json").read_text())
    compared = {"compare": json.loads(command("compare", str(out / "mesh.ply"), str(truth)))}
    if not read_mesh(truth).is_watertight:
        trimmed = str(out / "trimmed.ply")
        command("trim", str(out / "mesh.ply"), str(scan), "--distance", "0.01", "--out", trimmed)
        compared["trimmed"] = json.loads(command("compare", trimmed, str(truth)))
    return {
        **compared,
        "wall_seconds": metrics["seconds"],
        **{name: metrics[name] for name in KEPT if name in metrics},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans", type=Path, metavar="SCANS")
    parser.add_argument("--work", required=True, type=Path, metavar="DIR")
    parser.add_argument("--json", required=True, type=Path, metavar="FILE")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    scans = sorted(args.scans.glob("*.ply"))
    if not scans:
        raise SystemExit(f"{args.scans}: expected point clouds NAME.ply, got none")
    found = {scan.stem: one(scan, args.scans / "truth" / scan.name, args) for scan in scans}
    result = {
        "command": f"levelset-ext reconstruct SCAN --preset {args.preset} --seed {args.seed}; "
        "levelset-ext compare MESH TRUTH",
        "build": build_info(),
        "scans": found,
    }
    args.json.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
