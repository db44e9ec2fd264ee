"""The reconstruction loss, Eq. 13: put the level set t at distance |t| from a point cloud."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from levelset_ext import ops
from levelset_ext.field import Field, as_field, evaluate
from levelset_ext.result import LevelSetResult
from levelset_ext.sample_network import move_points

__all__ = ["Disks", "ReconstructionLoss", "fit_disks", "reconstruction"]


class Disks(NamedTuple):
    """Flat disks that stand for the surface between the points of a cloud X, one for each point.

    centers: (N, d), the points moved onto the quadric of their neighbours, see :func:`fit_disks`.
    normals: (N, d), unit, of either sign. radii: (N,), > 0 where neighbours differ.
    """

    centers: Tensor
    normals: Tensor
    radii: Tensor

    def distance(self, x: Tensor, index: Tensor) -> Tensor:
        """(n,), from each row of x (n, d) to the disk ``index`` (n,) names; the gradient is the
        unit vector from the nearest point of the disk, and 0 on it."""
        offset = x - self.centers[index]
        normal = self.normals[index]
        height = (offset * normal).sum(1, keepdim=True)
        aside = torch.linalg.vector_norm(offset - height * normal, dim=1)
        outside = torch.relu(aside - self.radii[index])
        return torch.linalg.vector_norm(torch.stack([height[:, 0], outside], 1), dim=1)


def fit_disks(cloud: Tensor, neighbours: int = 32, covered: int = 4) -> Disks:
    """The disks of a cloud that samples a hypersurface (a surface in space, a curve in the plane).

    Around a point the surface is taken for a quadric over the plane of its nearest neighbours, the
    least-squares one with weights exp(-2 r^2 / R^2) for neighbours as far as r of at most R; the
    disk is tangent to it. Across a surface that is sampled with noise the distance to the nearest
    point is wrong twice: near the surface it is too large by the gaps between the points, and away
    from it too small, as of several points the one that noise moved closest is the nearest. The
    disk averages over its neighbours' noise and spans the gap; it ends where they do, so a hole in
    the cloud stays one. A plane instead of the quadric would lie inside of whatever is round, the
    more the thinner it is.

    Args:
        cloud: X, (N, d).
        neighbours: points of a fit, the point itself among them; at most N are taken. Fewer than
            twice the coefficients of a quadric (d = 2: 6, d = 3: 12) are fitted by a plane.
        covered: the radius is the distance to so manieth a neighbour, less than ``neighbours``.

    Returns:
        :class:`Disks` in the dtype and on the device of the cloud, constants: found on the CPU in
        float64, without a gradient.

    Raises:
        ValueError: ``cloud`` has no points or one that is not finite, ``neighbours`` is below d,
            ``covered`` below 1 or not below ``neighbours``.
    """
    if cloud.dim() != 2 or 0 in cloud.shape:
        raise ValueError(f"cloud: expected finite points (N, d), got {tuple(cloud.shape)}")
    if not bool((cloud.double().abs() < 1e150).all()):  # the square of a distance is a number
        raise ValueError("cloud: expected finite points (N, d), below 1e150")
    d = cloud.shape[1]
    if neighbours < d:
        raise ValueError(f"neighbours: expected at least d = {d}, got {neighbours}")
    if not 1 <= covered < neighbours:
        raise ValueError(f"covered: expected 1 to {neighbours - 1}, got {covered}")
    points = cloud.detach().cpu().double().numpy()
    count = min(neighbours, len(points))
    distance, index = cKDTree(points).query(points, k=np.arange(1, count + 1))
    centers, normals = np.empty_like(points), np.empty_like(points)
    for rows in np.array_split(np.arange(len(points)), -(-len(points) // 10_000)):
        near = points[index[rows]] - points[rows, None]
        height, normals[rows] = _tangents(near, distance[rows])
        centers[rows] = points[rows] + height[:, None] * normals[rows]
    radii = distance[:, min(covered, count - 1)]
    return Disks(*(torch.from_numpy(part).to(cloud) for part in (centers, normals, radii)))


def _tangents(near: np.ndarray, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the line through 0 across the neighbours' plane meets their quadric, and its normals.

    Args:
        near: (n, k, d), the neighbours relative to their points.
        distance: (n, k), ascending, how far they are.

    Returns:
        Heights (n,), along the normals (n, d), which are unit.
    """
    k, d = near.shape[1:]
    reach = np.where(distance[:, -1:] > 0, distance[:, -1:], 1.0)
    unit = near / reach[:, :, None]
    offset = unit - unit.mean(1, keepdims=True)
    axes = np.linalg.eigh(offset.transpose(0, 2, 1) @ offset)[1]
    local = unit @ axes  # heights first
    across = local[:, :, 1:]
    terms = [np.ones((*across.shape[:2], 1)), across]
    first, second = np.triu_indices(d - 1)
    if k >= 2 * (d + len(first)):
        terms.append(across[:, :, first] * across[:, :, second])
    basis = np.concatenate(terms, 2)
    weighted = basis * np.exp(-2 * (distance / reach) ** 2)[:, :, None]
    # The ridge decides for the flattest where the neighbours leave a choice, as on one line.
    square = weighted.transpose(0, 2, 1) @ basis + 1e-9 * np.eye(basis.shape[2])
    found = np.linalg.solve(square, weighted.transpose(0, 2, 1) @ local[:, :, :1])[:, :, 0]
    tilted = np.concatenate([np.ones((len(near), 1)), -found[:, 1:d]], 1)
    normal = (axes @ tilted[:, :, None])[:, :, 0]
    length = np.linalg.norm(normal, axis=1)
    # The height at 0 is over the plane of the neighbours: along the tangent's normal it is less.
    return found[:, 0] * reach[:, 0] / length, normal / length[:, None]


