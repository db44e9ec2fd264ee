"""Samples that cover a level set evenly, and how well samples cover one.

Projections of random points lie thick where the level set faces much of the space around it, and
leave gaps elsewhere. :func:`sample_level_set` starts from them, fills what they miss, takes points
that are far from each other, and lets these repel one another along the surface.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from levelset_ext import ops
from levelset_ext.field import Field, as_field, check_integer
from levelset_ext.result import LevelSetResult
from levelset_ext.samplers.projection import project
from levelset_ext.samplers.state import box_bounds

__all__ = ["Coverage", "CoverageEstimate", "coverage", "estimate_coverage", "sample_level_set"]

_BLOCK = 256  # points whose largest gap is kept as one number


class Coverage(NamedTuple):
    """How samples stand to a dense sampling, lengths.

    chamfer: mean distance to the nearest point of the other set, averaged over the two directions.
    hausdorff: the largest such distance of either direction. gap: the largest from the dense
    sampling to the samples alone.
    """

    chamfer: float
    hausdorff: float
    gap: float


class CoverageEstimate(NamedTuple):
    """How samples cover the level set around them, lengths, without any dense sampling.

    mean_gap, largest_gap: mean, by area, and largest distance from a probe on the level set to its
    nearest sample. spacing: mean distance from a sample to its nearest other one. evenness:
    standard deviation of that distance over its mean; 0 on a lattice, about 0.5 for random points
    in the plane. probes: how many probes reached the level set.
    """

    mean_gap: float
    largest_gap: float
    spacing: float
    evenness: float
    probes: int


def coverage(points: Tensor, reference: Tensor) -> Coverage:
    """Chamfer and Hausdorff distance between samples (n, d) and a dense sampling (m, d).

    Numbers, without a gradient. Raises ValueError where there are no points.
    """
    for name, x in (("points", points), ("reference", reference)):
        if x.dim() != 2 or len(x) == 0:
            raise ValueError(f"{name}: expected (n, d) with n >= 1, got {tuple(x.shape)}")
    there = ops.nearest_distance(reference.detach(), points.detach())[0]
    back = ops.nearest_distance(points.detach(), reference.detach())[0]
    gap = float(there.max())
    return Coverage(float((there.mean() + back.mean()) / 2), max(gap, float(back.max())), gap)


def estimate_coverage(
    fn: Field,
    points: Tensor,
    level: Tensor | float = 0.0,
    *,
    box: tuple[Any, Any] | None = None,
    probes: int = 4,
    reach: float = 3.0,
    max_iters: int = 20,
    tol: float = 1e-5,
    generator: torch.Generator | None = None,
) -> CoverageEstimate:
    """Probes the level set near samples for places far from every sample.

    A probe is a sample moved by a Gaussian step, as long on average as ``reach`` times the distance
    to the nearest other sample, and projected back. Probes therefore find gaps that samples
    surround, and edges up to ``reach`` spacings wide, but not a component without any sample.

    Args:
        fn: module or callable (n, d) -> (n,) or (n, l).
        points: samples on the level set, (n, d), n >= 2.
        level: a scalar or (l,).
        box: (lower, upper) outside of which nothing has to be covered; scalars or (d,).
        probes: per sample.
        reach: length of a step, in spacings.
        max_iters, tol: of the projections.
        generator: of the CPU.

    Returns:
        :class:`CoverageEstimate`, numbers without a gradient.

    Raises:
        ValueError: fewer than two samples, or another shape.
        RuntimeError: no probe reached the level set.
    """
    points = _samples(points)
    field = as_field(fn)
    nearest = torch.from_numpy(_neighbours(points, 1)[0][:, 0]).to(points)
    spacing = nearest.mean()
    length = reach * nearest.median() / math.sqrt(points.shape[1])
    noise = torch.randn(
        probes * len(points), points.shape[1], dtype=points.dtype, generator=generator
    )
    starts = points.repeat(probes, 1) + length * noise.to(points.device)
    found = project(field, starts, level, max_iters, tol)
    # A projection that ran far away tells nothing of the neighbourhood.
    near = found.converged & (
        (found.points - starts).norm(dim=1) <= 4 * length * math.sqrt(points.shape[1])
    )
    for bound, sign in zip(box_bounds(box, points), (1, -1), strict=True):
        if bound is not None:
            near &= (sign * (found.points - bound) >= 0).all(1)
    if not bool(near.any()):
        raise RuntimeError("estimate_coverage: no probe reached the level set")
    probed = found.points[near]
    gaps = ops.nearest_distance(probed, points)[0]
    # Probes are as thick as samples are. Each counts for the area that it has to itself.
    positions = probed.cpu().double().numpy()
    crowd = cKDTree(positions).query_ball_point(positions, float(length), return_length=True)
    share = torch.from_numpy(1 / crowd).to(gaps)
    return CoverageEstimate(
        float((gaps * share).sum() / share.sum()),
        float(gaps.max()),
        float(spacing),
        float(nearest.std(unbiased=False) / spacing) if spacing > 0 else 0.0,
        int(near.sum()),
    )


def sample_level_set(
    fn: Field,
    n: int,
    box: tuple[Any, Any],
    level: Tensor | float = 0.0,
    *,
    candidates: int = 8,
    rounds: int = 30,
    max_iters: int = 50,
    tol: float = 1e-5,
    generator: torch.Generator | None = None,
) -> LevelSetResult:
    """n points that cover a level set inside a box evenly by length, area or volume.

    Uniform points of the box are projected; what converged is spread along the level set by
    perturbing and projecting again, which reaches parts that the box's points seldom land on. Of
    these candidates n are taken farthest-first, and each of these then moves along the tangent
    space, away from its neighbours, and is projected again.

    Args:
        fn: module or callable (m, d) -> (m,) or (m, l), l < d.
        n: how many points, >= 1.
        box: (lower, upper), scalars or (d,); at least one of them (d,), which tells d.
        level: a scalar or (l,).
        candidates: how many per point that is kept, >= 2.
        rounds: of repulsion; 0 for none.
        max_iters, tol: of the projections.
        generator: of the CPU; a seed means the same on every device up to its rounding.

    Returns:
        A :class:`LevelSetResult` of n converged rows on the device and in the dtype of ``box``, or
        of none if no candidate reached the level set: there is none in the box, or none that the
        projections find.

    Raises:
        ValueError: an argument is not as described.
    """
    n = check_integer("n", n, 1)
    if candidates < 2:
        raise ValueError(f"candidates: expected at least 2, got {candidates!r}")
    if rounds < 0:
        raise ValueError(f"rounds: expected at least 0, got {rounds!r}")
    low, high = _corners(box)
    field = as_field(fn)
    d = low.shape[0]
    limits = (low, high)

    def onto(points: Tensor) -> Tensor:
        found = project(field, points, level, max_iters, tol, box=limits)
        return found.points[found.converged]

    unit = torch.rand(candidates * n, d, dtype=low.dtype, generator=generator).to(low.device)
    pool = onto(low + unit * (high - low))
    if len(pool) == 0:
        return project(field, low.new_empty(0, d), level, 0, tol)
    # Each round doubles what is known, from the emptiest places first.
    while True:
        some = pool[_farthest(pool, min(n, len(pool)), generator)]
        if len(some) > 1:
            step = torch.from_numpy(_neighbours(some, 1)[0][:, 0]).to(some).median()
        else:
            step = (high - low).norm() * 0.05
        noise = torch.randn(candidates * len(some) // 2, d, dtype=low.dtype, generator=generator)
        starts = some.repeat(candidates // 2 + 1, 1)[: len(noise)] + step * noise.to(low.device)
        fresh = onto(starts.clamp(low, high))
        gap = float(ops.nearest_distance(fresh, pool)[0].max()) if len(fresh) else 0.0
        pool = torch.cat([pool, fresh])
        if len(pool) >= 2 * candidates * n or gap < 0.5 * float(step) or len(fresh) == 0:
            break
    if len(pool) < n:
        pool = torch.cat([pool, onto(pool.repeat(-(-n // len(pool)), 1))])
    chosen = pool[_farthest(pool, min(n, len(pool)), generator)]
    chosen = _repel(field, chosen, pool, limits, level, rounds, max_iters, tol)
    return project(field, chosen, level, max_iters, tol, box=limits)


def _corners(box: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
    if len(box) != 2:
        raise ValueError(f"box: expected (lower, upper), got {box!r}")
    sized = [torch.as_tensor(v) for v in box if torch.as_tensor(v).dim() == 1]
    if not sized:
        raise ValueError("box: expected at least one corner of shape (d,)")
    like = sized[0] if sized[0].is_floating_point() else sized[0].to(torch.get_default_dtype())
    low, high = box_bounds(box, like[None])
    assert low is not None
    assert high is not None
    low, high = low.expand_as(like).contiguous(), high.expand_as(like).contiguous()
    if not bool((torch.isfinite(low) & torch.isfinite(high) & (low < high)).all()):
        raise ValueError(f"box: expected finite lower < upper, got {box!r}")
    return low, high


def _samples(points: Tensor) -> Tensor:
    points = points.detach()
    if points.dim() != 2 or len(points) < 2 or points.shape[1] < 1:
        raise ValueError(f"points: expected (n, d), n >= 2, d >= 1, got {tuple(points.shape)}")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("points: expected finite numbers, got NaN or infinity")
    return points


def _neighbours(points: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices (n, k) of the nearest other points."""
    positions = points.detach().cpu().double().numpy()
    distance, index = cKDTree(positions).query(positions, k=min(k, len(positions) - 1) + 1)
    return distance[:, 1:], index[:, 1:]


