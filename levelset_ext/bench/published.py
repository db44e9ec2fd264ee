"""The algorithms of the paper's public code, rendered in plain torch: what they evaluate, and when
they stop, is theirs; the lines are not. They are the baseline of the comparisons.

Where a choice had to be made it went in their favour: they get the same module of Linear layers as
everybody (theirs has convolutions with kernel 1), print nothing, and take distances to a cloud in
chunks, without keeping a graph of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_CLAMP = 1e-6  # under |grad|^2, as published


def newton(
    module: nn.Module, x: Tensor, level: Tensor, max_iters: int, tol: float
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Newton for l = 1.

    Every iteration evaluates all rows: a forward with a graph, and a backward of the sum of the
    outputs that computes the gradients of x *and of all parameters*, which are thrown away: per
    layer three products instead of two. It goes on, with all rows, until the worst row of the batch
    is within ``tol`` or ``max_iters`` steps are done.

    Returns:
        points (n, d), F (n, 1), D_xF (n, 1, d), and the number of evaluations of the batch.
    """
    point = x.detach().clone().requires_grad_()
    gradient = torch.zeros_like(x)
    for evaluation in range(1, max_iters + 2):
        module.zero_grad()
        values = module(point)
        values.sum().backward()
        assert point.grad is not None
        gradient = point.grad
        residual = values.detach() - level
        if evaluation > max_iters or not bool(residual.abs().max() > tol):
            break
        squares = gradient.square().sum(1, keepdim=True).clamp_min(_CLAMP)
        point = (point.detach() - residual * gradient / squares).requires_grad_()
    module.zero_grad()
    return point.detach(), values.detach(), gradient[:, None].detach(), evaluation


def false_position(
    margin: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, max_iters: int, tol: float
) -> tuple[Tensor, Tensor, int]:
    """Regula falsi on the segments from start to end.

    Every iteration evaluates all rows three times: at both ends of the bracket, although their
    values are known, and at the point between. It goes on until the worst row is within ``tol``, or
    after ``max_iters`` + 1 iterations, and ends with a forward and a backward for D_xF.

    Returns:
        points (n, *event), F (n,), and the number of forwards of the batch.
    """
    shape = (-1, *(1,) * (start.dim() - 1))
    with torch.no_grad():
        sign = margin(start).sign()
        left = torch.zeros(len(start), dtype=start.dtype, device=start.device)
        right = torch.ones_like(left)
        forwards = 1
        for _ in range(max_iters + 1):
            at_right = margin(end + right.view(shape) * (start - end))
            at_left = margin(end + left.view(shape) * (start - end))
            between = (left * at_right - right * at_left) / (at_right - at_left)
            point = end + between.view(shape) * (start - end)
            values = margin(point)
            forwards += 3
            right = torch.where(sign * values > 0, between, right)
            left = torch.where(sign * values < 0, between, left)
            if not bool((values.abs() > tol).any()):
                break
    point = point.detach().requires_grad_()
    values = margin(point)
    values.sum().backward()
    return point.detach(), values.detach(), forwards + 1


def sample_network(module: nn.Module, points: Tensor, values: Tensor, jacobian: Tensor) -> Tensor:
    """Eq. 9 for l = 1: one more forward with a graph at the points found."""
    gradient = jacobian[:, 0]
    squares = gradient.square().sum(1, keepdim=True).clamp_min(_CLAMP)
    return points - (module(points) - values) * gradient / squares


def squared_distance(x: Tensor, cloud: Tensor, rows: int = 512) -> Tensor:
    """Squared distance to the nearest cloud point from the matrix |x|^2 + |y|^2 - 2 x.y, some rows
    of it at a time. Differentiable in x, through the smallest entry of each row alone."""
    squares = cloud.square().sum(1)
    index = []
    with torch.no_grad():
        for part in x.split(rows):
            matrix = part.square().sum(1, keepdim=True) + squares - 2 * (part @ cloud.t())
            index.append(matrix.min(1).indices)
    nearest = cloud[torch.cat(index)]
    return x.square().sum(1) + nearest.square().sum(1) - 2 * (x * nearest).sum(1)
