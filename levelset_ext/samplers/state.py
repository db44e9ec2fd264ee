"""What every iterative sampler keeps: full-size results, and which rows still run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from levelset_ext import _C
from levelset_ext.field import Field, check_integer, jacobian_of
from levelset_ext.ops import level_rows
from levelset_ext.result import LevelSetResult, Status


def check_limits(max_iters: int, tol: float) -> int:
    """Returns ``max_iters`` as an int, whatever integer it was."""
    max_iters = check_integer("max_iters", max_iters, 0)
    if not (tol >= 0 and math.isfinite(tol)):
        raise ValueError(f"tol: expected a finite number >= 0, got {tol!r}")
    return max_iters


def box_bounds(box: tuple[object, object] | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Box corners as flat (d,) tensors. ``box`` is a pair of scalars or tensors of the event shape;
    None in the pair leaves that side open."""
    if box is None:
        return None, None
    if not isinstance(box, tuple | list) or len(box) != 2:
        raise ValueError(f"box: expected a pair (lower, upper), got {box!r}")
    corners: list[Tensor | None] = []
    for name, corner in zip(("lower", "upper"), box, strict=True):
        if corner is None:
            corners.append(None)
            continue
        tensor = torch.as_tensor(corner, dtype=x.dtype, device=x.device)
        try:
            tensor = tensor.expand(x.shape[1:])
        except RuntimeError:
            raise ValueError(
                f"box: expected {name} as a scalar or {tuple(x.shape[1:])}, "
                f"got {tuple(tensor.shape)}"
            ) from None
        if bool(tensor.isnan().any()):
            raise ValueError(f"box: expected numbers as {name}, got NaN")
        corners.append(tensor.reshape(-1).contiguous())
    lower, upper = corners
    if lower is not None and upper is not None and bool((lower > upper).any()):
        raise ValueError("box: expected lower <= upper in every coordinate")
    return lower, upper


class SamplerState:
    """Rows of one sampler run. A row that is done is never evaluated again (active-row compaction).

    Attributes:
        points: (n, d), flat events.
        values, jacobian, level: F (n, l), D_xF (n, l, d) and c (n, l); there after the first
            ``record``.
        status: (n,) int8; ``RUNNING`` rows are the ones in ``rows``.
        rows: (m,) int64, indices of the running rows, ascending.
    """

    values: Tensor
    jacobian: Tensor
    level: Tensor

    def __init__(
        self, x: Tensor, level: Tensor | float, known: LevelSetResult | None = None
    ) -> None:
        """``known`` holds F and D_xF at x, in place of the first evaluation."""
        self.event = x.shape[1:]
        self.points = x.detach().flatten(1).clone(memory_format=torch.contiguous_format)
        n = self.points.shape[0]
        self._level = level
        self.status = torch.full((n,), int(Status.RUNNING), dtype=torch.int8, device=x.device)
        self.iterations = torch.zeros(n, dtype=torch.int32, device=x.device)
        self.rows = torch.arange(n, device=x.device)
        self._known = known
        self._recorded = False

    def active_points(self) -> Tensor:
        """Points of the running rows, (m, *event)."""
        points = self.points if self.all_running() else self.points[self.rows]
        return points.view(points.shape[0], *self.event)

    def all_running(self) -> bool:
        return self.rows.shape[0] == self.points.shape[0]

    def of_rows(self, tensor: Tensor) -> Tensor:
        """The running rows of a full-size tensor."""
        return tensor if self.all_running() else tensor[self.rows]

    def evaluate(self, field: Field) -> tuple[Tensor, Tensor]:
        """F (m, l) and D_xF (m, l, d) of the running rows at their points, which are recorded."""
        if self._known is not None and not self._recorded:
            values, jacobian = self._known.values, self._known.jacobian
        else:
            values, jacobian = jacobian_of(field, self.active_points())
        jacobian = jacobian.flatten(2)
        self.record(values, jacobian)
        return values, jacobian

    def record(self, values: Tensor, jacobian: Tensor) -> None:
        """Keeps F (m, l) and D_xF (m, l, d) of the running rows at their points."""
        if not self._recorded:
            self._recorded = True
            n, l = self.points.shape[0], values.shape[1]  # noqa: E741
            if l > _C.max_outputs:
                raise ValueError(f"fn: expected 1 to {_C.max_outputs} outputs, got {l}")
            level = level_rows(self._level, n, l, self.points).expand(n, l)
            self.level = level.clone(memory_format=torch.contiguous_format)
            self.values, self.jacobian = values.clone(), jacobian.clone()
        elif self.all_running():
            self.values, self.jacobian = values.clone(), jacobian.clone()
        else:
            self.values[self.rows] = values
            self.jacobian[self.rows] = jacobian

    def compact(self) -> None:
        """Forgets rows that are no longer running."""
        self.rows = torch.nonzero(self.status == Status.RUNNING).squeeze(1)

    def count_update(self) -> None:
        """One more update for every row that moved; call between the update and ``compact``."""
        self.iterations += self.status == Status.RUNNING

    def finish(self, tol: float) -> LevelSetResult:
        """Judges the rows that still run by what was recorded last, and makes the result."""
        residual = (self.values - self.level).abs().amax(1)
        verdict = torch.full_like(self.status, int(Status.MAX_ITERATIONS))
        verdict[residual <= tol] = int(Status.CONVERGED)
        finite = torch.isfinite(residual) & torch.isfinite(self.points).all(1)
        verdict[~finite] = int(Status.NON_FINITE)
        self.status = torch.where(self.status == Status.RUNNING, verdict, self.status)
        n, l = self.values.shape  # noqa: E741
        return LevelSetResult(
            points=self.points.view(n, *self.event),
            values=self.values,
            jacobian=self.jacobian.view(n, l, *self.event),
            level=self.level,
            status=self.status,
            iterations=self.iterations,
        )
