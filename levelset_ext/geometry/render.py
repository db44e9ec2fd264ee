"""Shaded pictures of a level set {F = c} in 3-D, drawn by casting rays; no display is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from levelset_ext.field import Field
from levelset_ext.geometry.extract import _for_the_grid
from levelset_ext.geometry.preview import (
    _BACK,
    _BACKGROUND_BOTTOM,
    _BACKGROUND_TOP,
    _FRONT,
    _lit,
)
from levelset_ext.geometry.rays import RayHits, intersect_rays

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
        distance = float(np.linalg.norm(at - to))
        if distance == 0:
            raise ValueError(f"eye: expected another point than target, got {at.tolist()}")
        if span is None:
            span = distance
        if not span > 0:
            raise ValueError(f"span: expected a length > 0, got {span}")
        back = (at - to) / distance
        right = np.cross(upward, back)
        length = float(np.linalg.norm(right))
        if length <= 1e-9 * float(np.linalg.norm(upward)):
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
        bounds: (lower, upper), numbers or (3,): the part of space that is shown. None shows what
            lies nearer than twice the distance from the eye to the camera's target.
        color, inner_color: (3,) in [0, 1], of the side where F is larger, and of the other one,
            which is seen where ``bounds`` cut the surface open.
        background: (3,) in [0, 1]; None is a pale gradient.
        supersample: rays along the side of a pixel that needs more than one, >= 1.
        step, lipschitz, batch: of :func:`levelset_ext.geometry.intersect_rays`.
        tol: of the same; None is 1e-4 x the distance to the target x the median |D_xF| at the
            pixels of a coarse picture, less than a pixel sees.

    Returns:
        (height, width, 3) uint8.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if not isinstance(camera, Camera):
        raise TypeError(f"camera: expected a Camera, got {type(camera).__name__}")
    if isinstance(supersample, bool) or not isinstance(supersample, int) or supersample < 1:
        raise ValueError(f"supersample: expected an integer >= 1, got {supersample!r}")
    outer = _FRONT if color is None else _color("color", color)
    inner = _BACK if inner_color is None else _color("inner_color", inner_color)
    field, device, dtype = _for_the_grid(fn)
    cutoff = math.inf if bounds is not None else 2 * camera.distance

    def cast(column: np.ndarray, row: np.ndarray, within: float) -> RayHits:
        origins, directions = camera.rays(column, row)
        return intersect_rays(
            field,
            torch.from_numpy(origins).to(device, dtype),
            torch.from_numpy(directions).to(device, dtype),
            level,
            far=cutoff,
            box=bounds,
            step=step,
            lipschitz=lipschitz,
            tol=within,
            batch=batch,
            differentiable=False,
        )

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
        picture[rough] = fine.reshape(len(rough), -1, 3).mean(1)
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
    return (1 - mix) * _BACKGROUND_TOP + mix * _BACKGROUND_BOTTOM


def _tolerance(cast: Any, camera: Camera) -> float:
    """1e-4 of the distance to the target, in the units of F."""
    row, column = (index.ravel() + 0.5 for index in np.mgrid[:16, :16])
    hits = cast(column * camera.width / 16, row * camera.height / 16, 0.0)
    slopes = torch.linalg.vector_norm(hits.result.jacobian[:, 0], dim=1)
    slopes = slopes[torch.isfinite(slopes)]
    return 1e-4 * camera.distance * float(slopes.median()) if len(slopes) else 0.0


def _shade(
    hits: RayHits, camera: Camera, outer: np.ndarray, inner: np.ndarray, behind: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    colors = np.array(behind)
    shapes = np.zeros((len(colors), 4))
    hit = hits.mask.cpu().numpy()
    normals = hits.normals[hits.mask].double().cpu().numpy()
    normals = np.nan_to_num(normals)
    from_inside = hits.inside.cpu().numpy()[hit]
    normals[from_inside] *= -1
    seen = normals @ np.stack([camera.right, camera.up, camera.back], 1)
    seen[:, 2] = np.maximum(seen[:, 2], 0.0)
    colors[hit] = np.clip(_lit(seen, np.where(from_inside[:, None], inner, outer)), 0, 1)
    shapes[hit, :3] = normals
    shapes[hit, 3] = hits.t[hits.mask].double().cpu().numpy()
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
