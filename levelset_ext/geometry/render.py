"""Shaded pictures of a level set {F = c} in 3-D, drawn by casting rays; no display is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.ndimage
import torch
from torch import Tensor

from levelset_ext.field import Field, check_integer
from levelset_ext.geometry import canvas
from levelset_ext.geometry.compare import TriangleMesh
from levelset_ext.geometry.extract import _for_the_grid
from levelset_ext.geometry.rays import RayHits, intersect_rays
from levelset_ext.samplers.state import box_bounds

__all__ = ["Camera", "render"]

_RAYS = 1 << 18  # cast at a time
_SMOOTH_NORMALS = 0.95  # cosine between neighbours below which a pixel is drawn more finely
_SMOOTH_DEPTH = 0.02  # the same for the share that their distances differ by


@dataclass(frozen=True)
class Camera:
    """A pinhole camera, or a parallel projection.

    Attributes:
        eye: (3,), where it stands.
        right, up, back: (3,) each, its axes, orthonormal; it looks along -back.
        width, height: of the picture in pixels.
        fov: angle the picture spans vertically, in degrees; 0 for a parallel projection.
        span: for a parallel projection, the length the picture spans vertically.
        distance: from the eye to what it looks at.
    """

    eye: np.ndarray
    right: np.ndarray
    up: np.ndarray
    back: np.ndarray
    width: int
    height: int
    fov: float
    span: float
    distance: float

    @staticmethod
    def look_at(
        eye: npt.ArrayLike,
        target: npt.ArrayLike = (0.0, 0.0, 0.0),
        up: npt.ArrayLike = (0.0, 1.0, 0.0),
        *,
        width: int = 512,
        height: int = 512,
        fov: float = 35.0,
        span: float | None = None,
    ) -> Camera:
        """A camera at ``eye`` with ``target`` in the middle of its picture.

        Args:
            eye, target, up: (3,) each; ``up`` points upward in the picture.
            width, height: pixels.
            fov: vertical angle in degrees, in [0, 180); 0 makes a parallel projection.
            span: for fov 0, the height of the picture as a length; None is the distance between
                eye and target.

        Raises:
            ValueError: an argument is not as described; ``up`` is along the line of sight.
        """
        at, to, upward = (
            _vector(name, v) for name, v in (("eye", eye), ("target", target), ("up", up))
        )
        for name, number in (("width", width), ("height", height)):
            if int(number) < 1:
                raise ValueError(f"{name}: expected at least 1 pixel, got {number}")
        if not 0 <= fov < 180:
            raise ValueError(f"fov: expected degrees in [0, 180), got {fov}")
        distance = math.hypot(*(at - to))
        if distance == 0:
            raise ValueError(f"eye: expected another point than target, got {at.tolist()}")
        if span is None:
            span = distance
        if not span > 0:
            raise ValueError(f"span: expected a length > 0, got {span}")
        back = (at - to) / distance
        right = np.cross(upward, back)
        length = math.hypot(*right)
        if length <= 1e-9 * math.hypot(*upward):
            raise ValueError(f"up: expected a direction across the view, got {upward.tolist()}")
        right /= length
        return Camera(
            at, right, np.cross(back, right), back, int(width), int(height), float(fov),
            float(span), distance,
        )  # fmt: skip

    def rays(self, column: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rays through places of the picture.

        Args:
            column, row: (n,), in pixels from the upper left corner; centres are at halves.

        Returns:
            Origins and unit directions, (n, 3) float64 each.
        """
        x = (np.asarray(column, dtype=np.float64) - self.width / 2) / self.height
        y = (self.height / 2 - np.asarray(row, dtype=np.float64)) / self.height
        if self.fov == 0:
            aside = (x[:, None] * self.right + y[:, None] * self.up) * self.span
            return self.eye + aside, np.broadcast_to(-self.back, aside.shape).copy()
        reach = 2 * math.tan(math.radians(self.fov) / 2)
        directions = (x[:, None] * self.right + y[:, None] * self.up) * reach - self.back
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        return np.broadcast_to(self.eye, directions.shape).copy(), directions


