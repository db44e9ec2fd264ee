"""DeepFool (Moosavi-Dezfooli et al.): the shortest way over the boundary, by linearisations.

At each step every wrong class k has, for the linearised network, its boundary with the right class
y at the distance (f_y - f_k) / |grad (f_y - f_k)|_q; the point moves over the nearest one. That is
a Newton step (Eq. 5) on the field f_y - f_k with k chosen anew each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from levelset_ext.attacks.pgd import _clean_pass
from levelset_ext.attacks.prepare import (
    LogitsFunction,
    attack_copy,
    check_batch,
    input_gradient,
    lengths,
    outside_inference_mode,
    per_row,
)
from levelset_ext.margin import margin

__all__ = ["DeepFooled", "deepfool"]


@dataclass(frozen=True)
class DeepFooled:
    """Attributes:

    adversarial: (n, *event) in [0, 1].
    success: (n,) bool, whether the margin is not positive there.
    distance: (n,) |adversarial - x| in the norm of the attack; inf where it did not succeed. An
        upper bound of the distance to the boundary, for an affine network (1 + overshoot) times it.
    iterations: (n,) int64, steps taken.
    """

    adversarial: Tensor
    success: Tensor
    distance: Tensor
    iterations: Tensor


@outside_inference_mode
def deepfool(
    model: LogitsFunction,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "linf",
    iters: int = 50,
    overshoot: float = 0.02,
    classes: int = 10,
    binary: bool = False,
) -> DeepFooled:
    """DeepFool on n rows at once; rows that are over the boundary leave the batch.

    Args:
        model, x, y, binary: as for :func:`levelset_ext.attacks.pgd`.
        norm: in which the way is short, "linf" or "l2".
        iters: most steps.
        overshoot: how much farther than the linearised boundary a step goes, relative.
        classes: only so many wrong classes are looked at, those with the largest logits at x. Each
            costs a backward per step.

    Raises:
        ValueError: as for :func:`levelset_ext.attacks.pgd`.
    """
    y = check_batch(x, y, norm, iters=iters, overshoot=overshoot)
    if classes < 1:
        raise ValueError(f"classes: expected at least 1, got {classes}")
    logits = attack_copy(model, binary=binary)
    x, y, clean = _clean_pass(logits, x, y, binary)
    return run_deepfool(logits, x, y, clean, norm, iters, overshoot, classes)


def run_deepfool(
    logits: LogitsFunction,
    x: Tensor,
    y: Tensor,
    clean: Tensor,
    norm: str,
    iters: int,
    overshoot: float,
    classes: int,
) -> DeepFooled:
    """:func:`deepfool` on a prepared network whose logits at x are ``clean``, (n, K)."""
    order = clean.scatter(1, y[:, None], float("-inf")).argsort(1, descending=True)
    rivals = order[:, : min(classes, order.shape[1] - 1)]
    points = x.clone()
    success = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    steps = torch.full((len(x),), iters, dtype=torch.int64, device=x.device)
    here = torch.arange(len(x), device=x.device)
    at = x
    for t in range(iters + 1):
        if len(here) == 0:
            break
        with torch.enable_grad():
            # A leaf of its own, as the first layer of a network may work in place.
            point = at.detach().clone().requires_grad_()
            out = logits(point.clone())
        over = ~(margin(out.detach(), y[here], check=False) > 0)
        points[here] = at
        success[here[over]] = True
        steps[here[over]] = t
        if t == iters or bool(over.all()):
            break
        shift = _shortest(out, point, y[here], rivals[here], norm)
        stay = ~over
        here, at = here[stay], at[stay]
        at = (at + (1 + overshoot) * shift[stay]).clamp_(0, 1)
    distance = torch.where(success, lengths(points - x, norm), float("inf"))
    return DeepFooled(points, success, distance, steps)


def _shortest(out: Tensor, point: Tensor, y: Tensor, rivals: Tensor, norm: str) -> Tensor:
    """(n, *event): the step to the nearest linearised boundary; 0 where no class has a gradient."""
    own = out.gather(1, y[:, None])[:, 0]
    best = torch.full_like(own, float("inf"))
    shift = torch.zeros_like(point)
    count = rivals.shape[1]
    for k in range(count):
        gap = own - out.gather(1, rivals[:, k : k + 1])[:, 0]
        gradient = input_gradient(gap, point, keep=k + 1 < count)
        gap = gap.detach()
        flat = gradient.flatten(1)
        # The dual norm measures how fast the gap can close per length of the step.
        size = flat.abs().sum(1) if norm == "linf" else torch.linalg.vector_norm(flat, dim=1)
        distance = gap / size
        # At a boundary the row would stand still; the least step of the dtype takes it across.
        distance = distance.clamp_min(torch.finfo(gap.dtype).eps)
        usable = torch.isfinite(distance) & (size > 0) & (distance < best)
        unit = torch.sign(gradient) if norm == "linf" else gradient / per_row(size, gradient)
        shift = torch.where(per_row(usable, shift), -per_row(distance, shift) * unit, shift)
        best = torch.where(usable, distance, best)
    return shift.detach()
