"""Projected gradient ascent on a loss of the logits, in a ball around the image and the box [0, 1].

One step is one forward, one backward to the input and a handful of element-wise operations; the
logits of the forward also tell which rows are broken by now. A row whose margin is not positive at
some iterate is broken for good: that iterate is its adversarial example, and the row leaves the
batch. So no time is spent on rows that are decided, and a row counts that a later step would have
carried back over the boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from levelset_ext.attacks.prepare import (
    LogitsFunction,
    attack_copy,
    check_batch,
    check_classes,
    check_rows,
    input_gradient,
    outside_inference_mode,
    per_row,
    random_start,
)
from levelset_ext.margin import margin, targeted_margin

__all__ = ["OBJECTIVES", "Attacked", "multi_targeted", "pgd"]

Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _xent(logits: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
    return functional.cross_entropy(logits, y, reduction="none")


def _margin(logits: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
    return -margin(logits, y, check=False)


def _slm(logits: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
    own = logits.gather(1, y[:, None])[:, 0]
    return logits.scatter(1, y[:, None], float("-inf")).logsumexp(1) - own


def _rescaled_xent(logits: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
    # Where the margin is large, 1 - softmax vanishes in floating point and the gradient with it.
    # Divided by its own margin, every row looks at its rivals from a distance of 1.
    scale = margin(logits.detach(), y, check=False).abs().clamp_min(1.0)
    return functional.cross_entropy(logits / scale[:, None], y, reduction="none")


def _targeted(logits: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
    assert targets is not None
    return -targeted_margin(logits, y, targets)


OBJECTIVES: dict[str, Objective] = {
    "xent": _xent,
    "margin": _margin,
    "slm": _slm,
    "rescaled-xent": _rescaled_xent,
    "targeted": _targeted,
}


@dataclass(frozen=True)
class Attacked:
    """What an attack did to n images.

    Attributes:
        adversarial: (n, *event) in [0, 1] and in the ball: the first point found at which the row
            is broken; for the others the last iterate of the last restart.
        success: (n,) bool, whether the row is broken (margin not positive) there.
        step: (n,) int64, after how many steps it broke (0: at the start itself); -1 where it
            did not.
        restart: (n,) int64, in which restart, or for the multi-targeted attack in which of its
            runs; -1 where it did not.
    """

    adversarial: Tensor
    success: Tensor
    step: Tensor
    restart: Tensor


@outside_inference_mode
def pgd(
    model: LogitsFunction,
    x: Tensor,
    y: Tensor,
    *,
    objective: str = "margin",
    eps: float,
    step: float,
    iters: int,
    restarts: int = 1,
    seed: int = 0,
    norm: str = "linf",
    targets: Tensor | None = None,
    start: Tensor | None = None,
    random: bool = True,
    early_stop: bool = True,
    rows: Sequence[int] | None = None,
    binary: bool = False,
) -> Attacked:
    """PGD with random starts, on all n rows as one batch.

    L_inf: delta <- clip(delta + step sign(g), -eps, eps); L2: delta <- (delta + step g / |g|),
    scaled back to length eps where it is longer. Then x + delta is clipped to [0, 1]. A row
    without a gradient (zero or NaN) stays where it is for the step.

    Args:
        model: module or callable, (n, *event) -> logits (n, K). Nothing about it changes.
        x: (n, *event) in [0, 1].
        y: (n,) integers.
        objective: what is increased, one of :data:`OBJECTIVES`: "xent", cross entropy; "margin",
            -F^y; "slm", the soft logit margin log sum_{j != y} exp f_j - f_y, whose gradient is
            that of cross entropy over 1 - softmax_y and so does not vanish with it;
            "rescaled-xent", cross entropy of the logits divided by max(1, |F^y|) of the row;
            "targeted", f_t - f_y with t from ``targets``.
        eps: radius of the ball. step: length of a step. iters: steps per restart.
        restarts: how many starts; a row leaves at the first one that breaks it.
        seed: of the random starts, see :func:`levelset_ext.attacks.prepare.random_start`.
        norm: "linf" or "l2".
        targets: (n,) int64, for "targeted" only.
        start: (n, *event) points to start the first restart from, instead of a random one; brought
            into the ball and into [0, 1].
        random: False starts at x itself (one restart is then all there is).
        early_stop: False keeps every row in the batch for all steps and judges its last iterate
            alone, as most libraries do.
        rows: numbers of the rows in their data set, for the random starts; 0 ... n - 1 if left out.
        binary: the network has one logit; labels 0 and 1, or -1 and 1.

    Raises:
        ValueError: labels out of range, images outside [0, 1], weights or logits at x that are not
            finite, a network with one class, shapes that do not belong together.
    """
    settings = Settings(eps, step, iters, restarts, seed, norm)
    y = check_batch(x, y, norm, eps=eps, step=step, iters=iters, restarts=restarts)
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if (targets is None) == (objective == "targeted"):
        raise ValueError(
            "targets: expected (n,) classes for the objective 'targeted', and only there"
        )
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start: expected shape {tuple(x.shape)}, got {tuple(start.shape)}")
    logits = attack_copy(model, binary=binary)
    x, y, clean = _clean_pass(logits, x, y, binary)
    if targets is not None:
        targets = check_classes(clean, check_rows("targets", targets, x), False, "targets")
    return run_pgd(
        logits,
        x,
        y,
        objective,
        settings,
        row_numbers(rows, x),
        targets=targets,
        start=start,
        random=random,
        early_stop=early_stop,
    )


@outside_inference_mode
def multi_targeted(
    model: LogitsFunction,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step: float,
    iters: int,
    restarts: int = 1,
    seed: int = 0,
    norm: str = "linf",
    rows: Sequence[int] | None = None,
    binary: bool = False,
) -> Attacked:
    """One targeted PGD per wrong class on f_t - f_y, each on the rows the runs before it left over.

    Stronger than the margin, whose largest wrong class draws the whole path although another one
    may be closer to winning inside the ball. Every row takes its classes in the order of their
    logits at x, the likeliest first, which decides only how early a row leaves.

    Arguments and errors as for :func:`pgd`. ``restart`` of the result counts runs: run = restart x
    (K - 1) + rank of the class.
    """
    settings = Settings(eps, step, iters, restarts, seed, norm)
    y = check_batch(x, y, norm, eps=eps, step=step, iters=iters, restarts=restarts)
    logits = attack_copy(model, binary=binary)
    x, y, clean = _clean_pass(logits, x, y, binary)
    return run_multi_targeted(logits, x, y, clean, settings, row_numbers(rows, x))


# --- the same with everything checked and prepared ---------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The numbers of a PGD attack, see :func:`pgd`.

    step_last, keep_best: of :func:`climb` alone. step_last: the length of the last step, to which
    the lengths go geometrically from ``step``; None keeps all alike. keep_best: whether a row ends
    at the best of its start and its iterates and not at the last one.
    """

    eps: float
    step: float
    iters: int
    restarts: int = 1
    seed: int = 0
    norm: str = "linf"
    step_last: float | None = None
    keep_best: bool = False

    def length(self, iteration: int) -> float:
        """Of the step with this number, from 0."""
        if self.step_last is None or self.iters < 2:
            return self.step
        return self.step * (self.step_last / self.step) ** (iteration / (self.iters - 1))


