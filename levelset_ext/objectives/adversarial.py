"""Training on adversarial examples: Madry, TRADES and max-margin adversarial training.

All three look for their examples on the network in eval mode, whose parameters want no gradient
meanwhile, and evaluate their loss in the mode the network is in, which a training loop sets to
train. The images are in [0, 1], and so are the examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from levelset_ext.attacks.pgd import OBJECTIVES, Settings, climb, run_pgd
from levelset_ext.attacks.prepare import (
    LogitsFunction,
    check_batch,
    lengths,
)
from levelset_ext.margin import check_labels, margin
from levelset_ext.objectives.base import Step
from levelset_ext.objectives.common import (
    accuracy,
    as_classes,
    check_fields,
    evaluate,
    grown,
    search_in_box,
    search_logits,
    uniform_start,
    warm_offsets,
)
from levelset_ext.samplers.false_position import search_segments

__all__ = ["MMA", "Madry", "Trades"]


@dataclass(frozen=True)
class Madry:
    """Cross entropy at the end of a PGD attack (Madry et al. 2018).

    The attack starts at a uniformly random point of the L_inf box around x and takes all its steps;
    the loss is that of its last iterate. Cost: iters + 1 forwards and backwards.

    eps: half the width of the box. step, iters: of PGD. step_last: length of the last step, to
    which the others fall geometrically; None keeps all alike. attack: what PGD increases, "xent" or
    "margin" (-F^y). warmup: share of the training over which eps grows linearly from 0, the length
    of the steps in proportion; 0 for none. warm_start: share of the examples whose attack goes on
    from where that of the last visit ended. keep_best: whether it ends at the best of its start and
    its iterates, for a forward more, and not at the last one. squares: proposals of
    :func:`levelset_ext.attacks.search_squares` after the steps, a forward each.

    Figures: accuracy, at the adversarial examples, in the mode of the loss.
    """

    eps: float = 0.3
    step: float = 0.01
    iters: int = 40
    attack: str = "xent"
    warmup: float = 0.0
    warm_start: float = 0.0
    step_last: float | None = None
    keep_best: bool = False
    squares: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            not_negative=("eps",),
            positive=("step",) if self.step_last is None else ("step", "step_last"),
            counts=("iters",),
            counts_or_none=("squares",),
            shares=("warmup", "warm_start"),
            attack=("xent", "margin"),
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
        y = check_batch(x, y, "linf")
        settings = _settings(self, self.eps, progress)
        logits, increased = search_logits(network, y), OBJECTIVES[self.attack]
        if offsets is not None and self.warm_start > 0:
            start = warm_offsets(offsets, self.warm_start, settings.eps, generator)
        else:
            start = uniform_start(x, settings.eps, generator)

        def value(d: Tensor) -> Tensor:
            return increased(logits(x + d), y, None)

        delta = search_in_box(value, x, start, settings, self.squares, generator)
        out = evaluate(network, (x + delta).clamp_(0, 1), y)
        return Step(functional.cross_entropy(out, y), {"accuracy": accuracy(out, y)}, delta)


@dataclass(frozen=True)
class Trades:
    """TRADES (Zhang et al. 2019): CE(f(x), y) + beta KL(softmax f(x) || softmax f(x')), means over
    the batch, with x' in the L_inf box around x where PGD finds the divergence large.

    The divergence is 0 with a gradient of 0 at x, so PGD starts at x + 0.001 N(0, 1). Both
    softmaxes of the loss have a gradient. Cost: iters + 2 forwards and backwards and one forward
    more; the two forwards of the loss are separate, so batch norm normalises x and x' each by its
    own statistics, as in the authors' code.

    beta: weight of the divergence. eps, step, iters, warmup: as for :class:`Madry`.

    Figures: cross_entropy, divergence, the two means, and accuracy, at x.
    """

    beta: float = 6.0
    eps: float = 0.3
    step: float = 0.01
    iters: int = 40
    warmup: float = 0.0

    def __post_init__(self) -> None:
        check_fields(
            self,
            not_negative=("beta", "eps"),
            positive=("step",),
            counts=("iters",),
            shares=("warmup",),
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
        x = x.detach()
        y = check_batch(x, y, "linf")
        settings = _settings(self, self.eps, progress)
        logits = search_logits(network, y)
        with torch.no_grad():
            there = logits(x.clone()).log_softmax(1)
        noise = 0.001 * torch.randn(x.shape, dtype=x.dtype, generator=generator)
        start = noise.clamp_(-settings.eps, settings.eps).to(x.device)
        delta = climb(
            lambda d: _divergence(there, logits(x + d).log_softmax(1)), x, start, settings
        )
        moved = (x + delta).clamp_(0, 1)
        out = evaluate(network, x, y)
        cross_entropy = functional.cross_entropy(out, y)
        other = as_classes(network(moved), len(x))
        divergence = _divergence(out.log_softmax(1), other.log_softmax(1)).mean()
        return Step(
            cross_entropy + self.beta * divergence,
            {
                "cross_entropy": cross_entropy.detach(),
                "divergence": divergence.detach(),
                "accuracy": accuracy(out, y),
            },
        )


@dataclass(frozen=True)
class MMA:
    """Max-margin adversarial training (Ding et al. 2020).

    The distance d of a correct example to the boundary is increased by decreasing the loss at its
    nearest adversarial example x + delta*, as long as d < eps_max; a wrong example has its cross
    entropy at x decreased:

        w CE(x)  +  (1 - w) 1/N [ sum_{correct, d < eps_max} L(x + delta*)  +  sum_{wrong} CE(x) ]

    The search. The authors run PGD in a ball whose size they remember from the epoch before for
    every image, then bisect along x -> x + delta until the loss changes sign. An objective here
    remembers nothing. PGD instead starts at x itself and a row stops at its first step over the
    boundary: a row takes about as many steps as its distance needs, which finds the size of the
    ball on the way, and the rows that are done cost nothing more. PGD climbs the soft logit margin,
    whose gradient has the direction of that of cross entropy but does not vanish where the softmax
    saturates. The sign change on the segment from x to the example found is then bracketed, with
    the margin F^y, by Anderson-Björck false position, which takes a few evaluations where
    bisection takes ten. For an affine binary network delta* is exact: |delta*|_inf = |F| / |w|_1.

    The loss is one forward of x and all x + delta* as one batch, so batch norm normalises both
    alike, and a single x + delta* is no batch of its own.

    Attributes:
        eps_max: d_max, > 0.
        step, iters: of PGD; step * iters >= eps_max, or no example could get that far.
        search: most evaluations of false position.
        tol: |F^y| that is near enough to the boundary.
        clean_weight: w; the paper has 1/3, and 0 for "OMMA".
        loss: L, "xent" as in the authors' runs, or "slm", the soft logit margin
            log sum_{j != y} exp f_j - f_y, for which the method is derived; the gradients of a row
            differ by the factor 1 - softmax_y, about 1/2 at the boundary.
        warmup: as for :class:`Madry`; here of eps_max.

    Figures: distance, the mean over the correct of min(d, eps_max), NaN if none is; crossed, the
    share of the batch with d < eps_max; accuracy, at x, in eval mode.
    """

    eps_max: float = 0.45
    step: float = 0.0125
    iters: int = 40
    search: int = 10
    tol: float = 1e-3
    clean_weight: float = 1 / 3
    loss: str = "xent"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        check_fields(
            self,
            positive=("eps_max", "step", "tol"),
            counts=("iters", "search"),
            shares=("clean_weight", "warmup"),
            loss=("xent", "slm"),
        )
        if self.step * self.iters < self.eps_max * (1 - 1e-9):
            raise ValueError(
                f"step: expected step * iters >= eps_max = {self.eps_max}, the farthest place to "
                f"look at, got {self.step} * {self.iters}"
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
        x = x.detach()
        y = check_batch(x, y, "linf")
        n = len(x)
        settings = _settings(self, self.eps_max, progress)
        rows, points, correct = self._nearest(search_logits(network, y), x, y, settings)
        distance = x.new_full((n,), settings.eps)
        distance[rows] = lengths(points - x[rows], "linf")

        out = as_classes(network(torch.cat([x, points])), n + len(rows))
        check_labels(y, out.shape[1], "y")
        clean = functional.cross_entropy(out[:n], y, reduction="none")
        near = OBJECTIVES[self.loss](out[n:], y[rows], None)
        margins = (near.sum() + torch.where(correct, 0.0, clean).sum()) / n
        return Step(
            self.clean_weight * clean.mean() + (1 - self.clean_weight) * margins,
            {
                "distance": distance[correct].mean(),
                "crossed": torch.tensor(len(rows) / max(n, 1), device=x.device),
                "accuracy": correct.double().mean(),
            },
        )

    def _nearest(
        self, logits: LogitsFunction, x: Tensor, y: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The correct rows with a boundary point in the box, (m,) int64, these points
        (m, *event), and which rows are correct at x, (n,) bool."""
        walked = run_pgd(logits, x, y, "slm", settings, range(len(x)), random=False)
        correct = walked.step != 0  # broken before the first step is wrong at x
        rows = torch.nonzero(walked.success & correct).squeeze(1)
        if len(rows) == 0:
            return rows, x[rows], correct
        result = search_segments(
            lambda points, k: margin(logits(points), y[rows[k]], check=False),
            x[rows],
            walked.adversarial[rows],
            0.0,
            self.search,
            self.tol,
            "anderson_bjorck",
            start_values=None,
            end_values=None,
        )
        finite = torch.isfinite(result.values[:, 0])
        return rows[finite], result.points[finite], correct


# --- parts ----------------------------------------------------------------------------------------


def _settings(objective: Madry | Trades | MMA, eps: float, progress: float) -> Settings:
    now = grown(eps, objective.warmup, progress)
    step = grown(objective.step, objective.warmup, progress)
    last = getattr(objective, "step_last", None)
    if last is not None:
        last = grown(last, objective.warmup, progress)
    keep = getattr(objective, "keep_best", False)
    iters = objective.iters if now > 0 else 0
    return Settings(now, step, iters, step_last=last, keep_best=keep)


def _divergence(there: Tensor, here: Tensor) -> Tensor:
    """(n,) KL(p || q) of log probabilities ``there`` = log p and ``here`` = log q, (n, K)."""
    return functional.kl_div(here, there, reduction="none", log_target=True).sum(1)
