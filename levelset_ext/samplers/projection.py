"""Projection of points onto a level set: Newton, and two slower methods to compare it with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from levelset_ext import ops
from levelset_ext.compiled import MLP, compiled_field
from levelset_ext.field import Field, as_constant_field, check_points, full_precision, values_of
from levelset_ext.ops import level_rows
from levelset_ext.result import LevelSetResult, Status
from levelset_ext.samplers.state import SamplerState, box_bounds, check_limits
from levelset_ext.samplers.uncompiled import uncompiled

METHODS = ("newton", "gradient_descent", "lbfgs")


@uncompiled
def project(
    fn: Field,
    x: Tensor,
    level: Tensor | float = 0.0,
    max_iters: int = 20,
    tol: float = 1e-5,
    method: str = "newton",
    *,
    max_step: float = math.inf,
    box: tuple[Any, Any] | None = None,
    step_size: float = 0.1,
    history: int = 8,
) -> LevelSetResult:
    """Moves points to the level set F = c.

    Args:
        fn: module or callable (n, *event) -> (n,) or (n, l); rows must not depend on each other.
        x: starting points, (n, *event), floating point. Not modified.
        level: c; a scalar, (l,), (n,) when l = 1, or (n, l), which wins where shapes coincide.
        max_iters: most updates of a row, >= 0.
        tol: a row is done when max_j |F_j - c_j| <= tol, in the units of F.
        method: "newton" is the generalized Newton iteration of Eq. 4. "gradient_descent" takes
            steps of ``step_size`` along -grad 1/2 |F - c|^2. "lbfgs" minimises the same objective,
            every row with its own history and backtracking line search.
        max_step: longest single step, an L2 length in the units of x.
        box: (lower, upper) that points are clamped to after every step; scalars or the event shape.
        step_size: of "gradient_descent".
        history: pairs kept by "lbfgs".

    Returns:
        A detached :class:`~levelset_ext.LevelSetResult`. ``values`` and ``jacobian`` are those of
        the returned points, also for rows that did not converge. A finished row is not evaluated
        again. ``torch.autocast`` around the call is left, since reduced precision gets to no
        ``tol``; a callable may enter it itself. A network that is a multilayer perceptron runs as
        its compiled field, see :class:`~levelset_ext.networks.MLP`.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    x = check_points("x", x)
    max_iters = check_limits(max_iters, tol)
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if not max_step > 0:
        raise ValueError(f"max_step: expected a length > 0, got {max_step!r}")
    if not (step_size > 0 and math.isfinite(step_size)):
        raise ValueError(f"step_size: expected a finite number > 0, got {step_size!r}")
    if history < 1:
        raise ValueError(f"history: expected at least 1 pair, got {history!r}")
    # Tensors made in inference mode could not enter the sample network afterwards.
    keep = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.no_grad(), full_precision(x):
        compiled = compiled_field(fn, x) if method == "newton" else None
        if compiled is not None:
            return compiled.newton(
                x,
                level_rows(level, len(x), compiled.outputs, x),
                max_iters,
                tol,
                max_step,
                box_bounds(box, x),
                keep and isinstance(fn, MLP),
            )
        field = as_constant_field(fn)
        state = SamplerState(x, level)
        bounds = box_bounds(box, x)
        if method == "newton":
            _newton(field, state, max_iters, tol, max_step, bounds)
        elif method == "gradient_descent":
            _gradient_descent(field, state, max_iters, tol, max_step, bounds, step_size)
        else:
            _lbfgs(field, state, max_iters, tol, max_step, bounds, history)
        return state.finish(tol)


def project_from(
    fn: Field, start: LevelSetResult, level: Tensor | float, max_iters: int, tol: float
) -> LevelSetResult:
    """:func:`project` from the points of a result, whose F and D_xF are not evaluated again.

    Not for users: a result that was found before an optimizer step looks as good as one of now.
    """
    max_iters = check_limits(max_iters, tol)
    with torch.inference_mode(False), torch.no_grad(), full_precision(start.points):
        state = SamplerState(start.points, level, start)
        _newton(as_constant_field(fn), state, max_iters, tol, math.inf, (None, None))
        return state.finish(tol)


Bounds = tuple[Tensor | None, Tensor | None]


def _newton(
    field: Field,
    state: SamplerState,
    max_iters: int,
    tol: float,
    max_step: float,
    bounds: Bounds,
) -> None:
    """Eq. 4 on the running rows. The update decides which rows are done, from the values it was
    given anyway, so the last evaluation of a row is the one that found it converged."""
    lower, upper = bounds
    for iteration in range(max_iters + 1):
        values, jacobian = state.evaluate(field)
        if iteration == max_iters:
            break
        ops.newton_update_(
            state.points,
            state.status,
            values,
            jacobian,
            state.level,
            index=None if state.all_running() else state.rows,
            lower=lower,
            upper=upper,
            tol=tol,
            max_step=max_step,
        )
        state.count_update()
        state.compact()
        if state.rows.shape[0] == 0:
            break


def _clamp(points: Tensor, bounds: Bounds) -> Tensor:
    lower, upper = bounds
    if lower is not None:
        points = torch.maximum(points, lower)
    return points if upper is None else torch.minimum(points, upper)


def _judge(state: SamplerState, values: Tensor, gradient: Tensor, tol: float) -> None:
    """Ends running rows that are on the level set, are not finite or have nowhere to go."""
    residual = (values - state.of_rows(state.level)).abs().amax(1)
    slope = gradient.abs().amax(1)
    near = residual <= tol  # where Newton does not look at the gradient either
    finite = torch.isfinite(residual) & torch.isfinite(state.of_rows(state.points)).all(1)
    status = torch.full_like(state.rows, int(Status.RUNNING), dtype=torch.int8)
    status[slope == 0] = int(Status.RANK_DEFICIENT)
    status[near] = int(Status.CONVERGED)
    status[~(finite & (near | torch.isfinite(slope)))] = int(Status.NON_FINITE)
    state.status[state.rows] = status
    state.compact()


