"""Figure 1: four decision boundaries through the same 16 points of the plane.

    python python_examples/figure1_boundaries.py --out DIR --quick
    python python_examples/figure1_boundaries.py --out DIR             (the paper's setting)

The same network is trained by (a) cross entropy, (b) Eq. 12 in L_inf, (c) Eq. 12 in L2 and (d)
the geometric SVM, Eq. 11. DIR/boundaries.png shows the boundaries; around every point the square
or disc of the target eps, red where the boundary is nearer; in (d) the disc of the smallest margin
and the level sets +1 and -1. DIR/margins.csv has the distances from the points to the boundary,
which is taken from a dense grid and not from the samples that the losses used; wrong points count
negative.

The paper's setting (supplementary 2.1): FC-1 (3 x 512), Adam 0.001, 1000 epochs, batch size 1,
lambda 0.001, 20 iterations. Not in the paper: the points, which are drawn here; eps, 0.9 times
what any boundary can reach; the first tenth of (b), (c) and (d), which is cross entropy (a quarter
with --quick), as a boundary has to exist before it can be moved; alpha -1 and L2 in (d).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _shared import BLUE, GREY, RED, Run, arguments, command, pyplot, save_picture, write_table
from skimage.measure import find_contours
from torch import Tensor, nn

import levelset_ext as ls
from levelset_ext.errors import InputError
from levelset_ext.margin import margin
from levelset_ext.networks import ImplicitMLP
from levelset_ext.samplers import BoundarySamples

PANELS = {
    "cross-entropy": "(a) cross entropy",
    "robust-linf": r"(b) Eq. 12, $L_\infty$",
    "robust-l2": "(c) Eq. 12, $L_2$",
    "geometric-svm": "(d) geometric SVM, Eq. 11",
}
NORMS = {"linf": np.inf, "l2": 2}
WINDOW = (-0.1, 0.6)  # the points lie in [0, 0.5]^2


@dataclass(frozen=True)
class Setting:
    width: int = 512
    epochs: int = 1000
    batch: int = 1
    lr: float = 1e-3
    decay: bool = False  # the learning rate to 0 along a cosine
    copies: int = 16  # starting points of the search around every example
    lam: float = 1e-3
    alpha: float = -1.0
    reach: float = 0.9  # eps over the largest margin that is possible
    grid: int = 1401
    seed: int = 0


QUICK = Setting(width=64, epochs=400, batch=16, lr=3e-3, decay=True, grid=701)


def draw_points(seed: int, n: int = 16, apart: float = 0.07, other: float = 0.1) -> Any:
    """n points in [0, 0.5]^2, half of them on either side of a wave; opposite ones ``other`` apart
    in L_inf, equal ones ``apart``."""
    generator = np.random.default_rng(seed)
    points: list[np.ndarray] = []
    labels: list[int] = []
    while len(points) < n:
        p = generator.uniform(0, 0.5, 2)
        label = int(p[1] > 0.25 + 0.13 * np.sin(2 * np.pi * p[0] / 0.4))
        far = all(
            np.abs(p - q).max() >= (apart if label == k else other)
            for q, k in zip(points, labels, strict=True)
        )
        if far and labels.count(label) < n // 2:
            points.append(p)
            labels.append(label)
    return torch.tensor(np.array(points), dtype=torch.float32), torch.tensor(labels)


def possible(x: Tensor, y: Tensor, norm: str) -> float:
    """Half the smallest distance between opposite points: no boundary has a larger margin."""
    apart = torch.linalg.vector_norm(x[:, None] - x[None], NORMS[norm], dim=2)
    return float(apart[y[:, None] != y[None]].min()) / 2


def newton_samples(
    network: nn.Module, x: Tensor, y: Tensor, radius: float, generator: torch.Generator
) -> BoundarySamples:
    """Boundary points near examples by Newton's method, from random starts in squares."""
    start = x + radius * (2 * torch.rand(x.shape, generator=generator) - 1)
    found = ls.project(lambda p: difference(network, p), start, max_iters=20)
    # What the loss wants is the margin of each label; on the boundary only its sign differs.
    sign = torch.where(y > 0, 1.0, -1.0)[:, None]
    found = replace(found, values=found.values * sign, jacobian=found.jacobian * sign[:, :, None])
    with torch.no_grad():
        margins = margin(network(x), y)
    rows = torch.nonzero(found.converged).squeeze(1)
    return BoundarySamples(
        result=found[rows],
        rows=rows,
        correct=margins[rows] > 0,
        margins=margins,
        crossed=found.converged,
        ends=found.points,
    )


