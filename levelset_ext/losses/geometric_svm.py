"""The geometric SVM loss, Eq. 11: the soft-margin SVM with the margin measured in input space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from levelset_ext.field import Field, as_field, as_rows, check_points
from levelset_ext.margin import as_int64, check_labels, margin
from levelset_ext.result import LevelSetResult
from levelset_ext.sample_network import no_samples, sample_network
from levelset_ext.samplers.at_points import level_points
from levelset_ext.samplers.projection import project_from

__all__ = ["GeometricSvmLoss", "SvmSamples", "geometric_svm", "svm_samples"]

NORMS = {"linf": torch.inf, "l2": 2.0}


@dataclass(frozen=True)
class SvmSamples:
    """Projections of N examples: ``boundary`` p^0 of x on the level 0, and ``below`` p^-1 and
    ``above`` p^1 of p^0 on the levels -1 and 1. ``values`` (N,) is F at the examples."""

    boundary: LevelSetResult
    below: LevelSetResult
    above: LevelSetResult
    values: Tensor


class GeometricSvmLoss(NamedTuple):
    """Eq. 11 and its parts, scalars.

    total: what to call backward() on. hinge: the first sum. regularizer: the second, with lambda.
    margin: mean of Delta. used: share of the examples that take part. All but total are detached.
    """

    total: Tensor
    hinge: Tensor
    regularizer: Tensor
    margin: Tensor
    used: Tensor


def binary_field(fn: Field) -> Field:
    """The scalar F of a binary network: its one output, or f_1 - f_0 of its two."""
    field = as_field(fn)

    def scalar(x: Tensor) -> Tensor:
        logits = as_rows(field(x))
        if logits.dim() == 1:
            return logits
        if logits.dim() == 2 and logits.shape[1] in (1, 2):
            ones = torch.ones(logits.shape[0], dtype=torch.int64, device=logits.device)
            return margin(logits, ones, check=False)
        raise ValueError(
            f"fn: expected a binary network, (n,), (n, 1) or (n, 2), got {tuple(logits.shape)}"
        )

    return scalar


def svm_samples(fn: Field, x: Tensor, max_iters: int = 20, tol: float = 1e-5) -> SvmSamples:
    """Newton projections of the examples for :func:`geometric_svm`; arguments as of
    :func:`levelset_ext.project`."""
    x = check_points("x", x)
    field = binary_field(fn)
    start = level_points(field, x)
    boundary = project_from(field, start, 0.0, max_iters, tol)
    # Both sides in one call: the evaluations of a small batch cost more than its rows.
    n = len(x)
    levels = torch.ones(2 * n, dtype=x.dtype, device=x.device)
    levels[:n] = -1
    both = LevelSetResult.cat([boundary, boundary])
    sides = project_from(field, both, levels, max_iters, tol)
    return SvmSamples(boundary, sides[:n], sides[n:], start.values[:, 0])


def geometric_svm(
    fn: Field,
    x: Tensor,
    y: Tensor,
    samples: SvmSamples | None = None,
    *,
    alpha: float = -1.0,
    lam: float = 0.001,
    distance: str = "linf",
    max_iters: int = 20,
    tol: float = 1e-5,
) -> GeometricSvmLoss:
    """Eq. 11: the hinge loss of distances, and a reward for a wide margin.

    1/N sum_j max{0, 1 - sign(y_j F(x_j)) d(x_j, p_j) / Delta_j}  +  lam/N sum_j Delta_j^alpha

    Delta_j = min{d(p_j, S_1), d(p_j, S_-1)} is the width of the margin where x_j meets the
    boundary. With an affine F, alpha = -2 and "l2" this is the linear soft-margin SVM, Eq. 10.

    Args:
        fn: binary network: one output F, or two logits with F = f_1 - f_0.
        x: examples, (N, *event); constants here.
        y: labels, (N,) integers: 0 and 1, or -1 and 1.
        samples: of :func:`svm_samples` for these examples; None finds them.
        alpha: exponent < 0 of the regularizer.
        lam: lambda >= 0; a schedule passes another number every step.
        distance: "linf" or "l2", for d everywhere.
        max_iters, tol: of the projections, if ``samples`` is None.

    Returns:
        :class:`GeometricSvmLoss`. The gradient reaches the parameters through p^0, p^-1 and p^1.
        A projection that did not converge stands on the level it reached. An example is left out
        of both sums, not of N, where p^0 or both of p^1 and p^-1 cannot move (not finite, no
        gradient) or where Delta is 0. Without any example left ``total`` is 0, with zeros as
        gradients.

    Raises:
        TypeError, ValueError: an argument is not as described, a label is out of range.
    """
    x = check_points("x", x).detach()
    n = x.shape[0]
    if y.shape != (n,):
        raise ValueError(f"y: expected shape (N,) = ({n},), got {tuple(y.shape)}")
    check_labels(y, 1, "y")
    if not alpha < 0:
        raise ValueError(f"alpha: expected an exponent < 0, got {alpha!r}")
    if not lam >= 0:
        raise ValueError(f"lam: expected a number >= 0, got {lam!r}")
    if distance not in NORMS:
        raise ValueError(f"distance: expected one of {', '.join(NORMS)}, got {distance!r}")
    field = binary_field(fn)
    found = svm_samples(field, x, max_iters, tol) if samples is None else samples
    if len(found.boundary) != n:
        raise ValueError(f"samples: expected those of N = {n} rows, got {len(found.boundary)}")

    sides = [_side(found.boundary, side, NORMS[distance]) for side in (found.below, found.above)]
    used = found.boundary.usable & (sides[0] | sides[1]) & torch.isfinite(found.values)
    rows = torch.nonzero(used).squeeze(1)
    share = used.to(x.dtype).mean() if n else x.new_zeros(())
    if rows.shape[0] == 0:
        zero = no_samples(field, x)
        nothing = zero.detach()
        return GeometricSvmLoss(zero, nothing, nothing, torch.full_like(nothing, torch.nan), share)

    # One evaluation of the network for all three levels. Rows that cannot move stay constants.
    three = [r[rows] for r in (found.boundary, found.below, found.above)]
    p, p_below, p_above = sample_network(field, LevelSetResult.cat(three)).split(rows.shape[0])
    widths = [
        _width(side[rows], p - q, distance)
        for side, q in zip(sides, (p_below, p_above), strict=True)
    ]
    delta = torch.minimum(*widths)
    positive = as_int64(y.to(x.device)[rows]) > 0
    sign = torch.sign(found.values[rows]) * torch.where(positive, 1.0, -1.0)
    ratio = _norm(x[rows] - p, distance) / delta
    hinge = (1 - sign.to(x.dtype) * ratio).clamp(min=0).sum() / n
    regularizer = lam * delta.pow(alpha).sum() / n
    return GeometricSvmLoss(
        total=hinge + regularizer,
        hinge=hinge.detach(),
        regularizer=regularizer.detach(),
        margin=delta.detach().mean(),
        used=share,
    )


def _side(boundary: LevelSetResult, side: LevelSetResult, norm: float) -> Tensor:
    """(N,) bool, rows of which this side measures a width."""
    apart = torch.linalg.vector_norm((side.points - boundary.points).flatten(1), norm, dim=1)
    return side.usable & torch.isfinite(apart) & (apart > 0)


def _width(measured: Tensor, offset: Tensor, distance: str) -> Tensor:
    """Norm of the rows that are measured; infinite, with zeros as gradients, for the others."""
    # Before the norm, as the gradient of the norm of a row with NaN is NaN, even times zero.
    offset = torch.where(measured[:, None], offset.flatten(1), 1.0)
    return torch.where(measured, _norm(offset, distance), torch.inf)


def _norm(offset: Tensor, distance: str) -> Tensor:
    """Norm of every row. amax shares its gradient among coordinates of equal size."""
    offset = offset.flatten(1)
    return offset.abs().amax(1) if distance == "linf" else torch.linalg.vector_norm(offset, dim=1)
