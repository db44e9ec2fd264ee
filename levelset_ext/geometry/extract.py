"""A level set {F = c} in 3-D as a triangle mesh: sparse marching cubes, then Newton.

1. *Where is it?* F is evaluated on a coarse lattice, and cells that may hold surface are halved
   until they have the wanted size. Only those cells are ever evaluated, so time and memory grow
   with the area of the surface, not with the volume of the box.
2. *How does it run?* A case table, built from one rule for the faces of a cube, cuts every cell.
   A vertex belongs to a grid edge and is named by that edge's integer key, so neighbouring cells
   share it exactly and there are no seams to weld.
3. *Where exactly?* Vertices are projected onto the level set in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import scipy.ndimage
import torch

from levelset_ext.compiled import MLP, compiled_field
from levelset_ext.field import Field, as_rows, evaluation_copy, value_and_jacobian
from levelset_ext.samplers import project

Values = Callable[[np.ndarray], np.ndarray]  # positions (n, 3) float64 -> F - c (n,) float64
Work = Callable[[np.ndarray], tuple[np.ndarray, ...]]  # x (n, ...) -> arrays of n rows
Spread = Callable[[Work, np.ndarray, int], tuple[np.ndarray, ...]]

RESIDUAL_SHARE = 1e-6  # promised: |F - c| <= this x diagonal x median |D_xF|
_TARGET_SHARE = 1e-7  # asked of Newton, so that the promise holds with room
_COARSE_CELLS = 48  # least number of coarse cells along the longest side
_EDGE_MARGIN = 0.05  # vertices start this share of an edge away from its ends: no slivers


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh of a level set and how it came about.

    Faces wind counter-clockwise seen from where F is larger, so normals point outward for a field
    that is negative inside.
    """

    vertices: np.ndarray  # (v, 3) float64
    faces: np.ndarray  # (f, 3) int64
    normals: np.ndarray  # (v, 3) float64, D_xF / |D_xF|
    evaluations: int = 0  # points at which F was evaluated on the lattice
    cell: float = float("nan")  # side of a grid cell
    residual: float = 0.0  # max |F - c| over the vertices, float64 where F allows it
    tolerance: float = float("nan")  # RESIDUAL_SHARE x diagonal x median |D_xF|
    bracketed: int = 0  # vertices put on their own grid edge because Newton left the cell
    unrefined: int = 0  # vertices still above the tolerance

    @property
    def empty(self) -> bool:
        return len(self.faces) == 0


