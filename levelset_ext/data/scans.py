"""Point clouds: reading them from files, checking them, putting them into the unit box and back,
and a synthetic range scan for runs without a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import skimage.measure
import trimesh

from levelset_ext.data.meshes import (
    check_finite,
    check_regular_file,
    load_with_trimesh,
    ply_vertices,
    read_ply,
)
from levelset_ext.data.text_meshes import (
    data_lines,
    excerpt,
    numbers,
    read_obj,
    read_off,
    words,
)
from levelset_ext.errors import InputError

TEXT_SUFFIXES = (".xyz", ".txt", ".asc", ".pts")
POINT_SUFFIXES = (".ply", ".obj", ".off", ".stl", *TEXT_SUFFIXES, ".npy")


# --- reading --------------------------------------------------------------------------------


def read_points(path: str | os.PathLike[str], dim: int | None = 3) -> np.ndarray:
    """The points of a PLY, OBJ, OFF, STL, XYZ (.xyz, .txt, .asc, .pts) or NPY file.

    Faces, strips, normals, colours and extra columns are left aside. STL repeats every corner for
    each triangle around it; there equal corners count once. Memory is a small multiple of the
    size of the file, whatever its header claims.

    Args:
        path: a regular file; its extension says the format.
        dim: coordinates a point must have; None takes what an XYZ or NPY file has (2 or 3 columns
            of text, any width of NPY).

    Returns:
        (n, d) float64, n >= 1, all finite.

    Raises:
        InputError: the file is missing, no regular file, empty, truncated, malformed, pickled, of
            an unknown extension, without points, of another dimension, or holds NaN or infinity.
    """
    what = f"a point cloud ({', '.join(POINT_SUFFIXES)})"
    file = check_regular_file(path, what)
    suffix = file.suffix.lower()
    if suffix not in POINT_SUFFIXES:
        raise InputError(f"{file}: unknown extension {suffix!r}; expected {what}")
    try:
        if suffix == ".ply":
            points = ply_vertices(file, read_ply(file))
        elif suffix == ".npy":
            points = _read_npy(file)
        elif suffix == ".stl":
            points = np.unique(load_with_trimesh(file)[0], axis=0)
        elif suffix == ".obj":
            points = read_obj(file)[0]
        elif suffix == ".off":
            points = read_off(file)[0]
        else:
            points = _read_text(file)
    except (OSError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{file}: cannot be read ({reason}); expected {what}") from error
    if not len(points):
        raise InputError(f"{file}: no points; expected {what} with at least one point")
    if dim is not None and points.shape[1] != dim:
        raise InputError(
            f"{file}: expected points of dimension {dim}, got dimension {points.shape[1]}"
        )
    check_finite(file, points)
    return np.ascontiguousarray(points)


def _read_npy(file: Path) -> np.ndarray:
    expected = "an array (n, d) of real numbers"
    try:
        # Mapping, not reading: a header that promises more than the file holds fails here.
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        reason = str(error)
        if "pickle" in reason or "Object" in reason or "objects" in reason:
            reason = "pickled or object data is refused"
        raise InputError(f"{file}: expected a NPY file with {expected} ({reason})") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{file}: expected a NPY file with {expected}, got an archive")
    if array.dtype.kind not in "fiu":
        raise InputError(f"{file}: expected {expected}, got dtype {array.dtype}")
    if array.ndim != 2 or array.shape[1] < 1:
        raise InputError(f"{file}: expected {expected}, got shape {array.shape}")
    with np.errstate(over="ignore"):
        return np.array(array, dtype=np.float64)


def _read_text(file: Path) -> np.ndarray:
    lines = data_lines(file, (b"#", b"//"))
    rows: list[list[float]] = []
    width, promised = 0, -1
    for number, line in lines:
        fields = words(line)
        if file.suffix.lower() == ".pts" and not rows and promised < 0 and len(fields) == 1:
            if not fields[0].isdigit():
                raise InputError(
                    f"{file}: line {number}: expected a point count or three numbers, "
                    f"got {excerpt(line)}"
                )
            promised = int(fields[0])
            continue
        width = width or max(2, min(3, len(fields)))
        try:
            rows.append(numbers(file, number, line, width))
        except InputError as error:
            if rows or line.lower() == line.upper():  # a header has letters
                raise
            raise InputError(f"{error} (a header line? begin it with #)") from None
    if len(rows) < promised:
        raise InputError(f"{file}: truncated: expected {promised} points, got {len(rows)}")
    return np.array(rows).reshape(-1, width or 3)


# --- checking -------------------------------------------------------------------------------


@dataclass(frozen=True)
class CloudSummary:
    """What `validate_cloud` found out about a cloud it accepts."""

    count: int  # points, repeated ones counted each time
    distinct: int  # different points
    rank: int  # dimension of the smallest flat that holds all points, at least 2
    extent: tuple[float, ...]  # side lengths of the bounding box, input units

    @property
    def coplanar(self) -> bool:
        """True when a 3-D cloud lies in one plane: it bounds no volume."""
        return self.rank < len(self.extent)


def validate_cloud(
    points: np.ndarray, minimum: int = 100, dim: int = 3, name: str = "points"
) -> CloudSummary:
    """Refuse clouds nothing can be reconstructed from; repeated and coplanar points are fine.

    A direction counts as flat when the cloud's root-mean-square extent along it is below
    1e-9 of the largest one or below the rounding of the coordinates themselves.

    Args:
        points: (n, dim) real.
        minimum: fewest points accepted.
        dim: coordinates of a point.
        name: what the messages call the cloud, usually its file.

    Raises:
        InputError: wrong shape, too few points, NaN or infinity, coordinates whose squares
            overflow, all points equal, all points on one line.
    """
    array = np.asarray(points)
    if array.ndim != 2 or array.shape[1] != dim:
        raise InputError(f"{name}: expected points (n, {dim}), got shape {array.shape}")
    if array.dtype.kind not in "fiu":
        raise InputError(f"{name}: expected real numbers, got dtype {array.dtype}")
    cloud = array.astype(np.float64)
    if len(cloud) < max(minimum, 1):
        raise InputError(f"{name}: expected at least {max(minimum, 1)} points, got {len(cloud)}")
    check_finite(name, cloud)
    largest = float(np.abs(cloud).max())
    if largest > 1e150:
        raise InputError(f"{name}: expected coordinates below 1e150, got {largest:.3g}")
    low, high = cloud.min(0), cloud.max(0)
    extent = high - low
    rounding = 4 * np.finfo(np.float64).eps * largest
    if extent.max() <= rounding or extent.max() < 1e-150:
        raise InputError(f"{name}: expected points in different places, got all {len(cloud)} equal")
    centred = (cloud - low) / extent.max()
    centred -= centred.mean(0)
    spread = np.linalg.svd(centred.T @ centred / len(cloud), compute_uv=False)
    # The Gram matrix squares the extents, so below about 1e-8 it holds rounding only; the second
    # look measures the extent across the directions found to be large.
    directions = np.linalg.eigh(centred.T @ centred)[1][:, ::-1]
    rms = np.sqrt(((centred @ directions) ** 2).mean(0))
    flat = max(1e-9 * float(np.sqrt(spread[0])), rounding / float(extent.max()))
    rank = int((rms > flat).sum())
    if rank < 2:
        raise InputError(
            f"{name}: expected points that span a surface, got all {len(cloud)} on one line"
        )
    distinct = len(np.unique(cloud, axis=0))
    return CloudSummary(len(cloud), distinct, rank, tuple(float(side) for side in extent))


# --- normalisation --------------------------------------------------------------------------


@dataclass(frozen=True)
class Normalization:
    """The map between input units and the unit box, in float64.

    `unit = (input - center) / scale`. The centre of the bounding box goes to the origin and the
    longest half side to `RADIUS`: every coordinate then lies in [-0.9, 0.9], so [-1, 1]^3 holds
    the shape with a margin for the surface to close, and a grid over that box spends its cells on
    the shape. (A bounding sphere would guard the corners too, which no coordinate-wise sampling
    or grid needs, and would shrink long shapes.) One far outlier does shrink the rest.
    """

    center: tuple[float, ...]  # (d,), input units
    scale: float  # input units for one unit

    RADIUS = 0.9

    @classmethod
    def fit(cls, points: np.ndarray) -> Normalization:
        """The map for a cloud (n, d), n >= 1; ValueError when all its points are equal."""
        cloud = np.asarray(points, dtype=np.float64)
        if cloud.ndim != 2 or not len(cloud):
            raise ValueError(f"points: expected (n, d) with n >= 1, got {cloud.shape}")
        low, high = cloud.min(0), cloud.max(0)
        half = float((high - low).max()) / 2
        if not half > 0 or not np.isfinite(half):
            raise ValueError(f"points: expected a finite extent above 0, got {2 * half}")
        center = low + (high - low) / 2
        return cls(tuple(float(c) for c in center), half / cls.RADIUS)

    def to_unit(self, points: npt.ArrayLike) -> np.ndarray:
        """Input units (n, d) -> unit box, float64."""
        return (np.asarray(points, dtype=np.float64) - np.asarray(self.center)) / self.scale

    def to_input(self, points: npt.ArrayLike) -> np.ndarray:
        """Unit box (n, d) -> input units, float64."""
        return np.asarray(points, dtype=np.float64) * self.scale + np.asarray(self.center)


# --- a scan without a scanner ---------------------------------------------------------------

# The shape, in its own units (about 2 across): a pot with a handle. Lengths below are of it.
_VIEW_DISTANCE = 4.0
_GRAZING = 0.2  # |cos| between ray and normal below which a scanner gets no return
_PLACEMENT = 37.5  # millimetres for one unit
_OFFSET = np.array([120.0, -45.0, 860.0])


@dataclass(frozen=True)
class SyntheticScan:
    """A simulated raw scan and the surface it was taken from, both in millimetres."""

    points: np.ndarray  # (n, 3) float64: noisy, partial, in no order

    @cached_property
    def truth(self) -> trimesh.Trimesh:
        """The closed surface (genus 1) as a fine mesh, made when first asked for."""
        count = 128
        axis = np.linspace(-1.25, 1.25, count)
        grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)
        values = np.stack([_shape(plane.reshape(-1, 3)).reshape(count, count) for plane in grid])
        vertices, faces, _, _ = skimage.measure.marching_cubes(
            values, 0.0, spacing=(axis[1] - axis[0],) * 3, gradient_direction="descent"
        )
        vertices = vertices.astype(np.float64) + axis[0]
        for _ in range(4):
            gradient = _shape_gradient(vertices)
            step = _shape(vertices) / (gradient**2).sum(1)
            vertices = vertices - step[:, None] * gradient
        return trimesh.Trimesh(vertices * _PLACEMENT + _OFFSET, faces, process=False)


def synthetic_scan(points: int = 60_000, seed: int = 0, noise: float = 5e-4) -> SyntheticScan:
    """Scan an analytic shape from a few sides, as a range scanner on a tripod would.

    Each of nine perspective views sphere-traces a grid of rays; grazing hits are lost, no view
    looks from below or into the back of the handle, so parts of the surface stay unseen. Noise
    moves every hit along its own ray.

    Args:
        points: how many to return, drawn from all hits.
        seed: of every random choice; the same seed gives the same bytes.
        noise: standard deviation along the ray, as a share of the bounding-box diagonal.

    Raises:
        ValueError: `points` below 1 or `noise` negative.
    """
    if points < 1:
        raise ValueError(f"points: expected at least 1, got {points}")
    if not noise >= 0:
        raise ValueError(f"noise: expected at least 0, got {noise}")
    random = np.random.default_rng(seed)
    azimuth = np.deg2rad([0.0, 50.0, 100.0, 155.0, 205.0, 260.0, 310.0, 20.0, 200.0])
    elevation = np.deg2rad([15.0, 30.0, 10.0, 25.0, 15.0, 30.0, 10.0, 65.0, 55.0])
    side = int(np.ceil(np.sqrt(points / 2.6)))
    while True:
        hits = [_one_view(a, e, side, random) for a, e in zip(azimuth, elevation, strict=True)]
        where = np.concatenate([hit[0] for hit in hits])
        rays = np.concatenate([hit[1] for hit in hits])
        if len(where) >= points:
            break
        side = int(side * 1.3) + 4
    chosen = random.permutation(len(where))[:points]
    where, rays = where[chosen], rays[chosen]
    diagonal = float(np.linalg.norm(np.ptp(where, axis=0))) if points > 1 else 1.0
    where = where + rays * (noise * diagonal * random.standard_normal((points, 1)))
    return SyntheticScan(where * _PLACEMENT + _OFFSET)


def _one_view(
    azimuth: float, elevation: float, side: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Hits and ray directions, each (m, 3), of one camera looking at the origin."""
    forward = -np.array(
        [
            np.cos(elevation) * np.cos(azimuth),
            np.sin(elevation),
            np.cos(elevation) * np.sin(azimuth),
        ]
    )
    right = np.cross(forward, [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    origin = -_VIEW_DISTANCE * forward
    ticks = np.linspace(-0.36, 0.36, side)
    u, v = np.meshgrid(ticks, ticks)
    jitter = random.uniform(-0.5, 0.5, (2, side, side)) * (ticks[1] - ticks[0] if side > 1 else 0)
    rays = forward + (u + jitter[0]).reshape(-1, 1) * right + (v + jitter[1]).reshape(-1, 1) * up
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    depth = np.full(len(rays), _VIEW_DISTANCE - 1.7)
    alive = np.arange(len(rays))
    for _ in range(60):
        step = _shape(origin + depth[alive, None] * rays[alive])
        depth[alive] += 0.8 * step  # the smooth union is not quite a distance
        alive = alive[(np.abs(step) > 1e-5) & (depth[alive] < _VIEW_DISTANCE + 1.7)]
        if not len(alive):
            break
    hit = depth < _VIEW_DISTANCE + 1.7
    hit[alive] = False
    where, rays = origin + depth[hit, None] * rays[hit], rays[hit]
    normal = _shape_gradient(where)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    facing = -(normal * rays).sum(1) > _GRAZING
    return where[facing], rays[facing]


def _shape(x: np.ndarray) -> np.ndarray:
    """Signed values (n,) of the shape at x (n, 3), negative inside, close to a distance."""
    body = _ellipsoid(x, (0.1, -0.15, 0.0), (0.68, 0.62, 0.68))
    neck = _ellipsoid(x, (0.1, 0.5, 0.0), (0.34, 0.36, 0.34))
    knob = _ellipsoid(x, (0.1, 0.88, 0.0), (0.15, 0.13, 0.15))
    spout = _ellipsoid(x, (0.78, 0.22, 0.0), (0.30, 0.16, 0.16))
    handle = _torus(x, (-0.58, 0.02, 0.0), 0.42, 0.105)
    value = _blend(_blend(body, neck, 0.16), _blend(spout, knob, 0.02), 0.12)
    value = _blend(value, handle, 0.14)
    return np.maximum(value, -0.66 - x[:, 1])  # a flat foot to stand on


def _shape_gradient(x: np.ndarray) -> np.ndarray:
    step = 1e-5
    columns = []
    for axis in range(3):
        shift = np.zeros(3)
        shift[axis] = step
        columns.append((_shape(x + shift) - _shape(x - shift)) / (2 * step))
    return np.stack(columns, -1)


def _ellipsoid(x: np.ndarray, center: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    offset = x - np.array(center)
    k0 = np.linalg.norm(offset / np.array(radii), axis=1)
    k1 = np.linalg.norm(offset / np.array(radii) ** 2, axis=1)
    return k0 * (k0 - 1.0) / np.maximum(k1, 1e-12)


def _torus(x: np.ndarray, center: tuple[float, ...], major: float, minor: float) -> np.ndarray:
    offset = x - np.array(center)
    ring = np.hypot(offset[:, 0], offset[:, 1]) - major
    return np.hypot(ring, offset[:, 2]) - minor


def _blend(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """The union of two shapes, rounded over `width` where they meet."""
    mix = np.maximum(width - np.abs(a - b), 0.0) / width
    return np.minimum(a, b) - mix * mix * mix * width / 6.0
