"""Taking off a mesh what no measured point is near to, and small pieces.

{F = 0} has no border: where a scan ends, at the open base of a figure or the edge of a terrain, the
level set closes all the same, by a lid that nobody has measured. What is far from every point is
such a lid, or a sheet that a training has left between its points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from levelset_ext.data.meshes import mesh_arrays
from levelset_ext.geometry.compare import TriangleMesh, connected_vertices


@dataclass(frozen=True)
class TrimmedMesh:
    """What is left of a mesh.

    Attributes:
        vertices: (v, 3) float64, those that a face needs, in the order of the mesh.
        faces: (f, 3) int64, counter-clockwise as they were.
        index: (v,) int64, the vertex of the mesh that each is; for normals or colours of vertices.
        far: faces that were taken off as being far from the points.
        pieces: small pieces that were taken off after that.
    """

    vertices: np.ndarray
    faces: np.ndarray
    index: np.ndarray
    far: int
    pieces: int


def trim_mesh(
    mesh: TriangleMesh,
    points: npt.ArrayLike | None = None,
    distance: float = math.inf,
    smallest: float = 0.0,
) -> TrimmedMesh:
    """The mesh without faces that are far from all points, then without small pieces.

    Vertices do not move and no face is cut, so the new border follows the edges of the mesh.

    Args:
        mesh: vertices (v, 3) and faces (f, 3).
        points: (n, 3), what was measured; needed for a finite ``distance`` alone.
        distance: a face goes if each of its corners is further than this from every point, in
            units of the mesh; > 0. Faces should be smaller than it, as those of
            :func:`extract_mesh` are: of a large one the corners say little. It should be several
            times the spacing of the points, as wider gaps between them become holes.
        smallest: a piece, faces that share vertices, goes if its area is less than this share of
            all that ``distance`` has left; 0 to 1, the largest one always stays.

    Returns:
        :class:`TrimmedMesh`, without faces if all are far.

    Raises:
        ValueError: points that are missing, none, not (n, 3) or not finite; ``distance`` or
            ``smallest`` out of range; a mesh with vertices that are not finite, or faces of
            vertices that are not there.
    """
    if not distance > 0:
        raise ValueError(f"distance: expected a number > 0, got {distance!r}")
    if not 0 <= smallest <= 1:
        raise ValueError(f"smallest: expected a share in [0, 1], got {smallest!r}")
    vertices, given = mesh_arrays(mesh.vertices, mesh.faces, "mesh")
    if wrong := int((~np.isfinite(vertices)).any(1).sum()):
        raise ValueError(
            f"mesh: expected finite vertices, got NaN or infinity in {wrong} of {len(vertices)}"
        )
    faces = given.astype(np.int64)
    if math.isfinite(distance):
        beyond = math.nextafter(distance, math.inf)  # the search leaves its bound itself out
        far = np.isinf(_tree(points).query(vertices, distance_upper_bound=beyond)[0])
        faces = faces[~far[faces].all(1)]
    pieces = 0
    near = len(faces)
    if smallest > 0 and near:
        kept, pieces = _large_pieces(vertices, faces, smallest)
        faces = faces[kept]
    index, corner = np.unique(faces, return_inverse=True)
    return TrimmedMesh(vertices[index], corner.reshape(-1, 3), index, len(given) - near, pieces)


def _tree(points: npt.ArrayLike | None) -> cKDTree:
    cloud = np.asarray([] if points is None else points, dtype=np.float64)
    if cloud.ndim != 2 or cloud.shape[1] != 3 or not len(cloud):
        got = "none" if points is None else f"shape {cloud.shape}"
        raise ValueError(f"points: expected (n, 3) with n >= 1 for a finite distance, got {got}")
    if not np.isfinite(cloud).all():
        raise ValueError("points: expected finite numbers, got NaN or infinity")
    return cKDTree(cloud)


def _large_pieces(
    vertices: np.ndarray, faces: np.ndarray, smallest: float
) -> tuple[np.ndarray, int]:
    """(f,) which faces belong to a piece that is large enough, and how many pieces do not."""
    first, second = np.concatenate([faces[:, :2], faces[:, 1:]]).T
    label = connected_vertices(first, second, len(vertices))[1][faces[:, 0]]
    corner = vertices[faces]
    cross = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    area = np.bincount(label, np.linalg.norm(cross, axis=1))
    large = area >= smallest * area.sum()
    large[area.argmax()] = True
    kept = large[label]
    return kept, len(np.unique(label)) - len(np.unique(label[kept]))
