"""How far the loss of a classifier is from linear around an image (Qin et al. 2019).

    gamma(eps, x) = max_{|delta|_inf <= eps} | l(x + delta) - l(x) - delta . grad_x l(x) |

with l the cross entropy. The loss inside the box is at most l(x) + max |delta . grad l(x)| + gamma,
so a network with a small gamma has no worse point there than its gradient tells. Where gamma is
large, an attack that follows gradients may be lost, and its figure says little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from levelset_ext.attacks.pgd import Settings, check_finite, climb, row_numbers
from levelset_ext.attacks.prepare import (
    LogitsFunction,
    attack_copy,
    check_batch,
    check_classes,
    input_gradient,
    outside_inference_mode,
    per_row,
    random_start,
)
from levelset_ext.field import check_integer

__all__ = ["LocalLinearity", "local_linearity"]


@dataclass(frozen=True)
class LocalLinearity:
    """The measure of n rows; detached, on the device of the images.

    Attributes:
        gamma: (n,) the largest deviation found: a lower bound of the maximum, as every attack's
            figure is. inf where the loss is not finite somewhere in the box.
        delta: (n, *event), where it was found, |delta|_inf <= eps.
    """

    gamma: Tensor
    delta: Tensor

    @property
    def mean(self) -> float:
        """Mean of gamma; NaN without rows."""
        return float(self.gamma.mean())

    @property
    def max(self) -> float:
        """Largest gamma; NaN without rows."""
        return float(self.gamma.max()) if len(self) else float("nan")

    def __len__(self) -> int:
        return len(self.gamma)


@outside_inference_mode
def local_linearity(
    model: LogitsFunction,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    steps: int = 50,
    step: float | None = None,
    restarts: int = 1,
    seed: int = 0,
    clip: bool = False,
    batch: int = 250,
    rows: Sequence[int] | None = None,
    binary: bool = False,
) -> LocalLinearity:
    """gamma(eps, x) of every row, by sign-gradient ascent; the best of all iterates is kept.

    Args:
        model: module or callable, (n, *event) -> logits (n, K). A module runs as its eval-mode
            clone; nothing about it changes.
        x: (n, *event) in [0, 1].
        y: (n,) integers.
        eps: half the width of the box around the image.
        steps: of the ascent, per start.
        step: length of a step; 2.5 eps / steps if left out.
        restarts: starts per row, uniform in the box. At delta = 0 itself the deviation has no
            gradient.
        seed: of the starts. The result of a row does not depend on the other rows, up to the
            network's own batch-size rounding.
        clip: whether x + delta stays in [0, 1]; the definition does not ask for it.
        batch: rows at once.
        rows: numbers of the rows in their data set, for the starts; 0 ... n - 1 if left out.
        binary: the network has one logit; labels 0 and 1, or -1 and 1.

    Raises:
        ValueError: as for :func:`levelset_ext.attacks.pgd`.
    """
    step = 2.5 * eps / max(steps, 1) if step is None else step
    y = check_batch(x, y, "linf", eps=eps, step=step, steps=steps, restarts=restarts)
    steps = check_integer("steps", steps)
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    numbers = row_numbers(rows, x)
    logits = attack_copy(model, binary=binary)
    settings = Settings(eps, step, steps, restarts, seed)
    parts = [
        _one_batch(
            logits,
            x[at : at + batch].detach(),
            y[at : at + batch].to(x.device),
            settings,
            numbers[at : at + batch],
            clip,
            binary,
        )
        for at in range(0, max(len(x), 1), batch)
    ]
    return LocalLinearity(torch.cat([p.gamma for p in parts]), torch.cat([p.delta for p in parts]))


def _one_batch(
    logits: LogitsFunction,
    x: Tensor,
    y: Tensor,
    settings: Settings,
    rows: Sequence[int],
    clip: bool,
    binary: bool,
) -> LocalLinearity:
    with torch.enable_grad():
        point = x.clone().requires_grad_()
        out = logits(point.clone())
        y = check_classes(out, y, binary)
        check_finite(out.detach())
        deviation = deviation_from(logits, x, y, point, out)
    best = x.new_zeros(len(x))  # the deviation at delta = 0
    where = torch.zeros_like(x)

    def noted(delta: Tensor) -> Tensor:
        """The deviation, with the best so far kept aside."""
        nonlocal best, where
        values = deviation(delta)
        found = values.detach().to(best.dtype)
        found = torch.where(torch.isnan(found), torch.inf, found)
        better = found > best
        best = torch.where(better, found, best)
        where = torch.where(per_row(better, delta), delta.detach(), where)
        return values

    for restart in range(settings.restarts):
        start = random_start(
            x.shape[1:], rows, seed=settings.seed, restart=restart, norm="linf", eps=settings.eps
        ).to(x)
        last = climb(noted, x, start, settings, clip=clip)
        with torch.no_grad():
            noted(last)
    return LocalLinearity(best, where)


def deviation_from(
    logits: LogitsFunction, x: Tensor, y: Tensor, point: Tensor, out: Tensor
) -> Callable[[Tensor], Tensor]:
    """delta (n, *event) -> |l(x + delta) - l(x) - delta . grad l(x)| (n,), with l(x) and its
    gradient taken once.

    Args:
        logits: a prepared network.
        x, y: (n, *event), (n,).
        point: x as a leaf that wants a gradient.
        out: the logits (n, K) at ``point``, with their graph.
    """
    losses = functional.cross_entropy(out, y, reduction="none")
    gradient = input_gradient(losses, point)
    losses = losses.detach()

    def deviation(delta: Tensor) -> Tensor:
        moved = functional.cross_entropy(logits(x + delta), y, reduction="none")
        return (moved - losses - (delta * gradient).flatten(1).sum(1)).abs()

    return deviation
