"""Each op once more in plain torch, float64 and by the shortest formula."""

from __future__ import annotations

import torch
from torch import Tensor


def pinv_apply(jacobian: Tensor, residual: Tensor) -> Tensor:
    inverse = torch.linalg.pinv(jacobian.double())
    return (inverse @ residual.double()[:, :, None])[:, :, 0]


def pinv_adjoint(jacobian: Tensor, gradient: Tensor) -> Tensor:
    inverse = torch.linalg.pinv(jacobian.double())
    return (inverse.mT @ gradient.double()[:, :, None])[:, :, 0]


def newton_update(
    points: Tensor,
    values: Tensor,
    jacobian: Tensor,
    level: Tensor | float = 0.0,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    max_step: float = float("inf"),
) -> Tensor:
    """One step of Eq. 4 for rows that all run and all have full rank. Differentiable."""
    gram = jacobian @ jacobian.mT
    step = (jacobian.mT @ torch.linalg.solve(gram, (values - level)[:, :, None]))[:, :, 0]
    if max_step < float("inf"):
        length = torch.linalg.vector_norm(step, dim=1, keepdim=True)
        step = torch.where(length > max_step, step * (max_step / length), step)
    target = points - step
    if lower is not None:
        target = torch.maximum(target, lower)
    return target if upper is None else torch.minimum(target, upper)


def nearest_distance(x: Tensor, cloud: Tensor) -> tuple[Tensor, Tensor]:
    difference = x.double()[:, None] - cloud.double()[None]
    return torch.linalg.vector_norm(difference, dim=2).min(1)
