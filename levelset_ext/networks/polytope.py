"""Theorem 1, made: a ReLU network whose zero level set is a given piecewise linear hypersurface.

*Convex.* {x : n_i . x <= o_i for all i} has F(x) = max_i n_i . x - o_i.

*Any solid.* A binary space partition (BSP) along the planes h_i(x) = n_i . x - o_i of the faces
cuts space into convex cells that are all inside or all outside. A node with plane h whose sides
h > 0 and h < 0 have the fields p and q gets (F < 0 inside)

    F = min( max(-h, p), max(h, q), max(p, q) )

The first two terms choose a side. The third is what makes the field exact: on the plane h = 0 the
first two alone would be 0 wherever the solid continues across the plane, a wall that is not there.
With it F(x) = 0 exactly where x belongs to the closure of an inside cell and of an outside cell,
which is the surface: at an x on some of the planes, F(x) < 0 if and only if the cells on all sides
of all these planes are inside, F(x) > 0 if and only if they are all outside (induction over the
tree; cells have interior points, as every cut goes through a face). The proof of the theorem lists
all 3^k intersections of half spaces instead. Here p and q are computed once and used twice, so the
network grows with the tree. With p or q a leaf (+inf outside, -inf inside) the formula shrinks to
one max or min.

*As a network.* Every max and min is a hidden unit,

    max(a, b) = b + relu(a - b),    min(a, b) = b - relu(b - a)

and what a layer must hand on is carried as v = relu(v + s) - relu(-v - s) - s: x itself, from which
h_i can be had in any layer, and values used later. The fixed shift s keeps the bend of the carrying
units, where autograd takes relu' = 0 on both sides, away from v = 0, that is from the surface.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linprog
from torch import nn

__all__ = ["PolytopeMLP", "from_mesh", "from_polytope"]

_SHIFT = 0.0137311  # of the carrying units, x the size of the shape; any odd number
_CUT_COST = 6.0  # of a face that a plane cuts in two, against one of imbalance


class PolytopeMLP(nn.Sequential):
    """Linear and ReLU layers alone, (n, d) -> (n, 1).

    Attributes:
        planes: how many distinct hyperplanes the field is made of.
        cells: convex cells of the partition it was made from; planes + 1 if that has no choice.
    """

    planes: int
    cells: int

    @property
    def sizes(self) -> dict[str, int]:
        """Counts: planes, cells, hidden layers, the widest, units and parameters."""
        widths = [layer.out_features for layer in self if isinstance(layer, nn.Linear)][:-1]
        return {
            "planes": self.planes,
            "cells": self.cells,
            "hidden_layers": len(widths),
            "widest": max(widths, default=0),
            "units": sum(widths),
            "parameters": sum(p.numel() for p in self.parameters()),
        }


def from_polytope(
    normals: npt.ArrayLike | torch.Tensor,
    offsets: npt.ArrayLike | torch.Tensor,
    *,
    complement: bool = False,
    prune: bool = True,
    dtype: torch.dtype = torch.float64,
) -> PolytopeMLP:
    """The network of a convex polytope {x : normals_i . x <= offsets_i}, bounded or not.

    F is the largest signed distance to a plane: negative inside, |grad F| = 1, and within the cell
    of a face the distance to the polytope. k planes in d dimensions take ceil(log2 k) layers of at
    most k + k / 2 + 2 d units.

    Args:
        normals: (k, d) outward, any length but 0; one is a half space, two a wedge or a slab.
        offsets: (k,).
        complement: the polytope is the outside, F > 0 in it.
        prune: leave out planes without a face (k linear programs), and refuse empty polytopes. The
            polytope stays; F outside may get smaller where such a plane was the largest.
        dtype: of the parameters.

    Raises:
        ValueError: shapes that do not fit; a zero normal; numbers that are not finite; a polytope
            without interior points.
    """
    n = _array(normals).astype(np.float64)
    o = _array(offsets).astype(np.float64)
    if n.ndim != 2 or 0 in n.shape:
        raise ValueError(f"normals: expected (k, d) with k, d >= 1, got {n.shape}")
    if o.shape != (len(n),):
        raise ValueError(f"offsets: expected (k,) = ({len(n)},), got {o.shape}")
    for name, array in (("normals", n), ("offsets", o)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite numbers")
    length = np.linalg.norm(n, axis=1)
    if not (length > 0).all():
        raise ValueError(f"normals: expected lengths > 0, got 0 in row {int(length.argmin())}")
    n, o = n / length[:, None], o / length
    if prune:
        kept = _needed(n, o)
        n, o = n[kept], o[kept]
    circuit = _Circuit(n, o)
    root = circuit.combine("max", [circuit.literal(i, 1) for i in range(len(n))])
    if complement:
        root = circuit.combine("min", [circuit.literal(i, -1) for i in range(len(n))])
    scale = float(np.abs(o).max()) or 1.0
    return _network(circuit, root, _SHIFT * scale, len(n) + 1, None).to(dtype)


def from_mesh(
    vertices: npt.ArrayLike | torch.Tensor,
    faces: npt.ArrayLike | torch.Tensor,
    *,
    tol: float = 1e-12,
    dtype: torch.dtype = torch.float64,
    max_parameters: int = 100_000_000,
) -> PolytopeMLP:
    """The network whose zero level set is a closed triangle mesh, or a closed polygon in 2-D.

    F is negative inside. It is zero on the faces and has the right sign everywhere else, both to
    rounding in ``dtype``; it is not a distance away from the surface, but |grad F| = 1 where it has
    one, as every linear piece of F is +-h_i.

    Args:
        vertices: (v, 3), or (v, 2).
        faces: (f, 3) triangles, counter-clockwise from outside; or (f, 2) edges, the inside on
            their left. Several components and cavities are fine. The surface must not cross itself.
        tol: points closer than this x the diagonal to a plane count as on it.
        dtype: of the parameters.
        max_parameters: refuse to build a larger network.

    Returns:
        :class:`PolytopeMLP`; see its ``sizes``. Convex meshes need one unit for two faces; others
        depend on how the planes of the faces cut each other.

    Raises:
        ValueError: shapes that do not fit; not watertight; faces without area; wound inside out;
            a surface that crosses itself; too large.
    """
    v = _array(vertices).astype(np.float64)
    f = _array(faces)
    if v.ndim != 2 or v.shape[1] not in (2, 3):
        raise ValueError(f"vertices: expected (v, 2) or (v, 3), got {v.shape}")
    d = v.shape[1]
    if f.ndim != 2 or f.shape[1] != d or len(f) <= d or f.dtype.kind not in "iu":
        raise ValueError(
            f"faces: expected integers (f, {d}) with f > {d} for vertices {v.shape}, "
            f"got {f.dtype} {f.shape}"
        )
    if not np.isfinite(v).all():
        raise ValueError("vertices: expected finite numbers")
    f = f.astype(np.int64)
    if f.min() < 0 or f.max() >= len(v):
        raise ValueError(f"faces: expected indices in [0, {len(v)}), got {f.min()} to {f.max()}")
    if not 0 < tol < 1e-3:
        raise ValueError(f"tol: expected a share in (0, 1e-3), got {tol}")
    used = v[np.unique(f)]
    # Planes are kept relative to the middle of the shape, where their offsets have most digits.
    center = (used.min(0) + used.max(0)) / 2
    diagonal = float(np.linalg.norm(np.ptp(used, axis=0)))
    corner = (v - center)[f]
    normals = _face_normals(corner, diagonal)
    _check_closed(f)
    if _volume(corner) <= 0:
        raise ValueError(
            "faces: expected normals that point outward, got a surface wound inside out"
        )
    n, o, plane_of, side_of = _planes(corner, normals, tol * diagonal)
    builder = _Partition(n, o, tol * diagonal)
    pieces = _Pieces(list(corner), plane_of, side_of)
    root = builder.build(pieces)
    # h(x) = n . (x - center) - o
    circuit = builder.circuit
    circuit.offsets = o + n @ center
    size = max(diagonal, float(np.abs(center).max()))
    net = _network(circuit, root, _SHIFT * size, builder.cells, max_parameters)
    _verify(net, corner + center, normals, size)
    return net.to(dtype)


# --- input ----------------------------------------------------------------------------------------


def _array(values: npt.ArrayLike | torch.Tensor) -> np.ndarray:
    return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)


def _needed(n: np.ndarray, o: np.ndarray) -> np.ndarray:
    """Indices of the half spaces that bound the polytope, of unit normals (k, d) and offsets."""
    k, d = n.shape
    o = o / (float(np.abs(o).max()) or 1.0)  # the solver's tolerances are absolute
    # Largest ball inside, its radius at most 1 so that unbounded polytopes have one.
    cost = np.zeros(d + 1)
    cost[-1] = -1.0
    ball = linprog(
        cost, np.hstack([n, np.ones((k, 1))]), o, bounds=[(None, None)] * d + [(None, 1.0)]
    )
    if ball.status != 0 or ball.x[-1] <= 1e-12:
        raise ValueError("offsets: expected a polytope with interior points, got none")
    inside = o - n @ ball.x[:d]  # relative to the centre of that ball: all > 0
    kept = np.ones(k, dtype=bool)
    for i in range(k):  # the same plane twice: the tighter one stays
        looser = (np.abs(n - n[i]).max(1) <= 4e-16) & (inside >= inside[i])
        looser[i] = False
        if kept[i]:
            kept &= ~looser
    for i in range(k):
        if not kept[i] or kept.sum() == 1:
            continue
        others = kept.copy()
        others[i] = False
        # How far out can a point get that only the others hold? One row more keeps it bounded.
        rows = np.vstack([n[others], n[i]])
        ends = np.append(inside[others], inside[i] + 1.0)
        far = linprog(-n[i], rows, ends, bounds=[(None, None)] * d)
        if far.status == 0 and -far.fun <= inside[i] * (1 + 1e-12) + 1e-13:
            kept[i] = False
    return np.flatnonzero(kept)


def _face_normals(corner: np.ndarray, diagonal: float) -> np.ndarray:
    """Unit outward normals (f, d) of faces (f, d, d)."""
    edge = corner[:, 1] - corner[:, 0]
    if corner.shape[2] == 2:
        normals = np.stack([edge[:, 1], -edge[:, 0]], 1)
        height = np.linalg.norm(edge, axis=1)
    else:
        normals = np.cross(edge, corner[:, 2] - corner[:, 0])
        sides = np.linalg.norm(corner - np.roll(corner, 1, axis=1), axis=2).max(1)
        height = np.linalg.norm(normals, axis=1) / np.maximum(sides, 1e-300)
    # Thinner than this, rounding alone decides which way a face looks.
    thin = np.flatnonzero(height <= 1e-12 * diagonal)
    if len(thin):
        what = "length" if corner.shape[2] == 2 else "area"
        raise ValueError(
            f"faces: expected faces with {what}, got {len(thin)} degenerate, the first is face "
            f"{thin[0]}"
        )
    return normals / np.linalg.norm(normals, axis=1, keepdims=True)


def _check_closed(f: np.ndarray) -> None:
    """Every ridge (edge of a triangle, end of an edge) has as many faces on one side as on the
    other. So counted, components may touch along edges."""
    if f.shape[1] == 2:
        count = np.bincount(f[:, 0], minlength=f.max() + 1) - np.bincount(
            f[:, 1], minlength=f.max() + 1
        )
        even = np.bincount(f.ravel()) % 2 == 0
        odd, what = np.flatnonzero(count), "vertices"
    else:
        ends = f[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
        forward = ends[:, 0] < ends[:, 1]
        undirected, index = np.unique(np.sort(ends, axis=1), axis=0, return_inverse=True)
        index = index.reshape(-1)
        count = np.bincount(index[forward], minlength=len(undirected)) - np.bincount(
            index[~forward], minlength=len(undirected)
        )
        even = np.bincount(index) % 2 == 0
        odd, what = np.flatnonzero(count), "edges"
    if not len(odd):
        return
    if even[odd].all():
        raise ValueError(
            f"faces: expected one winding throughout, got {len(odd)} {what} between faces of "
            "opposite winding"
        )
    raise ValueError(
        f"faces: expected a watertight surface, got {len(odd)} open {what}; vertices at the same "
        "place must be one"
    )


def _volume(corner: np.ndarray) -> float:
    return float(np.linalg.det(corner).sum())


def _planes(
    corner: np.ndarray, normals: np.ndarray, tol: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Faces on one plane share it: normals (k, d), offsets (k,), and of each face its plane and
    whether its normal is the plane's (1) or the opposite (-1)."""
    count = len(corner)
    plane_of = np.full(count, -1)
    side_of = np.ones(count, dtype=np.int64)
    chosen: list[int] = []
    spread = np.linalg.norm(corner - np.roll(corner, 1, axis=1), axis=2).min(1)
    for i in np.argsort(-spread, kind="stable"):  # the planes of large faces are the exact ones
        if plane_of[i] >= 0:
            continue
        distance = np.abs((corner - corner[i].mean(0)) @ normals[i]).max(1)
        aligned = normals @ normals[i]
        same = (plane_of < 0) & (distance <= tol) & (np.abs(aligned) > 0.5)
        same[i] = True
        plane_of[same] = len(chosen)
        side_of[same] = np.where(aligned[same] > 0, 1, -1)
        chosen.append(int(i))
    n = normals[chosen]
    o = np.einsum("kd,kd->k", n, corner[chosen].mean(1))
    return n, o, plane_of, side_of


