"""Images changed anew at every visit of a training: rolled, mirrored, bent by an affine map."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["affine_between", "augment_cifar", "bent", "random_affine", "rolled"]


def augment_cifar(x: Tensor, generator: torch.Generator | None = None, *, pad: int = 4) -> Tensor:
    """Every image shifted by up to ``pad`` pixels (zeros come in) and mirrored half of the time.

    Args:
        x: (n, c, h, w).
        generator: of the CPU, whatever the device of x; a seed means the same on all of them.
        pad: widest shift, pixels.

    Returns:
        New tensor of the shape, dtype and device of x.
    """
    if x.dim() != 4:
        raise ValueError(f"x: expected images (n, c, h, w), got shape {tuple(x.shape)}")
    if pad < 0:
        raise ValueError(f"pad: expected at least 0, got {pad}")
    n, c, h, w = x.shape
    shift = torch.randint(2 * pad + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    rows = shift[0] + torch.arange(h)
    columns = shift[1] + torch.where(mirrored, torch.arange(w).flip(0), torch.arange(w))
    padded = functional.pad(x, (pad, pad, pad, pad))
    rows, columns = rows.to(x.device), columns.to(x.device)
    image = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def rolled(x: Tensor, moves: Tensor) -> Tensor:
    """Every image moved round and round: what leaves at one side comes in at the other.

    Nothing is lost, so ``rolled(rolled(x, moves), -moves)`` is x, bit for bit. Where the border of
    the images is empty, as MNIST's is, a short roll is a shift.

    Args:
        x: (n, c, h, w).
        moves: (n, 2) integers: pixels down and to the right.

    Returns:
        New tensor of the shape, dtype and device of x.

    Raises:
        ValueError: the shapes are others.
    """
    if x.dim() != 4 or moves.shape != (len(x), 2):
        raise ValueError(
            "moves: expected (n, 2) integers for images (n, c, h, w), got shapes "
            f"{tuple(moves.shape)} and {tuple(x.shape)}"
        )
    n, c, h, w = x.shape
    moves = moves.to(x.device)
    rows = (torch.arange(h, device=x.device) - moves[:, :1]) % h
    columns = (torch.arange(w, device=x.device) - moves[:, 1:]) % w
    image = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[None, :, None, None]
    return x[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def random_affine(
    count: int, bend: float, shift: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Affine maps of the plane near the identity, one an image.

    A map turns by an angle (radians), shears by a slope, stretches rows and columns by factors
    whose logarithm is meant, all uniform in [-bend, bend], and moves by up to ``shift`` pixels.

    Args:
        count: n.
        bend: 0 <= bend < 1.
        shift: pixels, along each axis.
        generator: of the CPU.

    Returns:
        (n, 2, 3): pixel positions (right, down) relative to the center of the changed image
        -> those of the image it is read from. For :func:`bent`.

    Raises:
        ValueError: ``bend`` or ``shift`` is out of range.
    """
    if not 0 <= bend < 1:
        raise ValueError(f"bend: expected 0 <= bend < 1, got {bend}")
    if not 0 <= shift < math.inf:
        raise ValueError(f"shift: expected a number of pixels >= 0, got {shift}")
    drawn = 2 * torch.rand(count, 6, generator=generator) - 1
    turn, shear, right, down = (bend * drawn[:, :4]).unbind(1)
    turned = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(-1, 2, 2)
    one, none = torch.ones(count), torch.zeros(count)
    sheared = torch.stack([one, shear, none, one], 1).view(-1, 2, 2)
    linear = turned @ sheared * torch.stack([right, down], 1).exp()[:, None]
    return torch.cat([linear, shift * drawn[:, 4:, None]], 2)


def affine_between(first: Tensor, second: Tensor) -> Tensor:
    """What bends an image that ``first`` has bent as if ``second`` had bent it instead.

    Args:
        first, second: (n, 2, 3), see :func:`random_affine`.

    Returns:
        (n, 2, 3): positions by ``second``, then back by ``first``.

    Raises:
        ValueError: the shapes are others.
    """
    if first.dim() != 3 or first.shape[1:] != (2, 3) or second.shape != first.shape:
        raise ValueError(
            "second: expected the shape (n, 2, 3) of first, got shapes "
            f"{tuple(second.shape)} and {tuple(first.shape)}"
        )
    # In float64: a map that is undone at once is the identity to the last digit of float32.
    one, other = first.double(), second.double()
    back = torch.linalg.inv(one[:, :, :2])
    linear = back @ other[:, :, :2]
    moved = back @ (other[:, :, 2:] - one[:, :, 2:])
    return torch.cat([linear, moved], 2).to(first.dtype)


def bent(x: Tensor, maps: Tensor, *, sharp: bool = False) -> Tensor:
    """Every image under its affine map.

    Args:
        x: (n, c, h, w), floating point.
        maps: (n, 2, 3), see :func:`random_affine`.
        sharp: False interpolates by cubics, zeros come in at the border, and what overshoots is
            clipped to the range of the image and 0: for images. True takes the nearest pixel, at
            the border the last one: for perturbations, whose extreme values must not be averaged
            away.

    Returns:
        New tensor of the shape, dtype and device of x.

    Raises:
        ValueError: shapes or dtype are others.
    """
    if not x.is_floating_point():
        raise ValueError(f"x: expected floating-point images, got {x.dtype}")
    if x.dim() != 4 or maps.shape != (len(x), 2, 3):
        raise ValueError(
            "maps: expected (n, 2, 3) for images (n, c, h, w), got shapes "
            f"{tuple(maps.shape)} and {tuple(x.shape)}"
        )
    if 0 in x.shape:
        return x.clone()
    # grid_sample counts in half widths and half heights.
    half = torch.tensor([x.shape[3] / 2, x.shape[2] / 2], device=x.device)
    across = torch.cat([half, half.new_ones(1)])
    grid = functional.affine_grid(
        maps.to(x.device, torch.float32) * across / half[:, None],
        list(x.shape),
        align_corners=False,
    )
    # Places have to be known to a small part of a pixel, which half precision cannot say.
    given, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
    grid = grid.to(x.dtype)
    if sharp:
        return functional.grid_sample(
            x, grid, mode="nearest", padding_mode="border", align_corners=False
        ).to(given)
    out = functional.grid_sample(x, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return out.clamp(low.clamp(max=0), high.clamp(min=0)).to(given)
