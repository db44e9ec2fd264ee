"""How far a mesh is from the true one, and the floor that sampling itself puts under the figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.sparse
from scipy.spatial import cKDTree

from levelset_ext.data.meshes import mesh_arrays


class TriangleMesh(Protocol):
    """Anything with vertices (v, 3) and faces (f, 3): `trimesh.Trimesh`, `extract.Mesh`."""

    @property
    def vertices(self) -> np.ndarray: ...

    @property
    def faces(self) -> np.ndarray: ...


def compare_meshes(
    mesh: TriangleMesh,
    truth: TriangleMesh,
    samples: int = 30_000,
    seed: int = 0,
    surface_samples: int = 50_000,
    dense_samples: int = 1_500_000,
) -> dict[str, float | int | bool | None]:
    """Distances between two surfaces, and the shape of the first.

    Points are drawn uniformly by area. With A of `mesh` and B of `truth`, `samples` points each,
    and `diagonal` that of the truth's bounding box:

    - `chamfer_l1`, `chamfer_l2`: mean over A of the distance to the nearest point of B, mean over
      B of the distance to the nearest point of A, then the mean of the two; the distance is the
      L1 norm or the (plain, not squared) L2 norm, in input units. `chamfer_l1_relative` and
      `chamfer_l2_relative`: the same / diagonal.
    - `two_sided_mean`: `chamfer_l2` / diagonal. `resampling_floor`: the same between B and a
      second, independent sampling of the truth, which no mesh can be expected to beat.
      `two_sided_ratio`: the one over the other; 1 is perfect.
    - `point_to_surface`: the same two means from `surface_samples` points to `dense_samples` points
      of the other surface, / diagonal: nearly the distance to the surface itself.
      `point_to_surface_floor`: the truth against itself.
    - `hausdorff`: the largest of those distances, points to dense samples, either way, / diagonal.
    - `normal_consistency`: mean |n . n'| of face normals at nearest points of A and B, both ways.
    - `components`, `watertight`, `euler_number`, `genus` (of the component with most faces; None
      unless watertight), `vertices`, `faces`: of `mesh`, vertices as they are joined by the faces.

    Raises:
        ValueError: a mesh without faces or without area, with faces of vertices that are not there
            or not finite, or a sample count below 1; meshes so far from each other in size or place
            that they cannot be of one thing in the same units.
    """
    for name, count in (
        ("samples", samples),
        ("surface_samples", surface_samples),
        ("dense_samples", dense_samples),
    ):
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
    random = np.random.default_rng(seed)
    surface = {"mesh": _Surface.of(mesh, "mesh"), "truth": _Surface.of(truth, "truth")}
    true_points = surface["truth"].corners.reshape(-1, 3)
    diagonal = float(np.linalg.norm(true_points.max(0) - true_points.min(0)))

    _check_alike(surface["mesh"].corners.reshape(-1, 3), true_points)

    a, a_normal = surface["mesh"].sample(samples, random)
    b, b_normal = surface["truth"].sample(samples, random)
    again, _ = surface["truth"].sample(samples, random)
    tree_a, tree_b = cKDTree(a), cKDTree(b)
    l1 = (tree_b.query(a, p=1)[0].mean() + tree_a.query(b, p=1)[0].mean()) / 2
    to_b, index_b = tree_b.query(a)
    to_a, index_a = tree_a.query(b)
    l2 = (to_b.mean() + to_a.mean()) / 2
    floor = (tree_b.query(again)[0].mean() + cKDTree(again).query(b)[0].mean()) / 2
    cosine = np.concatenate(
        [(a_normal * b_normal[index_b]).sum(1), (b_normal * a_normal[index_a]).sum(1)]
    )

    dense_truth = cKDTree(surface["truth"].sample(dense_samples, random)[0])
    dense_mesh = cKDTree(surface["mesh"].sample(dense_samples, random)[0])
    few_mesh = surface["mesh"].sample(surface_samples, random)[0]
    few_truth = surface["truth"].sample(surface_samples, random)[0]
    forth, back = dense_truth.query(few_mesh)[0], dense_mesh.query(few_truth)[0]
    own = dense_truth.query(few_truth)[0].mean()

    return {
        "chamfer_l1": float(l1),
        "chamfer_l2": float(l2),
        "chamfer_l1_relative": float(l1) / diagonal,
        "chamfer_l2_relative": float(l2) / diagonal,
        "two_sided_mean": float(l2) / diagonal,
        "resampling_floor": float(floor) / diagonal,
        "two_sided_ratio": float(l2 / floor),
        "point_to_surface": float((forth.mean() + back.mean()) / 2) / diagonal,
        "point_to_surface_floor": float(own) / diagonal,
        "hausdorff": float(max(forth.max(), back.max())) / diagonal,
        "normal_consistency": float(np.abs(cosine).mean()),
        **_topology(np.asarray(mesh.faces)),
        "vertices": len(mesh.vertices),
        "faces": len(mesh.faces),
        "diagonal": diagonal,
        "samples": samples,
    }


def _check_alike(mesh: np.ndarray, truth: np.ndarray) -> None:
    """Also because nearest points of what lies far away take hours: all are equally near."""
    boxes = [(points.min(0), points.max(0)) for points in (mesh, truth)]
    sizes = [float(np.linalg.norm(high - low)) for low, high in boxes]
    gap = np.maximum(boxes[0][0] - boxes[1][1], boxes[1][0] - boxes[0][1]).clip(min=0)
    apart = float(np.linalg.norm(gap))
    if max(sizes) > 5 * min(sizes) or apart > max(sizes):
        raise ValueError(
            f"mesh: expected the size and the place of truth, got diagonals {sizes[0]:.4g} and "
            f"{sizes[1]:.4g}, {apart:.4g} apart; are they in the same units?"
        )


@dataclass(frozen=True)
class _Surface:
    """Triangles with area, ready to be sampled."""

    corners: np.ndarray  # (f, 3, 3)
    normals: np.ndarray  # (f, 3), unit
    cumulative: np.ndarray  # (f,) running sum of the areas

    @classmethod
    def of(cls, mesh: TriangleMesh, name: str) -> _Surface:
        if not len(mesh.faces):
            raise ValueError(f"{name}: expected a mesh with faces, got none")
        vertices, faces = mesh_arrays(mesh.vertices, mesh.faces, name)
        corners = vertices[faces]
        if not np.isfinite(corners).all():
            raise ValueError(f"{name}: expected finite vertices, got NaN or infinity")
        cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        twice = np.linalg.norm(cross, axis=1)
        if not twice.sum() > 0:
            raise ValueError(f"{name}: expected a mesh with area, got area {twice.sum() / 2}")
        solid = twice > 0
        corners, cross, twice = corners[solid], cross[solid], twice[solid]
        return cls(corners, cross / twice[:, None], np.cumsum(twice / 2))

    def sample(self, count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Points (count, 3), uniform by area, and the face normals there."""
        at = random.random(count) * self.cumulative[-1]
        face = np.minimum(np.searchsorted(self.cumulative, at, side="right"), len(self.corners) - 1)
        u, v = random.random(count), random.random(count)
        outside = u + v > 1
        u[outside], v[outside] = 1 - u[outside], 1 - v[outside]
        corner = self.corners[face]
        edge_u, edge_v = corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]
        return corner[:, 0] + u[:, None] * edge_u + v[:, None] * edge_v, self.normals[face]


