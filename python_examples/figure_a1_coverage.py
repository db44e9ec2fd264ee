"""Figure A1: how well samples cover the level set of a classifier in the plane, and what it costs.

    python python_examples/figure_a1_coverage.py --out DIR [--quick] [--resume]

Networks are trained with cross entropy on two classes of points in [-0.35, 0.35]^2. Their decision
boundary is sampled with the same number of points in the ways of the paper's Figure A1, by
projecting uniform points or perturbed points of the level set, and evenly with
``geometry.sample_level_set``. Chamfer and Hausdorff distances are to a dense sampling. The paper
does not say how many points it takes; its figures stand beside for their order of magnitude.

coverage.csv: a row per network and method; summary.csv: means; cost.csv: points against time;
coverage.png: one network, all methods.
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
        began = time.perf_counter()
        if method == "even":
            points = sample_level_set(net, n, box(), generator=random).points
        else:
            result = ls.project(net, starts(method, dense, n, random), max_iters=50, box=box())
            points = result.points[result.converged]
        seconds = time.perf_counter() - began
        found[method] = {
            "points": points,
            **coverage(points, dense)._asdict(),
            "estimated_gap": estimate_coverage(
                net, points, box=box(), generator=torch.Generator().manual_seed(7)
            ).largest_gap,
            "seconds": seconds,
        }
    return found


def cost(seed: int, steps: int, counts: Sequence[int]) -> dict[str, Any]:
    net = classifier(seed, steps)
    seconds = []
    for n in counts:
        began = time.perf_counter()
        sample_level_set(net, n, box(), generator=torch.Generator().manual_seed(0))
        seconds.append(time.perf_counter() - began)
    return {"counts": list(counts), "seconds": seconds}


def draw(found: dict[str, Any], path: Any) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.3))
    for axis, method in zip(axes, METHODS, strict=True):
        dense, row = found["dense"], found[method]
        axis.scatter(dense[:, 0], dense[:, 1], s=0.5, color=GREY, alpha=0.5)
        color = BLUE if method == "even" else RED
        axis.scatter(row["points"][:, 0], row["points"][:, 1], s=9, color=color, zorder=3)
        axis.set_title(f"{method}\nChamfer {row['chamfer']:.4f}, Hausdorff {row['hausdorff']:.3f}")
        axis.set_aspect("equal")
        axis.set_xlim(-HALF, HALF)
        axis.set_ylim(-HALF, HALF)
    save_picture(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    networks, n, steps = (2, 60, 200) if args.quick else (10, 100, 1500)
    counts = (30, 60) if args.quick else (50, 100, 200, 400, 800, 1600)
    settings = {"seed": args.seed, "networks": networks, "points": n, "steps": steps}
    run = Run(args.out, "figure-a1", settings, networks + 1, args.resume)
    found = [
        run.unit(f"network-{k}", lambda seed=args.seed + k: one_network(seed, n, steps))  # type: ignore[misc]
        for k in range(networks)
    ]
    timed = run.unit("cost", lambda: cost(args.seed, steps, counts))
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
        summary.append(
            {
                "method": method,
                **means,
                "paper_chamfer": paper[0],
                "paper_hausdorff": paper[1],
            }
        )
    write_table(args.out / "summary.csv", summary)
    write_table(
        args.out / "cost.csv",
        [
            {"points": c, "seconds": s}
            for c, s in zip(timed["counts"], timed["seconds"], strict=True)
        ],
    )
    draw(found[0], args.out / "coverage.png")


if __name__ == "__main__":
    raise SystemExit(command(main))
