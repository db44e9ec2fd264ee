"""A picture of a reconstruction, input beside result, drawn with numpy, pillow and the network."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from levelset_ext.data.meshes import mesh_arrays
from levelset_ext.field import Field
from levelset_ext.geometry import canvas
from levelset_ext.geometry.compare import TriangleMesh
from levelset_ext.geometry.render import Camera, render
from levelset_ext.whole_files import write_whole

__all__ = ["PANEL", "render_preview"]

PANEL = canvas.PANEL


def render_preview(
    path: str | os.PathLike[str],
    cloud: np.ndarray,
    mesh: TriangleMesh,
    field: Field | None = None,
) -> None:
    """Write a PNG: left the cloud, right the surface, above and below from two opposite sides.

    With ``field`` the right side is the level set {F = 0} itself, every pixel a ray that false
    position has led to it, lit by D_xF; the mesh says where along a ray to look. Without, it is the
    mesh. The same input gives the same bytes. The file is written beside its name and renamed.

    Args:
        path: the PNG to make.
        cloud: (n, 3) points, in the units of the mesh; of more than 50 000 every k-th is drawn.
        mesh: vertices and faces, and `normals` (v, 3) if it has them; may be empty.
        field: F, of which ``mesh`` is the extracted level set 0, in the units of the mesh; module
            or callable as for :func:`levelset_ext.geometry.render`.

    Raises:
        ValueError: shapes that do not fit, positions that are not finite, indices out of range.
        OSError: the directory cannot be written.
    """
    points = np.asarray(cloud, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"cloud: expected (n, 3), got {points.shape}")
    vertices, faces = mesh_arrays(mesh.vertices, mesh.faces, "mesh")
    for name, array in (("cloud", points), ("mesh", vertices)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite positions, got NaN or infinity")
    normals = getattr(mesh, "normals", None)
    if normals is None or np.shape(normals) != vertices.shape:
        normals = _vertex_normals(vertices, faces)
    frame = points if len(points) else vertices
    low, high = (frame.min(0), frame.max(0)) if len(frame) else (np.zeros(3), np.ones(3))
    center = low / 2 + high / 2
    # One scale for all panels: the largest the cloud gets on screen in either view.
    rotated = [(frame - center) @ canvas.camera(*view).T for view in canvas.VIEWS]
    reach = max((float(np.abs(r[:, :2]).max()) for r in rotated if len(r)), default=1.0) or 1.0
    # What is smaller, or that small for where it is, has no scale that doubles hold.
    reach = max(reach, 1e-300, 1e-9 * float(np.abs(center).max()))
    size = PANEL * canvas.SCALE
    unit = canvas.FILL * size / 2 / reach
    thinned = points[:: max(1, -(-len(points) // canvas.MOST_DOTS))]
    planes, spacing = _local_planes(thinned)

    rows = []
    for view in canvas.VIEWS:
        axes = canvas.camera(*view)
        dots = _draw_points(
            (thinned - center) @ axes.T * unit, planes @ axes.T, spacing * unit, size
        )
        if field is None or not len(faces):
            solid = _smaller(
                _draw_mesh(
                    (vertices - center) @ axes.T * unit, faces, np.asarray(normals) @ axes.T, size
                )
            )
        else:
            eye = Camera.look_at(
                center + 4 * reach * axes[2],
                center,
                width=PANEL,
                height=PANEL,
                fov=0,
                span=2 * reach / canvas.FILL,
            )
            solid = render(field, eye, guide=mesh, supersample=2) / 255
        rows.append(np.concatenate([_smaller(dots), solid], 1))
    picture = np.concatenate(rows)
    image = Image.fromarray(np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8), "RGB")
    surface = "level set" if field is None else "level set, by rays; mesh"
    canvas.caption(image, f"input: {len(points):,} points", f"{surface}: {len(faces):,} triangles")
    write_whole(Path(path), lambda stream: image.save(stream, format="PNG", optimize=False))


def _smaller(panel: np.ndarray) -> np.ndarray:
    """A panel at its own size, each pixel the mean of those it was drawn with."""
    scale = canvas.SCALE
    return panel.reshape(PANEL, scale, PANEL, scale, 3).mean((1, 3))


def _draw_points(dots: np.ndarray, normals: np.ndarray, spacing: float, size: int) -> np.ndarray:
    """Lit dots, paler with depth, without those behind the surface the near dots suggest.

    Args:
        dots: (n, 3) camera coordinates in pixels.
        normals: (n, 3) unit, camera axes, of either sign.
        spacing: typical distance between neighbours, in pixels.
        size: of the square image.
    """
    image = canvas.background(size)
    if not len(dots):
        return image
    screen = canvas.on_screen(dots, size)
    radius = float(np.clip(0.45 * spacing, 0.75 * canvas.SCALE, 2.5 * canvas.SCALE))
    cover = float(np.clip(2.0 * spacing, 2 * radius, 12 * canvas.SCALE))
    curtain = canvas.splat(screen, cover, size)
    nearest = screen[(curtain & np.uint64(0xFFFFFFFF)).astype(np.int64) % len(dots), 2]
    column = np.clip(screen[:, 0].astype(np.int64), 0, size - 1)
    row = np.clip(screen[:, 1].astype(np.int64), 0, size - 1)
    seen = np.flatnonzero(screen[:, 2] <= nearest[row * size + column] + 4 * cover)
    buffer = canvas.splat(screen[seen], radius, size)
    pixel = np.flatnonzero(buffer != canvas.FAR)
    owner = seen[(buffer[pixel] & np.uint64(0xFFFFFFFF)).astype(np.int64)]
    near, far = float(screen[:, 2].min()), float(screen[:, 2].max())
    haze = 0.30 * ((screen[owner, 2] - near) / max(far - near, 1e-9))[:, None]
    facing = normals[owner] * np.where(normals[owner, 2:] < 0, -1.0, 1.0)
    image.reshape(-1, 3)[pixel] = (1 - haze) * canvas.lit(
        facing, canvas.DOTS
    ) + haze * canvas.BACKGROUND_BOTTOM
    return image


def _local_planes(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Unit normals (n, 3) of the planes through each point's neighbours, and the median spacing."""
    if len(points) < 5:
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
    image = canvas.background(size)
    if not len(faces):
        return image
    corner = canvas.on_screen(vertices, size)[faces]
    pixel, owner = canvas.owners(canvas.rasterize(corner, size, size))
    weight, _ = canvas.barycentric(corner, owner, pixel % size, pixel // size)
    normal = (weight[:, :, None] * normals[faces[owner]]).sum(1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    # The winding, not the normal, says which side is seen (rows grow downward on the screen).
    edge_a = corner[owner, 1, :2] - corner[owner, 0, :2]
    edge_b = corner[owner, 2, :2] - corner[owner, 0, :2]
    front = edge_a[:, 0] * edge_b[:, 1] - edge_a[:, 1] * edge_b[:, 0] < 0
    normal = np.where(front[:, None], normal, -normal)
    normal[:, 2] = np.maximum(normal[:, 2], 0.0)
    albedo = np.where(front[:, None], canvas.FRONT, canvas.BACK)
    image.reshape(-1, 3)[pixel] = canvas.lit(normal, albedo)
    return image


def _vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Area-weighted means of the normals of the faces around, (v, 3), unit where defined."""
    corner = vertices[faces]
    weighted = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    normals = np.zeros_like(vertices)
    for i in range(3):
        for axis in range(3):
            normals[:, axis] += np.bincount(faces[:, i], weighted[:, axis], len(vertices))
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-300)


# Names that other modules of the project still use; they are canvas's now.
_VIEWS, _SCALE, _FILL, _FAR = canvas.VIEWS, canvas.SCALE, canvas.FILL, canvas.FAR
_BACKGROUND_TOP, _BACKGROUND_BOTTOM = canvas.BACKGROUND_TOP, canvas.BACKGROUND_BOTTOM
_FRONT, _BACK, _DOTS, _MOST_DOTS = canvas.FRONT, canvas.BACK, canvas.DOTS, canvas.MOST_DOTS
_camera, _on_screen, _background = canvas.camera, canvas.on_screen, canvas.background
_splat, _lit, _barycentric, _caption = canvas.splat, canvas.lit, canvas.barycentric, canvas.caption
