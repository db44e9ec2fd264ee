"""What the objectives share: evaluations of the network, starts of searches, checks of fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from levelset_ext.attacks.pgd import Settings, ascend
from levelset_ext.attacks.prepare import LogitsFunction, without_gradients
from levelset_ext.attacks.squares import search_squares
from levelset_ext.field import as_rows, evaluation_copy
from levelset_ext.margin import check_labels, margin, two_logits


def evaluate(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The logits (n, K), K >= 2, in the mode the network is in; one logit as two.

    Raises:
        ValueError: an output that is neither (n,) nor (n, K); a label out of range.
    """
    # A copy, as the first layer of a network may work in place.
    logits = as_classes(network(x.clone()), len(x))
    check_labels(y, logits.shape[1], "y")
    return logits


def as_classes(logits: Tensor, n: int) -> Tensor:
    """(n, K) with K >= 2: one logit, (n,) or (n, 1), becomes two."""
    logits = as_rows(logits)
    if logits.shape in ((n,), (n, 1)):
        return two_logits(logits)
    if logits.dim() != 2 or logits.shape[0] != n or logits.shape[1] < 2:
        raise ValueError(
            f"network: expected logits (n,) or (n, K) with n = {n}, got {tuple(logits.shape)}"
        )
    return logits


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of rows with a positive margin, a scalar; a tie is wrong."""
    return (margin(logits.detach(), y, check=False) > 0).double().mean()


def grown(value: float, warmup: float, progress: float) -> float:
    """``value``, to which it grows linearly from 0 over the share ``warmup`` of the training."""
    return value if warmup == 0 else value * min(1.0, progress / warmup)


def check_fields(
    objective: Any,
    *,
    positive: Iterable[str] = (),
    not_negative: Iterable[str] = (),
    counts: Iterable[str] = (),
    counts_or_none: Iterable[str] = (),
    shares: Iterable[str] = (),
    **choices: Iterable[str],
) -> None:
    """Raises ValueError for a field that is not what its group says.

    Args:
        objective: a dataclass.
        positive, not_negative: names of fields that are finite numbers > 0, >= 0.
        counts, counts_or_none: of integers >= 1, >= 0.
        shares: of numbers in [0, 1].
        choices: for a field by its name, the strings it may be.
    """

    def refuse(name: str, expected: str) -> None:
        raise ValueError(f"{name}: expected {expected}, got {getattr(objective, name)!r}")

    for name in positive:
        if not (getattr(objective, name) > 0 and math.isfinite(getattr(objective, name))):
            refuse(name, "a finite number > 0")
    for name in not_negative:
        if not (getattr(objective, name) >= 0 and math.isfinite(getattr(objective, name))):
            refuse(name, "a finite number >= 0")
    for names, least in ((counts, 1), (counts_or_none, 0)):
        for name in names:
            value = getattr(objective, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                refuse(name, f"an integer >= {least}")
    for name in shares:
        if not 0 <= getattr(objective, name) <= 1:
            refuse(name, "a share in [0, 1]")
    for name, allowed in choices.items():
        if getattr(objective, name) not in allowed:
            refuse(name, f"one of {', '.join(allowed)}")


def search_logits(network: nn.Module, y: Tensor) -> LogitsFunction:
    """The network for searches among inputs: (n, *event) -> logits (n, K), K >= 2.

    It is the eval-mode clone with parameters that want no gradient, so neither a mode nor a buffer
    nor a ``.grad`` of the network changes, and no gradient of a parameter is computed. The labels
    are checked at the first evaluation, before a loss indexes with them.
    """
    clone = without_gradients(evaluation_copy(network))
    checked = False

    def logits(x: Tensor) -> Tensor:
        nonlocal checked
        out = as_classes(clone(x), len(x))
        if not checked:
            check_labels(y, out.shape[1], "y")
            checked = True
        return out

    return logits


def search_in_box(
    value: Callable[[Tensor], Tensor],
    x: Tensor,
    start: Tensor,
    settings: Settings,
    squares: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The offsets where steps along the gradient end, and after them some proposals of squares."""
    delta, there = ascend(value, x, start, settings)
    if squares:
        delta = search_squares(value, x, delta, settings.eps, squares, generator, there)
    return delta


def uniform_start(x: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    """Offsets from the box [-eps, eps], drawn on the CPU whatever the device of x."""
    return (torch.rand(x.shape, dtype=x.dtype, generator=generator) * 2 - 1).mul_(eps).to(x.device)


def warm_offsets(
    offsets: Tensor, share: float, eps: float, generator: torch.Generator | None
) -> Tensor:
    """``offsets`` in about that share of the rows, elsewhere uniform in [-eps, eps]. They may have
    been rounded since, or come from a larger box."""
    offsets = offsets.clamp(-eps, eps)
    rows = torch.rand(len(offsets), *(1,) * (offsets.dim() - 1), generator=generator) < share
    return torch.where(rows.to(offsets.device), offsets, uniform_start(offsets, eps, generator))