def render(
    fn: Field,
    camera: Camera,
    *,
    level: float = 0.0,
    bounds: tuple[Any, Any] | None = None,
    guide: TriangleMesh | None = None,
    color: Sequence[float] | None = None,
    inner_color: Sequence[float] | None = None,
    background: Sequence[float] | None = None,
    supersample: int = 3,
    step: float | None = None,
    lipschitz: float | None = None,
    tol: float | None = None,
    batch: int = 1 << 17,
) -> np.ndarray:
    """A picture of {F = level}: every pixel shows what its ray meets first.

    A first ray goes through the centre of each pixel; pixels that differ from a neighbour (outline,
    crease, step in depth) are averaged over ``supersample`` squared rays. Two lights, a sky and a
    rim, fixed to the camera, as in :func:`levelset_ext.geometry.render_preview`. Nothing is random.

    Args:
        fn: module or callable (n, 3) -> (n,) or (n, 1). A module runs as its eval-mode clone on its
            own device in its own dtype; another callable gets CPU tensors of the default dtype.
        camera: from :meth:`Camera.look_at`.
        level: c.
        bounds: (lower, upper), numbers or (3,): the part of space that is shown. Where one of them
            is infinite or None, and with None for both, it is only what lies nearer than twice the
            distance from the eye to the camera's target.
        guide: a mesh of the level set, as from :func:`levelset_ext.geometry.extract_mesh`. Rays are
            then searched where they, or their neighbours, come near what they see of it, which
            takes few evaluations; what the mesh lacks is not found.
        color, inner_color: (3,) in [0, 1], of the side where F is larger, and of the other one,
            which is seen where ``bounds`` cut the surface open.
        background: (3,) in [0, 1]; None is a pale gradient.
        supersample: rays along the side of a pixel that needs more than one, >= 1.
        step, lipschitz, batch: of :func:`levelset_ext.geometry.intersect_rays`.
            With ``guide`` the step is an edge's length.
        tol: of the same; None is 1e-4 x the distance to the target x the median |D_xF| at the
            pixels of a coarse picture, less than a pixel sees.

    Returns:
        (height, width, 3) uint8.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if not isinstance(camera, Camera):
        raise TypeError(f"camera: expected a Camera, got {type(camera).__name__}")
    supersample = check_integer("supersample", supersample, 1)
    outer = canvas.FRONT if color is None else _color("color", color)
    inner = canvas.BACK if inner_color is None else _color("inner_color", inner_color)
    try:
        corners = box_bounds(bounds, torch.empty(0, 3))
    except (TypeError, ValueError) as error:
        raise ValueError(str(error).replace("box:", "bounds:", 1)) from None
    field, device, dtype = _for_the_grid(fn)
    closed = all(corner is not None and bool(corner.isfinite().all()) for corner in corners)
    cutoff = math.inf if closed else 2 * camera.distance
    search = None if guide is None else _Search.along(guide, camera)

    def cast(column: np.ndarray, row: np.ndarray, within: float) -> _Seen:
        origins, directions = (
            torch.from_numpy(a).to(device, dtype) for a in camera.rays(column, row)
        )

        def part(rows: Any, near: Any, far: Any, length: float | None) -> RayHits:
            return intersect_rays(
                field, origins[rows], directions[rows], level, near=near, far=far, box=bounds,
                step=length, lipschitz=lipschitz, tol=within, batch=batch, differentiable=False,
            )  # fmt: skip

        seen = _Seen(len(column))
        if search is None:
            seen.add(np.arange(len(column)), part(slice(None), 0.0, cutoff, step))
            return seen
        near, far, sure = search.at(column, row)
        rows = np.flatnonzero(near < far)
        length = search.reach if step is None else step
        hits = part(rows, torch.from_numpy(near[rows]), torch.from_numpy(far[rows]), length)
        seen.add(rows, hits)
        # A ray that just misses what the mesh has there may meet what is behind.
        rows = np.flatnonzero(sure & ~seen.mask)
        seen.add(rows, part(rows, torch.from_numpy(near[rows]), search.end, step))
        return seen

    height, width = camera.height, camera.width
    if tol is None:
        tol = _tolerance(cast, camera)

    def shade(column: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Colours (n, 3), and normals and depth (n, 4) to compare neighbours by."""
        colors, shapes = np.empty((len(column), 3)), np.empty((len(column), 4))
        for at in range(0, len(column), _RAYS):
            some = slice(at, at + _RAYS)
            hits = cast(column[some], row[some], tol)
            colors[some], shapes[some] = _shade(
                hits, camera, outer, inner, _behind(background, row[some] / height)
            )
        return colors, shapes

    row, column = (index.ravel() + 0.5 for index in np.mgrid[:height, :width])
    picture, shapes = shade(column, row)
    if supersample > 1:
        rough = np.flatnonzero(_rough(shapes.reshape(height, width, 4)))
        offset = (np.arange(supersample) + 0.5) / supersample - 0.5
        down, across = (o.ravel() for o in np.meshgrid(offset, offset, indexing="ij"))
        fine, _ = shade((column[rough, None] + across).ravel(), (row[rough, None] + down).ravel())
        picture[rough] = fine.reshape(len(rough), supersample**2, 3).mean(1)
    pixels = np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return pixels.reshape(height, width, 3)


