"""Training that looks at the gradient at the input: large margin, LLR and CURE.

The gradient with respect to x is part of these losses, so their own gradient is a second
derivative of the network: it costs another backward, it takes operations that have one, and of a
ReLU network, whose gradient jumps from piece to piece, it sees the pieces and not the jumps. The
paper's sample network needs none, nor does :class:`LargeMargin` with a constant denominator.

Every forward of a loss runs in the mode the network is in, which a training loop sets to train.
With batch norm in train mode the rows of a batch depend on each other, and the gradient of a row
is then that of the sum of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from levelset_ext.attacks.linearity import deviation_from
from levelset_ext.attacks.pgd import Settings, climb
from levelset_ext.attacks.prepare import per_row
from levelset_ext.objectives.base import Step
from levelset_ext.objectives.common import (
    accuracy,
    check_fields,
    evaluate,
    grown,
    search_logits,
    uniform_start,
)

__all__ = ["CURE", "LLR", "LargeMargin"]

# The norm that measures how fast F can change per length of x, for each norm of x.
DUALS = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}


@dataclass(frozen=True)
class LargeMargin:
    """The large-margin loss at the input layer (Elsayed et al. 2018).

        1/N sum_i max_{j != y} max{0, gamma + (f_j - f_y) / (eps + |grad_x f_j - grad_x f_y|_q)}

    The quotient is minus the distance to the boundary between y and j of the network linearised at
    x, in the norm p dual to q. It is the length of one Newton step (Eq. 5) on f_y - f_j from x,
    where the paper takes as many as it needs to arrive. With the denominator constant its gradient
    is that of |x - p(theta)| with the Jacobian and c taken at x.

    One forward, and as many backwards to the input as rivals are looked at.

    Attributes:
        gamma: distance to reach, > 0, in the units of x.
        norm: of that distance: "l2", "linf" or "l1".
        constant_denominator: no gradient through the denominator, as the authors advise; otherwise
            second derivatives.
        classes: only so many rivals are looked at, those with the largest logits.
        eps: > 0, the authors', for rows without a gradient. It shortens a distance by the share
            eps / |grad|.

    Figures: distance, mean over the batch of the signed linearised distance; accuracy.
    """

    gamma: float = 0.3
    norm: str = "l2"
    constant_denominator: bool = True
    classes: int = 10
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self, positive=("gamma", "eps"), counts=("classes",), norm=tuple(DUALS))

    def __call__(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        progress: float = 1.0,
    ) -> Step:
        point = x.detach().clone().requires_grad_()
        logits = evaluate(network, point, y)
        rivals = logits.detach().scatter(1, y[:, None], float("-inf"))
        rivals = rivals.topk(min(self.classes, logits.shape[1] - 1), 1).indices
        gaps = logits.gather(1, y[:, None]) - logits.gather(1, rivals)
        sizes = []
        for gap in gaps.unbind(1):
            gradient = _gradient(gap, point, create=not self.constant_denominator)
            sizes.append(torch.linalg.vector_norm(gradient.flatten(1), DUALS[self.norm], dim=1))
        # min(dim) and not amin: the gradient is that of one boundary also where two are as near.
        distance = (gaps / (self.eps + torch.stack(sizes, 1))).min(1).values
        return Step(
            (self.gamma - distance).clamp(min=0).mean(),
            {"distance": distance.detach().mean(), "accuracy": accuracy(logits, y)},
        )


@dataclass(frozen=True)
class LLR:
    """Local linearity regularisation (Qin et al. 2019), means over the batch, l the cross entropy:

        l(x)  +  lam |l(x + delta) - l(x) - delta . grad l(x)|  +  mu |delta . grad l(x)|

    delta maximises the first modulus in the L_inf box, see
    :func:`levelset_ext.attacks.local_linearity`: a few sign-gradient steps from a uniformly random
    start, on the network in eval mode, whose parameters want no gradient meanwhile. delta is a
    constant of the loss. The loss is two forwards, at x and then at x + delta; batch norm in train
    mode normalises each by its own statistics.

    Attributes:
        eps: half the width of the box.
        lam, mu: weights >= 0.
        steps: of the search; 2 to 15 are the authors'.
        step: length of one.
        penalty: "llr" as above; "grad_l2" has mu |grad l(x)|_2 in place of the last term, which
            the authors compared it with. With lam = 0 as well nothing is searched.
        clip: whether x + delta stays in [0, 1]; the definition does not ask for it.
        warmup: share of the training over which eps, and the steps in proportion, grow linearly
            from 0; 0 for none.

    Figures: gamma, the mean of the first modulus (NaN if it was not needed); penalty, the mean that
    mu multiplies; accuracy, at x.
    """

    eps: float = 0.3
    lam: float = 4.0
    mu: float = 3.0
    steps: int = 10
    step: float = 0.075
    penalty: str = "llr"
    clip: bool = False
    warmup: float = 0.0

    def __post_init__(self) -> None:
        check_fields(
            self,
            not_negative=("eps", "lam", "mu"),
            positive=("step",),
            counts=("steps",),
            shares=("warmup",),
            penalty=("llr", "grad_l2"),
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
        searched = self.penalty == "llr" or self.lam > 0
        if searched:
            delta = self._search(network, x, y, generator, progress)
        point = x.clone().requires_grad_()
        logits = evaluate(network, point, y)
        losses = functional.cross_entropy(logits, y, reduction="none")
        gradient = _gradient(losses, point, create=True)
        loss = losses.mean()
        gamma = torch.full_like(loss.detach(), torch.nan)
        if searched:
            slope = (delta * gradient).flatten(1).sum(1)
            moved = evaluate(network, x + delta, y)
            deviation = functional.cross_entropy(moved, y, reduction="none") - losses - slope
            deviation = deviation.abs().mean()
            loss, gamma = loss + self.lam * deviation, deviation.detach()
        if self.penalty == "llr":
            penalty = slope.abs().mean()
        else:
            penalty = torch.linalg.vector_norm(gradient.flatten(1), dim=1).mean()
        return Step(
            loss + self.mu * penalty,
            {"gamma": gamma, "penalty": penalty.detach(), "accuracy": accuracy(logits, y)},
        )

    def _search(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None,
        progress: float,
    ) -> Tensor:
        eps = grown(self.eps, self.warmup, progress)
        step = grown(self.step, self.warmup, progress)
        logits = search_logits(network, y)
        with torch.enable_grad():
            point = x.clone().requires_grad_()
            deviation = deviation_from(logits, x, y, point, logits(point.clone()))
        start = uniform_start(x, eps, generator)
        return climb(deviation, x, start, Settings(eps, step, self.steps), clip=self.clip)


@dataclass(frozen=True)
class CURE:
    """Curvature regularisation (Moosavi-Dezfooli et al. 2019), means over the batch:

        l(x)  +  lam |grad l(x + h z) - grad l(x)|_2^2,   z = sign(grad l(x)) / |sign(grad l(x))|_2

    with l the cross entropy and z a constant. Both gradients are of the network in the mode it is
    in, and z comes from the one at x, which is needed anyway: two forwards in all, without any in
    eval mode. Batch norm in train mode normalises x and x + h z each by its own statistics.

    h: length of the step, > 0, in L2. lam: weight >= 0.

    Figures: curvature, the mean that lam multiplies; accuracy, at x.
    """

    h: float = 1.5
    lam: float = 4.0

    def __post_init__(self) -> None:
        check_fields(self, positive=("h",), not_negative=("lam",))

    def __call__(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        progress: float = 1.0,
    ) -> Step:
        point = x.detach().clone().requires_grad_()
        logits = evaluate(network, point, y)
        losses = functional.cross_entropy(logits, y, reduction="none")
        here = _gradient(losses, point, create=True)
        z = torch.sign(here.detach())
        # |sign| is at least 1 unless the row has no gradient, and then z is 0.
        size = torch.linalg.vector_norm(z.flatten(1), dim=1).clamp_min(1)
        moved = (x.detach() + z * per_row(self.h / size, z)).requires_grad_()
        there = _gradient(
            functional.cross_entropy(evaluate(network, moved, y), y, reduction="none"),
            moved,
            create=True,
        )
        curvature = (there - here).flatten(1).square().sum(1).mean()
        return Step(
            losses.mean() + self.lam * curvature,
            {"curvature": curvature.detach(), "accuracy": accuracy(logits, y)},
        )


def _gradient(values: Tensor, x: Tensor, *, create: bool) -> Tensor:
    """The gradient of the sum of ``values`` (n,) at x, zero where nothing leads there; with
    ``create`` it has a graph of its own. The graph of ``values`` is kept."""
    (gradient,) = torch.autograd.grad(
        values.sum(), x, retain_graph=True, create_graph=create, allow_unused=True
    )
    return torch.zeros_like(x) if gradient is None else gradient
