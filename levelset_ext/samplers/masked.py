"""Newton and false position on whole batches: every step has the same shapes and memory, and none
asks the device which rows run. What a sampler does with compaction, for CUDA graphs; on a CPU the
same numbers, at the cost of evaluating rows that are done."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from levelset_ext import _C, ops
from levelset_ext.field import Field, jacobian_of, values_of
from levelset_ext.ops import level_rows
from levelset_ext.result import LevelSetResult, Status
from levelset_ext.samplers.state import SamplerState


class Masked:
    """Rows of a batch in memory that stays. A row that is done is evaluated again, at the point
    where it is, and not moved."""

    def __init__(self, field: Field, x: Tensor, outputs: int) -> None:
        self.field = field
        self.state = state = SamplerState(x, 0.0)
        n, d = state.points.shape
        state.values = x.new_zeros(n, outputs)
        state.level = x.new_zeros(n, outputs)
        state.jacobian = x.new_zeros(n, outputs, d)

    def set_rows(self, x: Tensor, level: Tensor | float) -> None:
        state = self.state
        n, l = state.values.shape  # noqa: E741
        state.points.copy_(x.detach().flatten(1))
        state.level.copy_(level_rows(level, n, l, state.points).detach().expand(n, l))
        state.status.fill_(int(Status.RUNNING))
        state.iterations.zero_()

    def evaluate(self) -> None:
        """F and D_xF of all rows at their points."""
        values, jacobian = jacobian_of(self.field, self.state.active_points())
        self.state.values.copy_(values)
        self.state.jacobian.copy_(jacobian.flatten(2))

    def result(self, tol: float) -> LevelSetResult:
        """What was recorded last, in memory of its own."""
        found = copy.copy(self.state)
        for name in ("points", "values", "jacobian", "level", "status", "iterations"):
            setattr(found, name, getattr(self.state, name).clone())
        return found.finish(tol)


class MaskedNewton(Masked):
    """Eq. 4 on all rows: :meth:`begin`, :meth:`step` as often as wanted, then :meth:`evaluate`
    where a row may have moved in the last step, and :meth:`result`."""

    def __init__(
        self,
        field: Field,
        x: Tensor,
        outputs: int,
        tol: float,
        max_step: float = math.inf,
        bounds: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        super().__init__(field, x, outputs)
        self.tol, self.max_step, self.bounds = tol, max_step, bounds

    def begin(self, x: Tensor, level: Tensor | float) -> None:
        self.set_rows(x, level)

    def step(self) -> None:
        self.evaluate()
        state = self.state
        ops.newton_update_(
            state.points,
            state.status,
            state.values,
            state.jacobian,
            state.level,
            lower=self.bounds[0],
            upper=self.bounds[1],
            tol=self.tol,
            max_step=self.max_step,
        )
        state.count_update()


class MaskedSearch(Masked):
    """Root search on segments: :meth:`begin`, :meth:`step` as often as wanted, :meth:`end`."""

    def __init__(self, field: Field, start: Tensor, tol: float, variant: str) -> None:
        super().__init__(field, start, 1)
        n, d = self.state.points.shape
        self.tol, self.variant = tol, variant
        self.ends = self.state.points.new_zeros(2, n, d)
        self.bracket = ops.bracket_state(n, start.device)

    def begin(self, start: Tensor, end: Tensor, level: Tensor | float, last: bool = False) -> None:
        """Evaluates F at both ends; with ``last`` the search is over."""
        self.set_rows(start, level)
        self.ends[0].copy_(start.detach().flatten(1))
        self.ends[1].copy_(end.detach().flatten(1))
        both = values_of(self.field, torch.cat([start.detach(), end.detach()]))
        self._update(torch.cat(both.split(len(start)), 1), last)

    def step(self, last: bool = False) -> None:
        self._update(values_of(self.field, self.state.active_points()), last)

    def end(self) -> None:
        """D_xF at the points found; ``values`` become those the search has judged by."""
        self.evaluate()
        self.state.values.copy_(self.bracket[:, _C.bracket_value, None])

    def _update(self, values: Tensor, last: bool) -> None:
        state = self.state
        ops.bracket_update_(
            state.points,
            state.status,
            self.bracket,
            self.ends[0],
            self.ends[1],
            values,
            state.level,
            tol=self.tol,
            variant=self.variant,
            last=last,
        )
        state.count_update()


def repeat(step: Callable[[], object], status: Tensor, most: int) -> int:
    """Calls ``step`` until no row is ``RUNNING``, ``most`` times at the most; returns how often.

    On a GPU it looks at the state of two steps before, so that there is always work in the queue:
    up to two steps more than needed, which move nothing.
    """
    behind = 0 if status.device.type == "cpu" else 2
    flags: deque[Callable[[], bool]] = deque()
    for count in range(1, most + 1):
        step()
        flags.append(_running(status))
        if len(flags) > behind and not flags.popleft()():
            return count
    return most


def _running(status: Tensor) -> Callable[[], bool]:
    """Asks whether rows run, now; the answer is waited for when it is wanted."""
    answer = (status == Status.RUNNING).any()
    if answer.device.type == "cpu":
        return lambda: bool(answer)
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(answer, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(status.device))  # not of the current device

    def wait() -> bool:
        event.synchronize()
        return bool(host)

    return wait