def _vector(name: str, value: npt.ArrayLike) -> np.ndarray:
    vector = np.asarray(value, dtype=np.float64)
    if vector.shape != (3,) or not np.isfinite(vector).all():
        raise ValueError(f"{name}: expected 3 finite numbers, got {value!r}")
    return vector


def _color(name: str, value: Sequence[float]) -> np.ndarray:
    color = _vector(name, value)
    if color.min() < 0 or color.max() > 1:
        raise ValueError(f"{name}: expected numbers in [0, 1], got {value!r}")
    return color


def _behind(background: Sequence[float] | None, share: np.ndarray) -> np.ndarray:
    """The background (n, 3) at a share of the height, from above."""
    if background is not None:
        return np.broadcast_to(_color("background", background), (len(share), 3))
    mix = share[:, None]
    return (1 - mix) * canvas.BACKGROUND_TOP + mix * canvas.BACKGROUND_BOTTOM


class _Seen:
    """What n rays met: mask (n,), distances t (n,), gradients of F (n, 3), inside (n,)."""

    def __init__(self, n: int) -> None:
        self.mask, self.inside = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        self.t, self.gradients = np.full(n, np.inf), np.full((n, 3), np.nan)

    def add(self, rows: np.ndarray, hits: RayHits) -> None:
        """Takes over the hits of some of the rays."""
        some = hits.mask.cpu().numpy()
        met = rows[some]
        self.mask[met] = True
        self.inside[met] = hits.inside.cpu().numpy()[some]
        self.t[met] = _numbers(hits.t)[some]
        gradient = np.full((len(rows), 3), np.nan)
        gradient[hits.rows.cpu().numpy()] = _numbers(hits.result.jacobian[:, 0])
        self.gradients[met] = gradient[some]


