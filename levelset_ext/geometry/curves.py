"""Level sets that are curves, F: R^d -> R^(d-1), as polylines with every vertex on the curve.

The unit tangent t spans the null space of D_xF, with the sign for which det [D_xF; t] > 0: at
regular points that is one consistent direction of travel along every component. A step of length h

    predicts   x = p + h t
    corrects   q = the projection of x onto the level set (Newton, Eq. 4)

and is taken when p -> q looks like a piece of one smooth arc. Fronts run from every seed in both
directions at once, as rows of one batch. A front that reaches a vertex of a piece of the same curve
is joined to it: that is how the pieces grown from many seeds become one polyline, and how a loop
closes. So n seeds on a curve cost about what one does, in an n-th of the rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from enum import StrEnum
from functools import cached_property
from itertools import combinations
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from levelset_ext.field import (
    Field,
    as_field,
    check_integer,
    check_points,
    evaluate,
    jacobian_of,
)
from levelset_ext.result import LevelSetResult
from levelset_ext.samplers import project

__all__ = ["Curve", "CurveEnd", "CurveTrace", "trace_curve"]

_SEED_ITERS = 50
_CORRECTOR_ITERS = 10
_TOL_SHARE = {torch.float64: 1e-10}  # of diagonal x slope, see trace_curve; other dtypes: 1e-5
_SHORTEST, _LONGEST = 0.5, 1.5  # chord over h, outside of which a step went somewhere else
_CORNER = 0.25  # least cosine between the chord and the tangents at a corner
_AIM = 0.7  # share of max_turn that the next step is meant to turn by
_BEYOND = 0.15  # share of a step past its end in which another vertex is met instead
_LENS = 0.02  # half width of a straight step's neighbourhood, in steps


class CurveEnd(StrEnum):
    """Why a curve stops where it does.

    CLOSED      it does not: it is a loop
    BOX         it leaves the box; the vertex is on the face
    MAX_POINTS  the budget of vertices is spent
    STUCK       no step from there, down to ``min_step``, finds the curve's continuation
    """

    CLOSED = "closed"
    BOX = "box"
    MAX_POINTS = "max_points"
    STUCK = "stuck"


@dataclass(frozen=True, eq=False)
class Curve:
    """One component of a level set as a polyline.

    Attributes:
        vertices: (n, d) float64, n >= 2, in order along the curve, the first not repeated in a
            closed one. The direction is that of det [D_xF; t] > 0 at the first vertex.
        closed: the last vertex is joined to the first.
        ends: why it stops before the first and after the last vertex.
        crossings: how often it runs through a point where D_xF loses rank and branches cross.
        samples: the vertices as a result of a sampler, in their dtype and on their device: what
            :func:`levelset_ext.sample_network` makes differentiable in the parameters.
    """

    vertices: np.ndarray
    closed: bool
    ends: tuple[CurveEnd, CurveEnd]
    crossings: int
    samples: LevelSetResult
    _problem: _Problem = dataclass_field(repr=False)

    def __len__(self) -> int:
        return len(self.vertices)

    @cached_property
    def edges(self) -> np.ndarray:
        """(m, 2) int64, pairs of neighbours in order: n of a closed curve, else n - 1."""
        index = np.arange(len(self))
        pairs = np.stack([index, np.roll(index, -1)], 1)
        return pairs if self.closed else pairs[:-1]

    @cached_property
    def spacings(self) -> np.ndarray:
        """(m,) lengths of the edges."""
        return np.linalg.norm(
            self.vertices[self.edges[:, 1]] - self.vertices[self.edges[:, 0]], axis=1
        )

    @property
    def length(self) -> float:
        """Length of the polyline: that of the curve less O(h^2) for edges of length h."""
        return float(self.spacings.sum())

    @property
    def residual(self) -> float:
        """max |F - c| over the vertices."""
        return float(self.samples.residual.max())

    def resample(self, spacing: float) -> Curve:
        """The same curve with vertices at nearly equal distances of at most ``spacing``.

        New vertices start on the cubics through neighbouring vertices and their tangents and are
        projected onto the level set of the network as it is now; the ends of an open curve stay.

        Raises:
            ValueError: ``spacing`` is not a length, or needs more than 10^7 vertices.
            RuntimeError: no projection gets vertices that near to each other, because the level set
                has changed, or for rounding.
        """
        if not (spacing > 0 and self.length / spacing <= 1e7):
            raise ValueError(
                f"spacing: expected a length > 0, at most 10^7 of them on a curve of length "
                f"{self.length:.6g}, got {spacing!r}"
            )
        pieces = max(math.ceil(self.length / spacing), 3 if self.closed else 1)
        for _ in range(20):
            vertices = self._spread(pieces)
            samples = self._problem.at(vertices)
            curve = Curve(vertices, self.closed, self.ends, self.crossings, samples, self._problem)
            longest = float(curve.spacings.max())
            if longest <= spacing:
                return curve
            pieces = math.ceil(pieces * min(max(1.001 * longest / spacing, 1.001), 2.0)) + 1
        raise RuntimeError(
            f"spacing: cannot place vertices at most {spacing:.6g} apart on this curve; the best "
            f"has {longest:.6g}"
        )

    def _spread(self, pieces: int) -> np.ndarray:
        """Vertices that cut the curve into about ``pieces`` equal pieces, projected."""
        ends = np.concatenate([self.vertices, self.vertices[:1]]) if self.closed else self.vertices
        tangents = _tangents(self.samples.jacobian)
        tangents = np.concatenate([tangents, tangents[:1]]) if self.closed else tangents
        along = np.concatenate([[0.0], np.cumsum(self.spacings)])
        at = np.linspace(0.0, along[-1], pieces + 1)
        edge = np.clip(np.searchsorted(along, at, side="right") - 1, 0, len(self.edges) - 1)
        h = self.spacings[edge][:, None]
        s = ((at - along[edge]) / self.spacings[edge])[:, None]
        a, b = ends[edge], ends[edge + 1]
        # Signs along the polyline, as det [D_xF; t] changes its own at a crossing.
        ta = tangents[edge] * np.copysign(1.0, (tangents[edge] * (b - a)).sum(1))[:, None]
        tb = tangents[edge + 1] * np.copysign(1.0, (tangents[edge + 1] * (b - a)).sum(1))[:, None]
        start = (
            (1 + 2 * s) * (1 - s) ** 2 * a
            + s**2 * (3 - 2 * s) * b
            + h * (s * (1 - s) ** 2 * ta + s**2 * (s - 1) * tb)
        )
        found = self._problem.correct(start)
        points = _numpy(found.points)
        # Where Newton does not get there, or leaves the edge, the vertex is left out.
        moved = np.linalg.norm(points - start, axis=1)
        kept = _numpy(found.converged) & (moved <= 0.5 * h[:, 0])
        points[0], kept[0] = self.vertices[0], True
        if self.closed:
            return points[:-1][kept[:-1]]
        points[-1], kept[-1] = self.vertices[-1], True
        return points[kept]


@dataclass(frozen=True, eq=False)
class CurveTrace(Sequence[Curve]):
    """The curves found, longest first, and what became of the seeds.

    Attributes:
        curves: one for each component that a seed led to.
        seeds: the seeds, projected.
        seed_curve: (n,) int64, the curve each seed is on; -1 for none.
        message: one sentence: what was found, or why nothing was.
    """

    curves: tuple[Curve, ...]
    seeds: LevelSetResult
    seed_curve: np.ndarray
    message: str

    def __len__(self) -> int:
        return len(self.curves)

    def __iter__(self) -> Iterator[Curve]:
        return iter(self.curves)

    @overload
    def __getitem__(self, index: int) -> Curve: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Curve, ...]: ...
    def __getitem__(self, index: int | slice) -> Curve | tuple[Curve, ...]:
        return self.curves[index]

    @property
    def length(self) -> float:
        """Of all curves together."""
        return sum(curve.length for curve in self.curves)


def trace_curve(
    fn: Field,
    seeds: Tensor,
    level: Tensor | Sequence[float] | float = 0.0,
    *,
    box: tuple[Any, Any],
    step: float | None = None,
    min_step: float | None = None,
    max_turn: float = 0.2,
    tol: float | None = None,
    max_points: int = 20_000,
) -> CurveTrace:
    """The curves {F = c} through the projections of some points, inside a box.

    Args:
        fn: module or callable (n, d) -> (n, l) with l = d - 1, also (n,) for d = 2; rows must not
            depend on each other. A module runs as its eval-mode clone and is left as it is.
        seeds: (n, d), floating point: where to look. They are projected first; those that end
            outside the box, on no level set or at a point where D_xF loses rank are set aside. A
            component that no seed is drawn to is not found. Dtype and device are those of the
            whole computation.
        level: c, a number or one for each output.
        box: (lower, upper), finite; scalars or (d,). A curve ends on its faces.
        step: longest edge; None is 1/100 of the longest side of the box. An edge is shorter where
            the curve turns by more than ``max_turn`` over it.
        min_step: shortest step tried; None is ``step / 100``.
        max_turn: largest angle between the tangents at the ends of an edge, in (0, 1] radians.
        tol: largest |F_j - c_j| of a vertex; None is 1e-10 (float64, otherwise 1e-5) times the
            diagonal of the box times the median |grad F_j| at the seeds, of the flattest output.
        max_points: most vertices, of all curves together.

    Returns:
        A sequence of :class:`Curve`, each component once however many seeds lie on it; empty, with
        the reason as its ``message``, if there is none.

    Accuracy: vertices are on the curve to ``tol / |D_xF|``, so an edge of length h is at most
    kappa h^2 / 8 away from a curve of curvature kappa, and the length of the polyline is short by
    the share kappa^2 h^2 / 24.

    What decides a step: the corrector converged; the chord is about as long as h; the tangent
    turned by at most ``max_turn``; and the new tangent is the old one mirrored in the chord, as on
    an arc. The last is what a jump to a neighbouring branch fails, so branches have to come nearer
    to each other than about 1/20 of the step to be mistaken. Otherwise h is halved. At
    ``min_step`` corners are accepted, as networks that are piecewise linear have them. Where that
    fails, the trace tries to go straight across by 2, 4, 8, ... times ``min_step`` up to ``step``:
    so it runs through transversal self-crossings (the middle of an eight) on its own branch, and
    two branches that only pass each other nearer than about ``min_step`` count as crossing. Last it
    looks for a way on to the sides, at ``min_step``: corners of 90 degrees and more.

    Raises:
        TypeError, ValueError: an argument is not as described, l is not d - 1.
    """
    seeds = check_points("seeds", seeds).detach()
    if seeds.dim() != 2 or seeds.shape[1] < 2:
        raise ValueError(f"seeds: expected (n, d) with d >= 2, got {tuple(seeds.shape)}")
    low, high = _box(box, seeds.shape[1])
    diagonal = float(np.linalg.norm(high - low))
    step = float((high - low).max()) / 100 if step is None else step
    if not (step > 0 and math.isfinite(step)):
        raise ValueError(f"step: expected a length > 0, got {step!r}")
    min_step = step / 100 if min_step is None else min_step
    if not 0 < min_step <= step:
        raise ValueError(f"min_step: expected a length in (0, step = {step:.6g}], got {min_step!r}")
    if not 0 < max_turn <= 1:
        raise ValueError(f"max_turn: expected an angle in (0, 1], got {max_turn!r}")
    max_points = check_integer("max_points", max_points, 2)
    if tol is not None and not (tol > 0 and math.isfinite(tol)):
        raise ValueError(f"tol: expected a number > 0, got {tol!r}")

    prepared = as_field(fn)

    def field(x: Tensor) -> Tensor:  # a plain callable: the samplers clone it no more
        return prepared(x)

    _, jacobian = jacobian_of(field, seeds)
    n, l, d = jacobian.shape  # noqa: E741
    if l != d - 1:
        raise ValueError(
            f"fn: expected l = d - 1 = {d - 1} outputs for points of dimension d = {d}, as a level "
            f"set is a curve only then; got l = {l}"
        )
    tol = _default_tol(jacobian, diagonal) if tol is None else tol
    problem = _Problem(field, _level(level, l, seeds), low, high, tol, step, seeds)
    # Newton may want to leave for good from where F is flat.
    starts = project(
        field,
        seeds,
        problem.level.expand(n, l),
        max_iters=_SEED_ITERS,
        tol=tol,
        max_step=diagonal / 4,
    )
    points = _numpy(starts.points)
    inside = np.asarray(((points >= low) & (points <= high)).all(1))
    good = np.asarray(_numpy(starts.converged & starts.usable) & inside)
    tracer = _Tracer(problem, step, min_step, max_turn, max_points)
    owner = tracer.plant(points, _tangents(starts.jacobian), good)
    tracer.run()
    curves, place = tracer.curves()
    order = sorted(range(len(curves)), key=lambda k: -curves[k].length)
    rank = {old: new for new, old in enumerate(order)}
    seed_curve = np.array(
        [rank.get(place.get(vertex, -1), -1) for vertex in owner.tolist()], dtype=np.int64
    )
    found = tuple(curves[k] for k in order)
    return CurveTrace(found, starts, seed_curve, _message(found, starts, inside, good))


# --- arguments ------------------------------------------------------------------------------


def _box(box: Any, d: int) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(box, tuple | list) or len(box) != 2:
        raise ValueError(f"box: expected a pair (lower, upper), got {box!r}")
    corners = []
    for name, corner in zip(("lower", "upper"), box, strict=True):
        array = np.asarray(
            corner.detach().cpu() if isinstance(corner, Tensor) else corner, dtype=np.float64
        )
        if array.shape not in ((), (d,)):
            raise ValueError(f"box: expected {name} as a number or ({d},), got {array.shape}")
        corners.append(np.broadcast_to(array, (d,)).copy())
    low, high = corners
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ValueError(f"box: expected finite lower < upper, got {low.tolist()}, {high.tolist()}")
    return low, high


def _level(level: Tensor | Sequence[float] | float, l: int, like: Tensor) -> Tensor:  # noqa: E741
    """c as (l,), in the dtype of the points."""
    tensor = torch.as_tensor(level, dtype=like.dtype, device=like.device).detach()
    if tensor.dim() > 1 or tensor.numel() not in (1, l):
        raise ValueError(
            f"level: expected a number or ({l},), one for each output, got {tuple(tensor.shape)}"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError("level: expected finite numbers")
    return tensor.reshape(-1).expand(l)


def _default_tol(jacobian: Tensor, diagonal: float) -> float:
    slope = torch.linalg.vector_norm(jacobian.double(), dim=2).amin(1)
    slope = slope[torch.isfinite(slope) & (slope > 0)]
    typical = float(slope.median()) if len(slope) else 1.0
    return _TOL_SHARE.get(jacobian.dtype, 1e-5) * diagonal * typical


def _message(
    curves: Sequence[Curve], seeds: LevelSetResult, inside: np.ndarray, good: np.ndarray
) -> str:
    if curves:
        closed = sum(curve.closed for curve in curves)
        cut = sum(CurveEnd.MAX_POINTS in curve.ends for curve in curves)
        short = f"{cut} cut short by max_points, " if cut else ""
        return f"{len(curves)} curve(s), {closed} of them closed, {short}from {len(seeds)} seeds"
    if not len(seeds):
        return "no curve: no seeds"
    away = int((_numpy(seeds.converged) & ~inside).sum())
    lost = len(seeds) - int(seeds.converged.sum())
    singular = int((_numpy(seeds.converged) & inside).sum() - good.sum())
    return (
        f"no curve: of {len(seeds)} seeds {lost} did not reach the level set, {away} reached it "
        f"outside the box, {singular} where D_xF has no full rank, and {int(good.sum())} inside "
        "could not be followed"
    )


# --- the field along a curve ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Problem:
    """F, c and the box, with points as float64 arrays outside and tensors like the seeds inside."""

    field: Field
    level: Tensor  # (l,)
    low: np.ndarray  # (d,)
    high: np.ndarray
    tol: float
    max_step: float  # of the corrector: what moves further is no neighbour
    like: Tensor

    def tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.like)

    def correct(self, x: np.ndarray) -> LevelSetResult:
        """Projections of points (n, d)."""
        return project(
            self.field,
            self.tensor(x),
            self.level.expand(len(x), -1),
            max_iters=_CORRECTOR_ITERS,
            tol=self.tol,
            max_step=self.max_step,
        )

    def at(self, x: np.ndarray) -> LevelSetResult:
        """Points (n, d) of the curve with their values and Jacobians, where they are."""
        level = self.level.expand(len(x), -1)
        return project(self.field, self.tensor(x), level, max_iters=0, tol=self.tol)

    def on_face(
        self, x: np.ndarray, axis: int, value: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The point of the curve near x (d,) with coordinate ``axis`` equal to ``value``, and its
        tangent: Newton on the d equations F = c, x_axis = value."""

        def augmented(points: Tensor) -> Tensor:
            values = evaluate(self.field, points)
            return torch.cat([values, points[:, axis : axis + 1].to(values)], 1)

        level = torch.cat([self.level, self.level.new_tensor([value])])[None]
        found = project(
            augmented,
            self.tensor(x[None]),
            level,
            max_iters=_CORRECTOR_ITERS,
            tol=self.tol,
            max_step=self.max_step,
        )
        if not bool(found.converged):
            return None
        point = _numpy(found.points)[0]
        point[axis] = value  # linear in x, so Newton has solved it to rounding
        return point, _tangents(found.jacobian[:, :-1])[0]


