"""Figure A1: how well samples cover the level set of a classifier in the plane, and what it costs.

    python python_examples/figure_a1_coverage.py --out DIR [--quick] [--resume]

Networks are trained with cross entropy on two classes of points in [-0.35, 0.35]^2. Their decision
boundary is sampled with the same number of points in the ways of the paper's Figure A1, by
projecting uniform points or perturbed points of the level set until that many have arrived, and
evenly with ``geometry.sample_level_set``. Chamfer and Hausdorff distances are to a dense sampling.
The paper does not say how many points it takes; its figures stand beside for their order of
magnitude.

coverage.csv: a row per network and method; summary.csv: means, and in how many networks the even
samples have both distances smaller; cost.csv: points against CPU seconds, and how even they are;
coverage.png: one network, all methods, and the cost.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from _shared import BLUE, GREY, RED, Run, arguments, command, pyplot, save_picture, write_table
from torch import Tensor, nn

import levelset_ext as ls
from levelset_ext.geometry.coverage import coverage, estimate_coverage, sample_level_set

DTYPE = torch.float64
HALF = 0.35
PUBLISHED = {
    "uniform": (0.011, 0.141),
    "normal 0.01": (0.006, 0.017),
    "normal 0.05": (0.010, 0.132),
}
METHODS = (*PUBLISHED, "even")


def box() -> tuple[Tensor, Tensor]:
    return torch.full((2,), -HALF, dtype=DTYPE), torch.full((2,), HALF, dtype=DTYPE)


def classifier(seed: int, steps: int) -> nn.Module:
    """An MLP trained with cross entropy on 200 points, split by a wave that the seed draws."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(2, 64), nn.Softplus(20), nn.Linear(64, 64), nn.Softplus(20), nn.Linear(64, 1)
    ).double()
    x = HALF * (2 * torch.rand(200, 2, dtype=DTYPE, generator=random) - 1)
    phase, tilt = torch.rand(2, dtype=DTYPE, generator=random)
    wave = 0.12 * (14 * x[:, 0] + 6.3 * phase).sin() + 0.5 * (tilt - 0.5) * x[:, 0]
    y = (x[:, 1] > wave).double()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(steps):
        loss = nn.functional.binary_cross_entropy_with_logits(net(x)[:, 0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def dense_sampling(net: nn.Module, count: int) -> Tensor:
    """Projections of steps along and around an even sampling, many per gap."""
    random = torch.Generator().manual_seed(99)
    base = sample_level_set(net, 200, box(), rounds=0, generator=random).points
    noise = torch.randn(count, 2, dtype=DTYPE, generator=random)
    starts = base.repeat(-(-count // len(base)), 1)[:count] + 0.01 * noise
    found = ls.project(net, starts, max_iters=50, tol=1e-9, box=box())
    return found.points[found.converged]


def projections(
    net: nn.Module, method: str, dense: Tensor, n: int, random: torch.Generator
) -> Tensor:
    """The first n projections that arrive."""
    arrived = torch.empty(0, 2, dtype=DTYPE)
    while len(arrived) < n:
        found = ls.project(net, starts(method, dense, n, random), max_iters=50, box=box())
        arrived = torch.cat([arrived, found.points[found.converged]])
    return arrived[:n]


def starts(method: str, dense: Tensor, n: int, random: torch.Generator) -> Tensor:
    if method == "uniform":
        return HALF * (2 * torch.rand(n, 2, dtype=DTYPE, generator=random) - 1)
    sigma = float(method.split()[1])
    rows = torch.randint(len(dense), (n,), generator=random)
    return dense[rows] + sigma * torch.randn(n, 2, dtype=DTYPE, generator=random)


def one_network(seed: int, n: int, steps: int) -> dict[str, Any]:
    net = classifier(seed, steps)
    dense = dense_sampling(net, 20_000)
    found: dict[str, Any] = {"dense": dense}
    for method in METHODS:
        random = torch.Generator().manual_seed(seed + 1)
        began = time.process_time()
        if method == "even":
            points = sample_level_set(net, n, box(), generator=random).points
        else:
            points = projections(net, method, dense, n, random)
        seconds = time.process_time() - began
        found[method] = {
            "points": points,
            **coverage(points, dense)._asdict(),
            "estimated_gap": estimate_coverage(
                net, points, box=box(), generator=torch.Generator().manual_seed(7)
            ).largest_gap,
            "seconds": seconds,
        }
    return found


def cost(seed: int, steps: int, n: int) -> dict[str, Any]:
    net = classifier(seed, steps)
    began = time.process_time()
    points = sample_level_set(net, n, box(), generator=torch.Generator().manual_seed(0)).points
    seconds = time.process_time() - began
    estimate = estimate_coverage(net, points, box=box(), generator=torch.Generator().manual_seed(7))
    return {
        "points": len(points),
        "seconds": seconds,
        "milliseconds_per_point": 1e3 * seconds / len(points),
        "evenness": estimate.evenness,
        "largest_gap_in_spacings": estimate.largest_gap / estimate.spacing,
    }


def draw(found: dict[str, Any], timed: Sequence[dict[str, Any]], path: Any) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 5, figsize=(13.5, 3.6), layout="constrained")
    for axis, method in zip(axes, METHODS, strict=False):
        dense, row = found["dense"], found[method]
        axis.scatter(dense[:, 0], dense[:, 1], s=0.5, color=GREY, alpha=0.5)
        color = BLUE if method == "even" else RED
        axis.scatter(row["points"][:, 0], row["points"][:, 1], s=9, color=color, zorder=3)
        axis.set_title(f"{method}\nChamfer {row['chamfer']:.4f}\nHausdorff {row['hausdorff']:.4f}")
        axis.set_aspect("equal")
        axis.set_xlim(-HALF, HALF)
        axis.set_ylim(-HALF, HALF)
    counts, seconds = ([row[name] for row in timed] for name in ("points", "seconds"))
    axes[4].loglog(counts, seconds, "o-", color=BLUE, label="sample_level_set")
    axes[4].loglog(
        counts, [seconds[-1] * n / counts[-1] for n in counts], "--", color=GREY, label="linear"
    )
    axes[4].set_title("cost of even samples")
    axes[4].set_xlabel("points")
    axes[4].set_ylabel("CPU seconds")
    axes[4].legend()
    save_picture(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    networks, n, steps = (2, 60, 200) if args.quick else (10, 100, 1500)
    counts = (30, 60) if args.quick else (100, 300, 1000, 3000, 10_000, 30_000, 100_000)
    settings = {"seed": args.seed, "networks": networks, "points": n, "steps": steps}
    run = Run(args.out, "figure-a1", settings, networks + len(counts), args.resume)
    found = [
        run.unit(f"network-{k}", lambda seed=args.seed + k: one_network(seed, n, steps))  # type: ignore[misc]
        for k in range(networks)
    ]
    timed = [
        run.unit(f"cost-{count}", lambda count=count: cost(args.seed, steps, count))  # type: ignore[misc]
        for count in counts
    ]
    fields = ("chamfer", "hausdorff", "estimated_gap", "seconds")
    rows = [
        {"network": k, "method": m, "points": len(f[m]["points"]), **{x: f[m][x] for x in fields}}
        for k, f in enumerate(found)
        for m in METHODS
    ]
    write_table(args.out / "coverage.csv", rows)
    summary = []
    for method in METHODS:
        some = [row for row in rows if row["method"] == method]
        means = {x: sum(row[x] for row in some) / len(some) for x in fields}
        paper = PUBLISHED.get(method, (float("nan"), float("nan")))
        beaten = [all(f["even"][x] < f[method][x] for x in ("chamfer", "hausdorff")) for f in found]
        summary.append(
            {
                "method": method,
                **means,
                "networks": len(found),
                "even_is_better": "" if method == "even" else sum(beaten),
                "paper_chamfer": paper[0],
                "paper_hausdorff": paper[1],
            }
        )
    write_table(args.out / "summary.csv", summary)
    write_table(
        args.out / "cost.csv", [{k: v for k, v in row.items() if k != "kind"} for row in timed]
    )
    draw(found[0], timed, args.out / "coverage.png")


if __name__ == "__main__":
    raise SystemExit(command(main))
