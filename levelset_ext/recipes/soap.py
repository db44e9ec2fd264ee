"""SOAP: Adam in the eigenbasis of Shampoo's two factors (Vyas et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def _largest_quotient(first: float, second: float) -> float:
    """What a running mean over the root of a running mean of squares can be at most, by Cauchy and
    Schwarz."""
    if first**2 >= second:
        return math.inf
    return (1 - first) / math.sqrt((1 - second) * (1 - first**2 / second))


class Soap(torch.optim.Optimizer):
    """An optimizer for small perceptrons, where a step of Adam leaves most of a gradient unused.

    With G the gradient of a matrix W (m, n), L and R running means of G G^T and G^T G, and U, V
    their eigenvectors, Adam's update is taken of U^T G V, and turned back. Columns of a hidden
    layer see strongly correlated inputs; in this basis they are about independent, which is what
    Adam's scaling of single numbers takes for granted. Other tensors than matrices get Adam.

    No entry of that update is larger than Adam could make it, which is lr for equal betas. In a
    basis that stands still none is; where a refreshment turns a direction of small gradients into
    one of larger ones, the mean square is that of the small ones for a while, and the quotient is
    not bounded by anything.

    A step costs ten products of matrices as large as the layers, and every ``refresh`` steps two QR
    factorisations each: little beside a batch of a thousand rows, much for layers of a thousand.

    Args:
        params: parameters.
        lr: step size.
        betas: decay of the mean gradient, and of its square.
        factor_decay: decay of L and R.
        refresh: steps between two refreshments of U and V by one step of subspace iteration.
        eps: added to the root of the mean square, in the units of the gradient. A batch may leave
            whole directions without a gradient; what rounding leaves of it there must not count.

    The state is part of ``state_dict()``; a step after loading it is the same to the bit.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        *,
        factor_decay: float = 0.95,
        refresh: int = 10,
        eps: float = 1e-8,
    ) -> None:
        if refresh < 1:
            raise ValueError(f"refresh: expected at least 1 step, got {refresh}")
        for name, decay in (
            ("betas", betas[0]),
            ("betas", betas[1]),
            ("factor_decay", factor_decay),
        ):
            if not 0 <= decay < 1:
                raise ValueError(f"{name}: expected decays from 0 to below 1, got {decay}")
        settings = {
            "lr": lr,
            "betas": betas,
            "factor_decay": factor_decay,
            "refresh": refresh,
            "eps": eps,
        }
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        matrix = parameter.dim() == 2
        if not state:
            state["done"] = 0
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
            if matrix:
                for side, size in zip(("left", "right"), parameter.shape, strict=True):
                    state[side] = parameter.new_zeros(size, size)
        state["done"] += 1
        if matrix:
            keep = group["factor_decay"]
            state["left"].lerp_(gradient @ gradient.T, 1 - keep)
            state["right"].lerp_(gradient.T @ gradient, 1 - keep)
            if state["done"] == 1:
                for side in ("left", "right"):
                    state[f"{side}_basis"] = torch.linalg.eigh(state[side])[1]

        def turned(x: Tensor) -> Tensor:
            return state["left_basis"].T @ x @ state["right_basis"] if matrix else x

        first, second = group["betas"]
        state["mean"].lerp_(gradient, 1 - first)
        seen = turned(gradient)
        state["square"].lerp_(seen * seen, 1 - second)
        scale = (state["square"] / (1 - second ** state["done"])).sqrt_().add_(group["eps"])
        most = _largest_quotient(first, second)
        move = turned(state["mean"]) / scale / (1 - first ** state["done"])
        move.clamp_(-most, most)
        if matrix:
            move = state["left_basis"] @ move @ state["right_basis"].T
        parameter.add_(move, alpha=-group["lr"])
        if matrix and state["done"] % group["refresh"] == 0:
            self._refresh(state)

    @staticmethod
    def _refresh(state: dict[str, Any]) -> None:
        """Follows the eigenvectors: a step of subspace iteration, largest eigenvalue first, as QR
        is most accurate for the columns it comes to first."""
        for axis, side in enumerate(("left", "right")):
            basis = state[f"{side}_basis"]
            image = state[side] @ basis
            order = (basis * image).sum(0).argsort(descending=True)
            state["square"] = state["square"].index_select(axis, order)
            state[f"{side}_basis"] = torch.linalg.qr(image[:, order])[0]
