"""Even samples of level sets, against exact optima and dense samplings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import levelset_ext as ls
from levelset_ext.geometry.coverage import (
    _farthest,
    coverage,
    estimate_coverage,
    sample_level_set,
)

DTYPE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cube(d: int, half: float = 1.2) -> tuple[Tensor, Tensor]:
    return torch.full((d,), -half, dtype=DTYPE), torch.full((d,), half, dtype=DTYPE)


def sphere(x: Tensor) -> Tensor:
    return x.norm(dim=1) - 1


def dense_circle(radius: float = 1.0) -> Tensor:
    t = torch.arange(20_000, dtype=DTYPE) * (2 * math.pi / 20_000)
    return radius * torch.stack([t.cos(), t.sin()], 1)


def test_a_circle_is_covered_nearly_as_well_as_can_be() -> None:
    n = 40
    found = sample_level_set(sphere, n, cube(2), generator=seeded())
    assert len(found) == n
    assert bool(found.converged.all())
    measured = coverage(found.points, dense_circle())
    # n equal arcs: the mean distance of the circle to them is a quarter of an arc, the largest
    # half of one. Of the average with the other direction, which is 0, half is left.
    arc = 2 * math.pi / n
    assert measured.chamfer < 1.03 * arc / 8
    assert measured.gap < 1.25 * arc / 2
    assert measured.hausdorff == measured.gap


def test_an_estimate_without_a_dense_sampling_agrees_with_one() -> None:
    found = sample_level_set(sphere, 60, cube(2), generator=seeded())
    estimate = estimate_coverage(sphere, found.points, probes=50, generator=seeded(1))
    measured = coverage(found.points, dense_circle())
    assert estimate.mean_gap == pytest.approx(2 * measured.chamfer, rel=0.05)
    assert estimate.largest_gap == pytest.approx(measured.gap, rel=0.1)
    assert estimate.spacing == pytest.approx(2 * math.pi / 60, rel=0.05)
    assert estimate.evenness < 0.15
    # A gap of a sixth of the circle is found, from its edges.
    angle = torch.atan2(found.points[:, 1], found.points[:, 0])
    holed = found.points[angle.abs() > 0.17]
    wide = estimate_coverage(sphere, holed, probes=50, generator=seeded(1))
    assert wide.largest_gap == pytest.approx(0.17, abs=0.06)


def test_a_sample_that_is_far_away_is_no_gap() -> None:
    points = torch.tensor([[0.0, 0.0], [5.0, 0.0]], dtype=DTYPE)
    assert coverage(points, points[:1]) == (1.25, 5.0, 0.0)


def test_nothing_outside_the_box_has_to_be_covered() -> None:
    circle = dense_circle()[::400]
    half, spacing = circle[circle[:, 0] <= 1e-9], 2 * math.pi / 50
    for box, gap in ((None, 2.0), ((-2.0, (0.0, 2.0)), 0.6), (((-2.0, -2.0), 0.0), 0.6)):
        found = estimate_coverage(sphere, half, box=box, probes=50, generator=seeded())
        assert (found.largest_gap < gap * spacing) == (box is not None)


def test_a_thin_ellipsoid_is_covered_evenly_by_area() -> None:
    axes = torch.tensor([1.0, 0.2, 0.3], dtype=DTYPE)

    def ellipsoid(x: Tensor) -> Tensor:
        return (x / axes).norm(dim=1) - 1

    found = sample_level_set(ellipsoid, 300, cube(3), generator=seeded())
    estimate = estimate_coverage(ellipsoid, found.points, generator=seeded(1))
    # Random points have an evenness of 0.52 in the plane, whatever their number.
    assert estimate.evenness < 0.12
    assert estimate.largest_gap < 1.6 * estimate.spacing
    plain = ls.project(ellipsoid, 2.4 * torch.rand(300, 3, dtype=DTYPE, generator=seeded()) - 1.2)
    uneven = estimate_coverage(ellipsoid, plain.points[plain.converged], generator=seeded(1))
    assert estimate.mean_gap < uneven.mean_gap
    assert estimate.largest_gap < 0.7 * uneven.largest_gap


def test_components_of_different_size_get_their_share() -> None:
    def two(x: Tensor) -> Tensor:
        small = (x - x.new_tensor([0.9, 0.9])).norm(dim=1) - 0.1
        return torch.minimum(x.norm(dim=1) - 0.7, small)

    found = sample_level_set(two, 80, cube(2), generator=seeded())
    inside = (found.points - found.points.new_tensor([0.9, 0.9])).norm(dim=1) < 0.2
    assert int(inside.sum()) in (9, 10, 11)  # one part in eight of the length


def test_a_curve_in_space_and_a_level_set_that_the_box_cuts() -> None:
    def circle(x: Tensor) -> Tensor:
        return torch.stack([x.norm(dim=1) - 1, x[:, 2]], 1)

    found = sample_level_set(circle, 30, cube(3), generator=seeded())
    measured = coverage(
        found.points, torch.cat([dense_circle(), torch.zeros(20_000, 1, dtype=DTYPE)], 1)
    )
    assert measured.chamfer < 1.05 * (2 * math.pi / 30) / 8

    low, high = torch.tensor([-0.5, 0.0], dtype=DTYPE), torch.tensor([0.5, 1.0], dtype=DTYPE)
    arc = sample_level_set(sphere, 25, (low, high), generator=seeded()).points
    assert bool(((arc >= low - 1e-12) & (arc <= high + 1e-12)).all())
    dense = dense_circle()
    dense = dense[((dense >= low) & (dense <= high)).all(1)]
    assert coverage(arc, dense).gap < 0.08  # of an arc of pi / 3 with 25 points: 0.022 at best


def test_samples_move_with_the_network_and_leave_it_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    with torch.no_grad():
        level = float(net(torch.zeros(1, 2, dtype=DTYPE)))
    found = sample_level_set(net, 20, cube(2), level, generator=seeded())
    assert len(found) == 20
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    ls.sample_network(net, found).sum().backward()
    assert any(bool(p.grad.any()) for p in net.parameters() if p.grad is not None)
    again = sample_level_set(net, 20, cube(2), level, generator=seeded())
    assert torch.equal(found.points, again.points)


def test_even_samples_beat_every_row_of_figure_a1() -> None:
    """A classifier of points in the plane and its boundary, sampled as in Figure A1."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.Softplus(20), nn.Linear(32, 1)).double()
    x = torch.rand(64, 2, dtype=DTYPE) - 0.5
    y = ((3 * x[:, 0]).sin() * 0.3 > x[:, 1]).double()
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(150):
        loss = nn.functional.binary_cross_entropy_with_logits(net(x)[:, 0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    n = 100
    some = sample_level_set(net, n, cube(2, 0.35), rounds=0, generator=seeded(1)).points
    spread = some.repeat(200, 1) + 0.02 * torch.randn(200 * n, 2, dtype=DTYPE, generator=seeded(3))
    dense = ls.project(net, spread, box=cube(2, 0.35)).points
    ours = coverage(sample_level_set(net, n, cube(2, 0.35), generator=seeded()).points, dense)
    uniform = 0.7 * torch.rand(n, 2, dtype=DTYPE) - 0.35
    near = dense[torch.randint(len(dense), (n,), generator=seeded(2))]
    starts = [uniform] + [near + s * torch.randn(n, 2, dtype=DTYPE) for s in (0.01, 0.05)]
    box = cube(2, 0.35)
    for start in starts:
        found = ls.project(net, start, max_iters=50, box=box)
        theirs = coverage(found.points[found.converged], dense)
        assert ours.chamfer < theirs.chamfer
        assert ours.hausdorff < theirs.hausdorff


@pytest.mark.parametrize("d", [1, 2, 3])
def test_farthest_first_is_what_it_is_by_definition(d: int) -> None:
    points = torch.randn(700, d, dtype=DTYPE, generator=seeded()) ** 3  # thick and thin places
    points = torch.cat([points, points[:50]])  # and some twice
    for n in (1, 2, 60, 700):
        got = _farthest(points, n, seeded(4))
        distance = torch.full((len(points),), math.inf, dtype=DTYPE)
        first = int(torch.randint(len(points), (1,), generator=seeded(4)))
        assert int(got[0]) == first
        for row in got:
            assert distance[row] == distance.max()
            distance = torch.minimum(distance, (points - points[row]).square().sum(1))
    assert len(set(got.tolist())) == 700


def test_many_points_are_as_even_as_few() -> None:
    for n in (100, 3000):
        found = sample_level_set(sphere, n, cube(3), rounds=10, generator=seeded())
        assert len(found) == n
        estimate = estimate_coverage(sphere, found.points, generator=seeded(1))
        assert estimate.evenness < 0.12  # of random points: 0.52
        # Each point of a hexagonal lattice with this spacing has sqrt(3) / 2 x spacing^2.
        best = math.sqrt(4 * math.pi / n * 2 / math.sqrt(3))
        assert 0.8 * best < estimate.spacing < best
        assert estimate.largest_gap < 1.3 * estimate.spacing


def test_a_level_that_does_not_exist_gives_no_rows() -> None:
    found = sample_level_set(sphere, 10, cube(2), 5.0)
    assert len(found) == 0
    assert found.points.shape == (0, 2)
    assert found.counts() == {}
    # There is one, but not in the box.
    beside = torch.full((2,), 2.0, dtype=DTYPE), torch.full((2,), 3.0, dtype=DTYPE)
    assert len(sample_level_set(sphere, 10, beside)) == 0
    # A level for each of two outputs that do not meet.
    found = sample_level_set(lambda x: torch.stack([x.norm(dim=1), x[:, 2]], 1), 5, cube(3), 1e3)
    assert found.points.shape == (0, 3)
    assert found.values.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n: expected an integer >= 1"),
        ({"box": (-1.0, 1.0)}, "box: expected at least one corner"),
        ({"box": cube(2)[::-1]}, "box"),
        ({"candidates": 1}, "candidates"),
        ({"rounds": -1}, "rounds"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    arguments = {"n": 5, "box": cube(2), **change}
    with pytest.raises(ValueError, match=message):
        sample_level_set(sphere, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="points: expected"):
        estimate_coverage(sphere, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="reference: expected"):
        coverage(torch.zeros(3, 2), torch.zeros(0, 2))