def difference(network: nn.Module, x: Tensor) -> Tensor:
    logits = network(x)
    return logits[:, 1] - logits[:, 0]


def loss_of(
    panel: str,
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    setting: Setting,
    generator: torch.Generator,
) -> Tensor:
    if panel == "cross-entropy":
        return nn.functional.cross_entropy(network(x), y)
    if panel == "geometric-svm":
        loss = ls.losses.geometric_svm(
            network, x, y, alpha=setting.alpha, lam=setting.lam, distance="l2"
        )
        return loss.total
    many, labels = x.repeat(setting.copies, 1), y.repeat(setting.copies)
    if panel == "robust-l2":
        # Newton moves straight across, which is the way to the nearest point in L2.
        samples = newton_samples(network, many, labels, 1.2 * eps, generator)
        return ls.losses.robust(network, many, labels, samples, eps=eps, distance="l2").total
    # In L_inf the nearest point is in a corner of the square, where signed steps go.
    samples = ls.find_boundary(
        network, many, labels, eps, 0.5, eps / 8, 10, box=None, max_iters=20, generator=generator
    )
    return ls.losses.robust(network, many, labels, samples, eps=eps, distance="linf").total


def train(panel: str, x: Tensor, y: Tensor, eps: float, setting: Setting) -> dict[str, Any]:
    torch.manual_seed(setting.seed)
    network = ImplicitMLP(2, 2, setting.width, 3, activation="relu")
    generator = torch.Generator().manual_seed(setting.seed)
    optimizer = torch.optim.Adam(network.parameters(), setting.lr)
    warm = setting.epochs // 10 if setting.batch < len(x) else setting.epochs // 4
    for epoch in range(setting.epochs):
        kind = panel if epoch >= warm else "cross-entropy"
        if epoch == warm:  # Adam's idea of a step is that of another loss
            optimizer = torch.optim.Adam(network.parameters(), setting.lr)
        if setting.decay:
            share = epoch / setting.epochs
            optimizer.param_groups[0]["lr"] = setting.lr * (1 + np.cos(np.pi * share)) / 2
        for rows in torch.randperm(len(x), generator=generator).split(setting.batch):
            optimizer.zero_grad()
            loss_of(kind, network, x[rows], y[rows], eps, setting, generator).backward()
            optimizer.step()
    return {"state": network.state_dict()}


def on_grid(network: nn.Module, size: int) -> np.ndarray:
    """f_1 - f_0, (size, size): row i is the i-th value of y, column j that of x."""
    axis = torch.linspace(*WINDOW, size)
    with torch.no_grad():
        rows = [difference(network, torch.stack([axis, v.expand(size)], 1)) for v in axis]
    return torch.stack(rows).numpy()


def contours(values: np.ndarray, level: float) -> list[np.ndarray]:
    """Polylines (k, 2) of x and y, with a vertex on every line of the grid that they cross."""
    scale = (WINDOW[1] - WINDOW[0]) / (len(values) - 1)
    return [c[:, ::-1] * scale + WINDOW[0] for c in find_contours(values, level)]


