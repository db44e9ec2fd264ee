"""Fitting a sphere to images: gradients through rays (intersect_rays), by depth and by outline.

    python python_examples/fit_depth.py --out DIR [--quick] [--resume]

The target is a ball of radius 0.62, seen from six sides. A depth image holds the distance of every
hit, a silhouette only which rays hit. Two networks start too small: F(x) = |x| - r, whose one
parameter is the radius, and an MLP that begins as a sphere. Both descend

    depth:       mean over rays that hit both of (t(theta) - t*)^2
    silhouette:  mean over outline rays of s(theta)^2, 0 for one that touches

t(theta) follows the surface along its own ray. An outline ray runs between a pixel that sees the
ball and one that does not, so it should touch: s is how far the surface is from it (how deep it
goes in), along a second ray that meets both at right angles. Where that ray starts and where it
points depend on theta too, but to first order neither changes s: it is extremal there.

steps.csv: every fit and step: loss, radius, its error, the slope of the loss along its gradient by
back-propagation and by central differences (compared where it is above 1e-6). fit.json: the ends.
fit.png: pictures and curves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from _shared import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    Run,
    arguments,
    command,
    pyplot,
    save_picture,
    write_table,
)
from torch import Tensor, nn

import levelset_ext as ls
from levelset_ext.geometry import Camera, intersect_rays
from levelset_ext.recipes.files import write_json

DTYPE = torch.float64
TRUE, START = 0.62, 0.45
DISTANCE = 3.0
SIDES = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
COLORS = {
    "radius, depth": BLUE,
    "radius, silhouette": GREEN,
    "mlp, depth": RED,
    "mlp, silhouette": ORANGE,
}
FITS = tuple(COLORS)


class Ball(nn.Module):
    """F(x) = |x| - r."""

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.radius = nn.Parameter(torch.tensor(radius, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        return x.norm(dim=1) - self.radius


def sphere(radius: float, seed: int, width: int = 32) -> nn.Module:
    """An MLP that has been fitted to |x| - radius."""
    random = torch.Generator().manual_seed(seed)
    mlp = ls.networks.ImplicitMLP(3, 1, width, 2, activation="softplus", beta=30.0)
    mlp.init_sphere_(radius, random).to(DTYPE)
    optimizer = torch.optim.Adam(mlp.parameters(), 5e-3, betas=(0.9, 0.99))
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 400)
        x = 2 * torch.rand(512, 3, dtype=DTYPE, generator=random) - 1
        loss = (mlp(x)[:, 0] - (x.norm(dim=1) - radius)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mlp


def network(kind: str, seed: int) -> nn.Module:
    return Ball(START) if kind == "radius" else sphere(START, seed)


def rays(size: int, between: bool = False) -> tuple[Tensor, Tensor]:
    """Origins and directions (6, size, size, 3) through the middles of pixels; with ``between``,
    (6, 2 size - 1, 2 size - 1, 3), also through the middles of their edges and corners."""
    origins, directions = [], []
    for side in SIDES:
        eye = DISTANCE * np.array(side, dtype=float)
        up = (0, 0, 1) if side[1] else (0, 1, 0)
        camera = Camera.look_at(eye, up=up, width=size, height=size, fov=30)
        places = np.arange(0, 2 * size - 1, 1 if between else 2) / 2 + 0.5
        row, column = np.meshgrid(places, places, indexing="ij")
        o, v = camera.rays(column.ravel(), row.ravel())
        origins.append(torch.from_numpy(o).view(*row.shape, 3))
        directions.append(torch.from_numpy(v).view(*row.shape, 3))
    return torch.stack(origins), torch.stack(directions)


def cast(fn: Any, o: Tensor, v: Tensor) -> Any:
    part = {"near": DISTANCE - 1, "far": DISTANCE + 1}
    return intersect_rays(fn, o.reshape(-1, 3), v.reshape(-1, 3), **part, step=0.1, tol=1e-12)


def depth_loss(size: int) -> Callable[[nn.Module], Tensor]:
    o, v = rays(size)
    with torch.no_grad():
        target = cast(Ball(TRUE), o, v)

    def loss(net: nn.Module) -> Tensor:
        hits = cast(net, o, v)
        both = hits.mask & target.mask
        return (hits.t[both] - target.t[both]).square().mean()

    return loss


def outline(size: int) -> tuple[Tensor, Tensor]:
    """Rays between neighbouring pixels of which one sees the ball, all that is used of an image."""
    o, v = rays(size)
    with torch.no_grad():
        seen = cast(Ball(TRUE), o, v).mask.view(6, size, size)
    o, v = rays(size, between=True)
    edge = torch.zeros(o.shape[:3], dtype=torch.bool)
    edge[:, 1::2, ::2] = seen[:, 1:] != seen[:, :-1]
    edge[:, ::2, 1::2] = seen[:, :, 1:] != seen[:, :, :-1]
    return o[edge], v[edge]


def lowest(fn: Any, o: Tensor, v: Tensor) -> Tensor:
    """The points of some rays with the least F, roughly."""
    t = torch.full((len(o), 1), DISTANCE, dtype=DTYPE)
    half = 1.0
    for _ in range(2):
        tried = t + half * torch.linspace(-1, 1, 17, dtype=DTYPE)
        points = o[:, None] + tried[..., None] * v[:, None]
        values = fn(points.view(-1, 3)).view(len(o), -1)
        t = tried.gather(1, values.argmin(1, keepdim=True))
        half /= 8
    return o + t * v


def common_perpendicular(net: nn.Module, o: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Points on some rays, and directions from there that meet the surface along its normal."""
    with torch.no_grad():
        x = lowest(net, o, v)
        values, gradient = ls.value_and_jacobian(net, x)
        outward = -values.sign()
        toward = outward * gradient[:, 0]
        for _ in range(8):
            hits = intersect_rays(net, x, toward, far=0.6, step=0.1, tol=1e-12)
            tilt = (hits.normals * v).sum(1, keepdim=True)
            good = hits.mask[:, None]
            # For a sphere of radius 0.5 one such step would do.
            x = torch.where(good, x - 0.5 * tilt * v, x)
            toward = torch.where(good, outward * (hits.normals - tilt * v), toward)
    return x, toward


