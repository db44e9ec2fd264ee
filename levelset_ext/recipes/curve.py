"""From points to a curve: train a network R^d -> R^(d-1) with Eq. 13, trace its zero level set.

In space the network has two outputs, and the curve is where two surfaces meet; in the plane it has
one. Where D_xF has full rank a level curve has no ends: it is closed, or leaves the box. So points
of a part of a curve come back as a closed curve too, and through the gap, which no point supports,
it is the network's guess; an arc alone is closed the same way, and metrics.json cannot tell.

A run is a folder like that of ``reconstruct``, safe to kill at any moment:

    config.json      every setting, and which points
    checkpoint.pt    network, optimizer, random state, step
    history.csv      losses over the steps, and history.png
    curve.ply        vertices in order and edges, in input units
    preview.png      the points, and the curve through them
    metrics.json     written last: a folder with it holds a finished run
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.spatial import cKDTree

from levelset_ext._load import build_info
from levelset_ext.data.curves import synthetic_curve
from levelset_ext.data.scans import Normalization, read_points
from levelset_ext.errors import InputError
from levelset_ext.geometry import canvas
from levelset_ext.geometry.curves import Curve, CurveTrace, trace_curve
from levelset_ext.losses import ReconstructionLoss
from levelset_ext.networks import ImplicitMLP
from levelset_ext.recipes.curve_start import fit_polygons
from levelset_ext.recipes.files import write_json
from levelset_ext.recipes.observers import Observer
from levelset_ext.recipes.progress import clock, peak_memory_gb
from levelset_ext.recipes.reconstruct import (
    WATCHED,
    ReconstructConfig,
    Training,
    train_in_folder,
    watching,
)
from levelset_ext.recipes.run_folder import begin_run
from levelset_ext.whole_files import write_whole

KIND = "levelset_ext curve 1"
RESULTS = ("curve.ply", "preview.png", "checkpoint.pt", *WATCHED)
MINIMUM = 20  # points
SPACING_SHARE = 1 / 1000  # edges are at most this share of their curve's length


# --- points ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurvePoints:
    """What is reconstructed: points (n, d) in input units, and how config.json names them."""

    points: np.ndarray
    name: str
    truth: np.ndarray | None = None
    missing: int = 0  # truth[:missing] has no points

    @property
    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.points).tobytes()).hexdigest()


def load_curve_points(path: str | None, seed: int) -> CurvePoints:
    """The points of a file, of the plane or of space, or the synthetic ones when there is none."""
    if path is None:
        made = synthetic_curve(seed=seed)
        return CurvePoints(made.points, "synthetic curve", made.truth)
    points = read_points(path, dim=None)
    if points.shape[1] not in (2, 3):
        raise InputError(
            f"{path}: expected points of dimension 2 or 3, got dimension {points.shape[1]}"
        )
    if len(points) < MINIMUM:
        raise InputError(f"{path}: expected at least {MINIMUM} points, got {len(points)}")
    largest = float(np.abs(points).max())
    if largest > 1e150:
        raise InputError(f"{path}: expected coordinates below 1e150, got {largest:.3g}")
    if np.ptp(points, axis=0).max() <= 1e-12 * largest:
        raise InputError(f"{path}: expected points in different places, got all of them equal")
    return CurvePoints(points, str(path))


# --- training -------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurveConfig(ReconstructConfig):
    """Settings of a run; see :class:`ReconstructConfig`.

    ``start`` "polygon" begins with a closed line that visits the points in a likely order, see
    :mod:`levelset_ext.recipes.curve_start`, for Eq. 13 to move onto the points; "random" is He's
    normal distribution. Samples come from near the points, as the start has no other zeros that
    would have to be found.

    The paper's T is {0} alone, as no F: R^3 -> R^2 has |F| = d(x, X) everywhere. Near the curve
    there are such F, and ``general`` points there, each on its own level t with |t| to be its
    distance, are what keeps |D_xF| near 1 and its two rows apart: with {0} alone lambda is served
    by making F small instead of zero, and where the surfaces touch the curve splits.
    """

    steps: int = 900
    learning_rate: float = 1e-3  # with 3e-3 one spline in ten lost an arc
    width: int = 64
    hidden_layers: int = 3
    beta: float = 5.0  # of space; smooth, for the points' noise
    plane_beta: float = 20.0  # a signed distance has a sharp edge inside, and petals need it
    start: str = "polygon"  # or "random"
    start_steps: int = 600
    lam_first: float = 5.0
    lam_last: float = 5.0
    lam_steps: int = 1
    min_slope: float = 0.0
    projected: int = 256
    general: int = 256
    cloud_points: int = 300
    projected_noise: tuple[tuple[float, float], ...] = ((0.03, 0.7), (0.1, 0.3))
    general_noise: tuple[tuple[float, float], ...] = ((0.03, 0.4), (0.1, 0.6))
    margin: float = 0.2
    pool: int = 0
    newton_iters: int = 6
    trace_seeds: int = 2000  # where the trace looks, uniform in the box, beside the points
    trace_step: float = 0.02


CURVE_PRESETS: dict[str, CurveConfig] = {
    "fast": CurveConfig(),
    # The supplementary's: FC-1 with two outputs, the whole batch projected, 10 iterations. A batch
    # is the cloud, as often as it fits into 10 K points; lambda 5.
    "paper": CurveConfig(
        preset="paper",
        steps=50_000,
        width=512,
        activation="relu",
        start="random",
        lam_first=5.0,
        lam_last=5.0,
        lam_steps=1,
        p=1.0,
        general=0,
        projected=10_000,
        cloud_points=10_000,
        projected_noise=((0.1, 1.0),),
        newton_iters=10,
        newton_tol=1e-5,
        newton_step=math.inf,
        learning_rate=1e-3,
        beta2=0.999,
        schedule="halving",
        warmup=0.0,
        halve_at=(5_000, 15_000, 35_000),
        checkpoint_every=100,
    ),
}


def curve_preset(name: str, steps: int | None = None, seed: int = 0) -> CurveConfig:
    """A preset with another number of steps, its schedules stretched to it, and a seed."""
    if name not in CURVE_PRESETS:
        raise InputError(f"preset: expected one of {', '.join(CURVE_PRESETS)}, got {name!r}")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed: expected a number from 0 to 2^63 - 1, got {seed}")
    config = replace(CURVE_PRESETS[name], seed=seed)
    if steps is None:
        return config
    if steps < 1:
        raise InputError(f"steps: expected at least 1, got {steps}")
    stretch = steps / config.steps
    return replace(
        config,
        steps=steps,
        lam_steps=max(1, round(config.lam_steps * stretch)),
        halve_at=tuple(round(step * stretch) for step in config.halve_at),
    )


class CurveTraining(Training):
    """:class:`Training` of a network with d - 1 outputs."""

    config: CurveConfig

    def new_network(self) -> ImplicitMLP:
        config, d = self.config, self.cloud.shape[1]
        network = ImplicitMLP(
            d,
            d - 1,
            config.width,
            config.hidden_layers,
            activation=config.activation,
            beta=config.plane_beta if d == 2 else config.beta,
            skip=config.skip,
        )
        network.reset_parameters(self.generator)
        return network

    def advance(self) -> ReconstructionLoss:
        # Before the first step, not in new_network: a run that goes on has no use for it.
        if self.step == 0 and self.config.start == "polygon":
            fit_polygons(
                self.network,
                self.cloud,
                (self.low, self.high),
                self.generator,
                steps=self.config.start_steps,
            )
        return super().advance()


# --- the run as a folder --------------------------------------------------------------------


def reconstruct_curve(
    cloud: CurvePoints,
    out: Path,
    config: CurveConfig,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
    observers: Sequence[Observer] = (),
) -> dict[str, Any]:
    """Runs, or with ``resume`` goes on with, the reconstruction of a curve in the folder ``out``.

    Args, errors and what comes back are as for
    :func:`levelset_ext.recipes.reconstruct.reconstruct`. A network whose level set is no curve in
    the box of the points is a RuntimeError.
    """
    header = {"kind": KIND, "cloud": cloud.name, "digest": cloud.digest, "settings": asdict(config)}
    finished = begin_run(
        out,
        header,
        results=RESULTS,
        what="a curve reconstruction",
        same="a run with the same settings",
        named="cloud",
        resume=resume,
        say=say,
    )
    if finished is not None:
        return finished

    watch = watching(observers, say)
    run = train_in_folder(
        CurveTraining, cloud.points, out, config, KIND, device, resume, say, watch
    )
    training, normal = run.training, run.normal
    say(f"trained in {clock(run.trained)}; tracing")

    trace = trace_network(training, config)
    if not len(trace):
        raise RuntimeError(f"the trained network has no curve in the box: {trace.message}")
    fine = [curve.resample(0.999 * SPACING_SHARE * curve.length) for curve in trace]
    lines = [(normal.to_input(curve.vertices), curve.edges) for curve in fine]
    write_curve(out / "curve.ply", lines)
    render_curve(out / "preview.png", cloud.points, lines)
    metrics = _metrics(cloud, fine, lines, normal, training, run.history)
    metrics["training_seconds"] = run.trained
    metrics["seconds"] = run.spent.seconds()
    metrics["cpu_seconds"] = run.spent.cpu_seconds()
    watch.done({"preview": out / "preview.png"}, metrics)
    write_json(out / "metrics.json", metrics)
    return metrics


def trace_network(training: CurveTraining, config: CurveConfig) -> CurveTrace:
    """The zero level set in the box of the points widened by the samples' margin, in float64 and in
    normalised units, searched for from the points and from all over the box."""
    network = copy.deepcopy(training.network).double()
    low, high = training.low.double(), training.high.double()
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(config.trace_seeds, len(low), generator=generator, dtype=torch.float64)
    seeds = torch.cat([training.cloud.double(), low + uniform.to(low) * (high - low)])
    return trace_curve(network, seeds, box=(low, high), step=config.trace_step)


Line = tuple[np.ndarray, np.ndarray]  # vertices (n, d) in order, edges (m, 2)


def _metrics(
    cloud: CurvePoints,
    curves: Sequence[Curve],
    lines: Sequence[Line],
    normal: Normalization,
    training: CurveTraining,
    history: dict[str, float],
) -> dict[str, Any]:
    """Lengths and distances in input units."""
    nearest = np.stack([distance_to_line(cloud.points, *line) for line in lines])
    to_cloud = cKDTree(cloud.points).query(np.concatenate([line[0] for line in lines]))[0]
    near = np.bincount(nearest.argmin(0), minlength=len(lines))
    metrics: dict[str, Any] = {
        "points": len(cloud.points),
        "dimension": cloud.points.shape[1],
        "diagonal": float(np.linalg.norm(np.ptp(cloud.points, axis=0))),
        "components": len(curves),
        "closed": all(curve.closed for curve in curves),
        "length": sum(curve.length for curve in curves) * normal.scale,
        "curves": [
            {
                "closed": curve.closed,
                "ends": [str(end) for end in curve.ends],
                "crossings": curve.crossings,
                "length": curve.length * normal.scale,
                "vertices": len(curve),
                "longest_edge": float(curve.spacings.max()) * normal.scale,
                "nearest_for": int(count),
            }
            for curve, count in zip(curves, near, strict=True)
        ],
        "vertices": sum(len(curve) for curve in curves),
        "longest_edge_share": max(float(c.spacings.max()) / c.length for c in curves),
        "cloud_to_curve": float(nearest.min(0).mean()),
        "curve_to_cloud": float(to_cloud.mean()),
        "residual": max(curve.residual for curve in curves),
        "steps": training.step,
        "skipped_steps": training.skipped_steps,
        "divergences": training.guard.returns,
        "converged_share": training.converged_rows / training.projected_rows,
        "rank_deficient_rows": training.rank_deficient_rows,
        "peak_memory_gb": peak_memory_gb(),
        "build": build_info(),
        **history,
    }
    if cloud.truth is not None:
        metrics["against_truth"] = against_truth(lines, cloud.truth, cloud.missing)
    return metrics


def against_truth(lines: Sequence[Line], truth: np.ndarray, missing: int = 0) -> dict[str, float]:
    """Distances between polylines and a closed curve, dense and in order.

    ``truth_to_curve`` leaves out truth[:missing], which the points did not show; ``hausdorff`` is
    the largest of all distances, and so measures what the network made of such a gap.
    """
    count = np.arange(len(truth))
    loop = np.stack([count, np.roll(count, -1)], 1)
    forth = np.concatenate([distance_to_line(line[0], truth, loop) for line in lines])
    back = np.stack([distance_to_line(truth, *line) for line in lines]).min(0)
    return {
        "length": float(np.linalg.norm(truth[loop[:, 1]] - truth[loop[:, 0]], axis=1).sum()),
        "curve_to_truth": float(forth.mean()),
        "truth_to_curve": float(back[missing:].mean()),
        "truth_to_curve_max": float(back[missing:].max()),
        "hausdorff": float(max(forth.max(), back.max())),
    }


def distance_to_line(points: np.ndarray, vertices: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Distances (n,) from points to a polyline whose edges are all short beside them, or nearly
    equal: the edges looked at are those at the four nearest vertices."""
    around: list[list[int]] = [[] for _ in vertices]
    for k, (a, b) in enumerate(edges):
        around[a].append(k)
        around[b].append(k)
    touching = np.array([(k * 2)[:2] for k in around])  # (n, 2), the one edge of an end twice
    some = min(4, len(vertices))
    index = cKDTree(vertices).query(points, k=some)[1].reshape(len(points), some)
    pairs = edges[touching[index].reshape(len(points), -1)]
    start, end = vertices[pairs[..., 0]], vertices[pairs[..., 1]]
    along = end - start
    square = np.maximum((along * along).sum(-1), np.finfo(np.float64).tiny)
    share = np.clip(((points[:, None] - start) * along).sum(-1) / square, 0.0, 1.0)
    foot = start + share[..., None] * along
    return np.linalg.norm(points[:, None] - foot, axis=-1).min(1)


