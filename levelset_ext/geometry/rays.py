"""Rays against a level set {F = c}: the first crossing of each, or all of them.

A ray x(t) = o + t v, |v| = 1, is marched until F - c changes sign; false position finds the root in
that bracket. The hit then moves with the network's parameters along its ray (Eq. 9 with v in place
of the gradient), and with the ray itself:

    p(theta, o, v) = x - v [F(x; theta) - c] / (D_xF . v),        x = o + t_0 v
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from levelset_ext import ops
from levelset_ext.field import Field, as_field, check_integer, check_points, evaluate, values_of
from levelset_ext.result import LevelSetResult, Status
from levelset_ext.sample_network import move_points, no_samples
from levelset_ext.samplers import false_position
from levelset_ext.samplers.state import box_bounds, check_limits

__all__ = ["RayCrossings", "RayHits", "intersect_rays", "ray_crossings"]

_DEFAULT_STEPS = 128  # samples on the longest ray where no step is given
_DIP_ROUNDS = 24  # golden sections of a dip: an interval shrinks by 1e5


@dataclass(frozen=True, eq=False)
class RayHits:
    """The first crossing of each of n rays in d dimensions.

    Attributes:
        points: (n, d), where the ray meets the level set; NaN for a miss.
        t: (n,), distance along the ray from its origin; infinite for a miss.
        normals: (n, d), D_xF / |D_xF| at the hits, constants; NaN for a miss.
        mask: (n,) bool, which rays hit.
        inside: (n,) bool, whether F < c where the march of the ray began.
        rows: (m,) int64, ascending, the rays of ``result``.
        result: the m brackets after false position, misses left out. A row that is not in ``mask``
            ended without a point (``MAX_ITERATIONS``, ``NON_FINITE``).
    """

    points: Tensor
    t: Tensor
    normals: Tensor
    mask: Tensor
    inside: Tensor
    rows: Tensor
    result: LevelSetResult

    def __len__(self) -> int:
        return self.t.shape[0]


@dataclass(frozen=True, eq=False)
class RayCrossings:
    """Every crossing that was found on n rays, in no particular order.

    Attributes:
        rows: (m,) int64, the ray of each crossing.
        t: (m,), distance along it.
        result: the m points.
        length_below: (n,), how much of the marched part of each ray has F < c.
    """

    rows: Tensor
    t: Tensor
    result: LevelSetResult
    length_below: Tensor


def intersect_rays(
    fn: Field,
    origins: Tensor,
    directions: Tensor,
    level: float = 0.0,
    *,
    near: float | Tensor = 0.0,
    far: float | Tensor = math.inf,
    step: float | None = None,
    box: tuple[Any, Any] | None = None,
    lipschitz: float | None = None,
    tol: float = 1e-6,
    max_iters: int = 60,
    batch: int = 1 << 17,
    differentiable: bool | None = None,
) -> RayHits:
    """Finds where each ray meets {F = level} first, from either side.

    The ray is sampled every ``step``; two neighbours of different sign are a bracket. A sample
    with F = c counts as above. Where |F - c| dips between samples of one sign so steeply that it
    may reach 0, the dip is searched too; two crossings closer than ``step`` in any other way, and
    a ray that touches without crossing, are missed. A ray is not evaluated after its bracket.

    Gradients: ``points`` and ``t`` follow the parameters of ``fn``, and ``origins`` and
    ``directions`` where these ask for a gradient. Hits at which the ray is tangent to the level
    set are constants. Values do not depend on whether gradients are on.

    Args:
        fn: module or callable (n, d) -> (n,) or (n, 1). A module runs as its eval-mode clone.
        origins: (n, d), floating point.
        directions: (n, d) or (d,), any length but 0; they are normalised, so t is a distance.
        level: c.
        near, far: the part of the ray to search, lengths; a number or (n,). ``far`` may be infinite
            if ``box`` is given.
        step: between samples, a length; None is a 128th of the longest part.
        box: (lower, upper), numbers or (d,); only the part of each ray in the box is searched.
        lipschitz: if |F(x) - F(y)| <= lipschitz |x - y| is known, the march takes steps of
            |F - c| / lipschitz where these are longer than ``step``, and misses nothing by it.
        tol: of :func:`levelset_ext.false_position`, in the units of F.
        max_iters: of :func:`levelset_ext.false_position`.
        batch: most points in one evaluation of F during the march.
        differentiable: None gives gradients where F or the rays have a graph. True raises where F
            has none; False gives constants.

    Returns:
        :class:`RayHits`. A bracket whose root the dtype does not get to ``tol`` (``STALLED``) is a
        hit as near as the dtype allows.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: ``differentiable=True`` and F has no graph.
    """
    field = as_field(fn)
    max_iters = check_limits(max_iters, tol)
    gradients = torch.is_grad_enabled()
    # Tensors made in inference mode could not enter the sample network afterwards.
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        rays = _Rays(origins, directions, near, far, step, box, batch)
        brackets = _march(field, rays, level, lipschitz, every=False)
        result = _solve(field, rays, brackets, level, tol, max_iters)
        rows = brackets.rows
        good = (result.status == Status.CONVERGED) | (result.status == Status.STALLED)
        hit_rows, hits = (rows, result) if bool(good.all()) else (rows[good], result[good])

        mask = torch.zeros_like(brackets.below_at_start)
        mask[hit_rows] = True
        nowhere = torch.full_like(rays.unit, math.nan)
        gradient = hits.jacobian[:, 0]
        length = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        normals = nowhere.index_put((hit_rows,), gradient / length)
        moved = hits.points
        along, start = rays.unit[hit_rows], rays.origins[hit_rows]
        if gradients and differentiable is not False:
            required = differentiable is True
            moved = _follow(field, hits, hit_rows, origins, directions, rays, required)
            along, start = _given_rays(origins, directions, hit_rows, along, start)
        points = nowhere.index_put((hit_rows,), moved)
        distance = ((moved - start) * along).sum(1)
        t = torch.full_like(rays.near, math.inf).index_put((hit_rows,), distance)
        return RayHits(points, t, normals, mask, brackets.below_at_start, rows, result)


def ray_crossings(
    fn: Field,
    origins: Tensor,
    directions: Tensor,
    level: float = 0.0,
    *,
    near: float | Tensor = 0.0,
    far: float | Tensor = math.inf,
    step: float | None = None,
    box: tuple[Any, Any] | None = None,
    lipschitz: float | None = None,
    tol: float = 1e-6,
    max_iters: int = 60,
    batch: int = 1 << 17,
) -> RayCrossings:
    """All crossings of each ray with {F = level}; arguments as for :func:`intersect_rays`.

    Nothing here has a gradient. ``length_below`` is measured between the crossings found.
    """
    field = as_field(fn)
    max_iters = check_limits(max_iters, tol)
    with torch.inference_mode(False), torch.no_grad():
        rays = _Rays(origins, directions, near, far, step, box, batch)
        brackets = _march(field, rays, level, lipschitz, every=True)
        result = _solve(field, rays, brackets, level, tol, max_iters)
        rows = brackets.rows
        t = ((result.points - rays.origins[rows]) * rays.unit[rows]).sum(1)
        # F < c up to a crossing that goes up and from one that goes down.
        below = torch.zeros_like(rays.near)
        below[brackets.below_at_start] -= rays.near[brackets.below_at_start]
        below[brackets.below_at_end] += rays.far[brackets.below_at_end]
        below.index_add_(0, rows, torch.where(brackets.rising, t, -t))
        return RayCrossings(rows, t, result, below)


class _Rays:
    """Checked, detached rays with the part [near, far] of each that is to be searched."""

    def __init__(
        self,
        origins: Tensor,
        directions: Tensor,
        near: float | Tensor,
        far: float | Tensor,
        step: float | None,
        box: tuple[Any, Any] | None,
        batch: int,
    ) -> None:
        origins = check_points("origins", origins).detach()
        if origins.dim() != 2 or origins.shape[1] == 0:
            raise ValueError(f"origins: expected (n, d) with d >= 1, got {tuple(origins.shape)}")
        n, d = origins.shape
        if not isinstance(directions, Tensor):
            raise TypeError(f"directions: expected a tensor, got {type(directions).__name__}")
        if tuple(directions.shape) not in ((n, d), (d,)):
            raise ValueError(
                f"directions: expected (n, d) = ({n}, {d}) or ({d},), got {tuple(directions.shape)}"
            )
        batch = check_integer("batch", batch, 1)
        self.batch = batch
        self.origins = origins
        self.unit = _unit(directions.detach().expand(n, d), origins)
        bad = int((~torch.isfinite(self.unit).all(1)).sum())
        if bad:
            raise ValueError(f"directions: expected finite lengths > 0, got {bad} rows without")
        self.near = _lengths("near", near, origins)
        self.far = _lengths("far", far, origins)
        if box is not None:
            self._clip(*box_bounds(box, origins))
        if bool((torch.isinf(self.far) & (self.far > self.near)).any()):
            raise ValueError("far: expected a finite length where no box ends the ray, got inf")
        # A ray that is not finite has no part to search, whatever near and far came to.
        some = self.near < self.far
        longest = float((self.far - self.near)[some].max()) if bool(some.any()) else 0.0
        if step is None:
            step = longest / _DEFAULT_STEPS or 1.0
        if not (step > 0 and math.isfinite(step)):
            raise ValueError(f"step: expected a length > 0, got {step!r}")
        self.step = float(step)

    def at(self, rows: Tensor, t: Tensor) -> Tensor:
        return self.origins[rows] + t[:, None] * self.unit[rows]

    def _clip(self, lower: Tensor | None, upper: Tensor | None) -> None:
        """Slab test. An axis the ray does not move along lets it through or not at all."""
        for corner, sign in ((lower, 1.0), (upper, -1.0)):
            if corner is None:
                continue
            # sign * (o + t v - corner) >= 0
            offset = sign * (self.origins - corner)
            speed = sign * self.unit
            still = speed == 0
            t = -offset / torch.where(still, 1.0, speed)
            enter = torch.where(speed > 0, t, -math.inf)
            leave = torch.where(speed < 0, t, math.inf)
            leave = torch.where(still & (offset < 0), -math.inf, leave)
            self.near = torch.maximum(self.near, enter.amax(1))
            self.far = torch.minimum(self.far, leave.amin(1))


def _unit(directions: Tensor, like: Tensor) -> Tensor:
    """The directions (m, d) at length 1, in the dtype of ``like``; not finite where they have no
    finite length > 0."""
    given = directions.to(like.device, torch.promote_types(directions.dtype, like.dtype))
    # The squares of tiny or huge coordinates leave the range of the dtype.
    given = given / given.detach().abs().amax(1, keepdim=True)
    return (given / torch.linalg.vector_norm(given, dim=1, keepdim=True)).to(like.dtype)


def _lengths(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    n = like.shape[0]
    rows = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
    if tuple(rows.shape) not in ((), (n,)):
        raise ValueError(
            f"{name}: expected a number or (n,) = ({n},), got shape {tuple(rows.shape)}"
        )
    if bool(rows.isnan().any()) or (name == "near" and bool(torch.isinf(rows).any())):
        raise ValueError(f"{name}: expected a length, got {value!r}")
    return rows.expand(n).clone()


@dataclass
class _Brackets:
    rows: Tensor  # (m,) ray of each
    start: Tensor  # (m,) t
    end: Tensor
    start_values: Tensor  # (m,) F, not F - c
    end_values: Tensor
    rising: Tensor  # (m,) bool, F goes from below c to above
    below_at_start: Tensor  # (n,) bool, over all rays
    below_at_end: Tensor


def _march(
    field: Field, rays: _Rays, level: float, lipschitz: float | None, every: bool
) -> _Brackets:
    """Samples the rays; `every` keeps rays going after a bracket."""
    if not math.isfinite(level):
        raise ValueError(f"level: expected a finite number, got {level!r}")
    if lipschitz is not None and not (lipschitz > 0 and math.isfinite(lipschitz)):
        raise ValueError(f"lipschitz: expected a number > 0, got {lipschitz!r}")
    n = rays.origins.shape[0]
    device = rays.origins.device
    found: list[tuple[Tensor, ...]] = []
    below_start = torch.zeros(n, dtype=torch.bool, device=device)
    below_end = below_start.clone()
    with torch.no_grad():
        rows = torch.nonzero(rays.near < rays.far).squeeze(1)
        t = rays.near[rows]
        value = _values(field, rays, rows, t) - level
        below_start[rows] = value < 0
        below_end[rows] = value < 0
        # Two samples back, for dips; none there at first.
        old_t, old_value = t, torch.full_like(value, math.nan)
        # A dip was found in the last interval, where the next three samples are not to find it.
        known = torch.zeros_like(rows, dtype=torch.bool)
        keep = _finite(value, every)
        while True:
            keep &= t < rays.far[rows]
            if not bool(keep.all()):
                rows, t, value, old_t, old_value, known = (
                    x[keep] for x in (rows, t, value, old_t, old_value, known)
                )
            if rows.shape[0] == 0:
                break
            length = torch.full_like(t, rays.step)
            if lipschitz is not None:
                length = torch.maximum(length, value.abs() / lipschitz)
            # The grid is not to drift by rounding into one more, tiny step at the end.
            far = rays.far[rows]
            # At least to the next number: far from the origin of the ray a step may be less.
            new_t = torch.maximum(t + length, torch.nextafter(t, far))
            new_t = torch.where(new_t > far - 1e-3 * rays.step, far, new_t)
            new_value = _values(field, rays, rows, new_t) - level
            keep = _finite(new_value, every)
            crosses = keep & ((new_value < 0) != (value < 0))
            if bool(crosses.any()):
                found.append(_cut(crosses, rows, t, new_t, value, new_value))
            below_end[rows[keep]] = new_value[keep] < 0
            dips = keep & ~crosses & ~known
            dips &= _may_dip(old_t, t, new_t, old_value, value, new_value)
            known = torch.zeros_like(known)
            if bool(dips.any()):
                pairs, dipped, late = _search_dips(
                    field, rays, level, *(x[dips] for x in (rows, old_t, t, new_t)),
                    *(x[dips] for x in (old_value, value, new_value)),
                )  # fmt: skip
                found.extend(pairs if every else pairs[:1])
                searched = torch.nonzero(dips).squeeze(1)
                crosses[searched[dipped]] = True
                known[searched[late]] = True
            if not every:
                keep &= ~crosses
            old_t, old_value, t, value = t, value, new_t, new_value
    if found:
        columns = [torch.cat(column) for column in zip(*found, strict=True)]
    else:
        none = rays.near.new_empty(0)
        columns = [torch.empty(0, dtype=torch.int64, device=device), none, none, none, none]
    order = torch.argsort(columns[0], stable=True)
    index, start, end, first, second = (column[order] for column in columns)
    rising = (first < 0) & ~(second < 0)
    return _Brackets(
        index, start, end, first + level, second + level, rising, below_start, below_end
    )


def _finite(values: Tensor, all_of_them: bool) -> Tensor:
    """Which values are finite. Where every crossing of a line counts, all have to be."""
    finite = torch.isfinite(values)
    if all_of_them and not bool(finite.all()):
        bad = int((~finite).sum())
        raise ValueError(f"fn: expected finite values, got {bad} of {len(values)} that are not")
    return finite


def _cut(where: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    return tuple(column[where] for column in columns)


def _values(field: Field, rays: _Rays, rows: Tensor, t: Tensor) -> Tensor:
    """F (m,) at t of some rays."""
    parts = []
    for part in range(0, rows.shape[0], rays.batch):
        some = slice(part, part + rays.batch)
        values = values_of(field, rays.at(rows[some], t[some]))
        if values.shape[1] != 1:
            raise ValueError(f"fn: expected one output, (n,) or (n, 1), got {tuple(values.shape)}")
        parts.append(values[:, 0])
    return torch.cat(parts) if parts else t.new_empty(0)


def _may_dip(
    t0: Tensor, t1: Tensor, t2: Tensor, f0: Tensor, f1: Tensor, f2: Tensor
) -> Tensor:  # fmt: skip
    """Whether |F - c|, least at the middle of three samples of one sign, may reach 0 beside it.

    A convex function lies above its secants prolonged, so one that cannot is never searched.
    """
    sign = torch.where(f1 < 0, -1.0, 1.0)
    a, b, c = sign * f0, sign * f1, sign * f2
    least = (a >= b) & (c >= b) & (a >= 0)
    # Not a division: the first interval of a ray has length 0.
    from_left = b * (t1 - t0) <= (a - b) * (t2 - t1)
    from_right = b * (t2 - t1) <= (c - b) * (t1 - t0)
    return least & (from_left | from_right) & (t1 > t0)


def _search_dips(
    field: Field,
    rays: _Rays,
    level: float,
    rows: Tensor,
    t0: Tensor,
    t1: Tensor,
    t2: Tensor,
    f0: Tensor,
    f1: Tensor,
    f2: Tensor,
) -> tuple[list[tuple[Tensor, ...]], Tensor, Tensor]:
    """Golden section for the least |F - c| around t1, until it changes sign or nothing is left.

    Returns the brackets before and after the sign change, which of the rows have them, and which
    have them behind t1.
    """
    share = (3 - math.sqrt(5)) / 2
    sign = torch.where(f1 < 0, -1.0, 1.0)
    low, best, high = t0.clone(), t1.clone(), t2.clone()
    f_best = sign * f1
    crossed = torch.zeros_like(rows, dtype=torch.bool)
    active = torch.arange(rows.shape[0], device=rows.device)
    for _ in range(_DIP_ROUNDS):
        left, mid, right = low[active], best[active], high[active]
        after = right - mid > mid - left
        trial = torch.where(after, mid + share * (right - mid), mid - share * (mid - left))
        value = sign[active] * (_values(field, rays, rows[active], trial) - level)
        better = value < f_best[active]
        # The three keep the least value in the middle.
        low[active] = torch.where(after & better, mid, torch.where(after | better, left, trial))
        high[active] = torch.where(after & ~better, trial, torch.where(after | ~better, right, mid))
        best[active] = torch.where(better, trial, mid)
        f_best[active] = torch.where(better, value, f_best[active])
        # The rule of the march: F = c counts as above.
        over = torch.where(sign[active] > 0, value < 0, value <= 0)
        crossed[active[over]] = True
        active = active[~over]
        if active.shape[0] == 0:
            break
    rows, t0, t1, t2, f0, f1, f2 = _cut(crossed, rows, t0, t1, t2, f0, f1, f2)
    best, f_best = best[crossed], (sign * f_best)[crossed]
    early = best < t1
    before = torch.where(early, t0, t1), torch.where(early, f0, f1)
    behind = torch.where(early, t1, t2), torch.where(early, f1, f2)
    pairs: list[tuple[Tensor, ...]] = [
        (rows, before[0], best, before[1], f_best),
        (rows, best, behind[0], f_best, behind[1]),
    ]
    late = crossed.clone()
    late[crossed] = ~early
    return pairs, crossed, late


def _solve(
    field: Field, rays: _Rays, brackets: _Brackets, level: float, tol: float, max_iters: int
) -> LevelSetResult:
    """False position on the brackets; an empty result where there are none."""
    rows = brackets.rows
    results = []
    for part in range(0, max(rows.shape[0], 1), rays.batch):
        some = slice(part, part + rays.batch)
        results.append(
            false_position(
                field if rows.shape[0] else _no_rows,
                rays.at(rows[some], brackets.start[some]),
                rays.at(rows[some], brackets.end[some]),
                level,
                max_iters,
                tol,
                start_values=brackets.start_values[some],
                end_values=brackets.end_values[some],
            )
        )
    return LevelSetResult.cat(results)


def _no_rows(x: Tensor) -> Tensor:
    return x.sum(1)


def _given_rays(
    origins: Tensor, directions: Tensor, rows: Tensor, along: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Unit directions and origins of some rays, with the caller's graph where there is one."""
    if origins.requires_grad:
        start = origins[rows]
    if directions.requires_grad:
        given = _unit(directions.expand(origins.shape)[rows], along)
        along = along + (given - given.detach())
    return along, start


