"""Figure A2: iso-levels of a reconstruction network on a cut, and how far F is from the distance.

    python python_examples/figure_a2_levels.py --out DIR [--quick]
    python python_examples/figure_a2_levels.py --out DIR --run RUN --scan SCAN --truth MESH

RUN is a folder of ``levelset-ext reconstruct`` (or DIR/runs/NAME of surface_table.py), SCAN the
cloud it was made from (left out: where RUN says it is), MESH the surface the scan was taken from.
Without --run a network is trained on a synthetic scan first, whose surface is known.

DIR/figure_a2_levels.png    left: iso-levels of F on a plane through the shape, the zero level bold,
                            the true surface's cut thin; middle: F against the signed distance;
                            right: |F| / distance by distance
DIR/figure_a2_bands.csv     points in bands of their true distance d: |F| / d, ||F| - d|, signs
DIR/figure_a2_spacing.csv   points on iso-levels: their true signed distance, which ideally is F
DIR/figure_a2.json          both, with the settings

Lengths are those of the normalised cloud, whose longest half side is 0.9. The distance is that to
the triangles of the true surface, its sign that of the generalised winding number, so that small
holes in the truth do no harm. F is trained with the distance to the cloud alone: where the scan saw
nothing, both must differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from _shared import (
    BLUE,
    GREY,
    ORANGE,
    Run,
    arguments,
    command,
    pyplot,
    quantiles,
    save_picture,
    write_table,
)
from _surfaces import check_cloud, run_header
from scipy.spatial import cKDTree
from torch import Tensor, nn

import levelset_ext as ls
from levelset_ext.data.meshes import read_mesh
from levelset_ext.data.scans import Normalization
from levelset_ext.errors import InputError
from levelset_ext.field import value_and_jacobian
from levelset_ext.recipes.files import load_checkpoint, write_json
from levelset_ext.recipes.reconstruct import (
    KIND,
    Training,
    config_from,
    load_cloud,
    network_of,
    preset,
)
from levelset_ext.recipes.run_folder import digest

BANDS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # edges, in distance to the true surface
LEVELS = (-0.1, -0.05, -0.02, 0.0, 0.02, 0.05, 0.1, 0.2)
STEP, REACH = 0.05, 0.35  # of the iso-levels that are drawn, and how far F is coloured


# --- the true distance ---


class Surface:
    """Signed distances to a triangle mesh, negative inside.

    Args:
        vertices: (v, 3).
        faces: (f, 3), counter-clockwise from outside.
        samples: points of the surface that the nearest triangles are found by.
    """

    def __init__(self, vertices: np.ndarray, faces: np.ndarray, samples: int = 300_000) -> None:
        self.mesh = trimesh.Trimesh(vertices, faces, process=False)
        self.corner = np.array(self.mesh.triangles, np.float64)
        self.points, self.face = trimesh.sample.sample_surface(self.mesh, samples, seed=0)
        self.tree = cKDTree(self.points)

    def distance(self, x: np.ndarray, candidates: int = 12) -> np.ndarray:
        """(n,) from x (n, 3) to the nearest of the triangles on which the nearest samples lie."""
        _, near = self.tree.query(x, k=min(candidates, len(self.points)))
        face = self.face[near.reshape(len(x), -1)]
        rows = np.repeat(x, face.shape[1], axis=0)
        foot = trimesh.triangles.closest_point(self.corner[face.reshape(-1)], rows)
        return np.linalg.norm(foot - rows, axis=1).reshape(face.shape).min(1)

    def inside(self, x: np.ndarray, pairs: int = 2_000_000) -> np.ndarray:
        """Where the winding number, the sum of the triangles' solid angles / 4 pi, is over 1/2."""
        corner = torch.from_numpy(self.corner).float()
        found = []
        for some in torch.from_numpy(x).float().split(max(1, pairs // len(corner))):
            to = corner[None] - some[:, None, None]  # (m, f, 3 corners, 3)
            a, b, c = to.unbind(2)
            (la, lb, lc) = torch.linalg.vector_norm(to, dim=3).unbind(2)
            volume = (a * torch.linalg.cross(b, c)).sum(2)
            rest = la * lb * lc + (a * b).sum(2) * lc + (b * c).sum(2) * la + (c * a).sum(2) * lb
            found.append(torch.atan2(volume, rest).double().sum(1) / (2 * math.pi))
        return (torch.cat(found) > 0.5).numpy()

    def signed(self, x: np.ndarray) -> np.ndarray:
        return np.where(self.inside(x), -1.0, 1.0) * self.distance(x)


# --- what is measured ---


@dataclass(frozen=True)
class Amount:
    """How many points are looked at."""

    band: int = 1000
    level: int = 500


def points_in_bands(surface: Surface, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points around the surface, `count` in every one of BANDS, and their unsigned distance."""
    random = np.random.default_rng(seed)
    kept, distances = [], []
    for low, high in pairwise(BANDS):
        found, there = np.empty((0, 3)), np.empty(0)
        while len(found) < count:
            rows = random.integers(len(surface.points), size=2 * count)
            direction = random.standard_normal((2 * count, 3))
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
            x = surface.points[rows] + direction * random.uniform(low, 2 * high, (2 * count, 1))
            d = surface.distance(x)
            good = (d >= low) & (d < high)
            found, there = np.concatenate([found, x[good]]), np.concatenate([there, d[good]])
        kept.append(found[:count])
        distances.append(there[:count])
    return np.concatenate(kept), np.concatenate(distances)


def measure(
    network: nn.Module, surface: Surface, amount: Amount | None = None, seed: int = 0
) -> dict[str, Any]:
    """How far F is from the signed distance.

    Returns:
        points: (n, 3); distance: (n,) true, signed; values: (n,) of F; bands: rows of the first
        table; spacing: rows of the second.
    """
    amount = amount or Amount()
    like = next(network.parameters())
    x, d = points_in_bands(surface, amount.band, seed)
    inside = surface.inside(x)
    values, jacobian = value_and_jacobian(network, torch.from_numpy(x).to(like.dtype))
    f = values.detach().double().reshape(-1).cpu()
    slope = torch.linalg.vector_norm(jacobian.detach().double().reshape(len(x), 3), dim=1).cpu()
    distance = torch.from_numpy(d)
    agree = (f < 0) == torch.from_numpy(inside)
    bands = []
    for k, (low, high) in enumerate(pairwise(BANDS)):
        some = slice(k * amount.band, (k + 1) * amount.band)
        ratio = quantiles(f[some].abs() / distance[some].clamp_min(1e-12), (0.1, 0.5, 0.9))
        off = (f[some].abs() - distance[some]).abs()
        bands.append(
            {
                "from": low,
                "to": high,
                "points": amount.band,
                "ratio_10": ratio[0],
                "ratio_50": ratio[1],
                "ratio_90": ratio[2],
                "deviation_mean": float(off.mean()),
                "deviation_95": quantiles(off, (0.95,))[0],
                "signs_agree": float(agree[some].double().mean()),
                "slope_50": quantiles(slope[some], (0.5,))[0],
            }
        )
    signed = torch.where(torch.from_numpy(inside), -distance, distance)
    return {
        "points": torch.from_numpy(x),
        "distance": signed,
        "values": f,
        "bands": bands,
        "spacing": spacing(network, surface, amount.level, seed),
    }


def spacing(
    network: nn.Module, surface: Surface, count: int, seed: int = 0
) -> list[dict[str, Any]]:
    """True signed distances of points that are moved to iso-levels from where they should be."""
    random = np.random.default_rng(seed)
    like = next(network.parameters())
    normals = surface.mesh.face_normals[surface.face]
    rows = []
    for level in LEVELS:
        some = random.integers(len(surface.points), size=count)
        start = surface.points[some] + level * normals[some]
        found = ls.project(
            network, torch.from_numpy(start).to(like.dtype), level=level, max_iters=20, max_step=0.1
        )
        at = found.points[found.converged].double().numpy()
        d = torch.from_numpy(surface.signed(at)) if len(at) else torch.empty(0)
        low, middle, high = quantiles(d, (0.1, 0.5, 0.9))
        rows.append(
            {
                "level": level,
                "points": len(at),
                "distance_mean": float(d.mean()) if len(at) else float("nan"),
                "distance_10": low,
                "distance_50": middle,
                "distance_90": high,
            }
        )
    return rows


# --- the network ---


def read_run(folder: Path) -> dict[str, Any]:
    """Parameters and settings of a run, and the cloud it is of."""
    header = run_header(folder)
    state = load_checkpoint(folder / "checkpoint.pt", KIND)
    return {
        "settings": state["settings"],
        "network": state["training"]["network"],
        "step": state["training"]["counters"]["step"],
        "cloud": header["cloud"],
        "digest": header["digest"],
    }


def train(points: np.ndarray, steps: int, seed: int) -> dict[str, Any]:
    config = preset("fast", steps, seed)
    unit = torch.from_numpy(Normalization.fit(points).to_unit(points).astype(np.float32))
    training = Training(unit, config)
    while training.step < steps:
        training.advance()
    return {
        "settings": asdict(config),
        "network": training.network.state_dict(),
        "step": training.step,
    }


# --- the picture ---


def cut(
    network: nn.Module, surface: Surface, axis: int, at: float, pixels: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """F on a plane across an axis: ((n,), (m,), (m, n)), and the truth's cut (k, 2, 2)."""
    low, high = surface.mesh.bounds
    origin = low + (high - low) * np.where(np.arange(3) == axis, at, 0.5)
    # y, or else z, goes up.
    across, up = [k for k in (2, 0, 1) if k != axis] if axis != 1 else (0, 2)
    room = 0.28
    spread = (high - low).max() + 2 * room
    count = [max(2, round(pixels * (high[k] - low[k] + 2 * room) / spread)) for k in (across, up)]
    u = np.linspace(low[across] - room, high[across] + room, count[0])
    v = np.linspace(low[up] - room, high[up] + room, count[1])
    x = np.broadcast_to(origin, (len(v), len(u), 3)).copy()
    x[..., across], x[..., up] = u[None], v[:, None]
    like = next(network.parameters())
    with torch.no_grad():
        parts = torch.from_numpy(x.reshape(-1, 3)).to(like.dtype).split(50_000)
        values = torch.cat([network(part).reshape(-1) for part in parts])
    normal = np.eye(3)[axis]
    segments = trimesh.intersections.mesh_plane(surface.mesh, normal, origin)
    lines = np.asarray(segments).reshape(-1, 2, 3)[:, :, [across, up]]
    return (u, v, values.double().numpy().reshape(len(v), len(u))), lines


def draw(
    path: Path, found: dict[str, Any], plane: tuple[np.ndarray, ...], lines: np.ndarray
) -> None:
    plt = pyplot()
    from matplotlib.collections import LineCollection

    u, v, values = plane
    wide = 0.25 + min(max(float(np.ptp(u) / np.ptp(v)), 0.4), 1.2)
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(4.2 * (2 + wide), 4.6), gridspec_kw={"width_ratios": (wide, 1, 1)}
    )
    steps = np.arange(-round(REACH / STEP), round(REACH / STEP) + 1) * STEP
    shade = left.contourf(u, v, values, levels=steps, cmap="RdBu", extend="both", alpha=0.85)
    left.contour(
        u, v, values, levels=steps[steps != 0], colors="0.25", linewidths=0.6, linestyles="solid"
    )
    left.contour(u, v, values, levels=[0.0], colors="black", linewidths=2.2)
    left.add_collection(LineCollection(list(lines), colors=ORANGE, linewidths=1.0, zorder=5))
    left.set_aspect("equal")
    left.grid(False)
    left.set_title(f"iso-levels of F, every {STEP:g}")
    left.plot([], [], color="black", linewidth=2.2, label="F = 0")
    left.plot([], [], color=ORANGE, linewidth=1.0, label="true surface")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    figure.colorbar(shade, ax=left, shrink=0.8)

    reach = BANDS[-1]
    middle.plot([-reach, reach], [-reach, reach], color=GREY, linewidth=1, label="F = distance")
    middle.scatter(found["distance"], found["values"], s=3, color=BLUE, alpha=0.25, linewidths=0)
    middle.set_xlabel("true signed distance")
    middle.set_ylabel("F")
    middle.set_xlim(-1.05 * reach, 1.05 * reach)
    middle.set_ylim(-1.25 * reach, 1.25 * reach)
    middle.xaxis.set_major_locator(plt.MultipleLocator(0.1))
    middle.set_title("F against the distance")
    middle.legend(loc="upper left")

    at = np.arange(len(found["bands"]))
    low = np.array([row["ratio_10"] for row in found["bands"]])
    high = np.array([row["ratio_90"] for row in found["bands"]])
    right.bar(at, high - low, 0.5, bottom=low, color=BLUE, alpha=0.35, label="10 % to 90 %")
    middles = [row["ratio_50"] for row in found["bands"]]
    right.plot(at, middles, "o", color=BLUE, markersize=5, label="median")
    right.axhline(1.0, color=GREY, linewidth=1)
    right.set_ylim(0, max(2.0, 1.05 * max(row["ratio_90"] for row in found["bands"][1:])))
    for k, row in enumerate(found["bands"]):
        text = f"{100 * row['signs_agree']:.1f}"
        right.text(k, 0.04, text, ha="center", color="0.35", fontsize=8)
    right.set_xticks(at, [f"{row['from']:g}-\n{row['to']:g}" for row in found["bands"]])
    right.set_xlabel("true distance (numbers: % of signs that are right)")
    right.set_title("|F| / distance")
    right.legend(loc="upper right")
    save_picture(figure, path)


# --- the command ---


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--run", type=Path, metavar="RUN", help="folder of levelset-ext reconstruct"
    )
    parser.add_argument("--scan", metavar="SCAN", help="the cloud of RUN")
    parser.add_argument("--truth", type=Path, metavar="MESH", help="the surface it was taken from")
    parser.add_argument("--steps", type=int, help="of a training; 3000 if left out, quick 300")
    parser.add_argument("--axis", choices="xyz", help="across the cut; the shortest if left out")
    parser.add_argument("--at", type=float, default=0.5, help="where on it, from 0 to 1")
    args = parser.parse_args(argv)
    if not 0 < args.at < 1:
        raise InputError(f"at: expected a number between 0 and 1, got {args.at}")
    steps = args.steps if args.steps is not None else (300 if args.quick else 3000)
    if steps < 1:
        raise InputError(f"steps: expected at least 1, got {steps}")
    trained = read_run(args.run) if args.run else None
    where = args.scan
    if trained is not None and where is None and trained["cloud"] != "synthetic scan":
        where = trained["cloud"]
    cloud = load_cloud(where, args.seed)
    if trained is not None:
        check_cloud(args.run, trained, cloud)
    truth = cloud.truth if args.truth is None else read_mesh(args.truth)
    if truth is None:
        raise InputError("truth: expected the mesh of the true surface, got none")
    amount = Amount(200, 100) if args.quick else Amount()
    settings = {
        "seed": args.seed,
        "quick": args.quick,
        "scan": cloud.digest,
        "truth": digest(torch.tensor(truth.vertices), torch.tensor(truth.faces)),
        "network": steps if trained is None else digest(*trained["network"].values()),
    }
    run = Run(args.out, "figure-a2", settings, 2, args.resume)
    made = run.unit("network", lambda: trained or train(cloud.points, steps, args.seed))
    network = network_of(config_from({**made["settings"]}))
    network.load_state_dict(made["network"])
    network.requires_grad_(False)
    normal = Normalization.fit(cloud.points)
    surface = Surface(normal.to_unit(truth.vertices), np.asarray(truth.faces, np.int64))
    found = run.unit("measures", lambda: measure(network, surface, amount, args.seed))

    write_table(args.out / "figure_a2_bands.csv", found["bands"])
    write_table(args.out / "figure_a2_spacing.csv", found["spacing"])
    summary = {
        "steps": made["step"],
        "points": len(found["values"]),
        "correlation": correlation(found["distance"], found["values"]),
        "bands": found["bands"],
        "spacing": found["spacing"],
    }
    write_json(args.out / "figure_a2.json", {"settings": settings, **summary})
    axis = "xyz".index(args.axis) if args.axis else int(surface.mesh.extents.argmin())
    plane, lines = cut(network, surface, axis, args.at, 120 if args.quick else 500)
    draw(args.out / "figure_a2_levels.png", found, plane, lines)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


if __name__ == "__main__":
    raise SystemExit(command(main))