class ReconstructionLoss(NamedTuple):
    """Eq. 13 and its parts, scalars.

    total: what to call backward() on. levels: the first sum, one term for every sample set,
    detached. cloud: mean |F| over the cloud points, without lambda, detached.
    """

    total: Tensor
    levels: Tensor
    cloud: Tensor


def reconstruction(
    fn: Field,
    samples: LevelSetResult | Sequence[LevelSetResult],
    cloud: Tensor,
    cloud_batch: Tensor | None = None,
    *,
    lam: float = 1.0,
    p: float = 1.0,
    min_slope: float = 0.0,
    nearest: Sequence[Tensor | None] | None = None,
    disks: Disks | None = None,
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> ReconstructionLoss:
    """Eq. 13:  sum_t [ mean_i | d(x_i, X) - |t| |^p ]^(1/p)  +  lam / N sum_j |F(x_j)|.

    Args:
        fn: the network, l >= 1 outputs.
        samples: the sample sets of the levels t, one term of the sum each: results of
            :func:`levelset_ext.project` (a level set t = c, usually 0) or of
            :func:`levelset_ext.level_points` (every point on its own level set). A row that did not
            converge stands for the level it is on, t = F(x_i). They enter through
            :func:`levelset_ext.sample_network`; rows that cannot move are left out of the mean.
        cloud: X, (N, d). Distances are to all of it.
        cloud_batch: the points x_j of the second sum, (m, d); None takes all of X.
        lam: lambda >= 0.
        p: exponent >= 1 of the first sum.
        min_slope: rows with |D_xF| below it are left out (l = 1). p(theta) moves by 1 / |D_xF| for
            a unit of F, but only to first order: where F is flat, as on the medial axis of a shape,
            that promise holds for next to no step, and such rows shout down all others.
        nearest: for each sample set the index into ``cloud`` of the point nearest to each row, (n,)
            int64, or None where it is to be searched. Points that stay where they are from step to
            step need one search only.
        disks: of the cloud, see :func:`fit_disks`: d(x, X) is then the distance to the disk of the
            nearest point. None is the distance to the point itself.
        add_up: for rows that several processes share: adds a tensor up over all of them. The
            loss is then that of all rows, on every process, and the gradient of all rows the sum
            of those that the processes get. None takes the rows for all there are.

    For l > 1 (curves) |t| and |F| are Euclidean norms of the l outputs.

    Returns:
        :class:`ReconstructionLoss`. Differentiable in the parameters of ``fn``, by first
        derivatives of the network only.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if not 1 <= p < math.inf:
        raise ValueError(f"p: expected a finite exponent >= 1, got {p}")
    if not lam >= 0:
        raise ValueError(f"lam: expected a number >= 0, got {lam}")
    sets = [samples] if isinstance(samples, LevelSetResult) else list(samples)
    if not sets:
        raise ValueError("samples: expected at least one LevelSetResult, got none")
    for result in sets:
        if not isinstance(result, LevelSetResult):
            raise TypeError(f"samples: expected LevelSetResults, got {type(result).__name__}")
    for name, points in (("cloud", cloud), ("cloud_batch", cloud_batch)):
        if points is not None and not (isinstance(points, Tensor) and len(points) > 0):
            raise ValueError(f"{name}: expected a tensor of at least one point, got {points!r}")
    field = as_field(fn)

    if nearest is not None and len(nearest) != len(sets):
        raise ValueError(f"nearest: expected {len(sets)} entries, one a set, got {len(nearest)}")

    usable = [_steep(result, min_slope) for result in sets]
    known = list(nearest) if nearest is not None else [None] * len(sets)
    together = LevelSetResult.cat([result[rows] for result, rows in zip(sets, usable, strict=True)])
    sizes = [int(rows.sum()) for rows in usable]
    points = move_points(field, together)
    index = torch.cat(
        [
            ops.nearest_distance(part, cloud)[1] if found is None else found[rows]
            for part, found, rows in zip(together.points.split(sizes), known, usable, strict=True)
        ]
    )
    if disks is None:
        # Its gradient is the unit vector from the nearest point, and 0 at distance 0.
        distance = torch.linalg.vector_norm(points - cloud[index], dim=1)
    else:
        distance = disks.distance(points, index)
    on_level = torch.where(together.converged[:, None], together.level, together.values)
    error = (distance - torch.linalg.vector_norm(on_level, dim=1)).abs()
    terms = [_mean_power(part, p, add_up) for part in error.split(sizes)]

    batch = cloud if cloud_batch is None else cloud_batch
    misfit = _mean(_norm(evaluate(field, batch)), add_up)
    levels = torch.stack(terms)
    return ReconstructionLoss(
        total=levels.sum() + lam * misfit, levels=levels.detach(), cloud=misfit.detach()
    )


def _steep(result: LevelSetResult, min_slope: float) -> Tensor:
    """(n,) bool, rows that Eq. 9 can move and whose D_xF is not shorter than ``min_slope``."""
    if min_slope <= 0:
        return result.usable
    if result.values.shape[1] != 1:
        raise ValueError(f"min_slope: expected 0 for networks with l > 1 outputs, got {min_slope}")
    slope = torch.linalg.vector_norm(result.jacobian.flatten(1), dim=1)
    return result.usable & (slope >= min_slope)


def _norm(values: Tensor) -> Tensor:
    if values.shape[1] == 1:
        return values[:, 0].abs()
    return torch.linalg.vector_norm(values, dim=1)


def _mean(values: Tensor, add_up: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Of all rows; 0 for no rows."""
    if add_up is None:
        return values.mean() if values.shape[0] > 0 else values.sum()
    total, count = add_up(torch.stack([values.sum(), values.new_tensor(values.shape[0])]))
    return total / count.clamp(min=1)


def _mean_power(
    error: Tensor, p: float, add_up: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """[mean e^p]^(1/p); 0 for no rows, with the gradient 0 at e = 0."""
    if p == 1:
        return _mean(error, add_up)
    mean = _mean(error.pow(p), add_up)
    positive = mean > 0
    return torch.where(positive, torch.where(positive, mean, 1.0).pow(1 / p), 0.0 * mean)
