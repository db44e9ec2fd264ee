"""A picture of a reconstruction, input beside result, drawn with numpy and pillow alone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.spatial import cKDTree

from levelset_ext.geometry.compare import TriangleMesh
from levelset_ext.whole_files import write_whole

PANEL = 560  # pixels of one panel, of which there are two by two
_SCALE = 2  # drawn this much larger, then averaged down
_VIEWS = ((-35.0, 18.0), (145.0, 24.0))  # azimuth, elevation in degrees; y is up
_FILL = 0.84  # share of a panel the shape spans
_BACKGROUND_TOP = np.array([0.985, 0.985, 0.99])
_BACKGROUND_BOTTOM = np.array([0.90, 0.915, 0.935])
_FRONT = np.array([0.50, 0.62, 0.78])
_BACK = np.array([0.80, 0.62, 0.48])  # inner sides, seen through holes
_DOTS = np.array([0.30, 0.47, 0.72])
_KEY = np.array([-0.45, 0.65, 0.62])  # toward the lights, in camera axes: right, up, to the eye
_FILL_LIGHT = np.array([0.75, 0.05, 0.45])
_CANDIDATES = 1 << 18  # pixels tested at a time
_MOST_DOTS = 50_000
_FAR = np.iinfo(np.uint64).max


def render_preview(path: str | os.PathLike[str], cloud: np.ndarray, mesh: TriangleMesh) -> None:
    """Write a PNG: left the cloud, right the mesh, above and below from two opposite sides.

    The same input gives the same bytes. The file is written beside its name and renamed.

    Args:
        path: the PNG to make.
        cloud: (n, 3) points, in the units of the mesh; of more than 50 000 every k-th is drawn.
        mesh: vertices and faces, and `normals` (v, 3) if it has them; may be empty.

    Raises:
        ValueError: shapes that do not fit.
        OSError: the directory cannot be written.
    """
    points = np.asarray(cloud, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"cloud: expected (n, 3), got {points.shape}")
    vertices = np.asarray(mesh.vertices, dtype=np.float64).reshape(-1, 3)
    faces = np.asarray(mesh.faces, dtype=np.int64).reshape(-1, 3)
    normals = getattr(mesh, "normals", None)
    if normals is None or np.shape(normals) != vertices.shape:
        normals = _vertex_normals(vertices, faces)
    frame = points if len(points) else vertices
    low, high = (frame.min(0), frame.max(0)) if len(frame) else (np.zeros(3), np.ones(3))
    center = (low + high) / 2
    # One scale for all panels: the largest the cloud gets on screen in either view.
    rotated = [(frame - center) @ _camera(*view).T for view in _VIEWS]
    reach = max((float(np.abs(r[:, :2]).max()) for r in rotated if len(r)), default=1.0) or 1.0
    size = PANEL * _SCALE
    unit = _FILL * size / 2 / reach
    thinned = points[:: max(1, -(-len(points) // _MOST_DOTS))]
    planes, spacing = _local_planes(thinned)

    rows = []
    for view in _VIEWS:
        camera = _camera(*view)
        dots = _draw_points(
            (thinned - center) @ camera.T * unit, planes @ camera.T, spacing * unit, size
        )
        solid = _draw_mesh(
            (vertices - center) @ camera.T * unit, faces, np.asarray(normals) @ camera.T, size
        )
        rows.append(np.concatenate([dots, solid], 1))
    picture = np.concatenate(rows)
    height, width = picture.shape[0] // _SCALE, picture.shape[1] // _SCALE
    picture = picture.reshape(height, _SCALE, width, _SCALE, 3).mean((1, 3))
    image = Image.fromarray(np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8), "RGB")
    _caption(image, f"input: {len(points):,} points", f"level set: {len(faces):,} triangles")

    write_whole(Path(path), lambda stream: image.save(stream, format="PNG", optimize=False))


def _camera(azimuth: float, elevation: float) -> np.ndarray:
    """Rows: the directions right, up and toward the eye, in the coordinates of the shape."""
    a, e = np.deg2rad(azimuth), np.deg2rad(elevation)
    eye = np.array([np.cos(e) * np.sin(a), np.sin(e), np.cos(e) * np.cos(a)])
    right = np.array([np.cos(a), 0.0, -np.sin(a)])
    return np.stack([right, np.cross(eye, right), eye])


def _background(size: int) -> np.ndarray:
    mix = np.linspace(0, 1, size)[:, None, None]
    return np.broadcast_to(
        (1 - mix) * _BACKGROUND_TOP + mix * _BACKGROUND_BOTTOM, (size, size, 3)
    ).copy()


def _on_screen(shape: np.ndarray, size: int) -> np.ndarray:
    """Camera coordinates (n, 3) in pixels -> column, row, depth (small is near)."""
    return np.stack([shape[:, 0] + size / 2, size / 2 - shape[:, 1], -shape[:, 2]], -1)


def _depth_key(depth: np.ndarray, index: np.ndarray, size: int) -> np.ndarray:
    """One integer that orders first by depth, then by index: a z-buffer is its minimum."""
    share = np.clip(depth / (4 * size) + 0.5, 0, 1)
    return (share * (2**31)).astype(np.uint64) << np.uint64(32) | index.astype(np.uint64)


def _draw_points(dots: np.ndarray, normals: np.ndarray, spacing: float, size: int) -> np.ndarray:
    """Lit dots, paler with depth, without those behind the surface the near dots suggest.

    Args:
        dots: (n, 3) camera coordinates in pixels.
        normals: (n, 3) unit, camera axes, of either sign.
        spacing: typical distance between neighbours, in pixels.
        size: of the square image.
    """
    image = _background(size)
    if not len(dots):
        return image
    screen = _on_screen(dots, size)
    radius = float(np.clip(0.45 * spacing, 0.75 * _SCALE, 2.5 * _SCALE))
    cover = float(np.clip(2.0 * spacing, 2 * radius, 12 * _SCALE))
    curtain = _splat(screen, cover, size)
    nearest = screen[(curtain & np.uint64(0xFFFFFFFF)).astype(np.int64) % len(dots), 2]
    column = np.clip(screen[:, 0].astype(np.int64), 0, size - 1)
    row = np.clip(screen[:, 1].astype(np.int64), 0, size - 1)
    seen = np.flatnonzero(screen[:, 2] <= nearest[row * size + column] + 4 * cover)
    buffer = _splat(screen[seen], radius, size)
    pixel = np.flatnonzero(buffer != _FAR)
    owner = seen[(buffer[pixel] & np.uint64(0xFFFFFFFF)).astype(np.int64)]
    near, far = float(screen[:, 2].min()), float(screen[:, 2].max())
    haze = 0.30 * ((screen[owner, 2] - near) / max(far - near, 1e-9))[:, None]
    facing = normals[owner] * np.where(normals[owner, 2:] < 0, -1.0, 1.0)
    image.reshape(-1, 3)[pixel] = (1 - haze) * _lit(facing, _DOTS) + haze * _BACKGROUND_BOTTOM
    return image


def _splat(screen: np.ndarray, radius: float, size: int) -> np.ndarray:
    """Z-buffer (size * size,) of discs; its low 32 bits are the index of the nearest."""
    buffer = np.full(size * size, _FAR, dtype=np.uint64)
    key = _depth_key(screen[:, 2], np.arange(len(screen)), size)
    column, row = np.floor(screen[:, 0]).astype(np.int64), np.floor(screen[:, 1]).astype(np.int64)
    span = np.arange(-int(radius), int(radius) + 1)
    for dy in span:
        for dx in span:
            if dx * dx + dy * dy > radius**2:
                continue
            x, y = column + dx, row + dy
            ok = (x >= 0) & (x < size) & (y >= 0) & (y < size)
            np.minimum.at(buffer, y[ok] * size + x[ok], key[ok])
    return buffer


def _local_planes(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Unit normals (n, 3) of the planes through each point's neighbours, and the median spacing."""
    if len(points) < 4:
        return np.tile([0.0, 0.0, 1.0], (len(points), 1)), 0.0
    count = min(13, len(points))
    distance, index = cKDTree(points).query(points, k=count)
    around = points[index]
    around = around - around.mean(1, keepdims=True)
    covariance = np.einsum("nki,nkj->nij", around, around)
    return np.linalg.eigh(covariance)[1][:, :, 0], float(np.median(distance[:, 4]))