def _topology(faces: np.ndarray) -> dict[str, float | int | bool | None]:
    """Components, closedness, Euler number and genus of faces (f, 3), by index alone."""
    used, corner = np.unique(faces, return_inverse=True)
    corner = corner.reshape(-1, 3)
    edges = np.sort(corner[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    key = edges[:, 0].astype(np.int64) * len(used) + edges[:, 1]
    unique, multiplicity = np.unique(key, return_counts=True)
    first, second = unique // len(used), unique % len(used)
    components, label = connected_vertices(first, second, len(used))
    watertight = bool((multiplicity == 2).all())
    face_label = label[corner[:, 0]]
    largest = int(np.bincount(face_label).argmax())
    euler_largest = (
        int((label == largest).sum())
        - int((label[first] == largest).sum())
        + int((face_label == largest).sum())
    )
    return {
        "components": components,
        "watertight": watertight,
        "euler_number": len(used) - len(unique) + len(faces),
        "genus": (2 - euler_largest) // 2 if watertight else None,
    }


__all__ = ["TriangleMesh", "compare_meshes"]


def connected_vertices(first: np.ndarray, second: np.ndarray, count: int) -> tuple[int, np.ndarray]:
    """How many pieces ``count`` vertices form along the edges first - second, and the piece that
    each of them belongs to, (count,)."""
    graph = scipy.sparse.coo_matrix(
        (np.ones(len(first), np.int8), (first, second)), shape=(count, count)
    )
    pieces, label = scipy.sparse.csgraph.connected_components(graph, directed=False)
    return int(pieces), label
