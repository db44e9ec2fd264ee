"""The paper's two objectives for classifiers: Eq. 12 and Eq. 11 with the points they need."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from levelset_ext.attacks.pgd import Settings
from levelset_ext.field import Field
from levelset_ext.losses.geometric_svm import NORMS, geometric_svm
from levelset_ext.losses.robust import DISTANCES, robust
from levelset_ext.margin import margin
from levelset_ext.objectives.base import Step
from levelset_ext.objectives.common import (
    as_classes,
    check_fields,
    search_in_box,
    search_logits,
    uniform_start,
    warm_offsets,
)
from levelset_ext.objectives.statistics import with_batch_statistics
from levelset_ext.samplers.boundary import BoundarySamples, find_boundary

__all__ = ["GeometricSvm", "Robust"]


@dataclass(frozen=True)
class GeometricSvm:
    """Eq. 11 for binary networks.

    alpha, distance: of :func:`levelset_ext.losses.geometric_svm`. lam grows linearly from
    ``lam_first`` to ``lam`` over the share ``warmup`` of the training. max_iters, tol: of the
    projections.

    Figures: hinge, regularizer: the two sums; margin: mean of Delta; used: share of the examples
    that take part.
    """

    alpha: float = -1.0
    lam: float = 0.001
    lam_first: float = 0.001
    warmup: float = 1.0
    distance: str = "linf"
    max_iters: int = 20
    tol: float = 1e-5

    def __post_init__(self) -> None:
        if not self.alpha < 0:
            raise ValueError(f"alpha: expected an exponent < 0, got {self.alpha!r}")
        check_fields(
            self,
            not_negative=("lam", "lam_first"),
            positive=("tol",),
            counts=("max_iters",),
            shares=("warmup",),
            distance=tuple(NORMS),
        )

    def __call__(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        progress: float = 1.0,
    ) -> Step:
        done = 1.0 if self.warmup == 0 else min(1.0, progress / self.warmup)
        loss = geometric_svm(
            with_batch_statistics(network, x),
            x,
            y,
            alpha=self.alpha,
            lam=self.lam_first + (self.lam - self.lam_first) * done,
            distance=self.distance,
            max_iters=self.max_iters,
            tol=self.tol,
        )
        return Step(
            loss.total,
            {
                "hinge": loss.hinge,
                "regularizer": loss.regularizer,
                "margin": loss.margin,
                "used": loss.used,
            },
        )


@dataclass(frozen=True)
class Robust:
    """Eq. 12 on points of the decision boundary that a short attack finds.

    search "margin" is Section 3.2: steps on the margin that end where the boundary is crossed, of
    wrong examples towards their label. An example that is wrong and whose boundary is out of reach
    has no place in Eq. 12, and of a fresh network all are; their mean cross entropy at x, divided
    by N, is added with the weight ``lost``.

    search "xent" takes all steps on the cross entropy. Where they end across the boundary, the
    segment from x is searched for the point that enters Eq. 12. The mean cross entropy at the ends
    is added with the weight ``ends``: it also asks something of the examples whose boundary is
    further away than eps, which are nearly all of a robust network's.

    eps_correct, eps_wrong, step, iters, step_last, step_eps, keep_below, max_iters, tol: of
    :func:`levelset_ext.find_boundary`. eps_first, warmup: eps_correct grows linearly from
    ``eps_first`` over that share of the training; steps in proportion with "xent". lam_correct,
    lam_wrong, distance: of :func:`levelset_ext.losses.robust`. warm_start: share of the examples
    whose steps go on from where those of the last visit ended. keep_best: with "xent", whether the
    steps end at the best of their start and their iterates, for a forward more, and not at the last
    one. squares: with "xent", proposals of :func:`levelset_ext.attacks.search_squares` after the
    steps, a forward each, for networks that have learnt to hide from gradients.

    Under autocast the steps and the cross entropy run in reduced precision, Eq. 12 does not. With
    batch norm see :func:`levelset_ext.objectives.statistics.with_batch_statistics`.

    Figures: correct, wrong: the parts of Eq. 12; distance: mean signed distance to the boundary
    points; accuracy: at x for "margin", at the ends for "xent"; crossed: share of examples with a
    sign change to search; converged: share of those whose search met its tolerance; cross_entropy:
    of what is said above.
    """

    eps_correct: float = 0.4
    eps_wrong: float = 0.5
    step: float = 0.01
    iters: int = 40
    step_last: float | None = None
    step_eps: float | None = None
    keep_below: float = 0.1
    max_iters: int = 40
    tol: float = 1e-5
    eps_first: float = 0.001
    warmup: float = 0.0
    lam_correct: float = 1.0
    lam_wrong: float = 1.0
    distance: str = "rho"
    search: str = "margin"
    ends: float = 1.0
    lost: float = 1.0
    warm_start: float = 0.0
    keep_best: bool = False
    squares: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            not_negative=(
                "eps_correct",
                "eps_wrong",
                "eps_first",
                "lam_correct",
                "lam_wrong",
                "ends",
                "lost",
            ),
            positive=("step", "keep_below", "tol"),
            counts=("iters", "max_iters"),
            counts_or_none=("squares",),
            shares=("warmup", "warm_start"),
            distance=DISTANCES,
            search=("margin", "xent"),
        )
        given = [n for n in ("step_last", "step_eps") if getattr(self, n) is not None]
        check_fields(self, positive=given)
        for name in ("keep_best", "squares"):
            if getattr(self, name) and self.search != "xent":
                raise ValueError(
                    f"{name}: expected none with search {self.search!r}, got "
                    f"{getattr(self, name)!r}"
                )

    def __call__(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        progress: float = 1.0,
        offsets: Tensor | None = None,
    ) -> Step:
        x = x.detach()
        field = with_batch_statistics(network, x)
        done = 1.0 if self.warmup == 0 else min(1.0, progress / self.warmup)
        eps = self.eps_first + (self.eps_correct - self.eps_first) * done
        start = None
        if offsets is not None and self.warm_start > 0:
            start = warm_offsets(offsets, self.warm_start, eps, generator)
        if self.search == "xent":
            return self._after_all_steps(field, x, y, eps, start, generator)
        return self._until_crossed(field, x, y, eps, start, generator)

    def _until_crossed(
        self,
        field: Field,
        x: Tensor,
        y: Tensor,
        eps: float,
        start: Tensor | None,
        generator: torch.Generator | None,
    ) -> Step:
        samples = find_boundary(
            field,
            x,
            y,
            eps,
            self.eps_wrong,
            self.step,
            self.iters,
            start=None if start is None else x + start,
            step_last=self.step_last,
            step_eps=self.step_eps,
            max_iters=self.max_iters,
            tol=self.tol,
            keep_below=self.keep_below,
            generator=generator,
        )
        total, figures = self._eq_12(field, x, y, samples, eps, len(x))
        figures["accuracy"] = (samples.margins > 0).double().mean()
        lost = torch.nonzero(~((samples.margins > 0) | samples.crossed)).squeeze(1)
        figures["cross_entropy"] = torch.zeros_like(figures["correct"])
        if self.lost > 0 and len(lost):
            logits = as_classes(field(x[lost]), len(lost))
            cross_entropy = functional.cross_entropy(logits, y[lost], reduction="sum") / len(x)
            figures["cross_entropy"] = cross_entropy.detach()
            total = total + self.lost * cross_entropy
        return Step(total, figures, samples.ends - x)

    def _after_all_steps(
        self,
        field: nn.Module,
        x: Tensor,
        y: Tensor,
        eps: float,
        start: Tensor | None,
        generator: torch.Generator | None,
    ) -> Step:
        if start is None:
            start = uniform_start(x, eps, generator)
        quiet = search_logits(field, y)
        grown = eps / self.eps_correct if self.eps_correct > 0 else 1.0
        last = None if self.step_last is None else self.step_last * grown

        def value(d: Tensor) -> Tensor:
            return functional.cross_entropy(quiet(x + d), y, reduction="none")

        steps = Settings(
            eps, self.step * grown, self.iters, step_last=last, keep_best=self.keep_best
        )
        delta = search_in_box(value, x, start, steps, self.squares, generator)
        ends = (x + delta).clamp_(0, 1)
        logits = as_classes(field(ends.clone()), len(x))
        cross_entropy = functional.cross_entropy(logits, y)
        right = margin(logits.detach(), y, check=False) > 0
        # Of these rows alone it matters on which side x is, and where in between F = 0.
        over = torch.nonzero(~right).squeeze(1)
        none = torch.zeros((), dtype=x.dtype, device=x.device)
        total, figures = none, dict.fromkeys(("correct", "wrong", "crossed"), none)
        if len(over):
            total, figures = self._eq_12(
                field,
                x[over],
                y[over],
                self._between(field, x[over], y[over], ends[over], eps),
                eps,
                len(x),
            )
        figures["accuracy"] = right.double().mean()
        figures["cross_entropy"] = cross_entropy.detach()
        return Step(total + self.ends * cross_entropy, figures, delta)

    def _between(
        self, field: Field, x: Tensor, y: Tensor, ends: Tensor, eps: float
    ) -> BoundarySamples:
        """Boundary points on the segments from x to the ends, which are across it."""
        return find_boundary(
            field,
            x,
            y,
            eps,
            eps,
            self.step,
            0,
            start=ends,
            max_iters=self.max_iters,
            tol=self.tol,
            keep_below=self.keep_below,
        )

    def _eq_12(
        self,
        field: Field,
        x: Tensor,
        y: Tensor,
        samples: BoundarySamples,
        eps: float,
        count: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 12 over some rows of a batch of ``count``, and its figures."""
        with torch.autocast(x.device.type, enabled=False):
            loss = robust(
                field,
                x,
                y,
                samples,
                eps=(eps, self.eps_wrong),
                lam=(self.lam_correct, self.lam_wrong),
                distance=self.distance,
            )
        share = len(x) / count if count else math.nan  # a mean of nothing, as elsewhere
        crossed = samples.crossed.sum()
        figures = {
            "correct": loss.correct * share,
            "wrong": loss.wrong * share,
            "distance": loss.distance,
            "crossed": crossed.double() / count,
            "converged": samples.result.converged.sum().double() / crossed,
        }
        return loss.total * share, figures
