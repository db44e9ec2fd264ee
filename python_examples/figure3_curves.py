"""Figure 3, curves: a closed spline from noisy points, from very noisy points, and from a part.

    python python_examples/figure3_curves.py --out DIR --quick
    python python_examples/figure3_curves.py --out DIR

A network R^3 -> R^2 is trained on 300 points as by ``levelset-ext curve``. In DIR/curves.png every
column is one cloud: above, the zero sets of the two outputs (blue and orange) with the curve in
which they meet; below, the points (green) and the curve (black), with the spline that the points
come from (red, thin). DIR/curves.csv has lengths and mean distances.

Noise is the standard deviation of each coordinate; the splines are about 2 across. The third cloud
lacks a sixth of the spline: what closes the gap is the network's own idea, from a start that joins
the ends by a straight line. In curves.csv truth_to_curve leaves out what is missing, hausdorff does
not; curves.json has the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _shared import Run, arguments, command, write_table
from PIL import Image, ImageDraw, ImageFont

import levelset_ext as ls
from levelset_ext.data.curves import SyntheticCurve, synthetic_curve
from levelset_ext.data.scans import Normalization
from levelset_ext.errors import InputError
from levelset_ext.geometry import canvas
from levelset_ext.recipes.curve import (
    CurveTraining,
    against_truth,
    curve_preset,
    distance_to_line,
    trace_network,
)
from levelset_ext.recipes.files import write_json
from levelset_ext.recipes.progress import say
from levelset_ext.whole_files import write_whole

CLOUDS: dict[str, tuple[str, dict[str, float]]] = {
    "noise": ("noise 0.01", {}),
    "large-noise": ("noise 0.05", {"noise": 0.05}),
    "partial": ("a part is missing", {"missing": 1 / 6}),
}
BLUE, ORANGE = np.array([0.42, 0.60, 0.84]), np.array([0.93, 0.66, 0.38])
GREEN, BLACK, RED = np.array([0.20, 0.62, 0.30]), np.full(3, 0.08), np.array([0.80, 0.25, 0.22])
PANEL, SCALE = 640, 2  # pixels; drawn larger, then averaged down
VIEW = (-120.0, 22.0)
ZOOM = 1.45  # of the lower pictures, which have no surfaces around the curve


def unit_cloud(made: SyntheticCurve) -> tuple[Normalization, torch.Tensor]:
    normal = Normalization.fit(made.points)
    return normal, torch.from_numpy(normal.to_unit(made.points).astype(np.float32))


def train(made: SyntheticCurve, config: Any) -> dict[str, Any]:
    training = CurveTraining(unit_cloud(made)[1], config)
    while training.step < config.steps:
        training.advance()
    return {"training": training.state()}


# --- pictures: a z-buffer for each thing, then the nearer over the farther ---

Layer = tuple[np.ndarray, np.ndarray, float]  # depth (k,) of every pixel, colour (k, 3), opacity


def camera() -> tuple[np.ndarray, float, int]:
    """Axes, pixels for one unit, and pixels across. The cube [-1.1, 1.1]^3 fits."""
    size = PANEL * SCALE
    return canvas.camera(*VIEW), size / (2 * 1.1 * math.sqrt(3)) * 1.2, size


def splats(points: np.ndarray, radius: float, color: np.ndarray, zoom: float = 1.0) -> Layer:
    axes, unit, size = camera()
    screen = canvas.on_screen(points @ axes.T * unit * zoom, size)
    buffer = canvas.splat(screen, radius, size)
    depth = np.full(size * size, np.inf)
    pixel, owner = canvas.owners(buffer)
    depth[pixel] = screen[owner, 2]
    return depth, np.broadcast_to(color, (size * size, 3)), 1.0


def surface(mesh: Any, color: np.ndarray) -> Layer:
    """Triangles, lit from both sides."""
    axes, unit, size = camera()
    shades = np.zeros((size * size, 3))
    depth = np.full(size * size, np.inf)
    if mesh.empty:
        return depth, shades, 0.0
    corner = canvas.on_screen(mesh.vertices @ axes.T * unit, size)[mesh.faces]
    pixel, owner = canvas.owners(canvas.rasterize(corner, size, size))
    weight, _ = canvas.barycentric(corner, owner, pixel % size, pixel // size)
    depth[pixel] = (weight * corner[owner, :, 2]).sum(1)
    facing = (weight[..., None] * (mesh.normals @ axes.T)[mesh.faces[owner]]).sum(1)
    facing /= np.maximum(np.linalg.norm(facing, axis=1, keepdims=True), 1e-12)
    facing *= np.where(facing[:, 2:] < 0, -1.0, 1.0)
    shades[pixel] = canvas.lit(facing, color)
    return depth, shades, 0.72


def compose(layers: Sequence[Layer]) -> np.ndarray:
    size = camera()[2]
    picture = canvas.background(size).reshape(-1, 3).copy()
    order = np.argsort(-np.stack([depth for depth, _, _ in layers]), axis=0, kind="stable")
    for rank in range(len(layers)):
        for k, (depth, color, opacity) in enumerate(layers):
            at = np.flatnonzero((order[rank] == k) & np.isfinite(depth))
            picture[at] = opacity * color[at] + (1 - opacity) * picture[at]
    picture = picture.reshape(PANEL, SCALE, PANEL, SCALE, 3).mean((1, 3))
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def column(training: CurveTraining, trace: Any, truth: np.ndarray, resolution: int) -> np.ndarray:
    """Two panels, one above the other, in normalised units."""
    box = (training.low.numpy(), training.high.numpy())
    fine = [curve.resample(0.002).vertices for curve in trace]
    line = np.concatenate(fine) if fine else np.zeros((0, 3))
    middle = (box[0] + box[1]) / 2

    def output(k: int) -> Any:
        return ls.geometry.extract_mesh(_Output(training.network, k), box, resolution)

    def centred(mesh: Any) -> Any:
        return replace(mesh, vertices=mesh.vertices - middle)

    meshes = [centred(output(k)) for k in (0, 1)]
    black = splats(line - middle, 5.0, BLACK)
    above = [surface(meshes[0], BLUE), surface(meshes[1], ORANGE), black]
    below = [
        splats(training.cloud.numpy() - middle, 6.0, GREEN, ZOOM),
        splats(truth - middle, 2.2, RED, ZOOM),
        splats(line - middle, 4.2, BLACK, ZOOM),
    ]
    return np.concatenate([compose(above), compose(below)])


class _Output(torch.nn.Module):
    """One of the two outputs, as a field of its own."""

    def __init__(self, network: torch.nn.Module, k: int) -> None:
        super().__init__()
        self.network, self.k = network, k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)[:, self.k]


def work(argv: Sequence[str] | None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, help="training steps of every network")
    parser.set_defaults(seed=2)
    args = parser.parse_args(argv)
    steps = args.steps if args.steps is not None else (200 if args.quick else None)
    config = curve_preset("fast", steps, args.seed)
    resolution = 64 if args.quick else 160
    run = Run(args.out, "figure3-curves", asdict(config), len(CLOUDS), args.resume)
    columns, rows = [], []
    for name, (_, options) in CLOUDS.items():
        made = synthetic_curve(seed=args.seed, **options)  # type: ignore[arg-type]

        def compute(made: SyntheticCurve = made) -> dict[str, Any]:
            return train(made, config)

        state = run.unit(name, compute)["training"]
        normal, unit = unit_cloud(made)
        training = CurveTraining(unit, config)
        training.load(state)
        trace = trace_network(training, config)
        if not len(trace):
            raise InputError(f"{name}: no curve after {config.steps} steps: {trace.message}")
        lines = [(normal.to_input(c.vertices), c.edges) for c in (c.resample(0.005) for c in trace)]
        truth = against_truth(lines, made.truth, made.missing)
        rows.append(
            {
                "cloud": name,
                "points": len(made.points),
                "curves": len(trace),
                "closed": sum(curve.closed for curve in trace),
                "length": trace.length * normal.scale,
                "true_length": truth.pop("length"),
                "cloud_to_curve": float(
                    np.stack([distance_to_line(made.points, *line) for line in lines]).min(0).mean()
                ),
                **truth,
            }
        )
        columns.append(column(training, trace, normal.to_unit(made.truth), resolution))
    write_table(Path(args.out) / "curves.csv", rows)
    write_json(Path(args.out) / "curves.json", rows)
    image = Image.fromarray(np.concatenate(columns, 1), "RGB")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=20)
    for k, (title, _) in enumerate(CLOUDS.values()):
        draw.text((PANEL * k + 18, 14), title, fill=(70, 80, 95), font=font)
    path = Path(args.out) / "curves.png"
    write_whole(path, lambda stream: image.save(stream, format="PNG", optimize=False))
    say(str(path))


def main(argv: Sequence[str] | None = None) -> int:
    return command(work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
