"""Points of curves that the package makes itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline


@dataclass(frozen=True)
class SyntheticCurve:
    """Noisy points of a closed curve, and the curve."""

    points: np.ndarray  # (n, 3) float64
    truth: np.ndarray  # (m, 3) float64, dense and in order; the last is joined to the first
    missing: int = 0  # truth[:missing] has no points


def synthetic_curve(
    points: int = 300,
    seed: int = 0,
    noise: float = 0.01,
    knots: int = 6,
    missing: float = 0.0,
) -> SyntheticCurve:
    """The paper's data (supplementary 2.4): a closed cubic spline through random points of
    [-1, 1]^3, sampled by farthest points, with Gaussian noise.

    Drawn again while two arcs of the spline come nearer to each other than 0.15: no cloud with such
    noise says which of them its points are on.

    Args:
        points: how many.
        seed: of every random choice.
        noise: standard deviation of every coordinate.
        knots: points that the spline goes through, evenly spaced in its parameter.
        missing: share of the spline, by its parameter, that has no points.
    """
    if points < 1 or knots < 3 or not noise >= 0 or not 0 <= missing < 1:
        raise ValueError(
            "synthetic_curve: expected points >= 1, knots >= 3, noise >= 0, 0 <= missing < 1, got "
            f"{points}, {knots}, {noise}, {missing}"
        )
    random = np.random.default_rng(seed)
    while True:
        through = random.uniform(-1, 1, (knots, 3))
        spline = CubicSpline(
            np.arange(knots + 1), np.concatenate([through, through[:1]]), bc_type="periodic"
        )
        truth = spline(np.linspace(0, knots, 20_001)[:-1])
        if _apart(truth[::50]) > 0.15:
            break
    first = round(missing * len(truth))
    seen = truth[first:]
    chosen = farthest_points(seen, points, int(random.integers(len(seen))))
    return SyntheticCurve(chosen + noise * random.standard_normal(chosen.shape), truth, first)


def farthest_points(candidates: np.ndarray, count: int, first: int) -> np.ndarray:
    """``count`` of the candidates, each as far as possible from all before it."""
    chosen = [first]
    distance = np.linalg.norm(candidates - candidates[first], axis=1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        away = np.linalg.norm(candidates - candidates[chosen[-1]], axis=1)
        distance = np.minimum(distance, away)
    return candidates[chosen]


def _apart(loop: np.ndarray) -> float:
    """Least distance between points of a closed polyline that are 0.3 or more apart along it."""
    edge = np.linalg.norm(np.roll(loop, -1, 0) - loop, axis=1)
    along = np.concatenate([[0.0], np.cumsum(edge)])
    between = np.abs(along[:-1, None] - along[None, :-1])
    between = np.minimum(between, along[-1] - between)
    distance = np.linalg.norm(loop[:, None] - loop[None], axis=2)
    return float(distance[between > 0.3].min(initial=np.inf))
