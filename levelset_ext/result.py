"""What a sampler found, row by row."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from levelset_ext import _C, ops

if TYPE_CHECKING:
    from levelset_ext.compiled.tape import Tape

    class Status(IntEnum):
        """Names of the status codes; the values come from the compiled module."""

        CONVERGED = 0
        RUNNING = 1
        MAX_ITERATIONS = 2
        RANK_DEFICIENT = 3
        NON_FINITE = 4
        NOT_BRACKETED = 5
        STALLED = 6
else:
    Status = IntEnum("Status", _C.status_codes)
    Status.__doc__ = """What happened to a row.

    CONVERGED        |F - c| <= tol at the returned point
    RUNNING          moved by a raw op, not yet judged; no sampler returns it
    MAX_ITERATIONS   the iteration budget ended first; usable with its own value c = F(p)
    RANK_DEFICIENT   D_xF is zero, or its rows nearly parallel, or the step it asks for overflows
    NON_FINITE       NaN or infinity in F, the level or the point, or in D_xF of a row that is not
                     within tol; ``usable`` looks at D_xF of all rows
    NOT_BRACKETED    F - c has one sign at both ends of the segment (false position)
    STALLED          the next point equals this one: the dtype or the box allows no closer one
    """


def _cat_tapes(tapes: Sequence[Tape | None]) -> Tape | None:
    known = [tape for tape in tapes if tape is not None]
    return known[0].cat(known) if len(known) == len(tapes) else None


def _is_number(rows: Any) -> bool:
    """Whether an index is one integer: of Python, of NumPy, or a tensor without dimensions."""
    if isinstance(rows, Tensor):
        return rows.dim() == 0 and rows.dtype != torch.bool and not rows.is_floating_point()
    return isinstance(rows, int | np.integer) and not isinstance(rows, bool)


_TENSORS = ("points", "values", "jacobian", "level", "status", "iterations")


@dataclass(frozen=True, eq=False)
class LevelSetResult:
    """Points near a level set. All tensors are detached; rows are in the order of the input.

    Attributes:
        points: p, (n, *event).
        values: F(p), (n, l).
        jacobian: D_xF(p), (n, l, *event).
        level: c, (n, l).
        status: (n,) int8, a :class:`Status` each.
        iterations: (n,) int32, updates each row took.
        tape: what a compiled field remembers of its last evaluation, or None; see
            :class:`~levelset_ext.networks.MLP`.

    On disk it is its six tensors, in this order; the tape stays behind::

        torch.save([r.points, r.values, r.jacobian, r.level, r.status, r.iterations], "r.pt")
        r = LevelSetResult(*torch.load("r.pt"))
    """

    points: Tensor
    values: Tensor
    jacobian: Tensor
    level: Tensor
    status: Tensor
    iterations: Tensor
    tape: Tape | None = field(default=None, repr=False)

    @cached_property
    def converged(self) -> Tensor:
        """(n,) bool, rows with ``Status.CONVERGED``."""
        return self.status == Status.CONVERGED

    @cached_property
    def residual(self) -> Tensor:
        """(n,), max_j |F_j - c_j|, in the units of F."""
        return (self.values - self.level).abs().amax(1)

    @cached_property
    def distance(self) -> Tensor:
        """(n,), length of the Newton step still to go, in the units of the points: |F - c| / |grad
        F| for l = 1. Infinite where D_xF has no full rank, NaN where the row is not finite."""
        step = ops.pinv_apply(self.jacobian.flatten(2), self.values - self.level)
        length = torch.linalg.vector_norm(step, dim=1)
        length = torch.where(self.rank_status == Status.RANK_DEFICIENT, torch.inf, length)
        return torch.where(self.rank_status == Status.NON_FINITE, torch.nan, length)

    @cached_property
    def rank_status(self) -> Tensor:
        """(n,) int8, whether D_xF can be inverted: CONVERGED, RANK_DEFICIENT or NON_FINITE."""
        zeros = torch.zeros_like(self.values)
        return ops.pinv_apply(self.jacobian.flatten(2), zeros, return_status=True)[1]

    @cached_property
    def usable(self) -> Tensor:
        """(n,) bool, rows that Eq. 9 can move: finite, with D_xF of full rank. They need not have
        converged; such a row stays on its own level F(p)."""
        finite = torch.isfinite(self.points.flatten(1)).all(1) & torch.isfinite(self.values).all(1)
        return finite & (self.rank_status == Status.CONVERGED)

    @staticmethod
    def cat(results: Sequence[LevelSetResult]) -> LevelSetResult:
        """Rows of several results of the same network, one after the other; of none there is no
        shape, which is a ValueError."""
        if not results:
            raise ValueError("results: expected at least one LevelSetResult, got none")
        if len(results) == 1:
            return results[0]
        return LevelSetResult(
            **{name: torch.cat([getattr(r, name) for r in results]) for name in _TENSORS},
            tape=_cat_tapes([r.tape for r in results]),
        )

    def __len__(self) -> int:
        return self.points.shape[0]

    def __getitem__(self, rows: Any) -> LevelSetResult:
        """The result of some rows: a number (the dimension stays), a slice, a boolean mask (n,) or
        indices (m,)."""
        if _is_number(rows):
            rows = operator.index(rows)
            if not -len(self) <= rows < len(self):
                raise IndexError(f"row {rows} of a result with {len(self)} rows")
            rows = slice(rows % len(self), rows % len(self) + 1)
        return LevelSetResult(
            **{name: getattr(self, name)[rows] for name in _TENSORS},
            tape=None if self.tape is None else self.tape[rows],
        )

    def counts(self) -> dict[str, int]:
        """How many rows ended with each status; statuses that did not occur are left out."""
        codes, numbers = torch.unique(self.status, return_counts=True)
        return {
            Status(code).name: number
            for code, number in zip(codes.tolist(), numbers.tolist(), strict=True)
        }