def _numpy(tensor: Tensor) -> np.ndarray:
    array = tensor.detach().cpu().numpy()
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _tangents(jacobian: Tensor) -> np.ndarray:
    """Unit vectors t (n, d) with J t = 0 and det [J; t] > 0, for J (n, d - 1, d) of full rank;
    arbitrary ones where J is not finite or has no full rank."""
    rows = _numpy(jacobian)
    rows = np.where(np.isfinite(rows), rows, 0.0)
    length = np.linalg.norm(rows, axis=2, keepdims=True)
    rows = rows / np.where(length > 0, length, 1.0)
    t = np.linalg.qr(rows.transpose(0, 2, 1), mode="complete")[0][:, :, -1]
    sign = np.linalg.det(np.concatenate([rows, t[:, None]], 1))
    return t * np.copysign(1.0, sign)[:, None]


# --- tracing --------------------------------------------------------------------------------


@dataclass(eq=False)
class _Front:
    """The growing end of a piece."""

    vertex: int
    sign: float  # travels along sign x tangent of its vertex
    step: float
    leaping: bool = False  # goes straight across a place that no short step gets through
    end: CurveEnd | None = None  # None while it runs; CLOSED once it is joined to another


class _Tracer:
    """Pieces of curves: vertices with at most two neighbours each, and fronts at their ends."""

    def __init__(
        self, problem: _Problem, step: float, min_step: float, max_turn: float, max_points: int
    ) -> None:
        self.problem, self.step, self.min_step = problem, step, min_step
        self.max_turn, self.max_points = max_turn, max_points
        d = len(problem.low)
        self.count = 0
        self._on_curves = 0  # vertices with a neighbour; a seed alone is no part of a curve
        self._points = np.empty((64, d))
        self._tangents = np.empty((64, d))
        self.neighbours: list[list[int]] = []
        self.fronts: list[_Front] = []
        self.at: list[list[_Front]] = []  # fronts of each vertex

    @property
    def points(self) -> np.ndarray:
        """(count, d)"""
        return self._points[: self.count]

    @property
    def tangents(self) -> np.ndarray:
        """(count, d), signed as in `_tangents`."""
        return self._tangents[: self.count]

    def _add(self, point: np.ndarray, tangent: np.ndarray) -> int:
        if self.count == len(self._points):
            self._points = np.concatenate([self._points, np.empty_like(self._points)])
            self._tangents = np.concatenate([self._tangents, np.empty_like(self._tangents)])
        self._points[self.count], self._tangents[self.count] = point, tangent
        self.neighbours.append([])
        self.at.append([])
        self.count += 1
        return self.count - 1

    def _link(self, a: int, b: int) -> None:
        self._on_curves += (not self.neighbours[a]) + (not self.neighbours[b])
        self.neighbours[a].append(b)
        self.neighbours[b].append(a)

    def plant(self, points: np.ndarray, tangents: np.ndarray, good: np.ndarray) -> np.ndarray:
        """Starts two fronts at every good seed that no earlier one stands for. Returns the vertex
        of each seed (n,), -1 for none."""
        owner = np.full(len(points), -1, dtype=np.int64)
        for i in np.flatnonzero(good):
            # A seed within half a step of another, along the curve, adds nothing but a short edge.
            offset = self.points - points[i]
            distance = np.linalg.norm(offset, axis=1)
            along = np.abs(offset @ tangents[i])
            aside = np.sqrt(np.maximum(distance**2 - along**2, 0.0))
            same = (
                (distance <= self.step / 2)
                & (aside <= 0.25 * self.max_turn * distance + 1e-3 * self.min_step)
                & (np.abs(self.tangents @ tangents[i]) >= math.cos(self.max_turn))
            )
            if same.any():
                candidates = np.flatnonzero(same)
                owner[i] = candidates[distance[candidates].argmin()]
                continue
            vertex = owner[i] = self._add(points[i], tangents[i])
            for sign in (1.0, -1.0):
                front = _Front(int(vertex), sign, self.step)
                self.fronts.append(front)
                self.at[vertex].append(front)
        return owner

    def _has_room(self, front: _Front) -> bool:
        """Whether the budget has a vertex for its next step, and one for a seed it starts from."""
        needed = 1 if self.neighbours[front.vertex] else 2
        return self._on_curves + needed <= self.max_points

    def run(self) -> None:
        while active := [front for front in self.fronts if front.end is None]:
            vertex = np.array([front.vertex for front in active])
            sign = np.array([front.sign for front in active])
            h = np.array([front.step for front in active])
            start, direction = self.points[vertex], sign[:, None] * self.tangents[vertex]
            found = self.problem.correct(start + h[:, None] * direction)
            target, tangent = _numpy(found.points), _tangents(found.jacobian)
            arcs = _Arcs.of(start, direction, h, target, tangent, self.max_turn)
            reached = _numpy(found.converged & found.usable)
            for i, front in enumerate(active):
                # A front handled before may have been joined to this one, or have spent the budget.
                if front.end is None and self._has_room(front):
                    self._advance(front, arcs, i, bool(reached[i]), target[i], tangent[i])
            for front in active:
                if front.end is None and not self._has_room(front):
                    front.end = CurveEnd.MAX_POINTS

    def _advance(
        self,
        front: _Front,
        arcs: _Arcs,
        i: int,
        reached: bool,
        target: np.ndarray,
        tangent: np.ndarray,
    ) -> None:
        """Takes step i, or shortens it."""
        smooth = reached and bool(arcs.smooth[i])
        turned_over = arcs.sign[i] != front.sign
        if front.leaping:
            good = smooth
        elif turned_over:
            # det [D_xF; t] changes its sign along a smooth branch only at a crossing.
            good = False
        else:
            corner = reached and bool(arcs.corner[i]) and front.step <= self.min_step
            good = smooth or corner
        if good:
            turn = float(arcs.turn[i])
            self._take(front, target, tangent, float(arcs.sign[i]), turn)
        else:
            self._shorten(front)

    def _take(
        self, front: _Front, target: np.ndarray, tangent: np.ndarray, sign: float, turn: float
    ) -> None:
        """Goes on to ``target``, or to what lies before it: another piece, or the box."""
        chord = target - self.points[front.vertex]
        length = float(np.linalg.norm(chord))
        unit = chord / length
        met = self._first_on(front.vertex, unit, length, turn)
        if met is not None:
            self._join(front, met, unit)
            return
        box = self.problem
        if ((target < box.low) | (target > box.high)).any():
            self._leave(front, unit, length, turn, target)
            return
        self._move(front, target, tangent, sign)
        wanted = _AIM * self.max_turn / max(turn, 1e-9)
        front.step = min(max(front.step * min(max(wanted, 0.5), 2.0), self.min_step), self.step)
        front.leaping = False

    def _move(self, front: _Front, point: np.ndarray, tangent: np.ndarray, sign: float) -> None:
        vertex = self._add(point, tangent)
        self._link(front.vertex, vertex)
        self.at[front.vertex].remove(front)
        self.at[vertex].append(front)
        front.vertex, front.sign = vertex, sign

    def _shorten(self, front: _Front) -> None:
        if not front.leaping and front.step > self.min_step:
            front.step = max(front.step / 2, self.min_step)
            return
        front.leaping = True
        front.step *= 2
        if front.step > self.step:
            self._turn_corner(front)

    def _turn_corner(self, front: _Front) -> None:
        """Looks sideways and back for the continuation. What lies ahead of a corner of 90 degrees
        or more is projected to the corner itself, not beyond it."""
        start = self.points[front.vertex]
        direction = front.sign * self.tangents[front.vertex]
        basis = np.linalg.qr(np.column_stack([direction, np.eye(len(start))]))[0][:, 1:].T
        pairs = [(a, b * sign) for a, b in combinations(basis, 2) for sign in (1.0, -1.0)]
        between = [(a + b) / math.sqrt(2) for a, b in pairs]
        sideways = np.array([*basis, *between])
        sideways = np.concatenate([sideways, -sideways])
        angles = np.deg2rad([45, 75, 105, 135, 160])[:, None, None]
        fan = (np.cos(angles) * direction + np.sin(angles) * sideways).reshape(-1, len(start))
        found = self.problem.correct(start + self.min_step * fan)
        target, tangent = _numpy(found.points), _tangents(found.jacobian)
        h = np.full(len(fan), self.min_step)
        arcs = _Arcs.of(start, np.broadcast_to(direction, fan.shape), h, target, tangent, 1.0)
        onward = (tangent * arcs.unit).sum(1)
        # The way back along what has been traced has the other sign, and is not an answer.
        good = (
            _numpy(found.converged & found.usable)
            & (arcs.length >= self.min_step / 4)
            & (arcs.length <= 2 * self.min_step)
            & (front.sign * onward > _CORNER)
        )
        if not good.any():
            front.end = CurveEnd.STUCK
            return
        i = int(np.where(good, arcs.turn, np.inf).argmin())
        front.step = self.min_step
        self._take(front, target[i], tangent[i], front.sign, float(arcs.turn[i]))

    def _first_on(self, vertex: int, unit: np.ndarray, length: float, turn: float) -> int | None:
        """The first vertex on the arc that leaves ``vertex`` along a chord, if there is one."""
        offset = self.points - self.points[vertex]
        along = offset @ unit
        near = np.flatnonzero((along > 0) & (along <= (1 + _BEYOND) * length))
        # An arc that turns by tau is at most tau h / 8 away from its chord, and its tangents at
        # most tau / 2 off the chord's direction; twice that, and room for what is beyond the chord.
        aside = np.linalg.norm(offset[near] - along[near, None] * unit, axis=1)
        same = (aside <= (0.25 * turn + _LENS) * length) & (
            np.abs(self.tangents[near] @ unit) >= math.cos(min(turn + 0.1, 1.3))
        )
        near = near[same]
        near = near[~np.isin(near, [vertex, *self.neighbours[vertex]])]
        return int(near[along[near].argmin()]) if len(near) else None

    def _join(self, front: _Front, vertex: int, unit: np.ndarray) -> None:
        """Ends a front at a vertex of another piece, or of the other end of its own."""
        for other in self.at[vertex]:
            # The end that looks this way; one that is stuck is freed by being met.
            toward = other.sign * float(self.tangents[vertex] @ unit)
            if other is not front and toward < 0 and other.end is not CurveEnd.CLOSED:
                self._link(front.vertex, vertex)
                front.end = other.end = CurveEnd.CLOSED
                self.at[vertex].remove(other)
                self.at[front.vertex].remove(front)
                return
        front.end = CurveEnd.STUCK  # it would run over a piece that is there

    def _leave(
        self, front: _Front, unit: np.ndarray, length: float, turn: float, target: np.ndarray
    ) -> None:
        """Ends a front on the face of the box that its step crosses first."""
        box, start = self.problem, self.points[front.vertex]
        faces = [
            ((side[axis] - start[axis]) / (target[axis] - start[axis]), axis, side[axis])
            for side, out in ((box.low, target < box.low), (box.high, target > box.high))
            for axis in np.flatnonzero(out)
        ]
        for share, axis, value in sorted(faces):
            solved = box.on_face(start + share * (target - start), int(axis), float(value))
            if solved is None:
                continue
            point, tangent = solved
            along = float((point - start) @ unit)
            aside = float(np.linalg.norm(point - start - along * unit))
            slack = 1e-9 * float((box.high - box.low).max())
            if (
                (point >= box.low - slack).all()
                and (point <= box.high + slack).all()
                and -1e-3 * length <= along <= 1.01 * length
                and aside <= (0.25 * turn + _LENS) * length
            ):
                if along > 1e-6 * length:
                    point = np.clip(point, box.low, box.high)
                    self._move(front, point, tangent, math.copysign(1.0, float(tangent @ unit)))
                front.end = CurveEnd.BOX
                return
        # The curve leaves nearly along the face: nearer, in shorter steps.
        if front.leaping or front.step <= self.min_step:
            front.end = CurveEnd.BOX
        else:
            self._shorten(front)

    def curves(self) -> tuple[list[Curve], dict[int, int]]:
        """The pieces with at least two vertices, and the number of the piece of each vertex."""
        found: list[Curve] = []
        place: dict[int, int] = {}
        ends_first = sorted(range(self.count), key=lambda v: (len(self.neighbours[v]) == 2, v))
        for first in ends_first:
            if first in place or not self.neighbours[first]:
                continue
            path = self._walk(first)
            closed = len(self.neighbours[first]) == 2
            place.update((vertex, len(found)) for vertex in path)
            # From the first vertex along its tangent.
            step = self.points[path[1]] - self.points[path[0]]
            if float(step @ self.tangents[path[0]]) < 0:
                path = [path[0], *path[:0:-1]] if closed else path[::-1]
            found.append(self._curve(path, closed))
        return found, place

    def _walk(self, first: int) -> list[int]:
        path, before = [first], -1
        while True:
            following = [v for v in self.neighbours[path[-1]] if v != before]
            if not following or (following[0] == first and len(path) > 1):
                return path
            before = path[-1]
            path.append(following[0])

    def _curve(self, path: list[int], closed: bool) -> Curve:
        vertices = self.points[path].copy()
        following = np.roll(vertices, -1, axis=0) - vertices
        if not closed:
            following[-1] = following[-2]
        sign = np.copysign(1.0, (following * self.tangents[path]).sum(1))
        changes = sign != np.roll(sign, -1)
        crossings = int(changes.sum() if closed else changes[:-1].sum())
        ends = (CurveEnd.CLOSED, CurveEnd.CLOSED)
        if not closed:
            ends = (self._end_of(path[0]), self._end_of(path[-1]))
        samples = self.problem.at(vertices)
        return Curve(vertices, closed, ends, crossings, samples, self.problem)

    def _end_of(self, vertex: int) -> CurveEnd:
        (end,) = {front.end for front in self.at[vertex]} or {CurveEnd.STUCK}
        assert end is not None
        return end


