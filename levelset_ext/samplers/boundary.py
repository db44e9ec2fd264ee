"""Points on a classifier's decision boundary near given examples (Section 3.2).

A few steps of projected gradient descent on the margin F^j = f_j - max_{i != j} f_i carry an
example to the other side of the boundary of its class; between the last two steps lies a root,
which false position finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from levelset_ext.field import (
    Field,
    as_constant_field,
    as_field,
    as_rows,
    check_integer,
    check_points,
    jacobian_of,
    values_of,
)
from levelset_ext.margin import check_labels, margin
from levelset_ext.result import LevelSetResult
from levelset_ext.samplers.false_position import RowField, search_segments
from levelset_ext.samplers.state import check_limits
from levelset_ext.samplers.uncompiled import uncompiled

__all__ = ["BoundarySamples", "find_boundary", "margin_field"]


@dataclass(frozen=True)
class BoundarySamples:
    """Points of the decision boundary that belong to examples of a batch (x, y) of N.

    Attributes:
        result: m <= N points with the margin's value, its gradient and a status each; level 0.
        rows: (m,) int64, ascending: which example each point belongs to.
        correct: (m,) bool, whether that example was on the right side of its boundary.
        margins: (N,), F^y at the examples themselves, of all of them.
        crossed: (N,) bool, examples whose steps reached the other side. Those of them that are not
            in ``rows`` were dropped, as |margin| was too large after the search.
        ends: (N, *event), where the steps of each example ended: across the boundary if it crossed.
    """

    result: LevelSetResult
    rows: Tensor
    correct: Tensor
    margins: Tensor
    crossed: Tensor
    ends: Tensor

    def __len__(self) -> int:
        return self.rows.shape[0]


def margin_field(fn: Field, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """The margin of every row for its label, as a field whose level set 0 is the boundary.

    Args:
        fn: classifier (n, *event) -> logits (n, K), or (n,) for K = 2 with one logit; a module runs
            as its eval-mode clone and keeps its graph.
        labels: (n,) integers, one for every row the field will be given. A sampler that drops rows
            as they finish (:func:`levelset_ext.project`) gives it fewer, which is an error: project
            the rows of one label at a time, on ``f_y`` minus the largest other logit.
    """
    field = as_field(fn)
    return lambda x: margin(as_rows(field(x)), labels, check=False)


@uncompiled
def find_boundary(
    fn: Field,
    x: Tensor,
    y: Tensor,
    eps_correct: float | Tensor = 0.4,
    eps_wrong: float | Tensor = 0.5,
    step: float | Tensor = 0.01,
    iters: int = 40,
    *,
    step_last: float | Tensor | None = None,
    step_eps: float | None = None,
    box: tuple[float, float] | None = (0.0, 1.0),
    random_start: bool = True,
    start: Tensor | None = None,
    max_iters: int = 40,
    tol: float = 1e-5,
    variant: str = "anderson_bjorck",
    keep_below: float = 0.1,
    generator: torch.Generator | None = None,
) -> BoundarySamples:
    """Looks for a boundary point in the L_inf box around every example.

    Every example starts at a uniformly random point of its box and walks by sign-gradient steps on
    the margin towards the other side of its boundary: a correct example towards a mistake, a wrong
    one (a tie counts as wrong) towards its label. It stops as soon as the margin has changed sign;
    the last two places and their known values are the bracket that false position starts from.

    Under ``torch.autocast`` the steps, of which only signs count, run in reduced precision; the
    search and what it returns do not.

    Args:
        fn: classifier (n, *event) -> logits (n, K), K >= 2, or one logit (n,) or (n, 1). Only
            gradients with respect to x are computed. A module runs as its eval-mode clone.
        x: examples, (n, *event), floating point.
        y: labels, (n,) integers, as in :func:`levelset_ext.margin.margin`.
        eps_correct, eps_wrong: half the width of the box of correct and of wrong examples, >= 0;
            a number or (n,).
        step: length of a step in every coordinate, > 0; a number or (n,).
        iters: most steps, >= 0.
        step_last: length of the last of ``iters`` steps, > 0; a number or (n,). Lengths fall (or
            grow) geometrically from ``step`` to it. Long first steps reach the far side of the box
            and short last ones settle there: on a robust network of MNIST, 20 steps from 0.2 to
            0.005 carry twice as many rows over as the paper's 40 of 0.01, for half the evaluations
            (``benchmarks/search_steps.py``). None keeps all steps alike.
        step_eps: if given, ``step`` is meant for boxes of this size, and a correct example steps
            by ``step * eps_correct / step_eps``: eps that grows during a training keeps its steps
            in proportion. Wrong examples step by ``step``.
        box: (low, high) that all points stay within, as x does; None for no limits.
        random_start: start at the example itself instead if False.
        start: (n, *event), places to start at, brought into the boxes; ``random_start`` then does
            not count. The ``ends`` of a visit, with x at most a little changed since, save steps.
        max_iters, tol, variant: of :func:`levelset_ext.false_position`.
        keep_below: points with |margin| >= this are dropped after the search.
        generator: source of the random start, on any device.

    Returns:
        :class:`BoundarySamples`, all detached. Examples with a margin that is not finite, or that
        did not cross, have no point.

    Raises:
        TypeError, ValueError: an argument is not as described, a label is out of range, or x lies
            outside of ``box``, as images that were normalised do.
    """
    x = check_points("x", x)
    n = x.shape[0]
    if y.shape != (n,):
        raise ValueError(f"y: expected shape (n,) = ({n},), got {tuple(y.shape)}")
    max_iters = check_limits(max_iters, tol)
    iters = check_integer("iters", iters, 0)
    if step_eps is not None and not (step_eps > 0 and math.isfinite(step_eps)):
        raise ValueError(f"step_eps: expected a length > 0, got {step_eps!r}")
    if box is not None and not box[0] <= box[1]:
        raise ValueError(f"box: expected low <= high, got {box!r}")
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start: expected shape {tuple(x.shape)}, got {tuple(start.shape)}")
    if not keep_below > 0:
        raise ValueError(f"keep_below: expected a number > 0, got {keep_below!r}")
    if box is not None:
        _check_inside(x, box)
    field = as_constant_field(fn)
    labels = y.detach().to(x.device)
    widths = _per_row("eps_correct", eps_correct, x, 0), _per_row("eps_wrong", eps_wrong, x, 0)
    steps = _per_row("step", step, x, None)
    shrink = torch.ones_like(steps)
    if step_last is not None and iters > 1:
        shrink = (_per_row("step_last", step_last, x, None) / steps) ** (1 / (iters - 1))

    def row_field(points: Tensor, rows: Tensor) -> Tensor:
        return margin(as_rows(field(points)), labels[rows], check=False)

    # Tensors made in inference mode could not enter the sample network afterwards.
    with torch.inference_mode(False), torch.no_grad():
        x = x.detach().clone()
        everyone = torch.arange(n, device=x.device)
        logits = as_rows(field(x.clone()))
        check_labels(labels, logits.shape[1] if logits.dim() == 2 else 1, "y")
        margins = margin(logits, labels, check=False).to(x.dtype)
        correct = margins > 0
        eps = torch.where(correct, *widths)
        if step_eps is not None:
            steps = torch.where(correct, steps * (widths[0] / step_eps), steps)
        if start is None and random_start:
            # One draw per coordinate of the whole batch: a row's does not depend on the others.
            source = x.device if generator is None else generator.device
            noise = torch.rand(x.shape, dtype=x.dtype, device=source, generator=generator)
            start = x + _wide(eps, x) * (2 * noise.to(x.device) - 1)
        start = _within(x if start is None else start.detach().to(x), x, _wide(eps, x), box)
        before, after, values, crossed = _walk(
            row_field, x, start, margins, correct, eps, steps, shrink, iters, box
        )
        rows = everyone[crossed]
        result = search_segments(
            lambda points, k: row_field(points, rows[k]),
            before[rows],
            after[rows],
            0.0,
            max_iters,
            tol,
            variant,
            start_values=values[rows, 0],
            end_values=values[rows, 1],
            rounded_ends=torch.is_autocast_enabled(x.device.type),
        )
        near = result.residual < keep_below
        rows = rows[near]
        return BoundarySamples(result[near], rows, correct[rows], margins, crossed, after)


def _check_inside(x: Tensor, box: tuple[float, float]) -> None:
    if x.numel() == 0:
        return
    # What is not finite has no point anyway; a little is what rounding may add.
    inside = torch.nan_to_num(x.detach(), nan=box[0], posinf=box[1], neginf=box[0])
    low, high = (float(v) for v in torch.aminmax(inside))
    slack = 1e-5 * max(1.0, abs(box[0]), abs(box[1]))
    if low < box[0] - slack or high > box[1] + slack:
        raise ValueError(
            f"x: expected values within box = {tuple(box)}, got values from {low:g} to {high:g}; "
            "pass the range of your images, or box=None"
        )


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    """(n,) shaped to multiply (n, *event)."""
    return rows.view(-1, *(1,) * (like.dim() - 1))


def _within(points: Tensor, x: Tensor, widths: Tensor, box: tuple[float, float] | None) -> Tensor:
    """Points brought into the L_inf boxes around x and into ``box``."""
    points = torch.minimum(torch.maximum(points, x - widths), x + widths)
    return points if box is None else points.clamp(box[0], box[1])


def _per_row(name: str, value: float | Tensor, x: Tensor, least: float | None) -> Tensor:
    """A number or (n,) as (n,), >= ``least``, or > 0 for None."""
    n = x.shape[0]
    rows = torch.as_tensor(value, dtype=x.dtype, device=x.device).detach()
    if tuple(rows.shape) not in ((), (n,)):
        raise ValueError(
            f"{name}: expected a number or (n,) = ({n},), got shape {tuple(rows.shape)}"
        )
    good = rows > 0 if least is None else rows >= least
    if not bool((good & torch.isfinite(rows)).all()):
        bound = "> 0" if least is None else f">= {least}"
        raise ValueError(f"{name}: expected finite lengths {bound}, got {value!r}")
    return rows.expand(n)


def _walk(
    field: RowField,
    x: Tensor,
    start: Tensor,
    margins: Tensor,
    correct: Tensor,
    eps: Tensor,
    steps: Tensor,
    shrink: Tensor,
    iters: int,
    box: tuple[float, float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sign-gradient steps on the margin, of length ``steps * shrink ** k``. A row that has crossed
    is not evaluated again.

    Returns the last place on the row's own side, the first on the other, F at both (n, 2), and
    which rows crossed.
    """
    before, values = x.clone(), torch.stack([margins, margins], 1)
    after = start.clone()
    crossed = torch.zeros_like(correct)
    rows = torch.nonzero(torch.isfinite(margins)).squeeze(1)
    for iteration in range(iters + 1):
        if rows.shape[0] == 0:
            break
        here = after[rows]
        if iteration < iters:
            value, gradient = jacobian_of(partial(field, rows=rows), here)
            gradient = gradient[:, 0]
        else:
            # After the last step only the side counts.
            value = values_of(partial(field, rows=rows), here)
        value = value[:, 0]
        values[rows, 1] = value
        finite = torch.isfinite(value)
        over = finite & ((value > 0) != correct[rows])
        crossed[rows[over]] = True
        if iteration == iters:
            break
        stays = finite & ~over
        rows = rows[stays]
        here, origin = here[stays], x[rows]
        before[rows], values[rows, 0] = here, value[stays]
        length = steps[rows] * shrink[rows] ** iteration
        length = torch.where(correct[rows], -length, length)
        move = here + _wide(length, x) * gradient[stays].sign()
        after[rows] = _within(move, origin, _wide(eps[rows], x), box)
    return before, after, values, crossed
