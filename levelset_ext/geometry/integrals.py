"""Area, volume and integrals over a level set {F = c} without a mesh: random lines, with errors.

Cauchy-Crofton: of the lines that meet a ball of radius R in R^d, taken uniformly, each crosses a
hypersurface S inside it N times, and

    E[N] = 2 area(S) / area(sphere of radius R),        E[sum_i f(p_i)] = the same with the integral
                                                         of f over S in place of area(S)

so every line gives an unbiased value, and many lines a mean with a known standard error. The part
of such a line that is inside the solid has the expected length volume / volume of the ball's
(d - 1)-dimensional cross section.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from levelset_ext.field import Field, check_integer
from levelset_ext.geometry.extract import _for_the_grid
from levelset_ext.geometry.rays import RayCrossings, ray_crossings
from levelset_ext.result import Status
from levelset_ext.samplers.state import box_bounds

__all__ = ["Estimate", "level_set_integral", "level_set_volume", "surface_area"]

_LINES_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo mean.

    Attributes:
        value: a number, or (k,) for an integrand with k columns.
        standard_error: of ``value``, same shape; the deviation of one line / sqrt(lines).
        lines: how many there were.
        crossings: how many points of the level set they met.
    """

    value: Tensor
    standard_error: Tensor
    lines: int
    crossings: int

    def interval(self, sigmas: float = 1.96) -> tuple[Tensor, Tensor]:
        """value -+ sigmas x standard_error; 1.96 holds the truth in about 95 of 100 cases."""
        return self.value - sigmas * self.standard_error, self.value + sigmas * self.standard_error


def surface_area(
    fn: Field,
    bounds: tuple[Any, Any],
    level: float = 0.0,
    *,
    lines: int = 20_000,
    step: float | None = None,
    lipschitz: float | None = None,
    tol: float | None = None,
    generator: torch.Generator | None = None,
    dim: int = 3,
) -> Estimate:
    """Area of {F = level} in a box; the length of the curve for ``dim`` = 2.

    Arguments as for :func:`level_set_integral`.
    """
    return level_set_integral(
        fn, None, bounds, level, lines=lines, step=step, lipschitz=lipschitz, tol=tol,
        generator=generator, dim=dim,
    )  # fmt: skip


def level_set_integral(
    fn: Field,
    integrand: Callable[[Tensor], Tensor] | None,
    bounds: tuple[Any, Any],
    level: float = 0.0,
    *,
    lines: int = 20_000,
    step: float | None = None,
    lipschitz: float | None = None,
    tol: float | None = None,
    generator: torch.Generator | None = None,
    dim: int = 3,
) -> Estimate:
    """The integral of a function over the part of {F = level} in a box.

    Unbiased but for crossings that the march along a line does not see: pairs closer together than
    ``step`` (see :func:`levelset_ext.geometry.intersect_rays` for what it does about those).

    Args:
        fn: module or callable (n, d) -> (n,) or (n, 1). A module runs as its eval-mode clone on its
            own device in its own dtype; another callable gets CPU tensors of the default dtype.
        integrand: points (m, d) on the level set -> (m,) or (m, k); None is 1, the area.
        bounds: (lower, upper), numbers or (d,); lines are drawn through the ball around this box,
            and crossings outside the box do not count.
        level: c.
        lines: how many, at least 2. The error falls as lines ** -0.5.
        step: between samples along a line, a length; None is a 128th of the ball's diameter.
        lipschitz: of :func:`levelset_ext.geometry.intersect_rays`.
        tol: on |F - c| at the points; None takes at most 8 iterations of false position to them.
            The number of crossings does not depend on it.
        generator: source of the lines, on any device.
        dim: d, where the corners in ``bounds`` are numbers.

    Raises:
        TypeError, ValueError: an argument is not as described; F is not finite at a crossing.
    """
    field, lower, upper = _prepare(fn, bounds, dim, lines)
    d = lower.shape[0]
    center, radius = _ball(lower, upper)
    sums: list[Tensor] = []
    crossings = 0
    for found, n in _cast(
        field, center, radius, (lower, upper), level, lines, step, lipschitz, tol, generator
    ):
        points = found.result.points
        crossings += points.shape[0]
        bad = int((found.result.status == Status.NON_FINITE).sum())
        if bad:
            raise ValueError(f"fn: expected finite values, got none at {bad} crossings")
        if integrand is None:
            each = points.new_ones(points.shape[0], dtype=torch.float64)
        else:
            with torch.no_grad():
                each = integrand(points).double()
            if each.dim() not in (1, 2) or each.shape[0] != points.shape[0]:
                raise ValueError(
                    f"integrand: expected (m,) or (m, k) for {points.shape[0]} points, "
                    f"got {tuple(each.shape)}"
                )
        per_line = each.new_zeros(n, *each.shape[1:])
        sums.append(per_line.index_add_(0, found.rows, each))
    return _mean(torch.cat(sums), _sphere_area(d) * radius ** (d - 1) / 2, crossings)