def silhouette_loss(size: int) -> Callable[[nn.Module], Tensor]:
    o, v = outline(size)

    def loss(net: nn.Module) -> Tensor:
        x, toward = common_perpendicular(net, o, v)
        hits = intersect_rays(net, x, toward, far=0.6, step=0.1, tol=1e-12)
        # A ray that touches already may miss: it counts as 0, so that no ray makes the loss jump.
        return hits.t[hits.mask].square().sum() / len(x)

    return loss


def radius_of(net: nn.Module) -> tuple[float, float]:
    """Mean and standard deviation of the distance from the middle to the surface."""
    v = torch.randn(400, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        t = intersect_rays(net, torch.zeros_like(v), v, far=1.5, tol=1e-10).t
    return float(t.mean()), float(t.std(unbiased=False))


def slopes(net: nn.Module, loss: Callable[[nn.Module], Tensor], eps: float) -> tuple[float, float]:
    """The derivative of the loss along its normalised gradient, and its central difference."""
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(loss(net), parameters)
    length = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
    ends = []
    with torch.no_grad():
        for sign in (1, -2, 1):
            for p, g in zip(parameters, gradients, strict=True):
                p += sign * eps / max(length, 1e-30) * g
            ends.append(float(loss(net)))
    return length, (ends[0] - ends[1]) / (2 * eps)


def fit(name: str, seed: int, size: int, steps: int) -> dict[str, Any]:
    kind, image = name.split(", ")
    net = network(kind, seed)
    loss_of = (depth_loss if image == "depth" else silhouette_loss)(size)
    if kind == "radius":
        # Plain gradient descent. Depths near the outline change faster than the radius.
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            net.parameters(), 0.05 if image == "depth" else 0.1
        )
    else:
        optimizer = torch.optim.Adam(net.parameters(), 2e-3, betas=(0.9, 0.99))
    rows = []
    for step in range(steps + 1):
        if kind == "mlp":
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / (steps + 1))
        nothing = float("nan"), float("nan")
        slope, difference = slopes(net, loss_of, 1e-6) if step % 10 == 0 else nothing
        loss = loss_of(net)
        radius, uneven = radius_of(net)
        row = {
            "fit": name,
            "step": step,
            "loss": loss.item(),
            "radius": radius,
            "error": abs(radius - TRUE),
            "deviation": uneven,
            "slope": slope,
            "difference": difference,
        }
        rows.append(row)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"rows": rows}


