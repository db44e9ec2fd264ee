"""What the pictures share: camera, lights, colours, a z-buffer for discs and for triangles.

Pictures are arrays (rows, columns, 3) of floats in [0, 1]. Coordinates on the screen are column and
row (in pixels, centres at halves, rows downward) and depth (small is near).
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "BACK",
    "BACKGROUND_BOTTOM",
    "BACKGROUND_TOP",
    "DOTS",
    "FAR",
    "FILL",
    "FRONT",
    "MOST_DOTS",
    "PANEL",
    "SCALE",
    "VIEWS",
    "background",
    "barycentric",
    "camera",
    "caption",
    "lit",
    "on_screen",
    "owners",
    "rasterize",
    "splat",
]

PANEL = 560  # pixels of one panel, of which there are two by two
SCALE = 2  # drawn this much larger, then averaged down
VIEWS = ((-35.0, 18.0), (145.0, 24.0))  # azimuth, elevation in degrees; y is up
FILL = 0.84  # share of a panel the shape spans
BACKGROUND_TOP = np.array([0.985, 0.985, 0.99])
BACKGROUND_BOTTOM = np.array([0.90, 0.915, 0.935])
FRONT = np.array([0.50, 0.62, 0.78])
BACK = np.array([0.80, 0.62, 0.48])  # inner sides, seen through holes
DOTS = np.array([0.30, 0.47, 0.72])
MOST_DOTS = 50_000
FAR = np.iinfo(np.uint64).max  # of a z-buffer, where there is nothing
_KEY = np.array([-0.45, 0.65, 0.62])  # toward the lights, in camera axes: right, up, to the eye
_FILL_LIGHT = np.array([0.75, 0.05, 0.45])
_CANDIDATES = 1 << 18  # pixels tested at a time


def camera(azimuth: float, elevation: float) -> np.ndarray:
    """Rows: the directions right, up and toward the eye, in the coordinates of the shape."""
    a, e = np.deg2rad(azimuth), np.deg2rad(elevation)
    eye = np.array([np.cos(e) * np.sin(a), np.sin(e), np.cos(e) * np.cos(a)])
    right = np.array([np.cos(a), 0.0, -np.sin(a)])
    return np.stack([right, np.cross(eye, right), eye])


def background(size: int) -> np.ndarray:
    mix = np.linspace(0, 1, size)[:, None, None]
    return np.broadcast_to(
        (1 - mix) * BACKGROUND_TOP + mix * BACKGROUND_BOTTOM, (size, size, 3)
    ).copy()


def on_screen(shape: np.ndarray, size: int) -> np.ndarray:
    """Camera coordinates (n, 3) in pixels -> column, row, depth (small is near)."""
    return np.stack([shape[:, 0] + size / 2, size / 2 - shape[:, 1], -shape[:, 2]], -1)


def splat(screen: np.ndarray, radius: float, size: int) -> np.ndarray:
    """Z-buffer (size * size,) of discs; its low 32 bits are the index of the nearest."""
    buffer = np.full(size * size, FAR, dtype=np.uint64)
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


def rasterize(corner: np.ndarray, width: int, height: int) -> np.ndarray:
    """Z-buffer (height * width,) of triangles; its low 32 bits are the index of the nearest.

    Args:
        corner: (f, 3, 3), the corners of each triangle on the screen; depths within twice the
            height of the picture around 0.
        width, height: pixels.
    """
    buffer = np.full(height * width, FAR, dtype=np.uint64)
    # The box holds every pixel centre that a triangle can cover.
    ends = np.array([width, height])
    low = np.clip(np.ceil(corner[:, :, :2].min(1) - 0.5), 0, ends).astype(np.int64)
    high = np.clip(np.floor(corner[:, :, :2].max(1) - 0.5), -1, ends - 1).astype(np.int64)
    extent = np.maximum(high - low + 1, 0)
    count = extent.prod(1)
    shown = np.flatnonzero(count)
    last = np.cumsum(count[shown])
    at = 0
    while at < len(shown):
        done = int(last[at - 1]) if at else 0
        stop = max(at + 1, int(np.searchsorted(last, done + _CANDIDATES, side="right")))
        some = shown[at:stop]
        owner = np.repeat(some, count[some])
        order = np.arange(len(owner)) - np.repeat(last[at:stop] - count[some] - done, count[some])
        column = low[owner, 0] + order % extent[owner, 0]
        row = low[owner, 1] + order // extent[owner, 0]
        weight, solid = barycentric(corner, owner, column, row)
        inside = solid & (weight >= -1e-9).all(1)
        owner, weight = owner[inside], weight[inside]
        depth = (weight * corner[owner, :, 2]).sum(1)
        key = _depth_key(depth, owner, height)
        np.minimum.at(buffer, row[inside] * width + column[inside], key)
        at = stop
    return buffer


def owners(buffer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of a z-buffer that show something, and the index of what they show."""
    pixel = np.flatnonzero(buffer != FAR)
    return pixel, (buffer[pixel] & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _depth_key(depth: np.ndarray, index: np.ndarray, size: int) -> np.ndarray:
    """One integer that orders first by depth, then by index: a z-buffer is its minimum."""
    share = np.clip(depth / (4 * size) + 0.5, 0, 1)
    return (share * (2**31)).astype(np.uint64) << np.uint64(32) | index.astype(np.uint64)


def barycentric(
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


def lit(normal: np.ndarray, albedo: np.ndarray) -> np.ndarray:
    """Colours (m, 3) of unit normals in camera axes."""
    key, fill = _KEY / np.linalg.norm(_KEY), _FILL_LIGHT / np.linalg.norm(_FILL_LIGHT)
    half = key + np.array([0.0, 0.0, 1.0])
    half /= np.linalg.norm(half)
    sky = 0.36 + 0.10 * normal[:, 1]
    diffuse = sky + 0.62 * np.clip(normal @ key, 0, 1) + 0.20 * np.clip(normal @ fill, 0, 1)
    shine = 0.16 * np.clip(normal @ half, 0, 1) ** 40
    rim = 0.22 * (1 - normal[:, 2]) ** 3
    return albedo * diffuse[:, None] + (shine + rim)[:, None]


def caption(image: Image.Image, left: str, right: str) -> None:
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=17)
    draw.text((18, 14), left, fill=(70, 80, 95), font=font)
    draw.text((PANEL + 18, 14), right, fill=(70, 80, 95), font=font)
