"""Random search in a box, by squares, which needs no gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from levelset_ext.attacks.pgd import better

__all__ = ["search_squares"]

LARGEST = 0.8  # side of a square, of the shorter side of the image


@torch.no_grad()
def search_squares(
    value: Callable[[Tensor], Tensor],
    x: Tensor,
    delta: Tensor,
    eps: float,
    proposals: int,
    generator: torch.Generator | None = None,
    at_delta: Tensor | None = None,
) -> Tensor:
    """Replaces squares of the offsets by +-eps where that increases ``value``.

    The proposals of Square Attack (Andriushchenko et al. 2020) for L_inf: a square at a uniformly
    random place gets one sign per channel, and is kept by the rows whose value it increases. The
    side is drawn anew each time, log-uniform between a pixel and 0.8 of the image, as rows whose
    offsets come from earlier searches are at no common stage. One forward per proposal, and one
    for the start if ``at_delta`` is not given.

    Args:
        value: offsets (n, channels, height, width) -> (n,), what every row increases.
        x: (n, channels, height, width) in [0, 1].
        delta: as x, the offsets to start from, in [-eps, eps] and with x + delta in [0, 1].
        eps: half the width of the box.
        proposals: squares tried per row.
        generator: of places, sides and signs, which are drawn on the CPU whatever the device of x.
        at_delta: (n,), ``value(delta)`` where the caller has it.

    Returns:
        The offsets, with the same bounds; ``value`` is nowhere smaller than at ``delta``.

    Raises:
        ValueError: x that is not a batch of images, delta or at_delta of another shape.
    """
    if x.dim() != 4:
        raise ValueError(
            f"x: expected images (n, channels, height, width), got shape {tuple(x.shape)}"
        )
    if delta.shape != x.shape:
        raise ValueError(f"delta: expected shape {tuple(x.shape)}, got {tuple(delta.shape)}")
    if at_delta is not None and at_delta.shape != x.shape[:1]:
        raise ValueError(
            f"at_delta: expected shape {tuple(x.shape[:1])}, got {tuple(at_delta.shape)}"
        )
    n, channels, height, width = x.shape
    rows = torch.arange(height, device=x.device).view(1, 1, height, 1)
    columns = torch.arange(width, device=x.device).view(1, 1, 1, width)
    largest = max(1.0, LARGEST * min(height, width))
    best = value(delta) if at_delta is None else at_delta
    for _ in range(proposals):
        # Rows first, and nothing but rand: what WholeDraws can share among processes.
        drawn = torch.rand(n, 3 + channels, 1, 1, generator=generator)
        side = (largest ** drawn[:, :1]).round_()
        top = (drawn[:, 1:2] * (height - side + 1)).floor_().to(x.device)
        left = (drawn[:, 2:3] * (width - side + 1)).floor_().to(x.device)
        side = side.to(x.device)
        signs = (2 * drawn[:, 3:]).floor_().to(x.device)
        inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        square = (x + (signs * 2 - 1) * eps).clamp_(0, 1).sub_(x)
        proposed = torch.where(inside, square, delta)
        best, delta = better((value(proposed), proposed), (best, delta))
    return delta
