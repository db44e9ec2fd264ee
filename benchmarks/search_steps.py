"""How many examples does the search for boundary points carry over, by which steps?

    python benchmarks/search_steps.py RUN/checkpoint.pt ... --data DIR [--rows 256] [--out FILE]

For every trained classifier and every rule of steps: the share of the correctly classified images
whose walk crosses the boundary within eps = 0.4 and whose search converges, evaluations (forward
and backward) a row, processor seconds. Every point that is counted is checked: it lies in its box
and its margin is below the tolerance.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from _command import at_least_one, check_writable, command
from torch import Tensor, nn

import levelset_ext as ls
from levelset_ext import build_info
from levelset_ext.data.images import load_images
from levelset_ext.margin import margin
from levelset_ext.recipes.classifiers import fast_order, load_classifier

EPS, TOLERANCE = 0.4, 1e-5
RULES: dict[str, dict[str, Any]] = {
    "40 x 0.01 (the paper's)": {"step": 0.01, "iters": 40},
    "20 x 0.02": {"step": 0.02, "iters": 20},
    "10 x 0.04": {"step": 0.04, "iters": 10},
    "10 x 0.08": {"step": 0.08, "iters": 10},
    "20, 0.2 to 0.005": {"step": 0.2, "step_last": 0.005, "iters": 20},
    "10, 0.2 to 0.01": {"step": 0.2, "step_last": 0.01, "iters": 10},
    "40, 0.2 to 0.002": {"step": 0.2, "step_last": 0.002, "iters": 40},
}


class Counter(nn.Module):
    """Rows that a network has evaluated."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.rows = network, [0]  # a list is shared with the copies samplers make

    def forward(self, x: Tensor) -> Tensor:
        self.rows[0] += len(x)
        return self.network(x)


def measure(
    network: nn.Module, x: Tensor, y: Tensor, rule: dict[str, Any], seed: int
) -> list[float]:
    counter = Counter(network)
    began = time.process_time()
    found = ls.find_boundary(
        counter.forward, x, y, EPS, EPS, **rule, tol=TOLERANCE,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    spent = time.process_time() - began
    good = found.result.converged
    points, rows = found.result.points[good], found.rows[good]
    assert bool(((points - x[rows]).abs() <= EPS + 1e-6).all()), "a point outside its box"
    with torch.no_grad():
        there = margin(network(points), y[rows]).abs()
    assert bool((there <= 10 * TOLERANCE).all()), f"a margin of {there.max():.1e} at a root"
    return [len(rows) / len(x), counter.rows[0] / len(x), spent]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    at_least_one(args, "seeds")
    if args.out is not None:
        check_writable("out", args.out)
    test = load_images(args.data, "test", args.rows)
    x, y = test.images, test.labels.long()
    networks: dict[str, Any] = {}
    for path in args.checkpoints:
        network = fast_order(load_classifier(path)).eval()
        with torch.no_grad():
            right = margin(network(x), y) > 0
        rules = networks.setdefault(path.parent.name, {})
        print(f"{path.parent.name}: {int(right.sum())} of {len(x)} images classified correctly")
        for name, rule in RULES.items():
            runs = [measure(network, x[right], y[right], rule, seed) for seed in range(args.seeds)]
            shares, counts, seconds = zip(*runs, strict=True)
            rules[name] = {"share": shares, "evaluations": counts, "cpu_seconds": seconds}
            print(
                f"  {name:24} {100 * min(shares):5.1f} to {100 * max(shares):5.1f} % of the rows, "
                f"{sum(counts) / len(counts):5.1f} evaluations a row, {min(seconds):6.2f} s",
                flush=True,
            )
    if args.out is not None:
        result = {"eps": EPS, "rows": args.rows, "networks": networks, "build": build_info()}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(command(main))