def draw(rows: Sequence[dict[str, Any]], size: int, path: Any) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.3))
    o, v = rays(size)
    seen = [cast(Ball(r), o[:1], v[:1]) for r in (TRUE, START)]
    depth, small = (h.t.detach().view(size, size).numpy() for h in seen)
    shown = axes[0].imshow(np.where(np.isfinite(depth), depth, np.nan), cmap="viridis_r")
    axes[0].set_title("depth, one of six")
    figure.colorbar(shown, ax=axes[0], shrink=0.8)
    axes[1].imshow(np.isfinite(depth), cmap="Greys", vmax=1.6)
    axes[1].contour(np.isfinite(small), [0.5], colors=RED, linewidths=1)
    axes[1].set_title("silhouette; red: at the start")
    for axis in axes[:2]:
        axis.axis("off")
    for name in FITS:
        color = COLORS[name]
        some = [r for r in rows if r["fit"] == name]
        axes[2].semilogy([r["step"] for r in some], [r["error"] for r in some], color=color)
        checked = [r for r in some if r["slope"] > 1e-6]
        off = [max(mismatch(r), 1e-12) for r in checked]
        axes[3].semilogy([r["step"] for r in checked], off, "o-", ms=3, color=color, label=name)
    axes[2].set_title("|mean radius - 0.62|")
    axes[3].set_title("slope: |differences / autograd - 1|")
    for axis in axes[2:]:
        axis.set_xlabel("step")
    axes[3].legend(fontsize=7)
    save_picture(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    size, steps = (12, 30) if args.quick else (24, 150)
    settings = {"seed": args.seed, "size": size, "steps": steps}
    run = Run(args.out, "fit-depth", settings, len(FITS), args.resume)
    rows: list[dict[str, Any]] = []
    for name in FITS:
        unit = name.replace(", ", "-")
        rows += run.unit(unit, lambda name=name: fit(name, args.seed, size, steps))["rows"]  # type: ignore[misc]
    write_table(args.out / "steps.csv", rows)
    ends: dict[str, Any] = {"radius": TRUE, "start": START, "pixel": pixel(size), "fits": {}}
    for name in FITS:
        some = [r for r in rows if r["fit"] == name]
        checked = [r for r in some if r["slope"] > 1e-6]
        ends["fits"][name] = {
            "first_error": some[0]["error"],
            "last_error": some[-1]["error"],
            # After these the error stays below 1 %.
            "steps_to_1_percent": 1
            + max((r["step"] for r in some if r["error"] >= 0.01 * TRUE), default=-1),
            "last_deviation": some[-1]["deviation"],
            "worst_slope_mismatch": max(mismatch(r) for r in checked),
        }
    write_json(args.out / "fit.json", ends)
    draw(rows, size, args.out / "fit.png")


def mismatch(row: dict[str, Any]) -> float:
    """The share by which central differences differ from back-propagation."""
    return abs(row["difference"] / row["slope"] - 1)


def pixel(size: int) -> float:
    """Its width at the distance of the ball's middle."""
    return float(2 * DISTANCE * np.tan(np.radians(15)) / size)


if __name__ == "__main__":
    raise SystemExit(command(main))