def _cap(step: Tensor, max_step: float) -> Tensor:
    if math.isinf(max_step):
        return step
    length = torch.linalg.vector_norm(step, dim=1, keepdim=True)
    return step * (max_step / length).clamp(max=1.0).nan_to_num(nan=1.0)


def _objective_gradient(state: SamplerState, values: Tensor, jacobian: Tensor) -> Tensor:
    """Gradient of 1/2 |F - c|^2 of the running rows: J^T (F - c), (m, d)."""
    residual = values - state.of_rows(state.level)
    return (jacobian * residual[:, :, None]).sum(1)  # not einsum, which autocast would round


def _gradient_descent(
    field: Field,
    state: SamplerState,
    max_iters: int,
    tol: float,
    max_step: float,
    bounds: Bounds,
    step_size: float,
) -> None:
    for iteration in range(max_iters + 1):
        values, jacobian = state.evaluate(field)
        gradient = _objective_gradient(state, values, jacobian)
        rows = state.rows
        _judge(state, values, gradient, tol)
        if iteration == max_iters or state.rows.shape[0] == 0:
            break
        kept = state.status[rows] == Status.RUNNING
        step = _cap(-step_size * gradient[kept], max_step)
        state.points[state.rows] = _clamp(state.points[state.rows] + step, bounds)
        state.count_update()


def _lbfgs(
    field: Field,
    state: SamplerState,
    max_iters: int,
    tol: float,
    max_step: float,
    bounds: Bounds,
    history: int,
) -> None:
    """Limited-memory BFGS, one independent problem per row, with Armijo backtracking by halves."""
    n, d = state.points.shape
    moves = state.points.new_zeros(history, n, d)
    changes = state.points.new_zeros(history, n, d)
    gradients = state.points.new_zeros(n, d)
    used = 0
    last_points = state.points.clone()
    for iteration in range(max_iters + 1):
        values, jacobian = state.evaluate(field)
        gradient = _objective_gradient(state, values, jacobian)
        if iteration > 0:
            rows, slot = state.rows, (iteration - 1) % history
            moves[slot, rows] = state.points[rows] - last_points[rows]
            changes[slot, rows] = gradient - gradients[rows]
            used = min(iteration, history)
        gradients[state.rows] = gradient
        _judge(state, values, gradient, tol)
        if iteration == max_iters or state.rows.shape[0] == 0:
            break
        rows = state.rows
        order = [(iteration - 1 - k) % history for k in range(used)]  # newest first
        direction = _two_loop(gradients[rows], moves[:, rows], changes[:, rows], order)
        last_points[rows] = state.points[rows]
        target = _line_search(field, state, gradients[rows], _cap(direction, max_step), bounds)
        stuck = (target == state.points[rows]).all(1)
        state.points[rows] = target
        state.status[rows[stuck]] = int(Status.STALLED)
        state.count_update()
        state.compact()
        if state.rows.shape[0] == 0:
            break


def _two_loop(gradient: Tensor, moves: Tensor, changes: Tensor, order: list[int]) -> Tensor:
    """-H g for every row, (m, d). Pairs without positive curvature are left out of their row."""
    dot = (moves * changes).sum(2, keepdim=True)
    curved = dot > 1e-12 * (changes * changes).sum(2, keepdim=True)
    rho = torch.where(curved, 1.0 / torch.where(curved, dot, 1.0), 0.0)
    q = gradient.clone()
    alphas = {}
    for k in order:
        alphas[k] = rho[k] * (moves[k] * q).sum(1, keepdim=True)
        q = q - alphas[k] * changes[k]
    # The first direction has the length of a Newton step on 1/2 |F - c|^2 for |J| = 1.
    scale = torch.ones_like(q[:, :1])
    for k in reversed(order):
        squares = (changes[k] * changes[k]).sum(1, keepdim=True)
        scale = torch.where(curved[k], dot[k] / torch.where(squares > 0, squares, 1.0), scale)
    q = q * scale
    for k in reversed(order):
        beta = rho[k] * (changes[k] * q).sum(1, keepdim=True)
        q = q + moves[k] * (alphas[k] - beta)
    descends = (q * gradient).sum(1, keepdim=True) > 0
    return -torch.where(descends, q, gradient)


def _line_search(
    field: Field, state: SamplerState, gradient: Tensor, direction: Tensor, bounds: Bounds
) -> Tensor:
    """Points of the running rows after the longest of 1, 1/2, 1/4, ... that descends enough; a row
    for which none does stays. Only rows still searching are evaluated."""
    points, level = state.points[state.rows], state.level[state.rows]
    start = 0.5 * (state.values[state.rows] - level).square().sum(1)
    slope = (gradient * direction).sum(1)
    target = points.clone()
    searching = torch.arange(points.shape[0], device=points.device)
    length = 1.0
    for _ in range(30):
        trial = _clamp(points[searching] + length * direction[searching], bounds)
        values = values_of(field, trial.view(-1, *state.event))
        objective = 0.5 * (values - level[searching]).square().sum(1)
        enough = objective <= start[searching] + 1e-4 * length * slope[searching]
        target[searching[enough]] = trial[enough]
        searching = searching[~enough]
        if searching.shape[0] == 0:
            break
        length *= 0.5
    return target
