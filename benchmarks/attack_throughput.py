"""PGD-40 on 1000 MNIST-sized images with ConvNet-4a: ``attacks.evaluate`` against a bare loop.

    python benchmarks/attack_throughput.py [--rows 1000] [--repeats 3] [--threads 1] [--device cpu]

The bare loop is what one writes by hand: the same starts, forty times forward, backward to the
input, step and clip on all rows, and a look at the predictions. Both run in turns on one batch
after the other. They must break the same rows before any time counts. Two cases:

    standing   a radius at which no row breaks: what checks, accounting and the per-row starts cost.
               The target is a ratio of at most 1.1.
    falling    a radius at which about half of the rows break and leave the batch.

The network is untrained and the labels are its own predictions: the time of a step does not depend
on either.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time

import torch
from _command import at_least_one, command
from torch import Tensor, nn
from torch.nn import functional

from levelset_ext import attacks
from levelset_ext.networks import build
from levelset_ext.recipes.devices import parse_device

ITERS, TARGET = 40, 1.1


def bare(
    network: nn.Module, x: Tensor, y: Tensor, start: Tensor, eps: float, step: float
) -> Tensor:
    """Rows (n,) bool that are wrong at some iterate."""
    with torch.no_grad():
        broken = network(x).argmax(1) != y
    delta = start
    for _ in range(ITERS):
        delta.requires_grad_()
        logits = network(x + delta)
        loss = functional.cross_entropy(logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            broken |= logits.argmax(1) != y
            delta = (delta + step * gradient.sign()).clamp(-eps, eps)
            delta = (x + delta).clamp(0, 1) - x
    with torch.no_grad():
        return broken | (network(x + delta).argmax(1) != y)


def half_radius(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """About the radius within which half of the rows break: the median linearised distance."""
    with torch.no_grad():
        top = network(x).topk(2, dim=1)
    point = x.clone().requires_grad_()
    logits = network(point)
    gap = logits.gather(1, y[:, None]) - logits.gather(1, top.indices[:, 1:])
    (gradient,) = torch.autograd.grad(gap.sum(), point)
    return float((gap.detach()[:, 0] / gradient.flatten(1).abs().sum(1)).median())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    at_least_one(args, "rows", "batch", "repeats", "threads")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = parse_device(args.device)
    network = build("convnet-4a").to(device).eval()
    x = torch.rand(args.rows, 1, 28, 28).to(device)
    last = network.classifier[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.bias -= network(x[: args.batch]).mean(0)  # else it says the same of every image
        y = network(x).argmax(1)
    half = half_radius(network, x[: args.batch], y[: args.batch])
    report: dict[str, object] = {}
    worst = 0.0
    for case, eps in (("standing", half / 1e4), ("falling", half)):
        step = 2.5 * eps / ITERS
        spent: dict[str, list[float]] = {"evaluate": [], "bare": []}
        worked: dict[str, list[float]] = {"evaluate": [], "bare": []}
        broken = 0
        for repeat in range(args.repeats):
            for turn, at in enumerate(range(0, args.rows, args.batch)):
                some, labels = x[at : at + args.batch], y[at : at + args.batch]
                rows = range(at, at + len(some))
                start = attacks.random_start(
                    (1, 28, 28), rows, seed=0, restart=0, norm="linf", eps=eps
                ).to(device)
                start = (some + start).clamp(0, 1) - some
                success: dict[str, Tensor] = {}
                order = ("evaluate", "bare") if (repeat + turn) % 2 else ("bare", "evaluate")
                for which in order:
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    began, worked_before = time.perf_counter(), time.process_time()
                    if which == "bare":
                        success[which] = bare(network, some, labels, start.clone(), eps, step).cpu()
                    else:
                        success[which] = attacks.evaluate(
                            network,
                            some,
                            labels,
                            "pgd-xent",
                            eps=eps,
                            step=step,
                            iters=ITERS,
                            batch=args.batch,
                            rows=range(at, at + len(some)),
                        ).success
                    spent[which].append(time.perf_counter() - began)
                    worked[which].append(time.process_time() - worked_before)
                differ = int((success["evaluate"] != success["bare"]).sum())
                # A row on the boundary may fall to the rounding of another batch size.
                if differ > (0 if case == "standing" else len(some) // 100):
                    print(f"{case}: the results differ in {differ} rows", file=sys.stderr)
                    return 1
                if repeat == 0:
                    broken += int(success["evaluate"].sum())
        pairs = zip(spent["evaluate"], spent["bare"], strict=True)
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        total = {name: sum(values) / args.repeats for name, values in spent.items()}
        report[case] = {
            "rows": args.rows,
            "broken": broken,
            "seconds": {name: round(value, 3) for name, value in total.items()},
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_lowest": round(ratios[0], 3),
            "ratio_highest": round(ratios[-1], 3),
            # Of processor time, which other programs on the machine disturb less.
            "ratio_cpu": round(sum(worked["evaluate"]) / sum(worked["bare"]), 3),
        }
        worst = max(worst, statistics.median(ratios))
    report["target"], report["met"] = TARGET, worst <= TARGET
    report["environment"] = {
        "torch": torch.__version__,
        "threads": args.threads,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(command(main))