def extract_mesh(
    fn: Field,
    bounds: tuple[npt.ArrayLike, npt.ArrayLike],
    resolution: int = 256,
    level: float = 0.0,
    batch: int = 32768,
    refine: bool = True,
    spread: Spread | None = None,
) -> Mesh:
    """The level set {F = level} inside a box, as a mesh.

    The grid has cubic cells, `resolution` of them along the longest side of the box; it is
    centred on the box and covers it, so it may reach out by part of a cell (a coarse one, while
    searching) on the shorter sides. A surface that leaves the grid ends there with an open border.

    What is found: a cell is searched further when F - c changes sign over its corners, or when
    the smallest |F - c| at its corners is within reach, that is at most L sqrt(3)/2 x side. L is
    the largest slope between the corners of this cell, of the seven halved from the same parent,
    and of the parent's own such family (coarsest cells: of all cells around). Last, wherever the
    surface crosses a face of an evaluated cell, the cell behind it is evaluated too, so a
    component that is found at all is complete. What can slip through: a component smaller than a
    coarse cell (a 48th to a 96th of the longest side; one cell below resolution 96) around which
    F is much flatter between the corners than next to the surface; and anything that changes no
    sign between the nodes of the finest grid.

    Args:
        fn: (n, 3) -> (n,) or (n, 1). A module is evaluated as a copy in eval mode, on its own
            device, on the grid in its own dtype and for the vertices in float64. Another callable
            gets CPU tensors of the default dtype, float64 for the vertices. Where float64 is
            refused the vertices get the grid's dtype, and `residual` shows what that costs.
        bounds: lower (3,) and upper (3,) corner.
        resolution: cells along the longest side, at least 1. Memory is a few hundred MB at 512.
        level: c.
        batch: rows per evaluation of F on the grid; an eighth of it per projection.
        refine: move the vertices onto the level set; False leaves them where linear interpolation
            along their grid edges puts them.
        spread: how evaluations are shared by several processes, all of which make this call: called
            as spread(work, x, batch), it returns what ``work(x)`` would, arrays with a row for
            each row of x; it may split x between batches. None works alone.

    Returns:
        The mesh; with 0 vertices and 0 faces when F - level has one sign on all nodes seen.

    Raises:
        ValueError: bad bounds, resolution, level or batch; F of a wrong shape or NaN.
    """
    low, high = (np.asarray(corner, dtype=np.float64) for corner in bounds)
    if low.shape != (3,) or high.shape != (3,):
        raise ValueError(f"bounds: expected ((3,), (3,)), got ({low.shape}, {high.shape})")
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (high > low).all()):
        raise ValueError(
            f"bounds: expected finite lower < upper, got {low.tolist()}, {high.tolist()}"
        )
    if int(resolution) < 1:
        raise ValueError(f"resolution: expected at least 1, got {resolution}")
    if int(batch) < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    if not np.isfinite(level):
        raise ValueError(f"level: expected a finite number, got {level}")

    cell = float((high - low).max()) / int(resolution)
    cells = np.maximum(np.ceil((high - low) / cell - 1e-9), 1).astype(np.int64)
    origin = (low + high) / 2 - cell * cells / 2
    grid_fn, device, dtype = _for_the_grid(fn)

    share = _alone if spread is None else spread

    def values(x: np.ndarray) -> np.ndarray:
        return share(
            lambda part: (_evaluate(grid_fn, part, float(level), int(batch), device, dtype),),
            x,
            int(batch),
        )[0]

    lattice = _search(values, origin, cell, cells, int(resolution))
    faces, ends = _march(lattice)
    if not len(faces):
        none = np.empty((0, 3))
        return Mesh(none, np.empty((0, 3), np.int64), none.copy(), lattice.total, cell)
    margin = _EDGE_MARGIN if refine else 1e-3
    start = _interpolate(lattice, ends, margin)
    precisions = [(exact_fn, torch.float64) for exact_fn in _in_float64(grid_fn)]
    precisions.append((grid_fn, dtype))
    exact = _Exact(precisions, float(level), int(batch), device, start[:1], share)
    return _finish(exact, lattice, faces, ends, start, refine)


def _alone(work: Work, x: np.ndarray, batch: int) -> tuple[np.ndarray, ...]:
    return work(x)


# --- evaluating F ---------------------------------------------------------------------------


