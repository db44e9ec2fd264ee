"""The sample network: level-set points as functions of the network's parameters (Section 2.2).

    p(theta) = p - J^T (J J^T)^-1 [F(p; theta) - c]                                        (Eq. 9)

J = D_xF(p; theta_0) and c are constants of the sample, so one evaluation of F is all that is added
to a training step, and no second derivative of the network is ever needed.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from levelset_ext import ops
from levelset_ext.compiled.mlp import in_transform
from levelset_ext.field import Field, as_field, evaluate, full_precision
from levelset_ext.result import LevelSetResult

__all__ = ["SampleNetwork", "sample_network"]


def sample_network(
    fn: Field,
    result: LevelSetResult,
    *,
    frozen: bool = False,
    direction: Tensor | None = None,
) -> Tensor:
    """p(theta) for the points of a result.

    Args:
        fn: the network the points were found with: a module (evaluated as its eval-mode clone, see
            :func:`levelset_ext.field.evaluation_copy`) or a callable.
        result: what a sampler returned; its points, values and Jacobian are constants here.
        frozen: False gives ``p + J+ (F.detach() - F)``: the value is ``result.points`` to the bit
            at any theta, and the gradient that of Eq. 8 at the current theta. True is Eq. 9 itself
            with c = ``result.values``: the value follows theta to first order.
        direction: v, the shape of the points, for l = 1: p moves along v instead of along the
            gradient, ``p - v (F - c) / (D_xF . v)``, as a ray hit moves along its ray.

    Returns:
        (n, *event), differentiable in the parameters of ``fn`` to any order that F is; second
        derivatives are those of Eq. 9 with J held. Rows that cannot move (not finite, D_xF without
        full rank, v tangent to the level set) are constants. F is not evaluated at rows that are
        not finite; parameters get a gradient, if only zeros, also from a batch without a good row.

    Raises:
        RuntimeError: ``fn`` at these points has no graph although gradients are enabled, so that
            p(theta) would silently be a constant (not seen inside a transform of torch.func); or a
            tensor of ``result`` or ``direction`` asks for a gradient that this function does not
            give.
        ValueError: ``direction`` has another shape than the points, or l > 1; ``fn`` has another l
            than the result.
    """
    return move_points(as_field(fn), result, frozen, direction)


class SampleNetwork(nn.Module):
    """:func:`sample_network` as a module: ``SampleNetwork(net)(result)`` is p(theta).

    The network is a submodule, so its parameters are this module's parameters.
    """

    def __init__(self, network: nn.Module, *, frozen: bool = False) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network: expected an nn.Module, got {type(network).__name__}")
        self.network = network
        self.frozen = frozen

    def forward(self, result: LevelSetResult, direction: Tensor | None = None) -> Tensor:
        return sample_network(self.network, result, frozen=self.frozen, direction=direction)


def move_points(
    field: Field, result: LevelSetResult, frozen: bool = False, direction: Tensor | None = None
) -> Tensor:
    """:func:`sample_network` of a field that :func:`as_field` has prepared already."""
    if not isinstance(result, LevelSetResult):
        raise TypeError(
            f"result: expected the LevelSetResult of a sampler, got {type(result).__name__}"
        )
    constants: dict[str, Any] = {
        "result.points": result.points,
        "result.values": result.values,
        "result.jacobian": result.jacobian,
        "direction": direction,
    }
    for name, tensor in constants.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{name}: expected a constant, as p(theta) has no gradient with respect to it; "
                "detach it"
            )
    points = result.points
    finite = _finite_rows(result)
    jacobian = result.jacobian.flatten(2)
    # A tape is no function that torch.compile or a transform of torch.func could look into.
    usable = not torch.compiler.is_compiling() and not in_transform() and torch.is_grad_enabled()
    if usable and result.tape is not None and result.tape.fits(field):
        values = result.tape.values()
    else:
        # Frozen, p moves by F - c, where near theta_0 nothing but rounding would be left.
        with full_precision(points) if frozen else nullcontext():
            values = evaluate(field, _stand_in(points, finite)).to(points.dtype)
    if values.shape != result.values.shape:
        raise ValueError(
            f"fn: expected the l = {result.values.shape[1]} outputs of result.values, "
            f"got {values.shape[1]}; was the result found with another network?"
        )
    # Inside vmap a tensor does not tell of a graph that it has outside.
    if torch.is_grad_enabled() and not values.requires_grad and not in_transform():
        raise RuntimeError(
            "fn: expected an output with a gradient with respect to parameters; got one without a "
            "graph (all parameters frozen, a detach inside?); use torch.no_grad() if that is meant"
        )
    residual = values - (result.values if frozen else values.detach())
    if direction is None:
        step = ops.pinv_apply(jacobian, residual)
    else:
        step = _along(jacobian, residual, _check_direction(direction, result))
    if not frozen:
        # The step is 0, but of either sign: p - (+0) also keeps the sign of a zero in p.
        step = step - step.detach()
    return torch.where(_as_mask(finite, points), points - step.view(points.shape), points)


def _finite_rows(result: LevelSetResult) -> Tensor:
    """(n,) bool; a row that is not finite would put 0 * NaN into the parameters' gradients."""
    finite = torch.isfinite(result.points.flatten(1)).all(1)
    finite = finite & torch.isfinite(result.values).all(1)
    return finite & torch.isfinite(result.jacobian.flatten(1)).all(1)


