"""Level sets inside a network: keep the switching surfaces of hidden units away from the data.

    python python_examples/hidden_margin.py --out DIR [--quick] [--resume]

A ReLU unit switches where its input is 0. That set is a level set of a hidden unit, and is sampled
and controlled like the output's: ``LayerField`` names the unit, ``project`` finds the nearest point
of it, ``sample_network`` lets it move. Two networks are trained on scikit-learn's digits from the
same start on the same batches: cross entropy alone, and with

    mean over rows of max(0, eps - |x - p(theta)|),    p on the zero set of a unit

of the second layer, another unit every step. Measured on test images: the distance to the nearest
switching surface of that layer, and the share of units that L_inf noise switches.

hidden.csv: both networks; hidden.png: noise against switched units.
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
    steps = 400 if args.quick else 2000
    settings = {"seed": args.seed, "steps": steps, "eps": EPS, "weight": WEIGHT}
    run = Run(args.out, "hidden-margin", settings, 2, args.resume)
    found = {
        kind: run.unit(kind, lambda kind=kind: one(kind, args.seed, steps))  # type: ignore[misc]
        for kind in ("plain", "margin")
    }
    rows = []
    for kind, values in found.items():
        row = {"network": kind, **{k: v for k, v in values.items() if isinstance(v, float)}}
        rows.append(
            row | {f"switched_{e}": v for e, v in zip(NOISE, values["switched"], strict=True)}
        )
    write_table(args.out / "hidden.csv", rows)
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(4.6, 3.4))
    for kind, color in (("plain", RED), ("margin", BLUE)):
        label = "cross entropy" if kind == "plain" else "with margins of hidden units"
        axis.plot(NOISE, found[kind]["switched"], "o-", color=color, label=label)
    axis.set_xlabel("L_inf noise of this size in every pixel")
    axis.set_ylabel("share of hidden units that switch")
    axis.set_ylim(bottom=0)
    axis.legend()
    save_picture(figure, args.out / "hidden.png")


if __name__ == "__main__":
    raise SystemExit(command(main))