# --- files ----------------------------------------------------------------------------------


def write_curve(path: Path, lines: Sequence[Line]) -> None:
    """A binary PLY: ``vertex`` (double x y z, z = 0 in the plane), curve after curve and in order,
    and ``edge`` (int vertex1 vertex2). The same curves give the same bytes."""
    points, edges, first = [], [], 0
    for vertices, pairs in lines:
        flat = np.zeros((len(vertices), 3))
        flat[:, : vertices.shape[1]] = vertices
        points.append(flat)
        edges.append(pairs + first)
        first += len(vertices)
    corner = np.concatenate(points).astype("<f8")
    pair = np.concatenate(edges).astype("<i4")
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(corner)}",
        *(f"property double {axis}" for axis in "xyz"),
        f"element edge {len(pair)}",
        "property int vertex1",
        "property int vertex2",
        "end_header",
    ]
    blob = ("\n".join(header) + "\n").encode("ascii") + corner.tobytes() + pair.tobytes()
    write_whole(path, lambda stream: stream.write(blob))


_LINE = np.array([0.13, 0.15, 0.19])
_DOT_RADIUS, _LINE_RADIUS = 3.2, 3.6  # in pixels of the large picture


def render_curve(path: Path, cloud: np.ndarray, lines: Sequence[Line]) -> None:
    """Write a PNG: left the points, right the curve among them, from two sides (of the plane: from
    above). The same input gives the same bytes."""

    def in_space(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, np.zeros((len(x), 3 - x.shape[1]))], 1)

    points = in_space(cloud[:: max(1, -(-len(cloud) // canvas.MOST_DOTS))])
    line = in_space(np.concatenate([vertices for vertices, _ in lines]))
    views = canvas.VIEWS if cloud.shape[1] == 3 else ((0.0, 0.0),)
    low, high = points.min(0), points.max(0)
    center = (low + high) / 2
    cameras = [canvas.camera(*view) for view in views]
    reach = max(float(np.abs((points - center) @ c[:2].T).max()) for c in cameras) or 1.0
    size = canvas.PANEL * canvas.SCALE
    unit = canvas.FILL * size / 2 / reach

    rows = []
    for camera in cameras:
        dots = canvas.on_screen((points - center) @ camera.T * unit, size)
        curve = canvas.on_screen((line - center) @ camera.T * unit, size)
        left = [(dots, _DOT_RADIUS, canvas.DOTS)]
        rows.append(
            np.concatenate(
                [_draw(left, size), _draw([*left, (curve, _LINE_RADIUS, _LINE)], size)], 1
            )
        )
    picture = np.concatenate(rows)
    scale = canvas.SCALE
    height, width = picture.shape[0] // scale, picture.shape[1] // scale
    picture = picture.reshape(height, scale, width, scale, 3).mean((1, 3))
    image = Image.fromarray(np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8), "RGB")
    word = "curve" if len(lines) == 1 else "curves"
    canvas.caption(image, f"input: {len(cloud):,} points", f"level set: {len(lines)} {word}")
    write_whole(path, lambda stream: image.save(stream, format="PNG", optimize=False))


def _draw(layers: Sequence[tuple[np.ndarray, float, np.ndarray]], size: int) -> np.ndarray:
    """Discs (columns, rows and depths (k, 3); a radius; a colour), paler with depth."""
    image = canvas.background(size)
    flat = image.reshape(-1, 3)
    best = np.full(size * size, canvas.FAR, dtype=np.uint64)
    depths = np.concatenate([screen[:, 2] for screen, _, _ in layers])
    near, far = float(depths.min()), float(depths.max())
    for screen, radius, color in layers:
        buffer = canvas.splat(screen, radius, size)
        pixel = np.flatnonzero(buffer >> np.uint64(32) < best >> np.uint64(32))
        owner = (buffer[pixel] & np.uint64(0xFFFFFFFF)).astype(np.int64)
        haze = 0.45 * ((screen[owner, 2] - near) / max(far - near, 1e-9))[:, None]
        flat[pixel] = (1 - haze) * color + haze * canvas.BACKGROUND_BOTTOM
        best[pixel] = buffer[pixel]
    return image
