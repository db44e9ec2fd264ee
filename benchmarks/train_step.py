"""What one step of robust training costs: Eq. 12 with its sampling phase against a plain step.

    python benchmarks/train_step.py --data DIR [--checkpoint FILE] [--pairs 7] [--threads 1]
        [--set NAME=VALUE] [--json FILE]

All steps are whole steps of the same network (ConvNet-4a, or that of the checkpoint) on the same
batch of 128 training images: loss, backward, Adam. Per case:

    plain      a step of cross entropy, in the case's precision.
    robust     a step of the objective, its sampling phase included.
    floor      as many passes "forward, backward to the input" as the objective takes steps, and one
               plain step: what no implementation of that many steps over the whole batch goes
               below. Rows that leave the search early can.

Cases: "paper", Section 3.2 with 40 steps in float32, and "fast", the preset of ``levelset-ext train
robust`` with what --set changes. The three are timed in turns, in seconds of processor time, and
the ratio of every turn is taken by itself. Before that, two steps of the objective are taken with a
look at the boundary points that they find: |margin| has to be within the tolerance of the search.
How many rows a search keeps busy depends on the network, so a trained one should be given.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _command import at_least_one, check_writable, command
from torch import Tensor, nn
from torch.nn import functional

import levelset_ext as ls
from levelset_ext.data.images import load_images
from levelset_ext.field import evaluation_copy
from levelset_ext.margin import margin
from levelset_ext.objectives import CrossEntropy, Objective, Robust, level_sets
from levelset_ext.objectives.common import search_logits
from levelset_ext.recipes.classifiers import load_classifier
from levelset_ext.recipes.settings import parse_settings
from levelset_ext.recipes.train_presets import preset

BATCH = 128


def stepper(
    network: nn.Module, objective: Objective, x: Tensor, y: Tensor, autocast: bool
) -> Callable[[], dict[str, Tensor]]:
    """One step of training on a copy of the network; every call starts from the same weights."""
    start = copy.deepcopy(network).train()
    offsets = torch.zeros_like(x)

    def step() -> dict[str, Tensor]:
        nonlocal offsets
        for ours, first in zip(trained.parameters(), start.parameters(), strict=True):
            ours.data.copy_(first)
        more = {"offsets": offsets} if getattr(objective, "warm_start", 0) else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = objective(trained, x, y, generator=generator, progress=1.0, **more)
        if found.offsets is not None:
            offsets = found.offsets
        optimizer.zero_grad(set_to_none=True)
        found.loss.backward()
        optimizer.step()
        return found.figures

    trained = copy.deepcopy(start)
    optimizer = torch.optim.Adam(trained.parameters(), 1e-6, fused=True)
    generator = torch.Generator().manual_seed(0)
    return step


def passes(
    network: nn.Module, x: Tensor, y: Tensor, count: int, autocast: bool
) -> Callable[[], None]:
    logits = search_logits(network, y)

    def run() -> None:
        here = x
        for _ in range(count):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                here = here.detach().requires_grad_()
                loss = functional.cross_entropy(logits(here), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, here)
            here = here.detach() + 0.01 * gradient.sign()

    return run


def clock(run: Callable[[], Any]) -> float:
    """Seconds of processor time, which other programs on the machine disturb least."""
    began = time.process_time()
    run()
    return time.process_time() - began


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@contextlib.contextmanager
def checked_points(case: str) -> Iterator[list[int]]:
    """Checks every boundary point that an objective finds meanwhile; the list counts them.

    The points are those of the objective itself, with its steps, precision and tolerance.
    """
    search, counts = level_sets.find_boundary, []

    def checked(field: Any, x: Tensor, y: Tensor, *args: Any, **options: Any) -> Any:
        found = search(field, x, y, *args, **options)
        there = found.result.converged
        counts.append(int(there.sum()))
        if counts[-1]:
            points, rows = found.result.points[there], found.rows[there]
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                logits = evaluation_copy(field)(points)
            worst = float(margin(logits.float(), y[rows]).abs().max())
            if not worst <= options["tol"] + 1e-4:  # other batches are rounded otherwise
                raise SystemExit(f"{case}: boundary points with |margin| up to {worst:.3g}")
        return found

    level_sets.find_boundary = checked
    try:
        yield counts
    finally:
        level_sets.find_boundary = search
    if not sum(counts):
        raise SystemExit(f"{case}: expected boundary points in the timed steps, got none")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="folder with MNIST; scikit-learn's digits if left out")
    parser.add_argument("--checkpoint", type=Path, help="of levelset-ext train")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    at_least_one(args, "pairs", "threads")
    if args.json is not None:
        check_writable("json", args.json)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    data = load_images(args.data, "train", 4 * BATCH)
    x, y = data.images[:BATCH], data.labels[:BATCH]
    x = x.contiguous(memory_format=torch.channels_last)
    fast = preset("robust", data, settings=parse_settings(args.set))
    if args.checkpoint is None:
        network: nn.Module = ls.networks.build(fast.network, **fast.options)
    else:
        network = load_classifier(args.checkpoint)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    cases = {
        "paper": (Robust(), False),
        "fast": (Robust(**fast.settings), fast.autocast),
    }
    report: dict[str, Any] = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": args.threads,
        "batch": BATCH,
        "data": data.name,
        "checkpoint": args.checkpoint is not None,
        "cases": {},
    }
    for name, (objective, autocast) in cases.items():
        plain = stepper(network, CrossEntropy(), x, y, autocast)
        robust = stepper(network, objective, x, y, autocast)
        search = passes(network, x, y, objective.iters, autocast)
        with checked_points(name) as found:
            figures = robust()
            robust()
        plain()
        turns = [(clock(plain), clock(robust), clock(search)) for _ in range(args.pairs)]
        row = {
            "steps": objective.iters,
            "plain_seconds": spread([p for p, _, _ in turns]),
            "robust_seconds": spread([r for _, r, _ in turns]),
            "ratio": spread([r / p for p, r, _ in turns]),
            "floor_ratio": spread([(s + p) / p for p, _, s in turns]),
            "crossed": float(figures["crossed"]),
            "points_checked": sum(found),
        }
        report["cases"][name] = row
        print(
            f"{name:6} {objective.iters:3} steps  plain {row['plain_seconds']['median']:.3f} s  "
            f"robust {row['robust_seconds']['median']:.3f} s  "
            f"ratio {row['ratio']['median']:.2f} ({row['ratio']['min']:.2f} ... "
            f"{row['ratio']['max']:.2f})  floor {row['floor_ratio']['median']:.2f}  "
            f"crossed {row['crossed']:.2f}",
            flush=True,
        )
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(command(main))
