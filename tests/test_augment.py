"""Images changed at every visit: rolled, mirrored, bent by affine maps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from levelset_ext.data.augment import affine_between, augment_cifar, bent, random_affine, rolled

F64 = torch.float64


def test_rolling_moves_every_image_its_own_way_and_back() -> None:
    x = torch.zeros(3, 2, 5, 4, dtype=torch.float64)
    x[:, :, 1, 2] = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    moves = torch.tensor([[0, 0], [2, -1], [-2, 3]])
    out = rolled(x, moves)
    for image, (row, column) in enumerate([(1, 2), (3, 1), (4, 1)]):
        assert torch.equal(out[image, :, row, column], x[image, :, 1, 2])
        assert int((out[image] != 0).sum()) == 2
    x = torch.rand(6, 1, 7, 7)
    moves = torch.randint(-9, 10, (6, 2))
    assert torch.equal(rolled(rolled(x, moves), -moves), x)
    with pytest.raises(ValueError, match=r"moves: expected \(n, 2\) integers"):
        rolled(x, moves[:5])


def test_augmentation_shifts_and_mirrors() -> None:
    x = torch.rand(200, 3, 6, 5) + 0.5  # so that 0 can only be padding
    out = augment_cifar(x, torch.Generator().manual_seed(0), pad=2)
    assert out.shape == x.shape
    assert torch.equal(out, augment_cifar(x, torch.Generator().manual_seed(0), pad=2))
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    mirrored, shifts = 0, set()
    for image, there in zip(out, padded, strict=True):
        places = [
            (row, column, flip)
            for row in range(5)
            for column in range(5)
            for flip in (False, True)
            if torch.equal(
                image,
                there[:, row : row + 6, column : column + 5].flip(-1)
                if flip
                else there[:, row : row + 6, column : column + 5],
            )
        ]
        assert len(places) == 1
        mirrored += places[0][2]
        shifts.add(places[0][:2])
    assert 70 < mirrored < 130
    assert len(shifts) > 20


def hill(points: Tensor) -> Tensor:
    """A smooth picture, wide enough for cubics: positions (..., 2) relative to the center -> F."""
    right, down = points.unbind(-1)
    return torch.exp(-((right - 2) ** 2 + 2 * (down + 1) ** 2 + right * down) / 60)


def pixels(height: int, width: int) -> Tensor:
    down, right = torch.meshgrid(
        torch.arange(height, dtype=F64) - (height - 1) / 2,
        torch.arange(width, dtype=F64) - (width - 1) / 2,
        indexing="ij",
    )
    return torch.stack([right, down], 2)


def mapped(points: Tensor, maps: Tensor) -> Tensor:
    """(h, w, 2) under (n, 2, 3), written out."""
    maps = maps.to(F64)
    return torch.stack([points @ m[:, :2].T + m[:, 2] for m in maps])


def test_an_affine_map_is_near_the_identity_and_says_how_near() -> None:
    maps = random_affine(4000, 0.2, 3.0, torch.Generator().manual_seed(0))
    assert torch.equal(maps, random_affine(4000, 0.2, 3.0, torch.Generator().manual_seed(0)))
    linear, moved = maps[:, :, :2].double(), maps[:, :, 2]
    assert 2.9 < float(moved.abs().max()) <= 3.0
    # turn @ [[1, s], [0, 1]] @ diag(e^a, e^b): the first column is e^a long, turned by the angle.
    right = torch.linalg.vector_norm(linear[:, :, 0], dim=1)
    down = torch.linalg.det(linear) / right
    turn = torch.atan2(linear[:, 1, 0], linear[:, 0, 0])
    shear = (linear[:, :, 0] * linear[:, :, 1]).sum(1) / (right * down)
    for found in (right.log(), down.log(), turn, shear):
        assert 0.19 < float(found.abs().max()) < 0.2 + 1e-6
        assert abs(float(found.mean())) < 0.01
    still = random_affine(3, 0.0)
    assert torch.equal(still, torch.eye(2, 3).expand(3, 2, 3))
    for bend in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="bend: expected 0 <= bend < 1, got"):
            random_affine(3, bend)
    with pytest.raises(ValueError, match="shift: expected a number of pixels >= 0, got -1"):
        random_affine(3, 0.1, -1.0)


@pytest.mark.parametrize("size", [(28, 28), (24, 33)])
def test_a_bent_image_is_the_picture_at_the_mapped_places(size: tuple[int, int]) -> None:
    maps = random_affine(20, 0.15, 1.0, torch.Generator().manual_seed(1))
    places = pixels(*size)
    x = hill(places).expand(20, 1, *size).contiguous()
    out = bent(x, maps)
    there = mapped(places, maps)
    # Places whose neighbours are all inside; what lies outside counts as 0.
    limit = torch.tensor([size[1] / 2 - 3, size[0] / 2 - 3], dtype=F64)
    inside = (there.abs() <= limit).all(3)
    assert float(inside.double().mean()) > 0.5
    error = (out[:, 0] - hill(there)).abs()[inside]
    # torch's cubics (a = -3/4) are wrong by a tenth of a pixel, where a pixel is 0.12 at most.
    assert float(error.max()) < 0.015
    far = (there.abs() > limit + 5).any(3)
    assert not out[:, 0][far].any()


def test_bending_by_whole_pixels_and_right_angles_moves_pixels() -> None:
    x = torch.rand(2, 3, 9, 9, dtype=F64)
    left = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]).repeat(2, 1, 1)
    torch.testing.assert_close(bent(x, left)[..., :7], x[..., 2:], rtol=0, atol=1e-6)
    assert not bent(x, left)[..., 8].any()
    assert torch.equal(bent(x, left, sharp=True)[..., 7:], x[..., 8:].expand(2, 3, 9, 2))
    quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]).repeat(2, 1, 1)
    torch.testing.assert_close(bent(x, quarter), torch.rot90(x, 1, (2, 3)), rtol=0, atol=1e-6)
    same = torch.eye(2, 3).repeat(2, 1, 1)
    torch.testing.assert_close(bent(x, same), x, rtol=0, atol=1e-6)
    assert torch.equal(bent(x, same, sharp=True), x)
    with pytest.raises(ValueError, match=r"maps: expected \(n, 2, 3\) for images"):
        bent(x, same[:1])
    with pytest.raises(ValueError, match=r"x: expected floating-point images, got torch\.uint8"):
        bent(x.byte(), same)
    with pytest.raises(ValueError, match=r"second: expected the shape \(n, 2, 3\) of first"):
        affine_between(same, same[:1])


def test_bent_images_keep_their_range_and_sharp_ones_their_values() -> None:
    x = (torch.rand(50, 1, 12, 12, generator=torch.Generator().manual_seed(2)) < 0.5).float()
    maps = random_affine(50, 0.3, 2.0, torch.Generator().manual_seed(3))
    out = bent(x, maps)
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    for row in (0, 17):  # of an image alone the same
        torch.testing.assert_close(bent(x[row : row + 1], maps[row : row + 1]), out[row : row + 1])
    assert set(bent(0.3 - 0.6 * x, maps, sharp=True).unique().tolist()) == set(
        (0.3 - 0.6 * x).unique().tolist()
    )
    assert bent(x[:0], maps[:0]).shape == (0, 1, 12, 12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sharp", [False, True])
def test_images_in_half_precision_are_bent_as_in_float32(dtype: torch.dtype, sharp: bool) -> None:
    x = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(5)).to(dtype)
    maps = random_affine(8, 0.2, 1.0, torch.Generator().manual_seed(6))
    assert torch.equal(bent(x, maps, sharp=sharp), bent(x.float(), maps, sharp=sharp).to(dtype))


def test_what_is_bent_by_one_map_goes_to_where_another_would_have_put_it() -> None:
    generator = torch.Generator().manual_seed(4)
    first, second = (random_affine(20, 0.15, 1.0, generator) for _ in range(2))
    places = pixels(40, 40)
    between = affine_between(first, second)
    for k in range(20):
        torch.testing.assert_close(
            mapped(mapped(places, between[k : k + 1])[0], first[k : k + 1]),
            mapped(places, second[k : k + 1]),
            rtol=0,
            atol=1e-4,
        )
    x = hill(places).expand(20, 1, 40, 40).contiguous()
    middle = (slice(None), slice(None), slice(12, 28), slice(12, 28))
    torch.testing.assert_close(
        bent(bent(x, first), between)[middle], bent(x, second)[middle], rtol=0, atol=0.03
    )
    still = torch.eye(2, 3).expand(20, 2, 3)
    torch.testing.assert_close(affine_between(first, first), still, rtol=0, atol=1e-7)
