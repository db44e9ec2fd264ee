"""Thin parts and creases of the scans from near: the truth, ours, screened Poisson.

    python python_examples/close_ups.py SCANS --runs RUNS --out DIR

SCANS is a folder of point clouds NAME.ply with their surfaces in SCANS/truth/NAME.ply, and
RUNS/NAME a finished ``levelset-ext reconstruct`` of each (what is not there is trained, with the
preset "fast"). A run of another cloud is refused; without --runs, in DIR/runs, also one of other
settings. Three places of every scan are found by the truth alone: the two thinnest, by the lengths
of rays from the surface through the inside, and the one with most creases, by the angles between
faces. None is nearer to another than four radii; a radius is 5 % of the diagonal.

DIR/close_ups.json   distances to and from the truth within each place, / diagonal of the scan
DIR/close_ups.png    a row per scan; orange: the inner side
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import _surfaces
import numpy as np
import trimesh
from _shared import Run, arguments, command
from scipy.spatial import cKDTree
from surface_table import Scan, View, captioned, read_scans, save_image, words

from levelset_ext._load import build_info
from levelset_ext.data.meshes import read_mesh
from levelset_ext.data.scans import Normalization
from levelset_ext.geometry import canvas
from levelset_ext.geometry.compare import TriangleMesh
from levelset_ext.recipes.files import write_json
from levelset_ext.recipes.progress import say
from levelset_ext.recipes.reconstruct import ReconstructConfig, preset, reconstruct

RADIUS = 0.05  # of a place, in diagonals
APART = 4.0  # places, in radii
FRAMED = 1.4  # radii that a panel shows
SAMPLES = 4_000  # of the truth, to find places
DENSE = 400_000  # points that stand for the surface within a place


@dataclass(frozen=True)
class Place:
    """A ball around a point of the truth."""

    kind: str  # "thin" or "crease"
    center: np.ndarray
    radius: float

    def holds(self, points: np.ndarray, radii: float = 1.0) -> np.ndarray:
        return np.linalg.norm(points - self.center, axis=1) < radii * self.radius

    def part(self, mesh: TriangleMesh, radii: float) -> trimesh.Trimesh:
        """The faces of a mesh whose centres are within so many radii."""
        corners = mesh.vertices[mesh.faces]
        faces = mesh.faces[self.holds(corners.mean(1), radii)]
        return trimesh.Trimesh(mesh.vertices, faces, process=False)


def places(truth: trimesh.Trimesh, random: np.random.Generator) -> list[Place]:
    """Two thin places and one with creases; see the head of the file."""
    radius = RADIUS * float(np.linalg.norm(truth.extents))
    points, face = trimesh.sample.sample_surface(truth, SAMPLES, seed=random)
    normals = truth.face_normals[face]
    thickness = trimesh.proximity.thickness(truth, points, normals=normals, method="ray")
    thickness = np.where(np.isfinite(thickness), thickness, np.inf)
    # A ray near a crease is short too; the median of the neighbourhood says what is thin.
    near = cKDTree(points).query_ball_point(points, radius)
    thin = np.array([np.median(thickness[rows]) for rows in near])
    edges = truth.face_adjacency_edges
    ends = truth.vertices[edges]
    bent = np.linalg.norm(ends[:, 0] - ends[:, 1], axis=1) * truth.face_adjacency_angles**2
    crossed = cKDTree(ends.mean(1)).query_ball_point(points, radius)
    crease = np.array([bent[rows].sum() for rows in crossed])
    found: list[Place] = []
    for kind, score in (("thin", thin), ("thin", thin), ("crease", -crease)):
        free = np.ones(len(points), dtype=bool)
        for place in found:
            free &= ~place.holds(points, APART)
        if free.any():
            best = np.flatnonzero(free)[score[free].argmin()]
            found.append(Place(kind, points[best], radius))
    return found


def view_of(place: Place, truth: trimesh.Trimesh) -> View:
    """From where most of the place is seen; rather from above, where the light is."""
    part = place.part(truth, 3.0)
    inside = place.holds(part.triangles_center, FRAMED)
    frame = part.vertices[np.unique(part.faces[inside])]
    best, view = -1.0, View(frame)
    for azimuth, elevation in product(range(0, 360, 30), (-20.0, 15.0, 40.0)):
        candidate = View(frame, canvas.camera(float(azimuth), elevation))
        outward = part.face_normals @ candidate.axes[2] > 0
        corner = canvas.on_screen(candidate.place(part.vertices), candidate.size)[part.faces]
        _, owner = canvas.owners(canvas.rasterize(corner, candidate.size, candidate.size))
        seen = float((inside & outward)[owner].sum()) * (1.0 if elevation > 0 else 0.6)
        if seen > best:
            best, view = seen, candidate
    return view


def distances(mesh: TriangleMesh, truth: TriangleMesh, place: Place, seed: int) -> dict[str, Any]:
    """Means and maxima within a place, from each surface to the other, / diagonal."""
    diagonal = place.radius / RADIUS
    found: dict[str, Any] = {}
    for name, one, other in (("truth_to_mesh", truth, mesh), ("mesh_to_truth", mesh, truth)):
        here, there = place.part(one, 1.0), place.part(other, 2.0)
        if not (len(here.faces) and len(there.faces)):
            found[name] = found[f"{name}_max"] = None
            continue
        points = trimesh.sample.sample_surface(here, SAMPLES, seed=seed)[0]
        dense = trimesh.sample.sample_surface(there, DENSE, seed=seed + 1)[0]
        away = cKDTree(dense).query(points)[0] / diagonal
        found[name], found[f"{name}_max"] = float(away.mean()), float(away.max())
    return found


def ours(scan: Scan, run: Path, config: ReconstructConfig, own: bool) -> trimesh.Trimesh:
    """The mesh of a run, in the unit box of the scan; the run is made if it is not there.

    A finished run has to be of this cloud; one of our ``own``, of these settings as well.
    """
    if own or not (run / "metrics.json").exists():
        reconstruct(scan.raw, run, config, resume=True, say=say)
    _surfaces.check_cloud(run, _surfaces.run_header(run), scan.raw)
    mesh = read_mesh(run / "mesh.ply")
    normal = Normalization.fit(scan.raw.points)
    return trimesh.Trimesh(normal.to_unit(mesh.vertices), mesh.faces, process=False)


def poisson(scan: Scan, depth: int) -> dict[str, Any]:
    made = _surfaces.poisson(scan.points, depth=depth)
    return {"vertices": made.vertices, "faces": made.faces}


def panels(caption: str, view: View, place: Place, meshes: dict[str, Any]) -> np.ndarray:
    """(BAND + PANEL, meshes PANEL, 3): a place of each mesh under its name."""
    parts = [place.part(mesh, 3.0) for mesh in meshes.values()]
    shown = [view.mesh(np.asarray(part.vertices), np.asarray(part.faces), True) for part in parts]
    first, *others = meshes
    return captioned(shown, [f"{caption}, {first}", *others], band=1.0)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("data", nargs="?", type=Path, metavar="SCANS", help="folder of scans")
    parser.add_argument("--runs", type=Path, metavar="RUNS", help="ours; DIR/runs if left out")
    parser.add_argument("--scans", type=words, default=[], metavar="A,B", help="only these")
    parser.add_argument("--steps", type=int, help="of what has to be trained; as the preset has")
    args = parser.parse_args(argv)
    steps, depth = (args.steps or 60, 6) if args.quick else (args.steps, 8)
    scans = read_scans(args.data, args.scans, args.quick, args.seed)
    _surfaces.pymeshlab()
    runs, config = args.runs or args.out / "runs", preset("fast", steps, args.seed)
    settings = {"seed": args.seed, "steps": steps, "depth": depth}
    run = Run(args.out, "close-ups", settings, len(scans), args.resume)
    rows: list[np.ndarray] = []
    found: dict[str, list[dict[str, Any]]] = {}
    for scan in scans:
        made = run.unit(f"{scan.name}-{scan.raw.digest[:8]}-poisson", partial(poisson, scan, depth))
        meshes = {
            "truth": scan.truth,
            "ours": ours(scan, runs / scan.name, config, args.runs is None),
            "screened Poisson": trimesh.Trimesh(made["vertices"], made["faces"], process=False),
        }
        found[scan.name] = []
        shown: list[np.ndarray] = []
        for place in places(scan.truth, np.random.default_rng(args.seed)):
            entry: dict[str, Any] = {"kind": place.kind, "center": place.center.tolist()}
            for key, name in (("ours", "ours"), ("poisson", "screened Poisson")):
                entry[key] = distances(meshes[name], scan.truth, place, args.seed)
            found[scan.name].append(entry)
            view = view_of(place, scan.truth)
            shown.append(panels(f"{scan.name}, {place.kind}", view, place, meshes))
            near = {key: f"{1e4 * entry[key]['truth_to_mesh']:.1f}" for key in ("ours", "poisson")}
            say(f"{scan.name}, {place.kind}: truth to mesh x 1e4 {near}")
        rows.append(np.concatenate(shown, 1))
    write_json(
        args.out / "close_ups.json", {"settings": settings, "build": build_info(), "scans": found}
    )
    save_image(args.out / "close_ups.png", rows)


if __name__ == "__main__":
    raise SystemExit(command(main))
