"""Does Newton's method reach the level set, how does it compare, and what do its points look like?

    python python_examples/newton_questions.py --out DIR --quick                 (digits)
    python python_examples/newton_questions.py --out DIR --data MNIST_FOLDER     (the full setting)
    ... --checkpoint CHECKPOINT                                    (a trained network of your own)

The questions are the paper's reviewers'. F is Eq. 1, the margin f_j - max_{i != j} f_i of one
class j (--label); its zero level set is the decision boundary of that class. Test images are
projected.

residuals.csv, .png   |F(p)| after k = 0 ... 20 Newton steps, as quantiles over the rows, and the
                      share that has converged, of an untrained network and of a trained one
methods.csv, .png     Newton, damped Newton (steps of bounded length), gradient descent and L-BFGS
                      on 1/2 F^2, false position: how many rows each brings below the tolerance;
                      then, on the rows that all of them solve, evaluations of F and of F with
                      its gradient, seconds (median and quartiles of runs in turn), and how far
                      the points moved
images.png            test images, the boundary points found from them, the differences

False position starts from what the others do not have, an image on the other side of the boundary
(the nearest one of the training rows); its search for that image is not counted. The step size of
gradient descent and the bound of damped Newton are the best of a list, chosen on training rows.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _shared import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    Run,
    arguments,
    class_margin,
    command,
    images_digest,
    pyplot,
    quantiles,
    save_picture,
    train_classifier,
    write_table,
)
from torch import Tensor, nn

import levelset_ext as ls
from levelset_ext.data.images import Images, load_images
from levelset_ext.errors import InputError
from levelset_ext.networks import build
from levelset_ext.recipes.classifiers import classifier_state, load_classifier
from levelset_ext.recipes.progress import say
from levelset_ext.recipes.run_folder import network_digest

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
FLOOR = 1e-8  # smaller residuals, 0 among them, are drawn here
COLORS = {
    "newton": BLUE,
    "damped newton": GREEN,
    "gradient descent": RED,
    "l-bfgs": ORANGE,
    "false position": GREY,
}


@dataclass(frozen=True)
class Setting:
    rows: int = 1000
    train_rows: int = 60_000
    train_steps: int = 2000
    steps: int = 20  # k of the first question
    tol: float = 1e-4  # logits of size 10 cannot be told apart by much less in float32
    rounds: int = 9
    descent_steps: int = 5000
    label: int = 3
    seed: int = 0


QUICK = Setting(rows=200, train_rows=1437, train_steps=300, rounds=5, descent_steps=1000)

Field = Callable[[Tensor], Tensor]


class Counting:
    """A field that counts the rows it is evaluated at, with and without a gradient."""

    def __init__(self, field: Field) -> None:
        self.field, self.plain, self.with_gradient = field, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            self.with_gradient += len(x)
        else:
            self.plain += len(x)
        return self.field(x)


def residual_rows(network: str, field: Field, x: Tensor, setting: Setting) -> list[dict[str, Any]]:
    rows = []
    for k in range(setting.steps + 1):
        found = ls.project(field, x, max_iters=k, tol=setting.tol)
        row: dict[str, Any] = {"network": network, "steps": k}
        for share, value in zip(SHARES, quantiles(found.residual, SHARES), strict=True):
            row[f"q{round(100 * share)}"] = value
        row["largest"] = quantiles(found.residual, (1.0,))[0]
        row["converged_share"] = float((found.residual <= setting.tol).float().mean())
        row["finite_share"] = float(torch.isfinite(found.residual).float().mean())
        rows.append(row)
    return rows


def across(field: Field, x: Tensor, pool: Tensor) -> Tensor:
    """For every row the nearest row of the pool on the other side of the boundary."""
    with torch.no_grad():
        sides, pool_sides = field(x) > 0, field(pool) > 0
    distance = torch.cdist(x.flatten(1), pool.flatten(1))
    distance[sides[:, None] == pool_sides[None]] = torch.inf
    if not torch.isfinite(distance.amin(1)).all():
        raise InputError("label: expected a class that the network says of some rows and not all")
    return pool[distance.argmin(1)]


# (field, starts, ends on the other side) -> result; only false position looks at the ends.
Solver = Callable[[Field, Tensor, Tensor], ls.LevelSetResult]


def choose_solvers(
    field: Field, tuning: Tensor, setting: Setting
) -> tuple[dict[str, Solver], dict[str, str]]:
    """Every method, and what was chosen on the tuning rows for the two that have a length."""
    tol = setting.tol

    def newton(f: Field, x: Tensor, max_step: float = math.inf) -> ls.LevelSetResult:
        return ls.project(f, x, 0.0, 50, tol, max_step=max_step)

    def descent(f: Field, x: Tensor, step_size: float) -> ls.LevelSetResult:
        limit = setting.descent_steps
        return ls.project(f, x, 0.0, limit, tol, "gradient_descent", step_size=step_size)

    def best(values: Sequence[float], solve: Callable[[float], ls.LevelSetResult]) -> float:
        """The one that solves most rows, among equals the one with fewest updates."""
        score = {}
        for value in values:
            found = solve(value)
            score[value] = (int(found.converged.sum()), -int(found.iterations.sum()))
        return max(score, key=lambda value: score[value])

    size = best((1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1), lambda v: descent(field, tuning, v))
    most = best((0.1, 0.3, 1.0, 3.0), lambda v: newton(field, tuning, v))
    solve: dict[str, Solver] = {
        "newton": lambda f, x, end: newton(f, x),
        "damped newton": lambda f, x, end: newton(f, x, most),
        "gradient descent": lambda f, x, end: descent(f, x, size),
        "l-bfgs": lambda f, x, end: ls.project(f, x, 0.0, 200, tol, "lbfgs"),
        "false position": lambda f, x, end: ls.false_position(f, x, end, 0.0, 60, tol),
    }
    chosen = {"damped newton": f"steps <= {most:g}", "gradient descent": f"step size {size:g}"}
    return solve, chosen


def method_rows(field: Field, x: Tensor, pool: Tensor, setting: Setting) -> list[dict[str, Any]]:
    """First what each method solves, then, on the rows that all solve, what it costs."""
    solve, chosen = choose_solvers(field, pool[:32], setting)
    ends = across(field, x, pool)
    results = {name: method(field, x, ends) for name, method in solve.items()}
    solved = {
        name: (found.residual <= setting.tol) & torch.isfinite(found.residual)
        for name, found in results.items()
    }
    common = torch.nonzero(torch.stack(list(solved.values())).all(0)).squeeze(1)
    if len(common) == 0:
        raise InputError("no row is solved by all methods; more training or --descent-steps help")
    x, ends = x[common], ends[common]
    rows: list[dict[str, Any]] = []
    for name, method in solve.items():
        counting = Counting(field)
        found = method(counting, x, ends)
        moved = (found.points - x).flatten(1).norm(dim=1)
        rows.append(
            {
                "method": name,
                "chosen": chosen.get(name, ""),
                "solved_share": float(solved[name].float().mean()),
                "rows_compared": len(common),
                "largest_residual": float(found.residual.max()),
                "updates_median": float(found.iterations.double().median()),
                "updates_largest": int(found.iterations.max()),
                "gradients_per_row": counting.with_gradient / len(common),
                "values_per_row": counting.plain / len(common),
                "distance_median": float(moved.median()),
            }
        )
        if not rows[-1]["largest_residual"] <= setting.tol:
            raise RuntimeError(f"{name}: residual {rows[-1]['largest_residual']} on its own rows")
    seconds: dict[str, list[float]] = {name: [] for name in solve}
    for _ in range(setting.rounds):
        for name, method in solve.items():
            began = time.perf_counter()
            method(field, x, ends)
            seconds[name].append(time.perf_counter() - began)
    for row in rows:
        low, middle, high = statistics.quantiles(seconds[row["method"]], n=4)
        row.update(seconds=middle, seconds_q25=low, seconds_q75=high)
    # Of each round, so that a machine that is slow for a while is slow for both.
    for row in rows:
        pairs = zip(seconds[row["method"]], seconds["newton"], strict=True)
        row["times_newton"] = statistics.median(a / b for a, b in pairs)
    return rows


def draw_residuals(plt: Any, rows: list[dict[str, Any]], setting: Setting, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for axis, network, color in zip(axes, ("untrained", "trained"), (ORANGE, BLUE), strict=False):
        some = [row for row in rows if row["network"] == network]
        k = [row["steps"] for row in some]

        def line(key: str, some: list[dict[str, Any]] = some) -> list[float]:
            return [max(row[key], FLOOR) for row in some]

        axis.fill_between(k, line("q10"), line("q90"), color=color, alpha=0.15, label="10 - 90 %")
        axis.fill_between(k, line("q25"), line("q75"), color=color, alpha=0.3, label="25 - 75 %")
        axis.plot(k, line("q50"), color=color, label="median")
        axis.plot(k, line("largest"), color=color, lw=0.8, ls=":", label="largest")
        axis.axhline(setting.tol, color=GREY, lw=0.8)
        axis.annotate("tolerance", (k[-1], setting.tol), ha="right", va="bottom", color=GREY)
        axis.set(yscale="log", title=f"{network} network", xlabel="Newton steps k")
        axis.set_ylabel(r"$|F(p_k)|$")
        axis.legend(fontsize=7)
        share = [100 * row["converged_share"] for row in some]
        axes[2].plot(k, share, "o-", ms=3, color=color, label=network)
    axes[2].set(title="rows below the tolerance", xlabel="Newton steps k", ylabel="%")
    axes[2].set_ylim(-3, 103)
    axes[2].legend()
    save_picture(figure, path)


def draw_methods(plt: Any, rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(13, 2.8), sharey=True)
    names = [row["method"] for row in rows]
    colors = [COLORS[name] for name in names]
    axes[0].barh(names, [100 * row["solved_share"] for row in rows], color=colors)
    axes[0].set(title="rows solved, %", xlim=(0, 105))
    gradients = [row["gradients_per_row"] for row in rows]
    total = [row["gradients_per_row"] + row["values_per_row"] for row in rows]
    axes[1].barh(names, total, color=colors, alpha=0.45)
    axes[1].barh(names, gradients, color=colors)
    axes[1].set(title="evaluations per row (pale: F without gradient)", xscale="log")
    middle = [1e3 * row["seconds"] for row in rows]
    spread = [
        [1e3 * (row["seconds"] - row["seconds_q25"]) for row in rows],
        [1e3 * (row["seconds_q75"] - row["seconds"]) for row in rows],
    ]
    axes[2].barh(names, middle, xerr=spread, color=colors, error_kw={"lw": 1, "capsize": 2})
    axes[2].set(title=f"milliseconds for {rows[0]['rows_compared']} rows", xscale="log")
    moved = [row["distance_median"] for row in rows]
    axes[3].barh(names, moved, color=colors)
    axes[3].set(title=r"median $L_2$ distance moved")
    for axis, values in zip(axes[1:3], (gradients, middle), strict=True):
        # Bars on a logarithmic axis begin at a power of ten, not at the smallest of them.
        axis.set_xlim(left=10 ** math.floor(math.log10(min(values)) - 1e-9))
    axes[0].invert_yaxis()
    save_picture(figure, path)


def draw_images(plt: Any, x: Tensor, p: Tensor, notes: list[str], path: Path) -> None:
    columns = len(x)
    figure, axes = plt.subplots(3, columns, figsize=(1.25 * columns, 4.2), squeeze=False)
    largest = float((p - x).abs().max())
    for column in range(columns):
        for row, image in enumerate((x[column], p[column], p[column] - x[column])):
            axis = axes[row][column]
            shown = image.permute(1, 2, 0).squeeze(2).numpy()
            if row < 2:
                axis.imshow(shown.clip(0, 1), cmap="gray", vmin=0, vmax=1)
            else:
                difference = shown if shown.ndim == 2 else shown.mean(2)
                axis.imshow(difference, cmap="RdBu_r", vmin=-largest, vmax=largest)
            axis.set(xticks=(), yticks=())
            axis.grid(False)
        axes[0][column].set_title(notes[column], fontsize=8)
    for row, name in enumerate(("original", "boundary point", "difference")):
        axes[row][0].set_ylabel(name)
    save_picture(figure, path)


def trained_network(train: Images, setting: Setting) -> nn.Module:
    network = fresh(train, setting)
    say(f"training a {network.config['network']} on {len(train)} {train.name} images")
    train_classifier(
        network,
        train.images,
        train.labels,
        lambda x, y, step: nn.functional.cross_entropy(network(x), y),
        setting.train_steps,
        seed=setting.seed,
    )
    return network.eval()


def fresh(data: Images, setting: Setting) -> Any:
    torch.manual_seed(setting.seed)
    channels, height, width = data.images.shape[1:]
    return build("convnet-2a", data.classes, (channels, height, width))


def work(argv: Sequence[str] | None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", metavar="DIR", help="MNIST or CIFAR10 files (default: digits)")
    parser.add_argument("--checkpoint", metavar="FILE", help="trained network (default: train one)")
    parser.add_argument("--label", type=int, help="class j of Eq. 1 (default 3)")
    parser.add_argument("--rows", type=int, help="test images")
    parser.add_argument("--train-steps", type=int, help="of the network that is trained here")
    parser.add_argument("--descent-steps", type=int, help="most steps of gradient descent")
    args = parser.parse_args(argv)
    names = ("label", "rows", "train_steps", "descent_steps")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    setting = replace(QUICK if args.quick else Setting(), seed=args.seed, **changes)
    train = load_images(args.data, "train", setting.train_rows)
    test = load_images(args.data, "test", setting.rows)
    if not 0 <= setting.label < test.classes:
        raise InputError(f"label: expected 0 to {test.classes - 1}, got {setting.label}")
    given = None if args.checkpoint is None else load_classifier(args.checkpoint)
    settings = {
        **asdict(setting),
        "data": images_digest(train, test),
        "checkpoint": None if given is None else network_digest(given),
    }
    run = Run(args.out, "newton", settings, 4, args.resume)

    def make_network() -> dict[str, Any]:
        return classifier_state(trained_network(train, setting) if given is None else given)

    kept = run.unit("network", make_network)
    options = {**kept["options"], "shape": tuple(kept["options"]["shape"])}
    network = build(kept["network"], **options).eval()
    network.load_state_dict(kept["state"])
    torch.manual_seed(setting.seed)
    untrained = build(kept["network"], **options).eval()
    field = class_margin(network, setting.label)

    residuals = []
    for name, one in (("untrained", untrained), ("trained", network)):
        f = class_margin(one, setting.label)

        def measure(name: str = name, f: Field = f) -> dict[str, Any]:
            return {"rows": residual_rows(name, f, test.images, setting)}

        residuals += run.unit(f"residuals-{name}", measure)["rows"]
    methods = run.unit(
        "methods", lambda: {"rows": method_rows(field, test.images, train.images, setting)}
    )["rows"]

    plt = pyplot()
    write_table(args.out / "residuals.csv", residuals)
    write_table(args.out / "methods.csv", methods)
    draw_residuals(plt, residuals, setting, args.out / "residuals.png")
    draw_methods(plt, methods, args.out / "methods.png")

    # Images of the class itself, which leave it, then others, which are carried to its boundary.
    found = ls.project(field, test.images, 0.0, 50, setting.tol)
    mine = torch.nonzero(found.converged & (test.labels == setting.label)).squeeze(1)[:4]
    others = torch.nonzero(found.converged & (test.labels != setting.label)).squeeze(1)[:6]
    shown = torch.cat([mine, others])
    if len(shown) == 0:
        raise InputError("no image was projected; a network with more training may help")
    x, p = test.images[shown], found.points[shown]
    with torch.no_grad():
        best = network(p).topk(2, 1).indices
    # At p the class j ties with its strongest rival.
    notes = [
        f"a {label}\n{a} or {b}, $L_2$ {length:.2f}"
        for label, (a, b), length in zip(
            test.labels[shown].tolist(),
            best.tolist(),
            (p - x).flatten(1).norm(dim=1).tolist(),
            strict=True,
        )
    ]
    draw_images(plt, x, p, notes, args.out / "images.png")


def main(argv: Sequence[str] | None = None) -> int:
    return command(work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
