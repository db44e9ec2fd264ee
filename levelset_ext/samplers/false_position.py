"""Root search on segments: a point of the level set between two points on either side of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from levelset_ext import _C, ops
from levelset_ext.field import (
    Field,
    as_constant_field,
    check_points,
    full_precision,
    jacobian_of,
    values_of,
)
from levelset_ext.result import LevelSetResult, Status
from levelset_ext.samplers.state import SamplerState, check_limits
from levelset_ext.samplers.uncompiled import uncompiled

VARIANTS = tuple(_C.bracket_variants)

# F of some rows of a batch: (points (m, *event), rows=(m,) int64) -> (m,) or (m, 1).
RowField = Callable[..., Tensor]


@uncompiled
def false_position(
    fn: Field,
    start: Tensor,
    end: Tensor,
    level: Tensor | float = 0.0,
    max_iters: int = 40,
    tol: float = 1e-5,
    variant: str = "anderson_bjorck",
    *,
    start_values: Tensor | None = None,
    end_values: Tensor | None = None,
) -> LevelSetResult:
    """Finds a point with F = c on every segment whose ends lie on different sides of it.

    F is evaluated at both ends, unless the values are handed in, then once per iteration on the
    rows that are not done, and once more with D_xF at the points found.

    Args:
        fn: module or callable (n, *event) -> (n,) or (n, 1); rows must not depend on each other.
        start, end: (n, *event), floating point, of one dtype. Not modified.
        level: c; a scalar, (n,) or (n, 1).
        max_iters: most evaluations of a row between its ends, >= 0.
        tol: a row is done when |F - c| <= tol, in the units of F.
        variant: "anderson_bjorck" is the one that needs the fewest evaluations on networks.
            "illinois" and "chandrupatla" are close; "chandrupatla" cannot be slow. "bisection"
            halves. "regula_falsi" is the plain method of false position; where F bends one way on
            the segment it creeps up to the root from one side.
        start_values, end_values: F at start and end, (n,) or (n, 1), where they are known already.

    Returns:
        A detached :class:`~levelset_ext.LevelSetResult` with all n rows. Statuses:

        - ``CONVERGED``: also where an end is on the level set already.
        - ``NOT_BRACKETED``: F - c has one sign at both ends (so also on a segment of length 0 off
          the level set); the point is the end with the smaller |F - c|.
        - ``STALLED``: F - c changes sign here, but the dtype does not get it to ``tol``. No point
          lies between the two ends of the bracket any more, or three evaluations within 4 ulp of
          c, or of F at both ends of the segment, came no closer. float32 margins in the
          thousands end so.
        - ``MAX_ITERATIONS``: the better end of the bracket so far.
        - ``NON_FINITE``: the place on the segment where F is not finite.

        ``values`` are those that were compared with ``tol``; ``iterations`` counts evaluations
        between the ends.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    start, end = check_points("start", start), check_points("end", end)
    field = as_constant_field(fn)
    return search_segments(
        lambda x, rows: field(x),
        start,
        end,
        level,
        max_iters,
        tol,
        variant,
        start_values=start_values,
        end_values=end_values,
    )


def search_segments(
    field: RowField,
    start: Tensor,
    end: Tensor,
    level: Tensor | float,
    max_iters: int,
    tol: float,
    variant: str,
    *,
    start_values: Tensor | None,
    end_values: Tensor | None,
    rounded_ends: bool = False,
) -> LevelSetResult:
    """:func:`false_position` for a field that depends on the row, as a margin does on its label.

    With ``rounded_ends`` the known values are of lower precision than the search. They may have put
    a row on the level set, or a root between its ends, that is not there; so ``values`` are those
    of the evaluation at the points found, and a row that they say is not within ``tol`` is
    ``STALLED``.
    """
    max_iters = check_limits(max_iters, tol)
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    if end.shape != start.shape:
        raise ValueError(
            f"end: expected the shape of start, {tuple(start.shape)}, got {tuple(end.shape)}"
        )
    if end.dtype != start.dtype or end.device != start.device:
        raise ValueError(
            f"end: expected dtype and device of start ({start.dtype}, {start.device}), "
            f"got {end.dtype}, {end.device}"
        )
    # Tensors made in inference mode could not enter the sample network afterwards.
    with torch.inference_mode(False), torch.no_grad(), full_precision(start):
        state = SamplerState(start, level)
        first = start.detach().flatten(1).contiguous()
        second = end.detach().flatten(1).contiguous()
        n = first.shape[0]
        values = _end_values(field, state, (start, end), (start_values, end_values))
        c = ops.level_rows(level, n, 1, state.points).detach().expand(n, 1).contiguous()
        bracket = ops.bracket_state(n, state.points.device)
        for iteration in range(max_iters + 1):
            ops.bracket_update_(
                state.points,
                state.status,
                bracket,
                first,
                second,
                values,
                c,
                index=None if iteration == 0 or state.all_running() else state.rows,
                tol=tol,
                variant=variant,
                last=iteration == max_iters,
            )
            state.count_update()
            state.compact()
            if state.rows.shape[0] == 0:
                break
            values = _values(field, state.active_points(), state.rows)
        everyone = torch.arange(n, device=state.points.device)
        points = state.points.view(n, *state.event)
        jacobian = points.new_zeros(0, 1, *state.event)
        if n:  # many networks cannot reshape a batch without rows
            values, jacobian = jacobian_of(lambda x: field(x, everyone), points)
            _check_one_output(values)  # with known ends this may be the first evaluation
        state.rows = everyone
        answers = bracket[:, _C.bracket_value, None].to(state.points.dtype)
        if rounded_ends and n:
            answers = values
            missed = (state.status == Status.CONVERGED) & ~((values - c).abs() <= tol)[:, 0]
            state.status[missed] = int(Status.STALLED)
        state.record(answers, jacobian.flatten(2))
        return state.finish(tol)


def _values(field: RowField, x: Tensor, rows: Tensor) -> Tensor:
    values = values_of(lambda points: field(points, rows), x)
    _check_one_output(values)
    return values


def _check_one_output(values: Tensor) -> None:
    if values.shape[1] != 1:
        raise ValueError(f"fn: expected one output, (n,) or (n, 1), got {tuple(values.shape)}")


def _end_values(
    field: RowField,
    state: SamplerState,
    ends: tuple[Tensor, Tensor],
    known: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """F at both ends, (n, 2). What is not known is evaluated in one batch."""
    n = state.points.shape[0]
    columns: list[Tensor | None] = []
    for name, given in zip(("start_values", "end_values"), known, strict=True):
        if given is not None and tuple(given.shape) not in ((n,), (n, 1)):
            raise ValueError(
                f"{name}: expected (n,) or (n, 1) with n = {n}, got {tuple(given.shape)}"
            )
        columns.append(None if given is None else given.detach().reshape(n, 1).to(state.points))
    if n == 0:
        return state.points.new_zeros(0, 2)
    missing = [k for k in range(2) if columns[k] is None]
    if missing:
        x = torch.cat([ends[k].detach() for k in missing])
        found = _values(field, x, state.rows.repeat(len(missing)))
        for k, column in zip(missing, found.split(n), strict=True):
            columns[k] = column
    return torch.cat([column for column in columns if column is not None], 1)
