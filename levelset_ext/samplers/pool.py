"""Samples kept on a level set while the network under it trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from levelset_ext.field import Field
from levelset_ext.result import LevelSetResult, Status
from levelset_ext.samplers.projection import project

__all__ = ["SamplePool"]

_REFERENCE = 1024  # rows of a draw that crowding is measured against


class SamplePool:
    """Points of a level set, carried from one training step to the next.

    A step of an optimizer moves a level set little: a point that was on it nearly is, and one or
    two Newton iterations bring it back where a new starting point takes several. Each draw takes
    the next rows of the pool in a random order, moves them by ``jitter`` (a random walk along the
    level set, without which the same points would be trained on again and again), projects them and
    keeps where they land. A ``fresh`` share of every draw is given up for new points from
    ``starts``: first the rows that failed, then the most crowded ones. Points die where they are
    dense and are born everywhere, so the pool spreads out, and finds new parts of the level set.

    Args:
        size: points kept, at least 1.
        starts: count -> (count, *event), starting points of new samples; called with ``size`` once.
        level: c of :func:`~levelset_ext.project`, a scalar or (l,).
        jitter: standard deviation of the Gaussian move, in the units of the points, >= 0.
        fresh: share of new points in a draw, from 0 to 1.
        max_iters: most Newton iterations in a draw; a point that needs more goes on in its next.
        generator: of the random order and the jitter, on the CPU.
        options: further arguments of :func:`~levelset_ext.project`.

    Raises:
        ValueError: an argument is not as described.
    """

    def __init__(
        self,
        size: int,
        starts: Callable[[int], Tensor],
        *,
        level: Tensor | float = 0.0,
        jitter: float = 0.0,
        fresh: float = 0.1,
        max_iters: int = 3,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1 point, got {size}")
        if not (jitter >= 0 and math.isfinite(jitter)):
            raise ValueError(f"jitter: expected a finite length >= 0, got {jitter}")
        if not 0 <= fresh <= 1:
            raise ValueError(f"fresh: expected a share from 0 to 1, got {fresh}")
        self.starts, self.level, self.jitter, self.fresh = starts, level, jitter, fresh
        self.max_iters, self.generator, self.options = max_iters, generator, options
        self.points = starts(size).detach().clone()
        self._lost = torch.zeros(size, dtype=torch.bool)
        self._order = torch.randperm(size, generator=generator)
        self._next = 0

    def draw(self, fn: Field, count: int) -> LevelSetResult:
        """The next ``count`` points, 1 to ``size``, projected to the level set as it is now.

        Returns:
            The :class:`~levelset_ext.LevelSetResult` of these points.
        """
        if not 1 <= count <= len(self.points):
            raise ValueError(f"count: expected 1 to {len(self.points)} points, got {count}")
        rows = self._rows(count)
        self._replace(rows)
        place = rows.to(self.points.device)
        points = self.points[place]
        if self.jitter > 0:
            noise = torch.randn(points.shape, dtype=points.dtype, generator=self.generator)
            points = points + (self.jitter * noise).to(points.device)
        result = project(fn, points, self.level, self.max_iters, **self.options)
        self.points[place] = result.points
        # A row that ran out of iterations goes on where it is; others that failed start anew.
        arrived = result.converged | (result.status == Status.STALLED)
        self._lost[rows] = (~arrived & (result.status != Status.MAX_ITERATIONS)).cpu()
        return result

    def _replace(self, rows: Tensor) -> None:
        """Gives up those of the rows that are lost, and the most crowded up to the share."""
        lost = self._lost[rows]
        more = round(self.fresh * len(rows)) - int(lost.sum())
        if more > 0:
            kept = torch.nonzero(~lost).squeeze(1)  # what is lost is in nobody's way
            spacing = self._spacing(self.points[rows[kept].to(self.points.device)]).cpu()
            lost[kept[spacing.argsort()[:more]]] = True
        if bool(lost.any()):
            again = rows[lost]
            self.points[again.to(self.points.device)] = self.starts(len(again)).to(self.points)

    def _rows(self, count: int) -> Tensor:
        """The next rows of the order, and a new order where it ends: no row twice in a draw."""
        rows = self._order[self._next : self._next + count]
        self._next += count
        missing = count - len(rows)
        if missing > 0:
            order = torch.randperm(len(self.points), generator=self.generator)
            taken = torch.isin(order, rows)
            self._order = torch.cat([order[~taken], order[taken]])
            rows = torch.cat([rows, self._order[:missing]])
            self._next = missing
        return rows

    def _spacing(self, points: Tensor) -> Tensor:
        """(m,), distance to the nearest row before it, of the first 1024: of two points that are
        close, one is in the way."""
        points = points.flatten(1)
        # Starting points may be of any kind: one that is not a number is far from all.
        distance = torch.cdist(points, points[:_REFERENCE]).nan_to_num(torch.inf, torch.inf)
        before = torch.ones_like(distance, dtype=torch.bool).tril(-1)
        return torch.where(before, distance, torch.inf).amin(1)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; the generator is the caller's."""
        return {
            "points": self.points,
            "lost": self._lost,
            "order": self._order,
            "next": self._next,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with what :meth:`state_dict` returned, of a pool of the same size.

        Raises:
            ValueError: it is of another size.
        """
        if state["points"].shape != self.points.shape:
            raise ValueError(
                f"state: expected points {tuple(self.points.shape)}, "
                f"got {tuple(state['points'].shape)}"
            )
        # Copies, as a draw writes to them: the state may be gone back to once more.
        self.points = state["points"].to(self.points, copy=True)
        self._lost = state["lost"].to("cpu", copy=True)
        self._order = state["order"].to("cpu", copy=True)
        self._next = int(state["next"])
