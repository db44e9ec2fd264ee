"""How near the curve of ``levelset-ext curve`` comes to the one its points were taken from.

    python benchmarks/curve_accuracy.py --out benchmarks/results/curve_fast.json [--seeds 10]

The paper's data (supplementary 2.4): 300 points of a closed spline, noise 0.01, one spline a seed;
then more noise, and parts left out. Distances are in input units, in which the splines are about 2
across. ``truth_to_curve`` leaves out what is missing from the points, ``hausdorff`` does not.
``cpu_seconds`` counts every thread, from the start to the written curve.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _command import at_least_one, check_writable, command

from levelset_ext.data.curves import synthetic_curve
from levelset_ext.recipes.curve import CurvePoints, curve_preset, reconstruct_curve

KEPT = ("components", "closed", "length", "longest_edge_share", "cloud_to_curve", "against_truth")


def one(seed: int, noise: float, missing: float) -> dict[str, Any]:
    made = synthetic_curve(seed=seed, noise=noise, missing=missing)
    cloud = CurvePoints(made.points, "synthetic curve", made.truth, made.missing)
    began, used = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        metrics = reconstruct_curve(cloud, Path(folder) / "run", curve_preset("fast", seed=seed))
    return {
        "seed": seed,
        "noise": noise,
        "missing_share": missing,
        **{name: metrics[name] for name in (*KEPT, "converged_share", "steps")},
        "cpu_seconds": time.process_time() - used,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, metavar="JSON")
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    at_least_one(args, "seeds")
    check_writable("out", args.out)
    cases = [(seed, 0.01, 0.0) for seed in range(args.seeds)]
    for seed in range(min(3, args.seeds)):
        cases += [(seed, 0.05, 0.0), (seed, 0.1, 0.0), (seed, 0.01, 1 / 6), (seed, 0.01, 1 / 4)]
    runs = []
    for case in cases:
        runs.append(one(*case))
        truth = runs[-1]["against_truth"]
        print(
            f"seed {case[0]} noise {case[1]} missing {case[2]:.2f}:",
            f"{runs[-1]['components']} curve(s),",
            f"to truth {truth['curve_to_truth']:.4f},",
            f"from truth {truth['truth_to_curve']:.4f},",
            f"{runs[-1]['cpu_seconds']:.0f} s of CPU",
            file=sys.stderr,
        )
    environment = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    args.out.write_text(json.dumps({"environment": environment, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(command(main))