# --- the partition --------------------------------------------------------------------------------


@dataclass
class _Pieces:
    """Convex pieces of faces within a cell."""

    polygons: list[np.ndarray]  # (m, d) each
    plane: np.ndarray  # of each piece
    side: np.ndarray  # 1 if the piece looks along its plane's normal, -1 if against it

    def __len__(self) -> int:
        return len(self.polygons)

    def take(self, rows: np.ndarray) -> _Pieces:
        return _Pieces([self.polygons[i] for i in rows], self.plane[rows], self.side[rows])


class _Partition:
    """The BSP, built top-down, and the circuit of max and min that it means."""

    def __init__(self, n: np.ndarray, o: np.ndarray, tol: float) -> None:
        self.n, self.o, self.tol = n, o, tol
        self.circuit = _Circuit(n, o)
        self.cells = 0

    def build(self, pieces: _Pieces) -> int:
        """The circuit's node for the solid within one cell; iterative where the tree is a chain."""
        wrappers: list[tuple[str, list[int]]] = []
        node: int | None = None
        while node is None:
            ids, front, back = self._sides(pieces)
            free = ~(front.any(1) & back.any(1))
            looks = np.array([pieces.side[pieces.plane == i].sum() > 0 for i in ids])
            # A plane with nothing behind it in this cell splits off an empty side: one max or min.
            outside = np.where(front.any(1), ~looks, looks)  # is that side outside the solid?
            done = False
            for is_outside, op in ((True, "max"), (False, "min")):
                chosen = np.flatnonzero(free & (outside == is_outside))
                if not len(chosen):
                    continue
                literals = []
                for c in chosen:
                    # h points to the empty side: max(h, q) if it is outside, min(-h, q) if inside
                    toward = -1 if front[c].any() else 1
                    literals.append(
                        self.circuit.literal(int(ids[c]), toward if is_outside else -toward)
                    )
                self.cells += len(chosen)
                pieces = pieces.take(np.flatnonzero(~np.isin(pieces.plane, ids[chosen])))
                wrappers.append((op, literals))
                done = True
                break
            if not len(pieces):
                self.cells += 1
                op, literals = wrappers.pop()
                node = self.circuit.combine(op, literals)
            elif not done:
                node = self._choose(pieces, ids, front, back)
        for op, literals in reversed(wrappers):
            node = self.circuit.combine(op, [*literals, node])
        return node

    def _sides(self, pieces: _Pieces) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Planes in use (k,), and which pieces reach to their front and back, (k, pieces)."""
        ids = np.unique(pieces.plane)
        points = np.concatenate(pieces.polygons)
        counts = [len(p) for p in pieces.polygons]
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        distance = self.n[ids] @ points.T - self.o[ids, None]
        front = np.maximum.reduceat(distance, starts, axis=1) > self.tol
        back = np.minimum.reduceat(distance, starts, axis=1) < -self.tol
        own = ids[:, None] == pieces.plane[None]
        return ids, front & ~own, back & ~own

    def _choose(self, pieces: _Pieces, ids: np.ndarray, front: np.ndarray, back: np.ndarray) -> int:
        """Cuts the cell by the plane that cuts few faces and leaves two sides of like size."""
        cuts = (front & back).sum(1)
        cost = _CUT_COST * cuts + np.abs(front.sum(1) - back.sum(1))
        best = int(cost.argmin())
        plane = int(ids[best])
        sides: list[tuple[list[np.ndarray], list[int]]] = [([], []), ([], [])]
        for k, polygon in enumerate(pieces.polygons):
            for part, sign in ((0, 1.0), (1, -1.0)):
                if not (front, back)[part][best, k]:
                    continue
                kept = polygon
                if front[best, k] and back[best, k]:
                    kept = _clip(polygon, sign * (polygon @ self.n[plane] - self.o[plane]))
                sides[part][0].append(kept)
                sides[part][1].append(k)
        nodes = [
            self.build(_Pieces(polygons, pieces.plane[rows], pieces.side[rows]))
            for polygons, rows in sides
        ]
        return self.circuit.choice(plane, *nodes)


def _clip(polygon: np.ndarray, height: np.ndarray) -> np.ndarray:
    """The part of a convex polygon, or of a segment, with height >= 0."""
    if len(polygon) == 2:
        crossing = polygon[0] + height[0] / (height[0] - height[1]) * (polygon[1] - polygon[0])
        return np.stack([polygon[0], crossing] if height[0] > 0 else [crossing, polygon[1]])
    corners = []
    for i in range(len(polygon)):
        j = (i + 1) % len(polygon)
        if height[i] >= 0:
            corners.append(polygon[i])
        if (height[i] > 0 > height[j]) or (height[i] < 0 < height[j]):
            share = height[i] / (height[i] - height[j])
            corners.append(polygon[i] + share * (polygon[j] - polygon[i]))
    return np.stack(corners)


# --- the circuit ----------------------------------------------------------------------------------


class _Circuit:
    """A graph of binary max and min over literals +-(n_i . x - o_i), with shared nodes.

    Nodes are numbered in the order in which they are made, so operands come first.
    """

    def __init__(self, normals: np.ndarray, offsets: np.ndarray) -> None:
        self.normals, self.offsets = normals, offsets
        self.ops: list[str] = []  # "plane", "max", "min"
        self.args: list[tuple[int, int]] = []  # operands; of a plane its index and sign
        self.height: list[int] = []  # layers needed before it is known
        self._known: dict[tuple[str, int, int], int] = {}

    def _node(self, op: str, a: int, b: int, height: int) -> int:
        key = (op, a, b)
        if key not in self._known:
            self._known[key] = len(self.ops)
            self.ops.append(op)
            self.args.append((a, b))
            self.height.append(height)
        return self._known[key]

    def literal(self, plane: int, sign: int) -> int:
        return self._node("plane", plane, sign, 0)

    def combine(self, op: str, nodes: Iterable[int]) -> int:
        """max or min of any number: lowest first, so that the result is as low as can be."""
        heap = [(self.height[node], node) for node in dict.fromkeys(nodes)]
        heapq.heapify(heap)
        while len(heap) > 1:
            (_, a), (high, b) = heapq.heappop(heap), heapq.heappop(heap)
            node = self._node(op, a, b, high + 1)
            heapq.heappush(heap, (high + 1, node))
        return heap[0][1]

    def choice(self, plane: int, p: int, q: int) -> int:
        """p where h > 0, q where h < 0: min(max(-h, p), max(h, q), max(p, q)), with the first and
        last term as max(p, min(-h, q))."""
        up, down = self.literal(plane, 1), self.literal(plane, -1)
        other = self.combine("max", [p, self.combine("min", [down, q])])
        return self.combine("min", [other, self.combine("max", [up, q])])

    def layers(self, root: int) -> dict[int, int]:
        """The hidden layer in which each max and min below root is taken: as late as possible,
        so that little has to be carried."""
        layer = {root: self.height[root]}
        for node in range(root, -1, -1):
            if node not in layer or self.ops[node] == "plane":
                continue
            for arg in self.args[node]:
                layer[arg] = min(layer.get(arg, layer[node] - 1), layer[node] - 1)
        return {node: at for node, at in layer.items() if self.ops[node] != "plane"}


@dataclass
class _Signal:
    """An affine function of the units of one layer: sum of coefficient x unit, plus constant."""

    terms: dict[int, float] = field(default_factory=dict)
    constant: float = 0.0

    def add(self, other: _Signal, factor: float) -> _Signal:
        terms = dict(self.terms)
        for unit, coefficient in other.terms.items():
            terms[unit] = terms.get(unit, 0.0) + factor * coefficient
        return _Signal(terms, self.constant + factor * other.constant)


def _network(
    circuit: _Circuit,
    root: int,
    shift: float,
    cells: int,
    max_parameters: int | None,
) -> PolytopeMLP:
    """The circuit as Linear and ReLU layers."""
    d = circuit.normals.shape[1]
    layer = circuit.layers(root)
    depth = circuit.height[root] if circuit.ops[root] != "plane" else 0
    by_layer: list[list[int]] = [[] for _ in range(depth + 1)]
    last_use: dict[int, int] = {}
    for node, at in sorted(layer.items()):
        by_layer[at].append(node)
        for arg in circuit.args[node]:
            last_use[arg] = max(last_use.get(arg, 0), at)
    # The result of a layer may be h + relu(...), so x is carried through the last such layer.
    x_until = max((at for node, at in layer.items() if _base(circuit, node)[1]), default=0)
    x = [_Signal({k: 1.0}) for k in range(d)]
    known: dict[int, _Signal] = {}
    steps: list[tuple[list[_Signal], int]] = []  # pre-activations of a layer, inputs of it
    width = d
    for at in range(1, depth + 1):
        units: list[_Signal] = []

        def carried(signal: _Signal, units: list[_Signal] = units) -> _Signal:
            units.append(_Signal(signal.terms, signal.constant + shift))
            units.append(_Signal({}).add(units[-1], -1.0))
            return _Signal({len(units) - 2: 1.0, len(units) - 1: -1.0}, -shift)

        def value(node: int, x: list[_Signal] = x, known: dict[int, _Signal] = known) -> _Signal:
            if circuit.ops[node] != "plane":
                return known[node]
            return _plane(circuit, node, x)

        new_x = [carried(signal) for signal in x] if at <= x_until else []
        needed = {n for n in known if last_use[n] > at}
        bases = {}
        for node in by_layer[at]:
            base, is_plane = _base(circuit, node)
            bases[node] = base
            if not is_plane:
                needed.add(base)
        new_known = {node: carried(known[node]) for node in sorted(needed)}
        for node in by_layer[at]:
            base = bases[node]
            a, b = circuit.args[node]
            other = a if base == b else b
            sign = 1.0 if circuit.ops[node] == "max" else -1.0
            difference = value(other).add(value(base), -1.0)
            units.append(_Signal({}).add(difference, sign))
            handed = (
                _plane(circuit, base, new_x) if circuit.ops[base] == "plane" else new_known[base]
            )
            new_known[node] = handed.add(_Signal({len(units) - 1: sign}), 1.0)
        steps.append((units, width))
        width = len(units)
        x, known = new_x, new_known
    output = _plane(circuit, root, x) if circuit.ops[root] == "plane" else known[root]
    steps.append(([output], width))
    total = sum(len(units) * (inputs + 1) for units, inputs in steps)
    if max_parameters is not None and total > max_parameters:
        raise ValueError(
            f"max_parameters: the network of this surface has {total:,} parameters in "
            f"{len(steps)} layers, more than {max_parameters:,}"
        )
    modules: list[nn.Module] = []
    for units, inputs in steps:
        linear = nn.utils.skip_init(nn.Linear, inputs, len(units), dtype=torch.float64)
        weight = torch.zeros(len(units), inputs, dtype=torch.float64)
        index = [(row, unit) for row, s in enumerate(units) for unit in s.terms]
        if index:
            rows, columns = torch.tensor(index).T
            weight[rows, columns] = torch.tensor(
                [c for s in units for c in s.terms.values()], dtype=torch.float64
            )
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(torch.tensor([s.constant for s in units], dtype=torch.float64))
        modules += [linear, nn.ReLU()]
    net = PolytopeMLP(*modules[:-1])
    net.planes = len(np.unique([circuit.args[n][0] for n in _below(circuit, root)]))
    net.cells = cells
    return net


def _base(circuit: _Circuit, node: int) -> tuple[int, bool]:
    """Which operand is handed on beside the unit; a plane where there is one, as x is carried
    anyway."""
    a, b = circuit.args[node]
    for arg in (b, a):
        if circuit.ops[arg] == "plane":
            return arg, True
    return b, False


def _plane(circuit: _Circuit, node: int, x: list[_Signal]) -> _Signal:
    """The literal +-(n . x - o) from the carried x."""
    plane, sign = circuit.args[node]
    signal = _Signal({}, -sign * float(circuit.offsets[plane]))
    for k, coordinate in enumerate(x):
        signal = signal.add(coordinate, sign * float(circuit.normals[plane, k]))
    return signal


def _below(circuit: _Circuit, root: int) -> list[int]:
    """The planes below a node."""
    seen, stack, planes = {root}, [root], []
    while stack:
        node = stack.pop()
        if circuit.ops[node] == "plane":
            planes.append(node)
            continue
        for arg in circuit.args[node]:
            if arg not in seen:
                seen.add(arg)
                stack.append(arg)
    return planes


def _verify(net: PolytopeMLP, corner: np.ndarray, normals: np.ndarray, size: float) -> None:
    """A surface that crosses itself has no inside; it shows at the faces."""
    step = 64 * np.finfo(np.float64).eps * (net.sizes["hidden_layers"] + 8) * size
    middle = corner.mean(1)
    x = np.concatenate([middle, middle + step * normals, middle - step * normals])
    with torch.no_grad():
        on, out, back = net(torch.from_numpy(x))[:, 0].view(3, -1)
    wrong = (on.abs() > step) | (out <= 0) | (back >= 0)
    if bool(wrong.any()):
        raise ValueError(
            f"faces: expected a surface that does not cross itself, got {int(wrong.sum())} faces "
            f"without an inside and an outside, the first is face {int(wrong.int().argmax())}"
        )
