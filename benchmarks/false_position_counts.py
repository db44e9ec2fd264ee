"""How many rows a network has to evaluate to find boundary points on given segments.

    python benchmarks/false_position_counts.py [--rows 1024] [--quick] [--csv counts.csv]

Three classifiers are trained for seconds on scikit-learn's digits. The segments run between two
images of different classes, and from an image across the boundary in the direction that a gradient
walk found, as in robust training. F is the margin of the first image's class, and the goal is
|F| <= 1e-4 x the larger |F| at the segment's ends.

The baseline is plain false position as it is often written for batches: three forwards of the whole
batch in every iteration, until its last row is done or 40 iterations. All others are
``levelset_ext.false_position``: end values carried, one forward per iteration, only rows that are
not done. Only forwards are counted; D_xF at the answers is one more evaluation per row for all.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from levelset_ext.margin import margin
from levelset_ext.samplers import find_boundary
from levelset_ext.samplers.false_position import VARIANTS, search_segments

GOAL = 1e-4
BUDGET = 40


def networks() -> dict[str, nn.Module]:
    return {
        "ConvNet": nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(576, 200), nn.ReLU(), nn.Linear(200, 10),
        ),
        "MLP": nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        ),
        "deep MLP": nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(),
            *(layer for _ in range(5) for layer in (nn.Linear(128, 128), nn.ReLU())),
            nn.Linear(128, 10),
        ),
    }  # fmt: skip


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    net.eval().requires_grad_(False)


def between_images(net: nn.Module, x: Tensor, y: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Segments between images of different classes on whose ends the margin differs in sign."""
    first, second = torch.randint(len(x), (2, 4 * rows))
    first, second = first[y[first] != y[second]], second[y[first] != y[second]]
    sides = (margin(net(x[first]), y[first]) > 0) != (margin(net(x[second]), y[first]) > 0)
    first, second = first[sides][:rows], second[sides][:rows]
    return x[first], x[second], y[first]


def across_by_walk(net: nn.Module, x: Tensor, y: Tensor, rows: int) -> tuple[Tensor, ...]:
    """The example and its boundary point pushed over to the other side: a segment of a walk."""
    chosen = torch.randperm(len(x))[:rows]
    x, y = x[chosen], y[chosen]
    found = find_boundary(net, x, y, 0.4, 0.5, 0.02, 40)
    start, label = x[found.rows], y[found.rows]
    end = start + 1.3 * (found.result.points - start)
    sides = (margin(net(start), label) > 0) != (margin(net(end), label) > 0)
    return start[sides], end[sides], label[sides]


def plain_false_position(field, start: Tensor, end: Tensor) -> tuple[int, int, Tensor]:
    """Row-evaluations, iterations, and which rows reached the goal."""
    everyone = torch.arange(len(start))
    a, b, evaluated = start.clone(), end.clone(), 0
    done = torch.zeros(len(start), dtype=torch.bool)
    iterations = 0
    while iterations < BUDGET and not bool(done.all()):
        iterations += 1
        fa, fb = field(a, everyone), field(b, everyone)
        t = fa / torch.where(fa == fb, 1.0, fa - fb)
        middle = a + t[:, None] * (b - a)
        fm = field(middle, everyone)
        evaluated += 3 * len(start)
        done = fm.abs() <= GOAL
        same = ((fm > 0) == (fa > 0))[:, None]
        a, b = torch.where(same, middle, a), torch.where(same, b, middle)
    return evaluated, iterations, done


def measure(net: nn.Module, segments: tuple[Tensor, ...]) -> list[dict[str, object]]:
    start, end, label = segments
    n = len(start)
    first, last = (margin(net(x), label) for x in (start, end))
    scale = torch.maximum(first.abs(), last.abs())
    evaluated = 0

    def field(x: Tensor, rows: Tensor) -> Tensor:
        # |F| <= goal x scale is |F / scale| <= goal.
        nonlocal evaluated
        evaluated += len(rows)
        return margin(net(x), label[rows]) / scale[rows]

    theirs, iterations, done = plain_false_position(field, start, end)
    table: list[dict[str, object]] = [
        line("plain, 3 forwards, whole batch", n, theirs, iterations, done.float().mean(), theirs)
    ]
    runs = [(variant, False) for variant in VARIANTS] + [("anderson_bjorck", True)]
    for variant, known in runs:
        evaluated = 0
        result = search_segments(
            field, start, end, 0.0, BUDGET, GOAL, variant,
            start_values=first / scale if known else None,
            end_values=last / scale if known else None,
        )  # fmt: skip
        ours = evaluated - n
        most = int(result.iterations.max())
        name = variant + (", end values known" if known else "")
        table.append(line(name, n, ours, most, result.converged.float().mean(), theirs))
    return table


def line(name, n, evaluated, most, share, theirs) -> dict[str, object]:
    return {
        "method": name,
        "rows": n,
        "evaluations": evaluated,
        "per_row": evaluated / n,
        "most_iterations": most,
        "reached": float(share),
        "fewer": theirs / evaluated,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument(
        "--quick", action="store_true", help="fewer epochs and rows, and no bound that must hold"
    )
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    rows, epochs = (256, 4) if arguments.quick else (arguments.rows, 15)

    torch.manual_seed(0)
    torch.set_num_threads(1)
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, float32", file=sys.stderr
    )
    everything, worst = [], float("inf")
    for name, net in networks().items():
        train(net, x, y, epochs)
        for kind, segments in (
            ("between images", between_images(net, x, y, rows)),
            ("across by a walk", across_by_walk(net, x, y, rows)),
        ):
            table = measure(net, segments)
            print(f"\n{name}, {kind}, {table[0]['rows']} rows")
            print(f"{'method':36s} {'per row':>8s} {'most it.':>8s} {'reached':>8s} {'fewer':>8s}")
            for entry in table:
                print(
                    f"{entry['method']:36s} {entry['per_row']:8.2f} {entry['most_iterations']:8d} "
                    f"{entry['reached']:8.4f} {entry['fewer']:7.1f}x"
                )
                everything.append({"network": name, "segments": kind, **entry})
                if entry["method"] == "anderson_bjorck":
                    worst = min(worst, entry["fewer"])
    print(f"\nthe default variant: at least {worst:.1f} times fewer evaluations than plain")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(everything[0]))
            writer.writeheader()
            writer.writerows(everything)
    return 0 if arguments.quick or worst >= 10 else 1


if __name__ == "__main__":
    sys.exit(main())