def row_numbers(rows: Sequence[int] | None, x: Tensor) -> Sequence[int]:
    """The numbers of rows in their data set, those that the caller gave or 0 ... n - 1."""
    if rows is None:
        return range(len(x))
    if len(rows) != len(x):
        raise ValueError(f"rows: expected {len(x)} numbers, got {len(rows)}")
    if len(rows) and min(rows) < 0:
        raise ValueError(f"rows: expected numbers >= 0, got {min(rows)}")
    return rows


def _clean_pass(
    logits: LogitsFunction, x: Tensor, y: Tensor, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x detached, the labels as 0 ... K - 1, and the logits at x, which must be finite."""
    x = x.detach()
    with torch.no_grad():
        clean = logits(x.clone())
    y = check_classes(clean, y, binary)
    check_finite(clean)
    return x, y, clean


def check_finite(logits: Tensor) -> None:
    """Raises ValueError unless all logits (n, K) are finite."""
    bad = int((~torch.isfinite(logits).all(1)).sum())
    if bad:
        raise ValueError(
            f"model: expected finite logits at x, got NaN or inf in {bad} of {len(logits)} rows"
        )


def run_pgd(
    logits: LogitsFunction,
    x: Tensor,
    y: Tensor,
    objective: str,
    settings: Settings,
    rows: Sequence[int],
    *,
    targets: Tensor | None = None,
    start: Tensor | None = None,
    random: bool = True,
    early_stop: bool = True,
) -> Attacked:
    """:func:`pgd` on a prepared network. A restart sees the rows that all before it left over."""
    result = _untouched(x)
    left = torch.arange(len(x), device=x.device)
    for restart in range(settings.restarts if random else 1):
        if len(left) == 0:
            break
        some = x[left]
        if restart == 0 and start is not None:
            delta = _in_ball(start.detach().to(some)[left] - some, settings)
        elif random:
            delta = _offsets(some, left, rows, settings, restart)
        else:
            delta = torch.zeros_like(some)
        aims = None if targets is None else targets[left]
        point, at = _ascend(
            logits, some, y[left], delta, OBJECTIVES[objective], settings, aims, early_stop
        )
        _note(result, left, point, at, restart)
        left = left[at < 0]
    return result


def run_multi_targeted(
    logits: LogitsFunction,
    x: Tensor,
    y: Tensor,
    clean: Tensor,
    settings: Settings,
    rows: Sequence[int],
) -> Attacked:
    """:func:`multi_targeted` on a prepared network whose logits at x are ``clean``, (n, K)."""
    order = clean.scatter(1, y[:, None], float("-inf")).argsort(1, descending=True)
    wrong = order.shape[1] - 1
    result = _untouched(x)
    left = torch.arange(len(x), device=x.device)
    for run in range(settings.restarts * wrong):
        if len(left) == 0:
            break
        some = x[left]
        delta = _offsets(some, left, rows, settings, run)
        aims = order[left, run % wrong]
        point, at = _ascend(logits, some, y[left], delta, _targeted, settings, aims, True)
        _note(result, left, point, at, run)
        left = left[at < 0]
    return result


def _offsets(
    x: Tensor, left: Tensor, rows: Sequence[int], settings: Settings, restart: int
) -> Tensor:
    numbers = [rows[i] for i in left.tolist()]
    return random_start(
        x.shape[1:],
        numbers,
        seed=settings.seed,
        restart=restart,
        norm=settings.norm,
        eps=settings.eps,
    ).to(x)


def _untouched(x: Tensor) -> Attacked:
    never = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    success = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    return Attacked(x.clone(), success, never, never.clone())


def _note(result: Attacked, left: Tensor, point: Tensor, at: Tensor, run: int) -> None:
    """Writes what one run did to the rows ``left`` into the result of all runs."""
    result.adversarial[left] = point
    broken = left[at >= 0]
    result.success[broken] = True
    result.step[broken] = at[at >= 0]
    result.restart[broken] = run


def _ascend(
    logits: LogitsFunction,
    x: Tensor,
    y: Tensor,
    delta: Tensor,
    objective: Objective,
    settings: Settings,
    targets: Tensor | None,
    early_stop: bool,
) -> tuple[Tensor, Tensor]:
    """One run from the offsets ``delta``: the points (n, *event), and the step at which each row
    broke, (n,) int64, -1 where it did not."""
    points = x.clone()
    broke = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    here = torch.arange(len(x), device=x.device)  # where in the result the rows of the batch are
    if early_stop:
        delta = (x + delta).clamp_(0, 1).sub_(x)
        for t in range(settings.iters):
            with torch.enable_grad():
                delta.requires_grad_()
                out = logits(x + delta)
                gradient = input_gradient(objective(out, y, targets), delta)
            delta = delta.detach()
            right = margin(out.detach(), y, check=False) > 0  # NaN is not right either
            if not bool(right.all()):
                wrong = ~right
                points[here[wrong]] = (x[wrong] + delta[wrong]).clamp_(0, 1)
                broke[here[wrong]] = t
                x, y, here = x[right], y[right], here[right]
                delta, gradient = delta[right], gradient[right]
                targets = None if targets is None else targets[right]
                if len(x) == 0:
                    return points, broke
            delta = _moved(x, delta, gradient, settings, settings.step)
    else:
        delta = climb(lambda offset: objective(logits(x + offset), y, targets), x, delta, settings)
    last = (x + delta).clamp_(0, 1)
    with torch.no_grad():
        wrong = ~(margin(logits(last.clone()), y, check=False) > 0)
    points[here] = last
    broke[here[wrong]] = settings.iters
    return points, broke


def climb(
    value: Callable[[Tensor], Tensor],
    x: Tensor,
    delta: Tensor,
    settings: Settings,
    *,
    clip: bool = True,
) -> Tensor:
    """Projected ascent on anything: all rows take all ``settings.iters`` steps.

    Args:
        value: offsets (n, *event) -> (n,), what every row increases; differentiable.
        x: (n, *event), the centres of the balls.
        delta: (n, *event), the offsets to start from.
        settings: all but restarts and seed are used; keep_best costs one more evaluation.
        clip: whether x + delta stays in [0, 1].

    Returns:
        The offsets after the last step, detached; ``value`` has not been evaluated at them. With
        ``keep_best`` those of the largest value; where one is not a number the row takes what
        comes next.
    """
    return ascend(value, x, delta, settings, clip=clip)[0]


def ascend(
    value: Callable[[Tensor], Tensor],
    x: Tensor,
    delta: Tensor,
    settings: Settings,
    *,
    clip: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """:func:`climb`, and with ``keep_best`` the values (n,) at its offsets, else None."""
    delta = (x + delta).clamp_(0, 1).sub_(x) if clip else delta.detach().clone()
    kept = None
    for iteration in range(settings.iters):
        with torch.enable_grad():
            delta.requires_grad_()
            there = value(delta)
            gradient = input_gradient(there, delta)
        delta = delta.detach()
        if settings.keep_best:
            new = there.detach(), delta
            kept = new if kept is None else better(kept, new)
        delta = _moved(x, delta, gradient, settings, settings.length(iteration), clip)
    if kept is None:
        return delta, None
    with torch.no_grad():
        there, delta = better(kept, (value(delta), delta))
    return delta, there


def better(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of two pairs of values (n,) and offsets (n, *event) the larger one of every row; the other
    where they are equal or a value is not a number."""
    larger = one[0] > other[0]
    offsets = torch.where(per_row(larger, one[1]), one[1], other[1])
    return torch.where(larger, one[0], other[0]), offsets


def _moved(
    x: Tensor,
    delta: Tensor,
    gradient: Tensor,
    settings: Settings,
    step: float,
    clip: bool = True,
) -> Tensor:
    """The offsets after one step of this length."""
    if settings.norm == "linf":
        delta = torch.sign(gradient).mul_(step).add_(delta)  # sign(NaN) is 0
    else:
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        # By the largest entry first: squares of tiny or huge gradients leave the range of float32.
        largest = gradient.flatten(1).abs().amax(1)
        gradient = gradient / per_row(torch.where(largest > 0, largest, 1.0), gradient)
        size = torch.linalg.vector_norm(gradient.flatten(1), dim=1).clamp_min(1e-30)
        delta = delta + gradient * per_row(step / size, gradient)
    delta = _in_ball(delta, settings)
    return (x + delta).clamp_(0, 1).sub_(x) if clip else delta


def _in_ball(delta: Tensor, settings: Settings) -> Tensor:
    """The offsets, in memory that may be written to, brought into the ball."""
    eps = settings.eps
    if settings.norm == "linf":
        return delta.clamp_(-eps, eps)
    size = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return delta * per_row(torch.where(size > eps, eps / size, 1.0), delta)