def _as_mask(rows: Tensor, points: Tensor) -> Tensor:
    return rows.view(-1, *(1,) * (points.dim() - 1))


def _stand_in(points: Tensor, finite: Tensor) -> Tensor:
    """Where F is evaluated: at the points, and for a row that is not finite once more at the first
    that is (at 0 if there is none). The shape does not depend on the data, so that the graph can be
    compiled, and parameters get a gradient, if only zeros, also from a batch without a good row."""
    if points.shape[0] == 0:
        return points
    first = points.index_select(0, finite.to(torch.int8).argmax(0, keepdim=True))
    first = torch.where(finite.any(), first, 0.0)
    return torch.where(_as_mask(finite, points), points, first)


def no_samples(field: Field, x: Tensor) -> Tensor:
    """The scalar 0 with the graph of the network behind it, whatever the network computes and
    whatever x (n, *event) holds."""
    x = x.detach()
    values = evaluate(field, _stand_in(x, torch.isfinite(x.flatten(1)).all(1))[:1])
    return torch.where(torch.zeros_like(values, dtype=torch.bool), values, 0.0).sum()


def _check_direction(direction: Tensor, result: LevelSetResult) -> Tensor:
    if result.values.shape[1] != 1:
        raise ValueError(
            f"direction: expected a network with l = 1 output, got l = {result.values.shape[1]}; "
            "with more, one direction cannot hold every output"
        )
    if direction.shape != result.points.shape:
        raise ValueError(
            f"direction: expected the shape of result.points, {tuple(result.points.shape)}, "
            f"got {tuple(direction.shape)}"
        )
    return direction.to(result.points.dtype).flatten(1)


def _along(jacobian: Tensor, residual: Tensor, v: Tensor) -> Tensor:
    """v (F - c) / (D_xF . v), with rows whose v is tangent to the level set left where they are."""
    gradient = jacobian[:, 0]
    slope = (gradient * v).sum(1, keepdim=True)
    lengths = torch.linalg.vector_norm(gradient, dim=1, keepdim=True) * torch.linalg.vector_norm(
        v, dim=1, keepdim=True
    )
    # The rank rule of the ops, for the 1 x 1 matrix D_xF . v measured against its largest value.
    crosses = slope.abs() > ops.rank_tolerance(v.dtype) * lengths
    return torch.where(crosses, v / torch.where(crosses, slope, 1.0), 0.0) * residual