def _farthest(points: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Row numbers of n points, each the farthest from all before it. Half of the best possible
    largest gap is not beaten by any choice (Gonzalez 1985).

    When a point is taken, only those within the largest gap so far can get closer to what is taken.
    A tree finds them, and the farthest of the rest is kept per block of neighbours, so that the
    whole costs about len(points) log(n) distances instead of len(points) n.
    """
    x = points.detach().cpu().double().numpy()
    tree = cKDTree(x, leafsize=32)
    # In the order of the tree's leaves, what changes together lies together.
    order = tree.indices
    x = x[order]
    tree = cKDTree(x, leafsize=32)
    blocks = -(-len(x) // _BLOCK)
    gaps = np.full(blocks * _BLOCK, -np.inf)
    gaps[: len(x)] = np.inf
    table = gaps.reshape(blocks, _BLOCK)
    farthest = np.full(blocks, np.inf)
    chosen = np.empty(n, dtype=np.int64)
    first = int(torch.randint(len(x), (1,), generator=generator))
    at = int(np.flatnonzero(order == first)[0])
    for k in range(n):
        chosen[k] = at
        reach = math.sqrt(gaps[at]) if gaps[at] < np.inf else np.inf
        if reach == np.inf:
            near: Any = slice(0, len(x))
            touched: Any = slice(None)
        else:
            # One part in 1e9 more, as the tree's distances are rounded their own way.
            near = np.array(tree.query_ball_point(x[at], reach * (1 + 1e-9)), dtype=np.int64)
            touched = np.unique(near // _BLOCK)
        offset = x[near] - x[at]
        gaps[near] = np.minimum(gaps[near], np.einsum("ij,ij->i", offset, offset))
        gaps[at] = -np.inf
        farthest[touched] = table[touched].max(1)
        block = int(farthest.argmax())
        at = block * _BLOCK + int(table[block].argmax())
    return torch.from_numpy(order[chosen]).to(points.device)


def _repel(
    field: Field,
    points: Tensor,
    pool: Tensor,
    limits: tuple[Tensor, Tensor],
    level: Tensor | float,
    rounds: int,
    max_iters: int,
    tol: float,
) -> Tensor:
    """Moves points away from their neighbours; the arrangement with the smallest gap is kept."""
    if len(points) < 3:
        return points
    # A mean needs no more of a large pool than this.
    probes = pool[:: max(1, len(pool) // max(4 * len(points), 20_000))]

    def gap(x: Tensor) -> float:
        return float(ops.nearest_distance(probes, x)[0].pow(2).mean())

    best, smallest = points, gap(points)
    for done in range(rounds):
        k = min(4 * points.shape[1], len(points) - 1)
        distance, index = _neighbours(points, k)
        spacing = float(np.median(distance[:, 0]))
        r = torch.from_numpy(distance).to(points)
        away = points[:, None] - points[torch.from_numpy(index).to(points.device)]
        # A smooth force that ends at 2 spacings, so that far points do not add up.
        weight = (1 - r / (2 * spacing)).clamp(min=0).square() / r.clamp_min(1e-3 * spacing)
        push = (away * weight[..., None]).sum(1)
        found = project(field, points, level, 0, tol)
        normal = ops.pinv_apply(found.jacobian, (found.jacobian @ push[..., None])[..., 0])
        push = push - normal
        # Small steps at the end, so that the arrangement comes to rest.
        size = 0.5 * spacing * (1 - done / rounds)
        length = push.norm(dim=1, keepdim=True)
        push = push * (size / length.clamp_min(1e-30)).clamp(max=size)
        moved = project(field, (points + push).clamp(*limits), level, max_iters, tol, box=limits)
        near = (moved.points - points).norm(dim=1) <= 2 * spacing
        points = torch.where((moved.converged & near)[:, None], moved.points, points)
        size_now = gap(points)
        if size_now < smallest:
            best, smallest = points, size_now
    return best
