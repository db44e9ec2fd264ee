"""Level sets inside a network: keep the switching surfaces of hidden units away from the data.

    python python_examples/hidden_margin.py --out DIR [--quick] [--resume]

A ReLU unit switches where its input is 0. That set is a level set of a hidden unit, and is sampled
and controlled like the output's: ``LayerField`` names the unit, ``project`` finds the nearest point
of it, ``sample_network`` lets it move. Two networks are trained on scikit-learn's digits from the
same start on the same batches: cross entropy alone, and with

    mean over rows of max(0, eps - |x - p(theta)|),    p on the zero set of a unit

of the second layer, another unit every step, for several starts. Measured on test images: the
distance to the nearest switching surface of that layer, and the share of units that L_inf noise
switches.

hidden.csv: every network; hidden.json: means and standard deviations over the starts; hidden.png:
noise against switched units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from _shared import (
    BLUE,
    RED,
    Run,
    arguments,
    command,
    pyplot,
    quantiles,
    save_picture,
    train_classifier,
    write_table,
)
from torch import Tensor, nn

import levelset_ext as ls
from levelset_ext.data.images import load_images
from levelset_ext.recipes.files import write_json

LAYER, UNITS, EPS, WEIGHT = "3", 24, 0.15, 2.0
NOISE = (0.02, 0.05, 0.1, 0.15, 0.2)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 48),
        nn.Softplus(10),
        nn.Linear(48, UNITS),
        nn.ReLU(),
        nn.Linear(UNITS, 10),
    )


def switching_distance(net: nn.Module, x: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """|x - p(theta)| of the rows whose nearest point on the unit's zero set was found, (m,), and
    which they are, (n,) bool."""
    field = ls.LayerField(net, LAYER, unit)
    found = ls.project(field, x, max_iters=8, tol=1e-3)
    near = found.converged
    if not bool(near.any()):
        return x.new_zeros(0), near
    p = ls.sample_network(field, found[near])
    return (x[near] - p).flatten(1).norm(dim=1), near


def one(kind: str, seed: int, steps: int) -> dict[str, Any]:
    train, test = load_images(None, "train"), load_images(None, "test")
    net = network(seed)
    units = torch.randint(UNITS, (steps,), generator=torch.Generator().manual_seed(seed)).tolist()

    def loss_of(x: Tensor, y: Tensor, step: int) -> Tensor:
        loss = nn.functional.cross_entropy(net(x), y)
        if kind == "margin":
            distance, _ = switching_distance(net, x, units[step])
            loss = loss + WEIGHT * (EPS - distance).clamp(min=0).sum() / len(x)
        return loss

    train_classifier(net, train.images, train.labels, loss_of, steps, seed=seed)
    x, y = test.images, test.labels
    with torch.no_grad():
        accuracy = float((net(x).argmax(1) == y).double().mean())
        on = net[:4](x) > 0
        switched = []
        for eps in NOISE:
            noise = eps * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).sign()
            switched.append(float(((net[:4](x + noise) > 0) != on).double().mean()))
    nearest = torch.full((len(x),), torch.inf)
    for unit in range(UNITS):
        distance, rows = switching_distance(net, x, unit)
        nearest[rows] = torch.minimum(nearest[rows], distance.detach())
    low, middle, high = quantiles(nearest, (0.1, 0.5, 0.9))
    return {
        "accuracy": accuracy,
        "distance_10": low,
        "distance_median": middle,
        "distance_90": high,
        "switched": switched,
        "active": float(on.double().mean()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    steps, starts = (400, 1) if args.quick else (2000, 5)
    settings = {"seed": args.seed, "steps": steps, "starts": starts, "eps": EPS, "weight": WEIGHT}
    run = Run(args.out, "hidden-margin", settings, 2 * starts, args.resume)
    rows, summary = [], {}
    for kind in ("plain", "margin"):
        some = []
        for seed in range(args.seed, args.seed + starts):
            values = run.unit(f"{kind}-{seed}", lambda k=kind, s=seed: one(k, s, steps))  # type: ignore[misc]
            row = {k: v for k, v in values.items() if isinstance(v, float)}
            for eps, share in zip(NOISE, values["switched"], strict=True):
                row[f"switched_{eps}"] = share
            some.append(row)
            rows.append({"network": kind, "seed": seed, **row})
        columns = {name: torch.tensor([row[name] for row in some]).double() for name in some[0]}
        summary[kind] = {
            name: {"mean": float(x.mean()), "deviation": float(x.std()) if starts > 1 else None}
            for name, x in columns.items()
        }
    write_table(args.out / "hidden.csv", rows)
    write_json(args.out / "hidden.json", {"settings": settings, **summary})
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(4.6, 3.4))
    for kind, color in (("plain", RED), ("margin", BLUE)):
        label = "cross entropy" if kind == "plain" else "with margins of hidden units"
        found = [summary[kind][f"switched_{eps}"] for eps in NOISE]
        axis.errorbar(
            NOISE,
            [100 * f["mean"] for f in found],
            [100 * (f["deviation"] or 0.0) for f in found],
            fmt="o-",
            capsize=3,
            color=color,
            label=label,
        )
    axis.set_xlabel("L_inf noise of this size in every pixel")
    axis.set_ylabel("hidden units that switch, %")
    axis.set_ylim(bottom=0)
    axis.legend()
    save_picture(figure, args.out / "hidden.png")


if __name__ == "__main__":
    raise SystemExit(command(main))
