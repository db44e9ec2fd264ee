"""Where a curve begins: closed polygons through a cloud, and an F whose zero set they are.

Zero lines of F: R^3 -> R^2 have a direction, that of det [D_xF; t] > 0, like vortex lines. From a
random F different stretches of the curve come to run in opposite directions, and gradient descent
cannot turn one round: the level set ends as several loops. So training starts from one closed line
that visits the points in a likely order, and has only to be moved by a little.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import Tensor, nn

from levelset_ext.data.curves import farthest_points

CORNERS = 64  # of a polygon, at most
_NEIGHBOURS = 4  # the distance to this one is what the cloud's spacing is measured by,
_GAP = 5.0  # and clusters are further apart than this many of it
_OPEN = 3.0  # an edge this many times its tour's median is a hole in the cloud
_ROWS = 4096  # points x corners at a time


def start_polygons(points: np.ndarray, corners: int = CORNERS) -> list[np.ndarray]:
    """Closed polygons that pass near all points, (k, d) each.

    The points are clustered by single linkage; the corners are the means of k groups of a cluster
    (k-means from farthest points), in the order of a short closed tour. The tour is a guess that
    only training can improve: a coarse one may take a wrong turn where two stretches of the curve
    come nearer to each other than its corners are, and it closes what is open. Clusters with a hole
    are taken for pieces of one curve with several holes, and get one tour together.

    Args:
        points: (n, d), n >= 4, in different places.
        corners: of each polygon, at most; a third of the cluster's points if that is less.
    """
    whole, parts = [], []
    for cluster in clusters(points):
        tour = short_tour(_means(cluster, corners))
        edge = np.linalg.norm(np.roll(tour, -1, 0) - tour, axis=1)
        if edge.max() > _OPEN * np.median(edge):
            parts.append((cluster, tour))
        else:
            whole.append(tour)
    if len(parts) == 1:
        whole.append(parts[0][1])
    elif parts:
        whole.append(short_tour(_means(np.concatenate([cluster for cluster, _ in parts]), corners)))
    return whole


def clusters(points: np.ndarray) -> list[np.ndarray]:
    """The points by single linkage, largest cluster first. Clusters of less than 8 points, and of
    less than a hundredth of the cloud, are strays and left out, unless all are."""
    different = np.unique(points, axis=0)
    tree = cKDTree(different)
    reach = tree.query(different, k=min(_NEIGHBOURS + 1, len(different)))[0][:, -1]
    pairs = tree.query_pairs(_GAP * float(np.median(reach)), output_type="ndarray")
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (len(different),) * 2)
    label = connected_components(graph, directed=False)[1]
    found = sorted((different[label == k] for k in range(label.max() + 1)), key=len, reverse=True)
    least = max(8, len(different) // 100)
    return [cluster for cluster in found if len(cluster) >= least] or [different]


def _means(cluster: np.ndarray, corners: int) -> np.ndarray:
    """Means of groups of neighbours: nearer to the curve than the points by the root of 5 or so."""
    count = min(corners, max(len(cluster) // 3, 3))
    start = farthest_points(cluster, count, 0)
    return kmeans2(cluster, start, iter=10, minit="matrix")[0]


def short_tour(points: np.ndarray) -> np.ndarray:
    """The points in the order of a short closed tour: the best of several tours to the nearest
    neighbour, each shortened by turning a stretch round (2-opt) or by moving a stretch of up to
    three points elsewhere (Or-opt) until nothing helps."""
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    best, shortest = np.arange(len(points)), np.inf
    for first in np.linspace(0, len(points) - 1, min(8, len(points))).astype(int):
        tour = _improved(_nearest_neighbours(distance, int(first)), distance)
        length = float(distance[tour, np.roll(tour, -1)].sum())
        if length < shortest - 1e-12:
            best, shortest = tour, length
    return points[best]


def _nearest_neighbours(distance: np.ndarray, first: int) -> np.ndarray:
    tour, left = [first], np.ones(len(distance), dtype=bool)
    left[first] = False
    while left.any():
        tour.append(int(np.where(left, distance[tour[-1]], np.inf).argmin()))
        left[tour[-1]] = False
    return np.array(tour)


def _improved(tour: np.ndarray, distance: np.ndarray) -> np.ndarray:
    n = len(tour)
    if n < 5:
        return tour
    upper = np.triu(np.ones((n, n), dtype=bool), 1)
    while True:
        # 2-opt: edges (i, i+1), (j, j+1) become (i, j), (i+1, j+1).
        after = np.roll(tour, -1)
        edge = distance[tour, after]
        new = distance[np.ix_(tour, tour)] + distance[np.ix_(after, after)]
        gain = np.where(upper, edge[:, None] + edge[None] - new, 0.0)
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        if gain[i, j] > 1e-12:
            tour = np.concatenate([tour[: i + 1], tour[i + 1 : j + 1][::-1], tour[j + 1 :]])
            continue
        moved = _or_opt(tour, distance)
        if moved is None:
            return tour
        tour = moved


def _or_opt(tour: np.ndarray, distance: np.ndarray) -> np.ndarray | None:
    """The tour with the move of one stretch that shortens it most, None if no move does."""
    best: tuple[float, np.ndarray] | None = None
    for size in (1, 2, 3):
        for at in range(len(tour)):
            turned = np.roll(tour, -at)
            stretch, rest = turned[:size], turned[size:]
            closed = distance[rest[-1], stretch[0]] + distance[stretch[-1], rest[0]]
            saved = closed - distance[rest[-1], rest[0]]
            a, b = rest[:-1], rest[1:]
            for part in (stretch, stretch[::-1]):
                cost = distance[a, part[0]] + distance[part[-1], b] - distance[a, b]
                k = int(cost.argmin())
                gain = float(saved - cost[k])
                if gain > 1e-12 and (best is None or gain > best[0]):
                    best = gain, np.concatenate([rest[: k + 1], part, rest[k + 1 :]])
    return None if best is None else best[1]


def polygon_field(x: np.ndarray, polygons: list[np.ndarray]) -> np.ndarray:
    """F (n, d - 1) at x (n, d) with |F| the distance to the polygons, and zero nowhere else.

    In space F = distance x (cos W/2, sin W/2), W the solid angle that x sees the polygons under,
    summed. W is defined up to 4 pi, so the phase W/2 has one value up to a turn; it makes one turn
    round each polygon. A triangle with corners a, b, c seen from x adds to it the argument of
    |a||b||c| + (a.b)|c| + (a.c)|b| + (b.c)|a| + i det [a b c] (van Oosterom and Strackee), and a
    polygon is the fan of triangles from its first corner. In the plane F is the distance, negative
    inside (where a ray crosses an odd number of edges).
    """
    return np.concatenate(
        [_polygon_field(part, polygons) for part in np.array_split(x, -(-len(x) // _ROWS))]
    )


def _polygon_field(x: np.ndarray, polygons: list[np.ndarray]) -> np.ndarray:
    distance = np.full(len(x), np.inf)
    phase = np.ones(len(x), dtype=np.complex128)
    inside = np.zeros(len(x), dtype=bool)
    for corners in polygons:
        start, end = corners, np.roll(corners, -1, 0)
        along = end - start
        square = np.maximum((along * along).sum(1), np.finfo(np.float64).tiny)
        offset = x[:, None] - start
        share = np.clip((offset * along).sum(2) / square, 0.0, 1.0)
        away = np.linalg.norm(offset - share[..., None] * along, axis=2)
        distance = np.minimum(distance, away.min(1))
        if x.shape[1] == 2:
            crosses = (start[:, 1] > x[:, 1:]) != (end[:, 1] > x[:, 1:])
            rise = np.where(along[:, 1] == 0, 1.0, along[:, 1])
            at = start[:, 0] + (x[:, 1:] - start[:, 1]) / rise * along[:, 0]
            inside ^= ((crosses & (x[:, :1] < at)).sum(1) % 2).astype(bool)
            continue
        seen = -offset
        length = np.linalg.norm(seen, axis=2)
        a, b, c = seen[:, :1], seen[:, 1:-1], seen[:, 2:]
        ra, rb, rc = length[:, :1], length[:, 1:-1], length[:, 2:]
        ab, ac, bc = (a * b).sum(2), (a * c).sum(2), (b * c).sum(2)
        factor = ra * rb * rc + ab * rc + ac * rb + bc * ra + 1j * (a * np.cross(b, c)).sum(2)
        size = np.abs(factor)
        phase *= np.where(size > 0, factor / np.where(size > 0, size, 1.0), 1.0).prod(1)
    if x.shape[1] == 2:
        return np.where(inside, -distance, distance)[:, None]
    return distance[:, None] * np.stack([phase.real, phase.imag], 1)


def fit_polygons(
    network: nn.Module,
    cloud: Tensor,
    box: tuple[Tensor, Tensor],
    generator: torch.Generator,
    *,
    steps: int,
    samples: int = 16_384,
    batch: int = 1024,
    learning_rate: float = 3e-3,
) -> float:
    """Regresses a network on :func:`polygon_field` of the polygons of a cloud, by Adam.

    The loss is the mean of |F - F0|^2 / (|F0|^2 + 0.05^2), F0 the polygon field: an error that is
    small beside |F0| makes no zeros far away, and near the polygons F0 is met closely.

    Args:
        network: d - 1 outputs; changed in place.
        cloud: (n, d).
        box: two corners (d,); a third of the samples is uniform in it, the others are about the
            cloud, 0.05 and 0.2 away.
        generator: draws the samples, on the CPU.
        steps: of Adam.

    Returns:
        The root of the loss over the last tenth of the steps.
    """
    points = cloud.detach().cpu().double()
    low, high = (corner.detach().cpu().double() for corner in box)
    polygons = start_polygons(points.numpy())
    unit = torch.rand(samples, len(low), generator=generator).double()
    x = low + unit * (high - low)
    for k, sigma in enumerate((0.05, 0.2)):
        some = slice(k * samples // 3, (k + 1) * samples // 3)
        rows = torch.randint(len(points), (len(x[some]),), generator=generator)
        offset = torch.randn(len(rows), len(low), generator=generator).double()
        x[some] = points[rows] + sigma * offset
    wanted = torch.from_numpy(polygon_field(x.numpy(), polygons))
    weight = 1 / (wanted.square().sum(1, keepdim=True) + 0.05**2)
    x, wanted, weight = (part.to(cloud) for part in (x, wanted, weight))

    optimizer = torch.optim.Adam(network.parameters(), learning_rate, betas=(0.9, 0.99), fused=True)
    recent = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (0.01 + 0.99 * (1 + np.cos(np.pi * step / steps)) / 2)
        rows = torch.randint(samples, (batch,), generator=generator).to(cloud.device)
        loss = ((network(x[rows]) - wanted[rows]).square() * weight[rows]).sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step >= 0.9 * steps:
            recent.append(float(loss.detach()))
    return float(np.sqrt(np.mean(recent))) if recent else float("nan")