def _follow(
    field: Field,
    hits: LevelSetResult,
    rows: Tensor,
    origins: Tensor,
    directions: Tensor,
    rays: _Rays,
    required: bool,
) -> Tensor:
    """The hits as functions of the parameters and of the rays, equal to ``hits.points``."""
    points, v = hits.points, rays.unit[rows]
    if rows.shape[0] == 0:
        # No hit has a gradient of zeros: a loss of this batch can be differentiated all the same.
        return points + no_samples(field, rays.origins) if origins.shape[0] else points
    # One row tells whether F has parameters to follow; sample_network raises where it has none.
    if required or evaluate(field, points[:1]).requires_grad:
        points = move_points(field, hits, direction=v)
    if not (origins.requires_grad or directions.requires_grad):
        return points
    along, start = _given_rays(origins, directions, rows, v, rays.origins[rows])
    t = ((hits.points - rays.origins[rows]) * v).sum(1, keepdim=True)
    shift = start + t * along
    shift = shift - shift.detach()  # 0, with the gradient of x = o + t v at fixed t
    gradient = hits.jacobian[:, 0]
    slope = (gradient * v).sum(1, keepdim=True)
    lengths = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    crosses = slope.abs() > ops.rank_tolerance(v.dtype) * lengths
    back = (gradient * shift).sum(1, keepdim=True) / torch.where(crosses, slope, 1.0)
    return points + torch.where(crosses, shift - v * back, 0.0)