def _for_the_grid(fn: Field) -> tuple[Field, torch.device, torch.dtype]:
    """F as it is evaluated on the grid, with its device and dtype."""
    grid_fn: Field
    if isinstance(fn, MLP):
        grid_fn, module = fn, fn.module
    elif isinstance(fn, torch.nn.Module):
        grid_fn, module = evaluation_copy(fn), fn
    else:
        return fn, torch.device("cpu"), torch.get_default_dtype()
    floating = (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    first = next(floating, torch.empty(0))
    return grid_fn, first.device, first.dtype


def _in_float64(grid_fn: Field) -> list[Field]:
    """A float64 copy of a module, the callable itself, or nothing if the module has no copy."""
    module = grid_fn.module if isinstance(grid_fn, MLP) else grid_fn
    if not isinstance(module, torch.nn.Module):
        return [grid_fn]
    try:
        return [copy.deepcopy(module).double()]
    except Exception:  # it keeps tensors that are part of a graph, a lock, an open file, ...
        return []


def _evaluate(
    fn: Field,
    x: np.ndarray,
    level: float,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
) -> np.ndarray:
    """F - c at x (n, 3), float64 (n,)."""
    out = np.empty(len(x))
    with torch.no_grad():
        for at in range(0, len(x), batch):
            part = torch.from_numpy(x[at : at + batch]).to(device=device, dtype=dtype)
            compiled = compiled_field(fn, part)
            value = fn(part) if compiled is None else compiled.values(part)
            if len(part) == 1:
                value = as_rows(value)
            if value.shape not in ((len(part),), (len(part), 1)):
                raise ValueError(
                    f"fn: expected values ({len(part)},) or ({len(part)}, 1) for points "
                    f"({len(part)}, 3), got {tuple(value.shape)}"
                )
            out[at : at + batch] = value.reshape(-1).double().cpu().numpy() - level
    undefined = int(np.isnan(out).sum())
    if undefined:
        raise ValueError(f"fn: expected numbers, got NaN at {undefined} of {len(x)} grid nodes")
    return out


# --- the sparse lattice ---------------------------------------------------------------------

_CORNERS = np.array([[c & 1, c >> 1 & 1, c >> 2 & 1] for c in range(8)], dtype=np.int64)
_BRICK = 4  # nodes along the side of a brick
_CHUNK = 1 << 17  # cells handled at a time


class _Lattice:
    """Values at some nodes of a grid, kept in bricks of 4 x 4 x 4 nodes.

    A cell has the index of its lowest corner, so `listed` marks cells in the same bricks.
    """

    def __init__(self, values: Values, origin: np.ndarray, spacing: float, cells: np.ndarray):
        self.values, self.origin, self.spacing = values, origin, spacing
        self.cells = cells  # (3,) number of cells along each axis
        self.total = 0  # nodes evaluated
        self.table = np.full(tuple(cells // _BRICK + 1), -1, dtype=np.int32)
        self.bricks = np.empty((0, 3), dtype=np.int64)
        self.value = np.empty((0, _BRICK**3))
        self.known = np.empty((0, _BRICK**3), dtype=bool)
        self.listed = np.empty((0, _BRICK**3), dtype=bool)

    def position(self, nodes: np.ndarray) -> np.ndarray:
        return self.origin + self.spacing * nodes

    def at(self, nodes: np.ndarray) -> np.ndarray:
        """Values at nodes (..., 3) that are known."""
        slot, local = self._find(nodes)
        return self.value[slot, local]

    def add(self, cells: np.ndarray) -> np.ndarray:
        """List cells (m, 3), evaluate their corners; returns those not listed before."""
        fresh = []
        for at in range(0, len(cells), _CHUNK):
            part = cells[at : at + _CHUNK]
            nodes = (part[:, None] + _CORNERS).reshape(-1, 3)
            self._allocate(nodes)
            slot, local = self._find(part)
            new = ~self.listed[slot, local]
            # A cell may appear twice in one call; keep its first appearance.
            key = slot[new].astype(np.int64) * _BRICK**3 + local[new]
            first = np.unique(key, return_index=True)[1]
            fresh.append(part[new][first])
            self.listed[slot, local] = True
            slot, local = self._find(nodes)
            wanted = np.zeros_like(self.known)
            wanted[slot, local] = True
            wanted &= ~self.known
            slot, local = np.nonzero(wanted)
            where = self.bricks[slot] * _BRICK + _unravel(local)
            self.value[slot, local] = self.values(self.position(where))
            self.known |= wanted
            self.total += len(where)
        return np.concatenate(fresh) if fresh else np.empty((0, 3), np.int64)

    def corners(self, cells: np.ndarray) -> np.ndarray:
        """Corner values (m, 8) of cells (m, 3), corner c at (c & 1, c >> 1 & 1, c >> 2)."""
        return self.at(cells[:, None] + _CORNERS)

    def _find(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        brick, inner = nodes // _BRICK, nodes % _BRICK
        slot = self.table[brick[..., 0], brick[..., 1], brick[..., 2]]
        local = (inner[..., 0] * _BRICK + inner[..., 1]) * _BRICK + inner[..., 2]
        return slot, local

    def _allocate(self, nodes: np.ndarray) -> None:
        brick = nodes // _BRICK
        missing = brick[self.table[brick[:, 0], brick[:, 1], brick[:, 2]] < 0]
        if not len(missing):
            return
        key = np.unique(np.ravel_multi_index(tuple(missing.T), self.table.shape))
        new = np.stack(np.unravel_index(key, self.table.shape), -1).astype(np.int64)
        self.table[new[:, 0], new[:, 1], new[:, 2]] = len(self.bricks) + np.arange(len(new))
        self.bricks = np.concatenate([self.bricks, new])
        blank = np.zeros((len(new), _BRICK**3))
        self.value = np.concatenate([self.value, blank])
        self.known = np.concatenate([self.known, blank.astype(bool)])
        self.listed = np.concatenate([self.listed, blank.astype(bool)])


def _unravel(local: np.ndarray) -> np.ndarray:
    return np.stack([local // _BRICK**2, local // _BRICK % _BRICK, local % _BRICK], -1)


def _search(
    values: Values, origin: np.ndarray, cell: float, cells: np.ndarray, resolution: int
) -> _Lattice:
    """The finest lattice, with every cell listed that the rule of `extract_mesh` asks for."""
    stride = 1
    while resolution // (stride * 2) >= _COARSE_CELLS:
        stride *= 2
    size = -(-cells // stride)
    lattice = _Lattice(values, origin, cell * stride, size)
    current = lattice.add(np.stack(np.unravel_index(np.arange(size.prod()), tuple(size)), -1))
    family, inherited = np.zeros(0, np.int64), np.zeros(0)
    total = 0
    while stride > 1:
        near, reach = _may_hold_surface(lattice, current, family, inherited)
        total += lattice.total
        stride //= 2
        size = -(-cells // stride)
        lattice = _Lattice(values, origin, cell * stride, size)
        children = (2 * current[near][:, None] + _CORNERS).reshape(-1, 3)
        inside = (children < size).all(1)
        current, inherited = children[inside], reach[near]
        family = np.repeat(np.arange(len(inherited)), 8)[inside]
        lattice.add(current)
    lattice.total += total
    _grow(lattice, current)
    return lattice


def _may_hold_surface(
    lattice: _Lattice, cells: np.ndarray, family: np.ndarray, inherited: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which cells to halve, and the slope assumed for each.

    Args:
        lattice: one whose values at the corners of `cells` are known.
        cells: (m, 3).
        family: (m,) number of the parent each cell was halved from; empty on the coarsest level.
        inherited: the slope assumed for each parent.

    Returns:
        (m,) bool and (m,) float64.
    """
    near = np.empty(len(cells), dtype=bool)
    slope = np.empty(len(cells))
    closest = np.empty(len(cells))
    for at in range(0, len(cells), _CHUNK):
        corner = lattice.corners(cells[at : at + _CHUNK])
        near[at : at + _CHUNK] = (corner < 0).any(1) & (corner >= 0).any(1)
        closest[at : at + _CHUNK] = np.abs(corner).min(1)
        cube = corner.reshape(-1, 2, 2, 2)  # axes z, y, x
        with np.errstate(invalid="ignore"):
            rise = [np.abs(np.diff(cube, axis=a)).reshape(len(cube), -1).max(1) for a in (1, 2, 3)]
            total = np.sqrt(np.square(rise).sum(0)) / lattice.spacing
        slope[at : at + _CHUNK] = np.where(np.isnan(total), np.inf, total)
    if len(family):
        reach = inherited.copy()
        np.maximum.at(reach, family, slope)
        reach = reach[family]
    else:  # the coarsest level holds every cell: look at all the neighbours
        dense = np.zeros(tuple(lattice.cells))
        dense[tuple(cells.T)] = slope
        reach = scipy.ndimage.maximum_filter(dense, size=3, mode="nearest")[tuple(cells.T)]
    near |= closest <= reach * (np.sqrt(3) / 2 * lattice.spacing)
    # A steep spot must not make everything below it look steep: hand down the cell's own slope
    # and its siblings', not the grandparents'.
    if len(family):
        reach = np.zeros(len(inherited))
        np.maximum.at(reach, family, slope)
        reach = reach[family]
    return near, reach


def _grow(lattice: _Lattice, cells: np.ndarray) -> None:
    """List the cells behind every crossed face, in blocks of 4^3, until none is missing."""
    faces = [
        (axis, side, np.flatnonzero(_CORNERS[:, axis] == side))
        for axis in range(3)
        for side in (0, 1)
    ]
    block = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    while len(cells):
        missing = []
        for at in range(0, len(cells), _CHUNK):
            part = cells[at : at + _CHUNK]
            inside = lattice.corners(part) < 0
            mixed = inside.any(1) & ~inside.all(1)
            part, inside = part[mixed], inside[mixed]
            for axis, side, corner in faces:
                face = inside[:, corner]
                crossed = part[face.any(1) & ~face.all(1)].copy()
                crossed[:, axis] += 2 * side - 1
                crossed = crossed[
                    (crossed[:, axis] >= 0) & (crossed[:, axis] < lattice.cells[axis])
                ]
                slot, local = lattice._find(crossed)
                behind = (slot < 0) | ~lattice.listed[slot, local]
                missing.append(np.unique(crossed[behind] // 4, axis=0))
        blocks = np.unique(np.concatenate(missing), axis=0)
        wanted = (blocks[:, None] * 4 + block).reshape(-1, 3)
        cells = lattice.add(wanted[(wanted < lattice.cells).all(1)])


# --- marching cubes -------------------------------------------------------------------------


@cache
def _case_table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Triangles of each of the 256 cases, and the edges of a cube.

    Bit c of a case is set when corner c is inside (F < c). Each face of the cube is cut by one
    rule: every run of inside corners around the face gets its own segment. The rule sees the
    signs on the face only, so the two cells that share the face cut it alike and the surface
    closes. The segments of six faces form loops, and each loop is split into triangles without
    diagonals inside a face of the cube, where a diagonal of the neighbour could lie as well.

    Returns:
        triangles (256, t, 3) of edge numbers, -1 where unused; their counts (256,); and edges
        (12, 2): lower corner and axis of each edge.
    """
    edges = [(c, axis) for axis in range(3) for c in range(8) if not c >> axis & 1]
    number = {frozenset((c, c | 1 << axis)): e for e, (c, axis) in enumerate(edges)}
    faces = []  # four corners each, counter-clockwise seen from outside
    for axis in range(3):
        u, v = 1 << (axis + 1) % 3, 1 << (axis + 2) % 3
        ring = [0, u, u | v, v]
        faces.append([c | 1 << axis for c in ring])
        faces.append(ring[::-1])
    middle = np.array([_CORNERS[c] + 0.5 * np.eye(3)[axis] for c, axis in edges])
    on_face = np.concatenate([middle == 0, middle == 1], 1)  # (12, 6)

    cases = []
    for case in range(256):
        follow = {}
        for ring in faces:
            inside = [bool(case >> c & 1) for c in ring]
            cuts = [number[frozenset((ring[i], ring[(i + 1) % 4]))] for i in range(4)]
            for i in range(4):
                if inside[i] and not inside[i - 1]:  # a run begins at corner i
                    stop = i
                    while inside[(stop + 1) % 4]:
                        stop += 1
                    follow[cuts[i - 1]] = cuts[stop % 4]
        triangles: list[tuple[int, int, int]] = []
        while follow:
            loop = [min(follow)]
            while (after := follow.pop(loop[-1])) != loop[0]:
                loop.append(after)
            triangles += _split_loop(loop, middle, on_face)
        cases.append(triangles)
    counts = np.array([len(t) for t in cases])
    table = np.full((256, counts.max(), 3), -1)
    for case, triangles in enumerate(cases):
        table[case, : len(triangles)] = np.reshape(triangles, (-1, 3))
    return table, counts, np.array(edges)


def _split_loop(
    loop: list[int], middle: np.ndarray, on_face: np.ndarray
) -> list[tuple[int, int, int]]:
    """The triangulation with the best worst triangle among those without a diagonal in a face."""

    def options(i: int, j: int) -> list[list[tuple[int, int, int]]]:
        """All triangulations of the part of the loop from i to j, given the chord i-j."""
        if j - i < 2:
            return [[]]
        found = []
        for k in range(i + 1, j):
            chords = [(a, b) for a, b in ((i, k), (k, j)) if b - a > 1]
            if any((on_face[loop[a]] & on_face[loop[b]]).any() for a, b in chords):
                continue
            triangle = (loop[i], loop[k], loop[j])
            found += [
                [*left, triangle, *right] for left in options(i, k) for right in options(k, j)
            ]
        return found

    def quality(triangles: list[tuple[int, int, int]]) -> float:
        corner = middle[np.array(triangles)]
        sides = corner - np.roll(corner, 1, axis=1)
        area = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1)
        return float((area / np.square(sides).sum((1, 2))).min())

    return max(options(0, len(loop) - 1), key=quality)


def _march(lattice: _Lattice) -> tuple[np.ndarray, np.ndarray]:
    """Faces (f, 3) over edge vertices, and those edges: (v, 2, 3) node indices of their ends."""
    table, counts, edges = _case_table()
    slot, local = np.nonzero(lattice.listed)
    cells = lattice.bricks[slot] * _BRICK + _unravel(local)
    cells = cells[np.lexsort(cells.T[::-1])]
    shape = tuple(lattice.cells + 1)
    parts = []
    for at in range(0, len(cells), _CHUNK):
        part = cells[at : at + _CHUNK]
        case = ((lattice.corners(part) < 0) << np.arange(8)).sum(1)
        part, case = part[counts[case] > 0], case[counts[case] > 0]
        owner = np.repeat(np.arange(len(part)), counts[case])
        order = np.arange(len(owner)) - np.repeat(
            np.cumsum(counts[case]) - counts[case], counts[case]
        )
        edge = table[case[owner], order]  # (f, 3)
        node = part[owner][:, None] + _CORNERS[edges[edge, 0]]
        parts.append(
            np.ravel_multi_index(tuple(np.moveaxis(node, -1, 0)), shape) * 3 + edges[edge, 1]
        )
    keys = np.concatenate(parts) if parts else np.empty((0, 3), np.int64)
    named, faces = np.unique(keys, return_inverse=True)
    lower = np.stack(np.unravel_index(named // 3, shape), -1)
    upper = lower + np.eye(3, dtype=np.int64)[named % 3]
    return faces.reshape(-1, 3).astype(np.int64), np.stack([lower, upper], 1)


def _interpolate(lattice: _Lattice, ends: np.ndarray, margin: float) -> np.ndarray:
    """Where F - c vanishes along each edge if it were linear, `margin` away from the ends."""
    value = lattice.at(ends)
    with np.errstate(invalid="ignore"):
        share = value[:, 0] / (value[:, 0] - value[:, 1])
    share = np.clip(np.where(np.isnan(share), 0.5, share), margin, 1 - margin)
    return lattice.position(ends[:, 0] + share[:, None] * (ends[:, 1] - ends[:, 0]))


# --- onto the level set ---------------------------------------------------------------------


def _finish(
    exact: _Exact,
    lattice: _Lattice,
    faces: np.ndarray,
    ends: np.ndarray,
    start: np.ndarray,
    refine: bool,
) -> Mesh:
    """Project the vertices (unless told not to), take normals, measure the residual."""
    diagonal = float(np.linalg.norm(np.ptp(start, axis=0)))
    points, bracketed = start, 0
    if refine:
        sample = start[:: -(-len(start) // 4096)]
        slope = _typical(np.linalg.norm(exact.gradient(sample)[1], axis=1))
        tolerance = _TARGET_SHARE * diagonal * slope
        points, values, gradient, good = exact.project(start, tolerance)
        with np.errstate(invalid="ignore"):
            good &= np.linalg.norm(points - start, axis=1) <= lattice.spacing
        points[~good] = start[~good]
        # A triangle that turned over has a vertex that slid along the surface.
        turned = (_face_normals(points, faces) * _face_normals(start, faces)).sum(1) < 0
        good[faces[turned]] = False
        again = np.flatnonzero(~good)
        if len(again):
            first, second = lattice.position(ends[again, 0]), lattice.position(ends[again, 1])
            root, found = exact.bracket(first, second, tolerance)
            points[again] = np.where(found[:, None], root, start[again])
            values[again], gradient[again] = exact.gradient(points[again])
            bracketed = int(found.sum())
    else:
        values, gradient = exact.gradient(points)
    length = np.linalg.norm(gradient, axis=1)
    tolerance = RESIDUAL_SHARE * diagonal * _typical(length)
    return Mesh(
        vertices=points,
        faces=faces,
        normals=_normals(points, faces, gradient, length),
        evaluations=lattice.total,
        cell=lattice.spacing,
        residual=float(np.abs(values).max()),
        tolerance=tolerance,
        bracketed=bracketed,
        unrefined=int((~(np.abs(values) <= tolerance)).sum()),
    )


def _typical(slopes: np.ndarray) -> float:
    """The median of |D_xF|, without vertices where F has no gradient, as at the tip of a cone."""
    known = slopes[np.isfinite(slopes)]
    if not len(known):
        raise ValueError("fn: expected a finite gradient on the level set, got none at any vertex")
    return float(np.median(known))


class _Exact:
    """F at the vertices, in float64 where it takes that, a bounded number of rows at a time."""

    def __init__(
        self,
        precisions: Sequence[tuple[Field, torch.dtype]],
        level: float,
        batch: int,
        device: torch.device,
        probe: np.ndarray,
        spread: Spread,
    ) -> None:
        self.level, self.batch, self.device = level, max(1, batch // 8), device
        self.spread = spread
        for self.fn, self.dtype in precisions[:-1]:
            try:
                self._values(probe)  # by every process: it may raise
                return
            except (RuntimeError, TypeError, ValueError):  # tensors of another dtype inside
                continue
        self.fn, self.dtype = precisions[-1]

    def values(self, x: np.ndarray) -> np.ndarray:
        return self.spread(lambda part: (self._values(part),), x, self.batch)[0]

    def _values(self, x: np.ndarray) -> np.ndarray:
        return _evaluate(self.fn, x, self.level, self.batch, self.device, self.dtype)

    def gradient(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """F - c (n,) and D_xF (n, 3)."""
        return self.spread(self._gradient, x, self.batch)

    def _gradient(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, gradient = np.empty(len(x)), np.empty((len(x), 3))
        for rows, part in self._parts(x):
            f, jacobian = value_and_jacobian(self.fn, part)
            value[rows] = _numpy(f).reshape(-1) - self.level
            gradient[rows] = _numpy(jacobian).reshape(-1, 3)
        return value, gradient

    def project(self, x: np.ndarray, tolerance: float) -> tuple[np.ndarray, ...]:
        """Points, F - c and D_xF there, and which rows converged."""
        return self.spread(lambda part: self._project(part, tolerance), x, self.batch)

    def _project(
        self, x: np.ndarray, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        points, gradient = np.empty_like(x), np.empty_like(x)
        value, good = np.empty(len(x)), np.empty(len(x), dtype=bool)
        for rows, part in self._parts(x):
            r = project(self.fn, part, level=self.level, max_iters=10, tol=tolerance)
            points[rows] = _numpy(r.points)
            value[rows] = _numpy(r.values).reshape(-1) - self.level
            gradient[rows] = _numpy(r.jacobian).reshape(-1, 3)
            good[rows] = r.converged.reshape(-1).cpu().numpy()
        good &= np.isfinite(points).all(1) & np.isfinite(gradient).all(1)
        return points, value, gradient, good

    def bracket(
        self, first: np.ndarray, second: np.ndarray, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bisection between points (n, 3) of opposite sign; the roots, and which rows had one."""
        low, high = self.values(first), self.values(second)
        found = (low < 0) != (high < 0)
        near = np.where(np.abs(low) <= np.abs(high), 0.0, 1.0)
        a, b, below = np.zeros(len(first)), np.ones(len(first)), low < 0
        best, least = near, np.minimum(np.abs(low), np.abs(high))
        for _ in range(52):
            open_ = np.flatnonzero(found & (least > tolerance))
            if not len(open_):
                break
            t = (a[open_] + b[open_]) / 2
            value = self.values(first[open_] + t[:, None] * (second - first)[open_])
            same = (value < 0) == below[open_]
            a[open_[same]], b[open_[~same]] = t[same], t[~same]
            better = np.abs(value) < least[open_]
            best[open_[better]], least[open_[better]] = t[better], np.abs(value)[better]
        return first + best[:, None] * (second - first), found | (least <= tolerance)

    def _parts(self, x: np.ndarray) -> list[tuple[slice, torch.Tensor]]:
        slices = [slice(at, at + self.batch) for at in range(0, len(x), self.batch)]
        return [(s, torch.from_numpy(x[s]).to(self.device, self.dtype)) for s in slices]


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _face_normals(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    corner = points[faces]
    return np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])


def _normals(
    points: np.ndarray, faces: np.ndarray, gradient: np.ndarray, length: np.ndarray
) -> np.ndarray:
    """Unit gradients; where there is none, the area-weighted mean of the faces around."""
    flat = ~(np.isfinite(length) & (length > 0))
    if flat.any():
        mean = np.zeros_like(points)
        weighted = _face_normals(points, faces)
        for corner in range(3):
            np.add.at(mean, faces[:, corner], weighted)
        gradient = np.where(flat[:, None], mean, gradient)
        length = np.linalg.norm(gradient, axis=1)
    return gradient / np.maximum(length, np.finfo(np.float64).tiny)[:, None]


__all__: Sequence[str] = ["RESIDUAL_SHARE", "Mesh", "extract_mesh"]
