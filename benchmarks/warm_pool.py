"""A warm pool of samples against new ones in every step, at equal steps of the reconstruction.

    python benchmarks/warm_pool.py [SCAN TRUTH] [--steps 600] [--seeds 2] [--cases A,B]
        [--json FILE]

Without SCAN the synthetic one is used. Cases:

    fast     preset "fast": 512 of a step's rows are projected, from starts 0.03 from the cloud.
    paper    the share and the starts of the paper: 2500 rows of 5000 are projected in up to 10
             iterations of full length, from starts 0.1 from the cloud and in the box; FC 256 x 6
             with ReLU, Eq. 13 with p = 1.

In each case: new samples, and pools of several sizes, jitters and shares of new points. The figures
of a run: processor time of a step, evaluations of the network (with its Jacobian) per projected
row, the share of rows that converged, and the distances of ``levelset-ext compare`` between the
extracted surface and the true one. One thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from _command import at_least_one, check_writable, command
from torch import Tensor

from levelset_ext.data.meshes import read_mesh
from levelset_ext.data.scans import Normalization, synthetic_scan
from levelset_ext.errors import InputError
from levelset_ext.geometry.compare import compare_meshes
from levelset_ext.geometry.extract import extract_mesh
from levelset_ext.recipes.files import write_json
from levelset_ext.recipes.reconstruct import ReconstructConfig, Training, load_cloud, preset
from levelset_ext.result import LevelSetResult

POOLS: dict[str, dict[str, Any]] = {
    "new": {},
    "pool 4096, jitter 0.01": {"warm_pool": 4096, "warm_jitter": 0.01, "warm_iters": 2},
    "pool 4096, jitter 0.03": {"warm_pool": 4096, "warm_jitter": 0.03, "warm_iters": 3},
    "pool 20000, jitter 0.01": {"warm_pool": 20_000, "warm_jitter": 0.01, "warm_iters": 2},
}


def cases(steps: int, seed: int) -> dict[str, ReconstructConfig]:
    fast = replace(preset("fast", steps, seed), pool=30_000)
    paper = replace(
        fast,
        width=256,
        hidden_layers=6,
        activation="relu",
        p=1.0,
        projected=2500,
        general=2500,
        cloud_points=2500,
        projected_noise=((0.1, 0.8),),
        newton_iters=10,
        newton_step=float("inf"),
    )
    return {"fast": fast, "paper": paper}


class Counting(Training):
    """Counts evaluations of projected rows: one for every update, and one before the first."""

    evaluations = 0

    def samples(self) -> tuple[list[LevelSetResult], LevelSetResult, Tensor | None]:
        found = super().samples()
        self.evaluations += sum(int(part.iterations.sum()) + len(part) for part in found[0])
        return found


def run(cloud: Tensor, truth: trimesh.Trimesh, config: ReconstructConfig) -> dict[str, Any]:
    training = Counting(cloud, config)
    began = time.process_time()
    while training.step < config.steps:
        training.advance()
    seconds = time.process_time() - began
    box = training.low.double().numpy(), training.high.double().numpy()
    mesh = extract_mesh(training.network, box, resolution=160)
    compared = compare_meshes(
        trimesh.Trimesh(mesh.vertices, mesh.faces, process=False), truth, dense_samples=500_000
    )
    return {
        "ms_per_step": 1e3 * seconds / config.steps,
        "evaluations_per_row": training.evaluations / training.projected_rows,
        "converged_share": training.converged_rows / training.projected_rows,
        **{k: compared[k] for k in ("point_to_surface", "hausdorff", "normal_consistency")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scan", nargs="?", metavar="SCAN", help="point cloud")
    parser.add_argument("truth", nargs="?", type=Path, metavar="TRUTH", help="its surface")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--paper-steps", type=int, help="of the case paper; as --steps if left out")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--cases", default="fast,paper")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    at_least_one(args, "steps", "paper_steps", "seeds")
    chosen, known = args.cases.split(","), list(cases(1, 0))
    if strange := [name for name in chosen if name not in known]:
        raise InputError(f"cases: expected some of {', '.join(known)}, got {strange[0]!r}")
    if args.json is not None:
        check_writable("json", args.json)
    if (args.scan is None) != (args.truth is None):
        raise InputError(f"scan, truth: expected both or neither, got {args.scan} alone")
    torch.set_num_threads(1)
    if args.scan is None:
        made = synthetic_scan(60_000)
        points, truth = made.points, made.truth
    else:
        points, truth = load_cloud(args.scan, 0).points, read_mesh(args.truth)
    normal = Normalization.fit(points)
    cloud = torch.from_numpy(normal.to_unit(points).astype(np.float32))
    surface = trimesh.Trimesh(normal.to_unit(truth.vertices), truth.faces, process=False)

    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for case in chosen:
        for seed in range(args.seeds):
            steps = args.paper_steps if case == "paper" and args.paper_steps else args.steps
            config = cases(steps, seed)[case]
            for name, changes in POOLS.items():
                found = run(cloud, surface, replace(config, **changes))
                results.setdefault(case, {}).setdefault(name, []).append({"seed": seed, **found})
                print(f"{case}, {name}, seed {seed}: {json.dumps(found)}", flush=True)
    if args.json is not None:
        write_json(
            args.json,
            {
                "scan": "synthetic" if args.scan is None else Path(args.scan).stem,
                "steps": {"fast": args.steps, "paper": args.paper_steps or args.steps},
                "threads": 1,
                "machine": f"{platform.machine()}, torch {torch.__version__}",
                "pools": POOLS,
                "results": results,
            },
        )


if __name__ == "__main__":
    raise SystemExit(command(main))
