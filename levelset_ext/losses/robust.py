"""The robust loss, Eq. 12: keep the decision boundary at a distance from correct examples, and pull
it over wrong ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from levelset_ext.field import Field, as_field
from levelset_ext.result import LevelSetResult
from levelset_ext.sample_network import no_samples, sample_network
from levelset_ext.samplers.boundary import BoundarySamples, margin_field

__all__ = ["DISTANCES", "RobustLoss", "boundary_distance", "robust"]

DISTANCES = ("rho", "linf", "l2", "l1", "along")


class RobustLoss(NamedTuple):
    """Eq. 12 and its parts, scalars.

    total: what to call backward() on. correct, wrong: the parts of it that come from examples on
    the right and on the wrong side, detached. distance: mean signed distance of the examples that
    have a boundary point, NaN if none has, detached.
    """

    total: Tensor
    correct: Tensor
    wrong: Tensor
    distance: Tensor


def robust(
    fn: Field,
    x: Tensor,
    y: Tensor,
    samples: BoundarySamples,
    *,
    eps: float | Tensor | tuple[float, float] = 0.4,
    lam: float | Tensor | tuple[float, float] = 1.0,
    distance: str = "rho",
) -> RobustLoss:
    """Eq. 12:  1/N sum_j lam_j max{0, eps_j - sign(F^y(x_j)) d(x_j, p_j(theta))}.

    Args:
        fn: the classifier, as for :func:`levelset_ext.samplers.find_boundary`.
        x, y: the batch of N examples that ``samples`` were found for. x is a constant here.
        samples: boundary points of the examples that have one; the others add 0 to the sum.
        eps: target distances eps_j >= 0: a number, (N,), or a pair for correct and wrong examples.
            The gradient of a wrong example does not depend on its eps.
        lam: weights lam_j: a number, (N,), or a pair for correct and wrong examples.
        distance: d of :func:`boundary_distance`; the paper's is "rho". With "along" the points move
            along the line from their example, and not along the gradient: what is controlled is
            where the boundary cuts the line on which the point was found. Its gradient is divided
            by the slope of F on that line, which varies far less from point to point than
            max_i |D_xF_i|.

    Returns:
        :class:`RobustLoss`. The gradient reaches the parameters through p(theta) alone: signs, x
        and the points are constants. Without any boundary point ``total`` is 0, with zeros as
        gradients.

    Raises:
        ValueError: samples of another batch, a distance that is not there, eps or lam of another
            shape or below 0.
    """
    if not isinstance(samples, BoundarySamples):
        raise TypeError(
            f"samples: expected the BoundarySamples of find_boundary, got {type(samples).__name__}"
        )
    n = x.shape[0]
    if y.shape != (n,) or samples.margins.shape != (n,):
        raise ValueError(
            f"samples: expected those of the batch x, y with N = {n}; got labels "
            f"{tuple(y.shape)} and samples of N = {samples.margins.shape[0]}"
        )
    correct = samples.margins > 0
    targets = _per_example("eps", eps, correct, x)[samples.rows]
    weights = _per_example("lam", lam, correct, x)[samples.rows]
    field = as_field(fn)
    if len(samples) == 0:
        if distance not in DISTANCES:
            raise ValueError(f"distance: expected one of {', '.join(DISTANCES)}, got {distance!r}")
        zero = no_samples(field, x)
        nothing = zero.detach()
        return RobustLoss(zero, nothing, nothing, torch.full_like(nothing, torch.nan))
    labels = y.to(x.device)[samples.rows]
    centres = x.detach()[samples.rows]
    direction = samples.result.points - centres if distance == "along" else None
    points = sample_network(margin_field(field, labels), samples.result, direction=direction)
    d = boundary_distance(centres, points, samples.result, distance)
    signed = torch.where(samples.correct, d, -d)
    terms = weights * (targets - signed).clamp(min=0)
    with torch.no_grad():
        right = torch.where(samples.correct, terms, 0.0).sum() / n
    total = terms.sum() / n
    return RobustLoss(total, right, total.detach() - right, signed.detach().mean())


def boundary_distance(x: Tensor, points: Tensor, result: LevelSetResult, distance: str) -> Tensor:
    """How far examples are from their boundary points, (m,), differentiable in ``points``.

    Args:
        x, points: (m, *event).
        result: what the points are samples of; its Jacobian chooses the coordinate of "rho".
        distance: "rho" is |x_i - p_i| in the coordinate i in which |D_xF(p)| is largest; "linf",
            "l2" and "l1" are norms of x - p; "along" is that of "linf". "rho" <= "linf".
    """
    offset = (x - points).flatten(1)
    if distance == "rho":
        axis = result.jacobian[:, 0].flatten(1).abs().argmax(1, keepdim=True)
        return offset.gather(1, axis)[:, 0].abs()
    if distance in ("linf", "along"):
        # amax shares the gradient among coordinates at the same distance, of which a point that
        # was clamped to a box has many.
        return offset.abs().amax(1)
    if distance == "l2":
        return torch.linalg.vector_norm(offset, dim=1)
    if distance == "l1":
        return offset.abs().sum(1)
    raise ValueError(f"distance: expected one of {', '.join(DISTANCES)}, got {distance!r}")


def _per_example(
    name: str, value: float | Tensor | tuple[float, float], correct: Tensor, like: Tensor
) -> Tensor:
    n = correct.shape[0]
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ValueError(f"{name}: expected a pair (correct, wrong), got {value!r}")
        pair = torch.tensor(value, dtype=like.dtype, device=like.device)
        rows = torch.where(correct, pair[0], pair[1])
    else:
        rows = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
    if tuple(rows.shape) not in ((), (n,)):
        raise ValueError(
            f"{name}: expected a number, (N,) = ({n},) or a pair, got shape {tuple(rows.shape)}"
        )
    if not bool((rows >= 0).all()):
        raise ValueError(f"{name}: expected numbers >= 0, got {value!r}")
    return rows.expand(n)