def _numbers(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


@dataclass(frozen=True)
class _Search:
    """The part of each pixel's rays that is near a mesh.

    Attributes:
        near, far: (height, width), distances along the ray; far < near where there is no mesh
            within a pixel.
        sure: (height, width) bool, where the ray through the middle meets the mesh.
        reach: how far from the mesh the level set is looked for.
        end: nothing of the mesh is farther away than this.
    """

    near: np.ndarray
    far: np.ndarray
    sure: np.ndarray
    reach: float
    end: float

    @staticmethod
    def along(guide: TriangleMesh, camera: Camera) -> _Search:
        vertices = np.asarray(guide.vertices, dtype=np.float64).reshape(-1, 3)
        faces = np.asarray(guide.faces, dtype=np.int64).reshape(-1, 3)
        height, width = camera.height, camera.width
        nothing = np.full((height, width), np.inf)
        if not len(faces):
            return _Search(nothing, -nothing, np.zeros((height, width), dtype=bool), 1.0, 0.0)
        shape = (vertices - camera.eye) @ np.stack([camera.right, camera.up, camera.back], 1)
        ahead = -shape[:, 2]
        if camera.fov == 0:
            faces = faces[(ahead[faces] > 0).any(1)]  # no ray comes near the others
            if not len(faces):
                return _Search(nothing, -nothing, np.zeros((height, width), dtype=bool), 1.0, 0.0)
            scale = np.full(len(shape), height / camera.span)
            depth = ahead
        else:
            if ahead.min() <= 1e-9 * camera.distance:
                raise ValueError("guide: expected a mesh in front of the eye, got one around it")
            scale = height / (2 * math.tan(math.radians(camera.fov) / 2)) / ahead
            depth = -1 / ahead  # is linear on the screen, as the distance is not
        low, high = float(depth.min()), float(depth.max())
        spread = 2 * height / max(high - low, 1e-300)
        screen = np.stack(
            [
                width / 2 + scale * shape[:, 0],
                height / 2 - scale * shape[:, 1],
                (depth - (low + high) / 2) * spread,
            ],
            1,
        )
        corner = screen[faces]
        pixel, owner = canvas.owners(canvas.rasterize(corner, width, height))
        weight, _ = canvas.barycentric(corner, owner, pixel % width, pixel // width)
        met = (weight * depth[faces[owner]]).sum(1)
        distance = nothing.copy()
        if camera.fov == 0:
            distance.ravel()[pixel] = met
        else:
            rays = camera.rays(pixel % width + 0.5, pixel // width + 0.5)[1]
            distance.ravel()[pixel] = -1 / met / -(rays @ camera.back)
        edges = np.linalg.norm(vertices[faces] - vertices[np.roll(faces, 1, 1)], axis=2)
        reach = float(np.median(edges)) or 1.0
        sure = np.isfinite(distance)
        behind = np.where(sure, distance, -np.inf)
        near = scipy.ndimage.minimum_filter(distance, 3, mode="nearest") - reach
        near = near.clip(min=0)  # a ray begins at the eye
        far = scipy.ndimage.maximum_filter(behind, 3, mode="nearest") + reach
        # At an outline the surface turns away. It is a parabola there, along which the last part of
        # a pixel goes at most 2.5 times as far down as the pixel before.
        end = float(np.linalg.norm(shape, axis=1).max()) + reach
        deepest = scipy.ndimage.maximum_filter(behind, 5, mode="nearest")
        nearest = scipy.ndimage.minimum_filter(distance, 5, mode="nearest")
        outline = ~scipy.ndimage.minimum_filter(sure, 3, mode="nearest") & (near < far)
        far[outline] += 3 * (deepest - nearest)[outline]
        return _Search(near, np.minimum(far, end), sure, reach, end)

    def at(self, column: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """near, far and sure (n,) of rays through places of the picture."""
        place = row.astype(np.int64), column.astype(np.int64)
        return self.near[place], self.far[place], self.sure[place]


def _tolerance(cast: Any, camera: Camera) -> float:
    """1e-4 of the distance to the target, in the units of F."""
    row, column = (index.ravel() + 0.5 for index in np.mgrid[:16, :16])
    seen = cast(column * camera.width / 16, row * camera.height / 16, 0.0)
    slopes = np.linalg.norm(seen.gradients, axis=1)
    slopes = slopes[np.isfinite(slopes)]
    return 1e-4 * camera.distance * float(np.median(slopes)) if len(slopes) else 0.0


def _shade(
    seen: _Seen, camera: Camera, outer: np.ndarray, inner: np.ndarray, behind: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    colors = np.array(behind)
    shapes = np.zeros((len(colors), 4))
    hit = seen.mask
    normals = seen.gradients[hit]
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-300)
    normals = np.nan_to_num(normals)
    from_inside = seen.inside[hit]
    normals[from_inside] *= -1
    shown = normals @ np.stack([camera.right, camera.up, camera.back], 1)
    shown[:, 2] = np.maximum(shown[:, 2], 0.0)
    albedo = np.where(from_inside[:, None], inner, outer)
    colors[hit] = np.clip(canvas.lit(shown, albedo), 0, 1)
    shapes[hit, :3] = normals
    shapes[hit, 3] = seen.t[hit]
    return colors, shapes


def _rough(shapes: np.ndarray) -> np.ndarray:
    """(height, width) bool: pixels that differ from one beside, above or below them."""
    rough = np.zeros(shapes.shape[:2], dtype=bool)
    # Transposed views, so that "beside" is written once.
    for shape, out in ((shapes, rough), (shapes.swapaxes(0, 1), rough.T)):
        first, second = shape[:-1], shape[1:]
        one, other = first[..., 3] > 0, second[..., 3] > 0
        turned = (first[..., :3] * second[..., :3]).sum(-1) < _SMOOTH_NORMALS
        deeper = np.abs(first[..., 3] - second[..., 3]) > _SMOOTH_DEPTH * first[..., 3]
        differ = (one != other) | (one & other & (turned | deeper))
        out[:-1] |= differ
        out[1:] |= differ
    return rough
