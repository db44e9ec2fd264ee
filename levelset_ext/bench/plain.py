"""Eq. 4 in clean torch, as one writes it today: the competitors of the compiled loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from levelset_ext.bench.limits import PackedLinear
from levelset_ext.networks import ImplicitMLP

# x (m, d) -> F (m, l), D_xF (m, l, d)
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


class Found(NamedTuple):
    """points (n, d), F (n, l), D_xF (n, l, d) there, and how many rows were evaluated in all."""

    points: Tensor
    values: Tensor
    jacobian: Tensor
    rows: int


def by_autograd(module: nn.Module) -> Evaluate:
    """One forward, and one ``autograd.grad`` in x per output; no gradient of parameters."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            values = module(point)
            last = values.shape[1] - 1
            rows = [
                torch.autograd.grad(values[:, k].sum(), point, retain_graph=k < last)[0]
                for k in range(last + 1)
            ]
        return values.detach(), torch.stack(rows, 1)

    return evaluate


def by_vjp(module: nn.Module) -> Evaluate:
    """The same with ``torch.func.vjp``, which torch.compile takes without a break in the graph."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        values, pull = torch.func.vjp(module, x)[:2]
        rows = []
        for k in range(values.shape[1]):
            one = torch.zeros_like(values)
            one[:, k] = 1.0
            rows.append(pull(one)[0])
        return values.detach(), torch.stack(rows, 1).detach()

    return evaluate


def by_jacrev(module: nn.Module) -> Evaluate:
    """``vmap(jacrev)`` of the network at one point, its value on the side."""

    def one(x: Tensor) -> tuple[Tensor, Tensor]:
        value = module(x[None])[0]
        return value, value

    both = torch.func.vmap(torch.func.jacrev(one, has_aux=True))

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        jacobian, values = both(x)
        return values, jacobian

    return evaluate


class PackedEvaluate:
    """An :class:`ImplicitMLP` with ReLU by oneDNN's packed products, ReLU fused into them, and a
    backward to x written by hand with the transposed weights packed too."""

    def __init__(self, net: ImplicitMLP, rows: int) -> None:
        layers = [one for one in (*net.hidden, net.last) if isinstance(one, nn.Linear)]
        assert net.activation == "relu"
        self._skip = net.skip
        self._forward = [
            PackedLinear(one.weight, one.bias, rows, relu=one is not net.last) for one in layers
        ]
        # The gradient in x of the first layer and of the last is narrow: plain products do.
        self._last = net.last.weight.detach()
        self._first = layers[0].weight.detach()
        self._back = [PackedLinear(one.weight.detach().t(), None, rows) for one in layers[1:-1]]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = []
        h = x
        for index, layer in enumerate(self._forward[:-1]):
            if self._skip and index > 0:
                h = torch.cat([h, x], 1)
            h = layer(h)
            hidden.append(h)
        values = self._forward[-1](h)
        rows = []
        for k in range(values.shape[1]):
            delta = torch.where(hidden[-1] > 0, self._last[k], 0.0)
            gradient: Tensor | None = None
            for index in range(len(hidden) - 2, -1, -1):
                back = self._back[index](delta)
                if self._skip:
                    width = hidden[index].shape[1]
                    own = back[:, width:]
                    gradient = own if gradient is None else gradient + own
                    back = back[:, :width]
                delta = torch.where(hidden[index] > 0, back, 0.0)
            first = delta @ self._first
            rows.append(first if gradient is None else first + gradient)
        return values, torch.stack(rows, 1)


def step(jacobian: Tensor, residual: Tensor) -> Tensor:
    """J^T (J J^T)^-1 r; 0 for l = 1 where D_xF vanishes."""
    if jacobian.shape[1] == 1:
        gradient = jacobian[:, 0]
        squares = gradient.square().sum(1, keepdim=True)
        return gradient * torch.where(squares > 0, residual / squares, 0.0)
    gram = jacobian @ jacobian.mT
    return (jacobian.mT @ torch.linalg.solve_ex(gram, residual[:, :, None])[0])[:, :, 0]


def step_by_pinv(jacobian: Tensor, residual: Tensor) -> Tensor:
    """The same by ``torch.linalg.pinv``."""
    return (torch.linalg.pinv(jacobian) @ residual[:, :, None])[:, :, 0]


@torch.no_grad()
def newton_all_rows(
    evaluate: Evaluate,
    x: Tensor,
    level: Tensor,
    max_iters: int,
    tol: float,
    step: Callable[[Tensor, Tensor], Tensor] = step,
) -> Found:
    """Eq. 4, every row evaluated until all are done; rows that are done stay where they are."""
    for count in range(1, max_iters + 2):
        values, jacobian = evaluate(x)
        residual = values - level
        running = (residual.abs() > tol).any(1, keepdim=True)
        if count > max_iters or not bool(running.any()):
            break
        x = torch.where(running, x - step(jacobian, residual), x)
    return Found(x, values, jacobian, count * len(x))


@torch.no_grad()
def newton_compacted(
    evaluate: Evaluate, x: Tensor, level: Tensor, max_iters: int, tol: float
) -> Found:
    """Eq. 4, a row that is done not evaluated again."""
    points = x.clone()
    values, jacobian = evaluate(points)
    rows = (values - level).abs().gt(tol).any(1).nonzero()[:, 0]
    total = len(points)
    for _ in range(max_iters):
        if len(rows) == 0:
            break
        moved = points[rows] - step(jacobian[rows], values[rows] - level[rows])
        points[rows] = moved
        there, slope = evaluate(moved)
        values[rows], jacobian[rows] = there, slope
        total += len(rows)
        rows = rows[(there - level[rows]).abs().gt(tol).any(1)]
    return Found(points, values, jacobian, total)