@dataclass(frozen=True)
class _Arcs:
    """What a batch of steps looks like."""

    unit: np.ndarray  # (n, d) direction of the chord
    length: np.ndarray  # (n,) of the chord
    sign: np.ndarray  # (n,) +-1: the tangent at the target, times this, leads on
    turn: np.ndarray  # (n,) angle between the directions of travel at both ends
    smooth: np.ndarray  # (n,) bool: a piece of an arc
    corner: np.ndarray  # (n,) bool: at least no turning back

    @classmethod
    def of(
        cls,
        start: np.ndarray,
        direction: np.ndarray,
        h: np.ndarray,
        target: np.ndarray,
        tangent: np.ndarray,
        max_turn: float,
    ) -> _Arcs:
        chord = np.where(np.isfinite(target), target, start) - start
        length = np.linalg.norm(chord, axis=1)
        unit = chord / np.where(length > 0, length, 1.0)[:, None]
        lead, trail = (direction * unit).sum(1), (tangent * unit).sum(1)
        sign = np.copysign(1.0, trail)
        onward = sign[:, None] * tangent
        # 2 asin(|a - b| / 2) keeps the digits of small angles, which acos(a . b) does not.
        apart = np.linalg.norm(onward - direction, axis=1)
        turn = 2 * np.arcsin(np.clip(apart / 2, 0.0, 1.0))
        mirrored = 2 * lead[:, None] * unit - direction
        as_long = (length >= _SHORTEST * h) & (length <= _LONGEST * h)
        smooth = (
            as_long
            & (turn <= max_turn)
            & (lead >= math.cos(max_turn))
            & (np.linalg.norm(onward - mirrored, axis=1) <= max_turn / 2)
        )
        corner = (length >= h / 4) & (length <= 2 * h) & (lead > _CORNER)
        corner &= np.abs(trail) > _CORNER
        return cls(unit, length, sign, turn, smooth, corner)
