"""Table 2: a surface from one raw cloud, by this project and by others, in the same time.

    python python_examples/surface_table.py --out DIR --quick
    python python_examples/surface_table.py SCANS --out DIR --seconds 300

SCANS is a folder of point clouds NAME.ply with the surfaces they were taken from in
SCANS/truth/NAME.ply; without it there is one synthetic scan. Methods, all without normals given:

ours       Eq. 13, preset "fast", its schedules stretched to the time
sphere     AtlasNet, one map of a sphere
patch      AtlasNet, one map of a square
patches    AtlasNet, 25 maps of it
igr        implicit geometric regularisation
poisson    screened Poisson, depth 8, normals from 16 neighbours (needs pymeshlab; not trained)

What is trained gets --seconds of CPU time of one thread each (or --steps, to get the same figures
again); meshes are made after that. Sizes are what a CPU can do in minutes (see _surfaces.py):
AtlasNet's layers have a quarter of the published width, IGR's network is that of the preset. The
distances are those of ``levelset-ext compare``. Where the true surface is open, all meshes are
compared once more without what ``levelset-ext trim --distance 0.01`` takes off.

DIR/surface_table.md, .json   distances, topology and seconds of every scan and method
DIR/surface_table.png         a row per scan: the cloud, the truth and all meshes, above each its
                              point to surface x 1e3; orange: the inner side of a closed mesh
DIR/runs/NAME                 our networks, as runs of ``levelset-ext reconstruct``
DIR/parts                     what is finished, with the meshes, for --resume

Several processes can work on one DIR with --resume and different --scans; the last one, without
--scans, makes tables of all. --fast-results adds figures of full runs of the preset that a JSON
file of the form of benchmarks/results/reconstruct_fast.json holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import _surfaces
import numpy as np
import torch
import trimesh
from _shared import Run, arguments, command
from _surfaces import Budget, Surface
from PIL import Image, ImageDraw, ImageFont

from levelset_ext._load import build_info
from levelset_ext.data.meshes import read_mesh
from levelset_ext.data.scans import Normalization, synthetic_scan
from levelset_ext.errors import InputError
from levelset_ext.geometry import preview
from levelset_ext.geometry.compare import compare_meshes
from levelset_ext.geometry.trim import trim_mesh
from levelset_ext.recipes.files import read_json, write_json
from levelset_ext.recipes.progress import say
from levelset_ext.recipes.reconstruct import Cloud, load_cloud
from levelset_ext.whole_files import write_whole

METHODS = {
    "ours": "ours",
    "sphere": "AtlasNet, 1 sphere",
    "patch": "AtlasNet, 1 patch",
    "patches": "AtlasNet, 25 patches",
    "igr": "IGR",
    "poisson": "screened Poisson",
}
# Chamfer x 1e3 of the paper's Table 2: FAUST raw scans, not these.
PUBLISHED = {
    "sphere": (23.56, 17.69),
    "patch": (18.67, 13.38),
    "patches": (11.54, 7.89),
    "ours": (10.71, 7.32),
}
TRIM = 0.01  # of the diagonal of the cloud
PANEL, SCALE = 250, 2  # pixels; drawn larger, then averaged down
BAND = 26  # pixels above the panels, for the captions
FILL = 0.88


@dataclass(frozen=True)
class Scan:
    """A cloud and its surface, both in the unit box."""

    name: str
    raw: Cloud  # in input units
    points: np.ndarray  # (n, 3) float64
    truth: trimesh.Trimesh

    @property
    def cloud(self) -> torch.Tensor:
        return torch.from_numpy(self.points.astype(np.float32))


def scan_of(name: str, raw: Cloud, truth: trimesh.Trimesh) -> Scan:
    normal = Normalization.fit(raw.points)
    surface = trimesh.Trimesh(normal.to_unit(truth.vertices), truth.faces, process=False)
    return Scan(name, raw, normal.to_unit(raw.points), surface)


def read_scans(folder: Path | None, names: Sequence[str], quick: bool, seed: int) -> list[Scan]:
    if folder is None:
        if names:
            raise InputError(
                f"scans: expected a folder SCANS to choose from, got {names[0]!r} alone"
            )
        made = synthetic_scan(20_000 if quick else 170_000, seed=seed)
        return [scan_of("synthetic", Cloud(made.points, "synthetic scan"), made.truth)]
    there = sorted(file.stem for file in folder.glob("*.ply"))
    if not there:
        raise InputError(f"{folder}: expected a folder with scans NAME.ply, found none")
    if strange := [name for name in names if name not in there]:
        raise InputError(f"scans: expected some of {', '.join(there)}, got {', '.join(strange)}")
    return [
        scan_of(
            name,
            load_cloud(str(folder / f"{name}.ply"), seed),
            read_mesh(folder / "truth" / f"{name}.ply"),
        )
        for name in names or there
    ]


@dataclass(frozen=True)
class Setting:
    """What the figures of a method depend on, besides the scan."""

    seed: int = 0
    seconds: float | None = 300.0
    steps: int | None = None  # instead of seconds
    resolution: int = 256  # of implicit surfaces
    depth: int = 8  # of Poisson
    samples: int = 30_000  # of compare_meshes
    surface_samples: int = 50_000
    dense_samples: int = 1_500_000


def reconstruct(method: str, scan: Scan, how: Setting, runs: Path) -> Surface:
    budget = Budget(how.seconds, how.steps)
    if method == "ours":
        keep = (runs / scan.name, scan.raw)
        return _surfaces.ours(
            scan.cloud, budget, resolution=how.resolution, seed=how.seed, keep=keep
        )
    if method == "igr":
        return _surfaces.igr(scan.cloud, budget, resolution=how.resolution, seed=how.seed)
    if method == "poisson":
        return _surfaces.poisson(scan.points, depth=how.depth)
    return _surfaces.atlasnet(scan.cloud, method, budget, seed=how.seed)


def one_method(method: str, scan: Scan, how: Setting, runs: Path) -> dict[str, Any]:
    """The mesh of a method, and how far it is from the truth."""
    made = reconstruct(method, scan, how, runs)
    found: dict[str, Any] = {
        "steps": made.steps,
        "training_seconds": made.seconds,
        "mesh_seconds": made.mesh_seconds,
        "vertices": torch.from_numpy(made.vertices.astype(np.float32)),
        "faces": torch.from_numpy(made.faces.astype(np.int32)),
    }
    found["compare"] = scored(method, made.vertices, made.faces, scan, how)
    return found


def without_lids(method: str, scan: Scan, found: dict[str, Any], how: Setting) -> dict[str, Any]:
    """The distances of a mesh without what no point is near to."""
    length = TRIM * float(np.linalg.norm(np.ptp(scan.points, axis=0)))
    mesh = trimesh.Trimesh(found["vertices"].double().numpy(), found["faces"], process=False)
    left = trim_mesh(mesh, scan.points, length)
    return {"compare": scored(f"{method}, trimmed", left.vertices, left.faces, scan, how)}


def scored(
    method: str, vertices: np.ndarray, faces: np.ndarray, scan: Scan, how: Setting
) -> dict[str, Any] | None:
    """How far a mesh is from the truth; None, and a line, of what is no surface."""
    try:
        return compare_meshes(
            trimesh.Trimesh(vertices, faces, process=False),
            scan.truth,
            samples=how.samples,
            seed=how.seed,
            surface_samples=how.surface_samples,
            dense_samples=how.dense_samples,
        )
    except ValueError as error:  # no faces
        say(f"{scan.name}, {method}: {error}")
        return None


# --- the table ---


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """What goes into the JSON file: lengths over the diagonal of the truth."""
    more = {}
    if "trimmed" in found:
        more["trimmed"] = _relative(found["trimmed"]["compare"] or {})
    times = {key: found[key] for key in ("steps", "training_seconds", "mesh_seconds")}
    return {**_relative(found["compare"] or {}), **times, **more}


def _relative(compared: dict[str, Any]) -> dict[str, Any]:
    left = ("chamfer_l1", "chamfer_l2", "diagonal", "two_sided_mean")  # of the unit box, or twice
    return {key: value for key, value in compared.items() if key not in left}


HEAD = (
    "| scan | method | Chamfer L1 | Chamfer L2 | point to surface | Hausdorff | normals "
    "| watertight | components | Euler number | steps | training | mesh |\n"
    + "|---" * 2
    + "|--:" * 11
    + "|\n"
)


def table_row(scan: str, method: str, row: dict[str, Any], seconds: Sequence[str]) -> str:
    if "hausdorff" not in row:
        return f"| {scan} | {method} | no surface |" + " |" * 10 + "\n"
    cells = (
        f"{1e3 * row['chamfer_l1_relative']:.2f}",
        f"{1e3 * row['chamfer_l2_relative']:.2f}",
        f"{1e3 * row['point_to_surface']:.2f}",
        f"{1e3 * row['hausdorff']:.1f}",
        f"{row['normal_consistency']:.3f}",
        "yes" if row["watertight"] else "no",
        str(row["components"]),
        str(row["euler_number"]),
        *seconds,
    )
    return f"| {scan} | {method} | " + " | ".join(cells) + " |\n"


def markdown(
    results: dict[str, dict[str, dict[str, Any]]], full: dict[str, Any], how: Setting
) -> str:
    same = f"{how.seconds:g} s" if how.steps is None else f"{how.steps} steps"
    text = (
        "Lengths x 1e3 / diagonal of the true surface. Chamfer distances: 30 K points of each, the "
        "mean of both ways, as in the paper's Table 2; floor: the truth sampled twice. Point to "
        "surface: 50 K points to 1.5 M, the mean of both ways. Normals: mean |cosine|. Seconds of "
        f"CPU time; all training on one thread, {same} each.\n\n" + HEAD
    )
    for scan, rows in results.items():
        for method, row in rows.items():
            seconds = (
                str(row["steps"] or "-"),
                f"{row['training_seconds']:.0f} s" if row["steps"] else "-",
                f"{row['mesh_seconds'] + (0 if row['steps'] else row['training_seconds']):.0f} s",
            )
            text += table_row(scan, METHODS[method], row, seconds)
            if "trimmed" in row:
                text += table_row(scan, f"{METHODS[method]}, trimmed", row["trimmed"], ["", "", ""])
        if scan in full:
            run = full[scan]
            seconds = (str(run["steps"]), f"{run['wall_seconds']:.0f} s, 2 threads, with mesh", "")
            text += table_row(scan, "ours, full preset", run["compare"], seconds)
        some = next((row for row in rows.values() if "hausdorff" in row), None)
        if some is not None:
            floor = (some["resampling_floor"], some["point_to_surface_floor"])
            text += f"| {scan} | floor | | {1e3 * floor[0]:.2f} | {1e3 * floor[1]:.2f} |"
            text += " |" * 8 + "\n"
    text += "\nMeans over the scans, and the paper's (other scans, in their units, x 1e3):\n\n"
    text += "| method | Chamfer L1 | Chamfer L2 | point to surface | paper L1 | paper L2 |\n"
    text += "|---" + "|--:" * 5 + "|\n"
    for method, label in METHODS.items():
        rows_of = [rows[method] for rows in results.values() if "hausdorff" in rows.get(method, {})]
        if not rows_of:
            continue
        means = [
            1e3 * sum(row[key] for row in rows_of) / len(rows_of)
            for key in ("chamfer_l1_relative", "chamfer_l2_relative", "point_to_surface")
        ]
        paper = [f"{x:.2f}" for x in PUBLISHED.get(method, ())] or ["", ""]
        text += f"| {label} | " + " | ".join([*(f"{x:.2f}" for x in means), *paper]) + " |\n"
    return text


# --- the picture ---


class View:
    """One parallel camera for everything of a scan, which fills the panel with the frame's points.

    Axes are rows: right, up and toward the eye.
    """

    def __init__(self, frame: np.ndarray, axes: np.ndarray | None = None) -> None:
        low, high = frame.min(0), frame.max(0)
        self.center = (low + high) / 2
        if axes is None:
            # The longer of the two horizontal sides is turned more toward the picture; y is up.
            longer = high[0] - low[0] >= high[2] - low[2]
            axes = preview._camera(-35.0 if longer else -60.0, 20.0)
        self.axes = axes
        self.size = PANEL * SCALE
        screen = (frame - self.center) @ self.axes.T
        self.center += self.axes.T @ ((screen.max(0) + screen.min(0)) / 2)
        self.unit = FILL * self.size / np.ptp(screen[:, :2], axis=0).max()

    def place(self, points: np.ndarray) -> np.ndarray:
        return (points - self.center) @ self.axes.T * self.unit

    def dots(self, points: np.ndarray) -> np.ndarray:
        some = points[:: max(1, -(-len(points) // 50_000))]
        planes, spacing = preview._local_planes(some)
        return preview._draw_points(
            self.place(some), planes @ self.axes.T, spacing * self.unit, self.size
        )

    def mesh(self, vertices: np.ndarray, faces: np.ndarray, closed: bool) -> np.ndarray:
        """Inner sides are drawn in another colour, if the mesh is closed and so has such."""
        normals = preview._vertex_normals(vertices, faces) @ self.axes.T
        corner = self.place(vertices)
        if not closed and len(faces):
            corner, normals = corner[faces], normals[faces]
            away = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])[:, 2] < 0
            corner[away] = corner[away][:, ::-1]
            normals[away] = -normals[away][:, ::-1]
            corner, normals = corner.reshape(-1, 3), normals.reshape(-1, 3)
            faces = np.arange(len(corner)).reshape(-1, 3)
        return preview._draw_mesh(corner, faces, normals, self.size)


def picture_row(scan: Scan, units: dict[str, dict[str, Any]]) -> np.ndarray:
    """(BAND + PANEL, (2 + methods) PANEL, 3): cloud, truth, meshes with their distances."""
    view = View(scan.truth.vertices)
    # The truth may have holes; it is consistently wound all the same.
    panels = [view.dots(scan.points), view.mesh(scan.truth.vertices, scan.truth.faces, True)]
    captions = [f"{scan.name}: {len(scan.points):,} points", "truth"]
    for method, found in units.items():
        vertices, faces = found["vertices"].double().numpy(), found["faces"].long().numpy()
        panels.append(view.mesh(vertices, faces, method not in ("patch", "patches")))
        row = figures(found)
        distance = f"{1e3 * row['point_to_surface']:.2f}" if "hausdorff" in row else "no surface"
        captions.append(f"{METHODS[method]}: {distance}")
    return captioned(panels, captions)


def captioned(
    panels: Sequence[np.ndarray], captions: Sequence[str], band: float | None = None
) -> np.ndarray:
    """(BAND + PANEL, panels PANEL, 3): panels of a View side by side, each under its caption.

    The captions stand on a gray of [0, 1], or on what the panels begin with.
    """
    shown = np.concatenate(panels, 1)
    shown = shown.reshape(PANEL, SCALE, -1, SCALE, 3).mean((1, 3))
    above = shown[:1] if band is None else np.full_like(shown[:1], band)
    shown = np.concatenate([np.repeat(above, BAND, 0), shown])
    image = Image.fromarray(np.round(np.clip(shown, 0, 1) * 255).astype(np.uint8), "RGB")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    for k, caption in enumerate(captions):
        draw.text((k * PANEL + 10, 7), caption, fill=(60, 70, 85), font=font)
    return np.asarray(image)


def save_image(path: Path, rows: Sequence[np.ndarray]) -> None:
    image = Image.fromarray(np.concatenate(rows), "RGB")
    write_whole(path, lambda stream: image.save(stream, format="PNG", optimize=True))
    say(str(path))


# --- the command ---


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("data", nargs="?", type=Path, metavar="SCANS", help="folder of scans")
    parser.add_argument("--scans", type=words, default=[], metavar="A,B", help="only these")
    parser.add_argument(
        "--methods", type=words, default=list(METHODS), metavar="A,B", help="only these"
    )
    parser.add_argument("--seconds", type=float, help="of training, each; 300 if left out, quick 5")
    parser.add_argument(
        "--steps", type=int, help="so many instead of seconds: equal results, not equal times"
    )
    parser.add_argument("--fast-results", type=Path, metavar="FILE", help="full runs to cite")
    parser.add_argument("--note", default="", help="kept in the JSON file: the machine")
    args = parser.parse_args(argv)
    if strange := [name for name in args.methods if name not in METHODS]:
        raise InputError(f"methods: expected {', '.join(METHODS)}, got {', '.join(strange)}")
    if not args.methods:
        raise InputError(f"methods: expected some of {', '.join(METHODS)}, got none")
    if args.seconds is not None and args.steps is not None:
        raise InputError("seconds, steps: expected one of them, got both")
    if args.steps is not None and args.steps < 1:
        raise InputError(f"steps: expected at least 1, got {args.steps}")
    seconds = args.seconds if args.seconds is not None else (5.0 if args.quick else 300.0)
    if not 0 < seconds < math.inf:
        raise InputError(f"seconds: expected a number > 0, got {seconds}")
    how = Setting(args.seed, seconds if args.steps is None else None, args.steps)
    if args.quick:
        how = replace(
            how,
            resolution=96,
            depth=6,
            samples=5_000,
            surface_samples=5_000,
            dense_samples=100_000,
        )
    full = read_json(args.fast_results)["scans"] if args.fast_results else {}
    torch.set_num_threads(1)
    scans = read_scans(args.data, args.scans, args.quick, args.seed)
    if "poisson" in args.methods:
        _surfaces.pymeshlab()
    count = sum(1 if scan.truth.is_watertight else 2 for scan in scans) * len(args.methods)
    run = Run(args.out, "surface-table", vars(how), count, args.resume)
    units: dict[str, dict[str, dict[str, Any]]] = {}
    for scan in scans:
        for method in args.methods:
            compute = partial(one_method, method, scan, how, args.out / "runs")
            found = run.unit(f"{scan.name}-{scan.raw.digest[:8]}-{method}", compute)
            if not scan.truth.is_watertight:
                compute_trimmed = partial(without_lids, method, scan, found, how)
                name = f"{scan.name}-{scan.raw.digest[:8]}-{method}-trimmed"
                found = {**found, "trimmed": run.unit(name, compute_trimmed)}
            units.setdefault(scan.name, {})[method] = found
    results = {
        scan: {method: figures(found) for method, found in some.items()}
        for scan, some in units.items()
    }
    write_json(
        args.out / "surface_table.json",
        {
            "settings": vars(how),
            "note": args.note,
            "build": build_info(),
            "scans": results,
            "full_preset": {name: full[name] for name in results if name in full},
        },
    )
    table = markdown(results, full, how)
    write_whole(args.out / "surface_table.md", lambda stream: stream.write(table.encode()))
    save_image(args.out / "surface_table.png", [picture_row(s, units[s.name]) for s in scans])
    print(table)


if __name__ == "__main__":
    raise SystemExit(command(main))