def _draw_mesh(
    vertices: np.ndarray, faces: np.ndarray, normals: np.ndarray, size: int
) -> np.ndarray:
    """Triangles through a z-buffer, normals interpolated, lit by two lights and a rim."""
    image = _background(size)
    if not len(faces):
        return image
    screen = _on_screen(vertices, size)
    buffer = np.full(size * size, _FAR, dtype=np.uint64)
    corner = screen[faces]
    # Pixel centres are at half-integers; the box holds every centre a triangle can cover.
    low = np.clip(np.ceil(corner[:, :, :2].min(1) - 0.5), 0, size).astype(np.int64)
    high = np.clip(np.floor(corner[:, :, :2].max(1) - 0.5), -1, size - 1).astype(np.int64)
    extent = np.maximum(high - low + 1, 0)
    count = extent.prod(1)
    shown = np.flatnonzero(count)
    ends = np.cumsum(count[shown])
    at = 0
    while at < len(shown):
        done = int(ends[at - 1]) if at else 0
        stop = max(at + 1, int(np.searchsorted(ends, done + _CANDIDATES, side="right")))
        some = shown[at:stop]
        owner = np.repeat(some, count[some])
        order = np.arange(len(owner)) - np.repeat(ends[at:stop] - count[some] - done, count[some])
        column = low[owner, 0] + order % extent[owner, 0]
        row = low[owner, 1] + order // extent[owner, 0]
        weight, solid = _barycentric(corner, owner, column, row)
        inside = solid & (weight >= -1e-9).all(1)
        owner, weight = owner[inside], weight[inside]
        depth = (weight * corner[owner, :, 2]).sum(1)
        np.minimum.at(buffer, row[inside] * size + column[inside], _depth_key(depth, owner, size))
        at = stop

    pixel = np.flatnonzero(buffer != _FAR)
    owner = (buffer[pixel] & np.uint64(0xFFFFFFFF)).astype(np.int64)
    weight, _ = _barycentric(corner, owner, pixel % size, pixel // size)
    normal = (weight[:, :, None] * normals[faces[owner]]).sum(1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    # The winding, not the normal, says which side is seen (rows grow downward on the screen).
    edge_a = corner[owner, 1, :2] - corner[owner, 0, :2]
    edge_b = corner[owner, 2, :2] - corner[owner, 0, :2]
    front = edge_a[:, 0] * edge_b[:, 1] - edge_a[:, 1] * edge_b[:, 0] < 0
    normal = np.where(front[:, None], normal, -normal)
    normal[:, 2] = np.maximum(normal[:, 2], 0.0)
    image.reshape(-1, 3)[pixel] = _lit(normal, np.where(front[:, None], _FRONT, _BACK))
    return image


def _barycentric(
    corner: np.ndarray, owner: np.ndarray, column: np.ndarray, row: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (m, 3) of pixel centres in triangles, and which triangles have any area."""
    x, y = column + 0.5, row + 0.5
    (ax, ay), (bx, by), (cx, cy) = (corner[owner, i, :2].T for i in range(3))
    area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
    solid = np.abs(area) > 1e-12
    area = np.where(solid, area, 1.0)
    first = ((bx - x) * (cy - y) - (cx - x) * (by - y)) / area
    second = ((cx - x) * (ay - y) - (ax - x) * (cy - y)) / area
    return np.stack([first, second, 1 - first - second], -1), solid


def _lit(normal: np.ndarray, albedo: np.ndarray) -> np.ndarray:
    """Colours (m, 3) of unit normals in camera axes."""
    key, fill = _KEY / np.linalg.norm(_KEY), _FILL_LIGHT / np.linalg.norm(_FILL_LIGHT)
    half = key + np.array([0.0, 0.0, 1.0])
    half /= np.linalg.norm(half)
    sky = 0.36 + 0.10 * normal[:, 1]
    diffuse = sky + 0.62 * np.clip(normal @ key, 0, 1) + 0.20 * np.clip(normal @ fill, 0, 1)
    shine = 0.16 * np.clip(normal @ half, 0, 1) ** 40
    rim = 0.22 * (1 - normal[:, 2]) ** 3
    return albedo * diffuse[:, None] + (shine + rim)[:, None]


def _vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Area-weighted means of the normals of the faces around, (v, 3), unit where defined."""
    corner = vertices[faces]
    weighted = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    normals = np.zeros_like(vertices)
    for i in range(3):
        for axis in range(3):
            normals[:, axis] += np.bincount(faces[:, i], weighted[:, axis], len(vertices))
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-300)


def _caption(image: Image.Image, left: str, right: str) -> None:
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=17)
    draw.text((18, 14), left, fill=(70, 80, 95), font=font)
    draw.text((PANEL + 18, 14), right, fill=(70, 80, 95), font=font)


__all__ = ["render_preview"]