def level_set_volume(
    fn: Field,
    bounds: tuple[Any, Any],
    level: float = 0.0,
    *,
    lines: int = 20_000,
    step: float | None = None,
    lipschitz: float | None = None,
    tol: float | None = None,
    generator: torch.Generator | None = None,
    dim: int = 3,
) -> Estimate:
    """Volume of {F < level} in a box; the area for ``dim`` = 2.

    Arguments as for :func:`level_set_integral`.
    """
    field, lower, upper = _prepare(fn, bounds, dim, lines)
    d = lower.shape[0]
    center, radius = _ball(lower, upper)
    lengths: list[Tensor] = []
    crossings = 0
    for found, _ in _cast(
        field, center, radius, (lower, upper), level, lines, step, lipschitz, tol, generator
    ):
        crossings += found.rows.shape[0]
        lengths.append(found.length_below.double())
    # The ball of dimension d - 1 has the volume (area of its sphere) / (d - 1).
    section = _sphere_area(d - 1) / (d - 1) * radius ** (d - 1)
    return _mean(torch.cat(lengths), section, crossings)


def _prepare(
    fn: Field, bounds: tuple[Any, Any], dim: int, lines: int
) -> tuple[Field, Tensor, Tensor]:
    lines = check_integer("lines", lines, 2)
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise ValueError(f"bounds: expected a pair (lower, upper), got {bounds!r}")
    field, device, dtype = _for_the_grid(fn)
    for corner in bounds:
        if corner is None:
            raise ValueError(f"bounds: expected finite corners, got {bounds!r}")
        shape = torch.as_tensor(corner).shape
        if len(shape) == 1:
            dim = shape[0]
    if dim < 2:
        raise ValueError(f"dim: expected at least 2, got {dim}")
    like = torch.zeros(1, dim, dtype=dtype, device=device)
    try:
        lower, upper = box_bounds(tuple(bounds), like)
    except ValueError as error:
        raise ValueError(str(error).replace("box:", "bounds:", 1)) from None
    if lower is None or upper is None or not bool(torch.isfinite(lower + upper).all()):
        raise ValueError(f"bounds: expected finite corners, got {bounds!r}")
    if not bool((lower < upper).all()):
        raise ValueError(f"bounds: expected lower < upper, got {bounds!r}")
    return field, lower, upper


def _ball(lower: Tensor, upper: Tensor) -> tuple[Tensor, float]:
    return (lower + upper) / 2, float(torch.linalg.vector_norm((upper - lower).double()) / 2)


def _cast(
    field: Field,
    center: Tensor,
    radius: float,
    box: tuple[Tensor, Tensor],
    level: float,
    lines: int,
    step: float | None,
    lipschitz: float | None,
    tol: float | None,
    generator: torch.Generator | None,
) -> Iterator[tuple[RayCrossings, int]]:
    """Crossings of random lines with the level set, and the number of lines, chunk by chunk."""
    d = center.shape[0]
    step = 2 * radius / 128 if step is None else step
    for at in range(0, lines, _LINES_AT_ONCE):
        n = min(_LINES_AT_ONCE, lines - at)
        direction, offset = _lines(n, d, center, radius, generator)
        found = ray_crossings(
            field,
            center + offset - 2 * radius * direction,
            direction,
            level,
            near=radius,
            far=3 * radius,
            step=step,
            box=box,
            lipschitz=lipschitz,
            tol=0.0 if tol is None else tol,
            max_iters=8 if tol is None else 60,
        )
        yield found, n


def _lines(
    n: int, d: int, like: Tensor, radius: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Uniform lines through a ball about 0: directions (n, d), and points (n, d) of the disc across
    them, uniform in it."""
    device = like.device if generator is None else generator.device

    def normal() -> Tensor:
        # float64 on the way, so that the same seed gives the same lines in every dtype.
        return torch.randn(n, d, dtype=torch.float64, device=device, generator=generator)

    direction = normal()
    direction /= torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    across = normal()
    across -= (across * direction).sum(1, keepdim=True) * direction
    across /= torch.linalg.vector_norm(across, dim=1, keepdim=True)
    share = torch.rand(n, 1, dtype=torch.float64, device=device, generator=generator)
    offset = across * radius * share ** (1 / (d - 1))
    return direction.to(like), offset.to(like)


def _sphere_area(d: int) -> float:
    """Of the unit sphere in R^d."""
    return 2 * math.pi ** (d / 2) / math.gamma(d / 2)


def _mean(per_line: Tensor, factor: float, crossings: int) -> Estimate:
    n = per_line.shape[0]
    return Estimate(
        value=factor * per_line.mean(0),
        standard_error=factor * per_line.std(0) / math.sqrt(n),
        lines=n,
        crossings=crossings,
    )