def margins_of(values: np.ndarray, network: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Distance of every point to the boundary in either norm, negative for wrong points."""
    with torch.no_grad():
        sign = np.where(margin(network(x), y).numpy() > 0, 1.0, -1.0)
    lines = contours(values, 0.0)
    if not lines:  # one class everywhere
        return {norm: sign * np.inf for norm in NORMS}
    offset = np.concatenate(lines)[None] - x.numpy()[:, None]
    return {
        norm: sign * np.linalg.norm(offset, order, axis=2).min(1) for norm, order in NORMS.items()
    }


def draw(axes: Any, panel: str, values: np.ndarray, x: Tensor, y: Tensor, figures: Any) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Circle, Rectangle

    norm = "linf" if panel in ("cross-entropy", "robust-linf") else "l2"
    margins, eps = figures[norm], figures["eps"][norm]
    side = ListedColormap(["#f6dcd8", "#d9e6f5"])
    axes.imshow(
        values > 0, origin="lower", extent=(*WINDOW, *WINDOW), cmap=side, interpolation="nearest"
    )
    for line in contours(values, 0.0):
        axes.plot(*line.T, color="#20242c", lw=1.6, zorder=3)
    if panel == "geometric-svm":
        for level, color in ((-1.0, RED), (1.0, BLUE)):
            for line in contours(values, level):
                axes.plot(*line.T, color=color, lw=1.1, alpha=0.75, zorder=2)
    for p, label, reached in zip(x.numpy(), y.tolist(), margins.tolist(), strict=True):
        # One size for all: what is drawn is the smallest margin, or eps where eps was the aim.
        size = eps if "robust" in panel or panel == "cross-entropy" else max(margins.min(), 0)
        short = reached < 0.99 * size
        style: dict[str, Any] = {
            "fill": False,
            "ec": RED if short else GREY,
            "lw": 1.6 if short else 0.9,
            "zorder": 4,
        }
        if norm == "linf":
            axes.add_patch(Rectangle(p - size, 2 * size, 2 * size, **style))
        else:
            axes.add_patch(Circle(p, size, **style))
        axes.plot(*p, "o", color=BLUE if label else RED, ms=5.5, mec="white", mew=0.8, zorder=5)
    axes.set_title(PANELS[panel])
    name = r"L_\infty" if norm == "linf" else "L_2"
    axes.set_xlabel(f"smallest ${name}$ margin {margins.min():.4f}, target {eps:.4f}")
    if panel == "geometric-svm":
        axes.set_xlabel(f"smallest ${name}$ margin {margins.min():.4f}")
    axes.set(xlim=WINDOW, ylim=WINDOW, xticks=(), yticks=())
    axes.grid(False)


def work(argv: Sequence[str] | None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sets", type=int, help="sets of points; the first is drawn (quick: 1)")
    parser.add_argument("--epochs", type=int, help="passes over the points")
    args = parser.parse_args(argv)
    setting = replace(QUICK if args.quick else Setting(), seed=args.seed)
    if args.epochs is not None:
        setting = replace(setting, epochs=args.epochs)
    sets = args.sets if args.sets is not None else (1 if args.quick else 3)
    if setting.epochs < 1 or sets < 1:
        raise InputError("epochs, sets: expected at least 1")
    run = Run(args.out, "figure1", {**asdict(setting), "sets": sets}, sets * 4, args.resume)
    plt = pyplot()
    figure, all_axes = plt.subplots(1, 4, figsize=(13, 3.6))
    rows = []
    for number in range(sets):
        one = replace(setting, seed=setting.seed + number)
        x, y = draw_points(one.seed)
        best = {norm: possible(x, y, norm) for norm in NORMS}
        eps = {norm: setting.reach * value for norm, value in best.items()}
        for panel, axes in zip(PANELS, all_axes, strict=True):
            target = eps["l2" if panel == "robust-l2" else "linf"]

            def compute(panel: str = panel, target: float = target, s: Setting = one) -> Any:
                x, y = draw_points(s.seed)
                return train(panel, x, y, target, s)

            state = run.unit(f"{number}-{panel}", compute)["state"]
            network = ImplicitMLP(2, 2, setting.width, 3, activation="relu")
            network.load_state_dict(state)
            values = on_grid(network, setting.grid)
            margins = margins_of(values, network, x, y)
            for norm in NORMS:
                m = margins[norm]
                rows.append(
                    {
                        "set": number,
                        "method": panel,
                        "norm": norm,
                        "smallest_margin": float(m.min()),
                        "mean_margin": float(m.mean()),
                        "wrong_points": int((m < 0).sum()),
                        "eps": eps[norm],
                        "points_with_eps": int((m >= 0.99 * eps[norm]).sum()),
                        "largest_possible": best[norm],
                        "grid_step": (WINDOW[1] - WINDOW[0]) / (setting.grid - 1),
                    }
                )
            if number == 0:
                draw(axes, panel, values, x, y, {**margins, "eps": eps})
    write_table(Path(args.out) / "margins.csv", rows)
    save_picture(figure, Path(args.out) / "boundaries.png")


def main(argv: Sequence[str] | None = None) -> int:
    return command(work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
