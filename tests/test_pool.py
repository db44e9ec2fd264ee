"""The pool of samples that follow a level set while it moves."""

import copy
import math

import problems
import pytest
import torch

import levelset_ext as ls
from levelset_ext.result import Status
from levelset_ext.samplers import SamplePool


def starts(seed=0, d=3):
    generator = torch.Generator().manual_seed(seed)
    return lambda count: 2 * torch.rand(count, d, generator=generator, dtype=torch.float64) - 1


def pool_of(size=200, **options):
    options.setdefault("generator", torch.Generator().manual_seed(1))
    return SamplePool(size, starts(), **options)


def test_a_kept_point_follows_the_level_set():
    sphere, pool = problems.Sphere(0.7), pool_of(fresh=0.0)
    first = pool.draw(sphere, 200)
    assert first.converged.all()
    assert int(first.iterations.sum()) > 0
    with torch.no_grad():
        sphere.radius += 0.01
    second = pool.draw(sphere, 200)
    assert second.converged.all()
    torch.testing.assert_close(second.points.norm(dim=1), torch.full((200,), 0.71).double())
    # The same points, moved along their normals: no other row is nearer.
    distance = torch.cdist(second.points, first.points).amin(1)
    torch.testing.assert_close(distance, torch.full((200,), 0.01).double())
    third = pool.draw(sphere, 200)
    assert int(third.iterations.sum()) == 0  # nothing moved


def test_every_row_is_drawn_before_one_is_drawn_again():
    pool = pool_of(90, fresh=0.0)
    seen = [pool.draw(problems.Sphere(), 40).points for _ in range(9)]  # 360 = 4 * 90
    drawn = torch.cat(seen).unique(dim=0)
    assert len(drawn) == 90
    for points in seen:
        assert len(points.unique(dim=0)) == 40
    counts = (torch.cat(seen)[:, None] == drawn).all(2).sum(0)
    assert counts.tolist() == [4] * 90


def test_points_that_are_lost_are_drawn_anew():
    class Half(problems.Sphere):
        def forward(self, x):  # not a number on one side
            return torch.where(x[:, 0] > 0, super().forward(x), torch.nan)

    pool = pool_of(100, fresh=0.0)
    for _ in range(12):
        result = pool.draw(Half(), 100)
    assert (result.status == Status.CONVERGED).float().mean() > 0.95
    assert torch.isfinite(pool.points).all()


def test_points_that_are_lost_leave_the_choice_of_the_crowded_as_it_is():
    calls = []

    def counted(count):
        calls.append(count)
        return torch.full((count, 3), 0.5, dtype=torch.float64)

    generator = torch.Generator().manual_seed(5)
    pool = SamplePool(40, counted, fresh=0.25, generator=generator)
    calls.clear()
    pool.points = torch.rand(40, 3, generator=generator, dtype=torch.float64)
    pool.points[30:35] = pool.points[20:25] + 1e-6
    bad = torch.tensor([0, 3, 7])
    pool.points[bad] = math.nan
    pool._lost[bad] = True
    pool.points[12] = math.nan  # as a starting point may be
    pool._replace(torch.arange(40))
    assert calls == [10]
    given_up = torch.nonzero((pool.points == 0.5).all(1)).squeeze(1).tolist()
    assert len(given_up) == 10
    assert {0, 3, 7, *range(30, 35)} <= set(given_up)
    # With all of them given up, none is counted twice.
    pool.fresh, pool._lost[5] = 1.0, True
    pool._replace(torch.arange(40))
    assert calls == [10, 40]


def test_a_point_that_the_box_holds_stays():
    pool = pool_of(20, fresh=0.0, box=(-1.0, 1.0))
    first, second = (pool.draw(lambda x: x[:, 0] - 2, 20) for _ in range(2))
    assert (first.status == Status.STALLED).all()
    order = [result.points[:, 1].sort().values for result in (first, second)]
    assert torch.equal(*order)


def test_an_unfinished_point_goes_on():
    pool = pool_of(50, fresh=0.0, max_iters=1)
    quadric = problems.Quadric()
    residuals = [float(pool.draw(quadric, 50).residual.amax()) for _ in range(8)]
    assert residuals[0] > 1e-2
    assert residuals[-1] <= 1e-5


def test_crowded_points_make_room():
    """All points begin in one place of a circle; births are everywhere on it."""
    generator = torch.Generator().manual_seed(0)
    calls = []

    def everywhere(count):
        calls.append(count)
        if len(calls) == 1:
            return torch.tensor([[0.7, 0.0]]).double() + 1e-3 * torch.rand(
                count, 2, generator=generator, dtype=torch.float64
            )
        return 2 * torch.rand(count, 2, generator=generator, dtype=torch.float64) - 1

    circle = problems.Sphere(0.7, 2)
    pool = SamplePool(120, everywhere, fresh=0.2, generator=generator)

    def largest_gap():
        angle = torch.atan2(pool.points[:, 1], pool.points[:, 0]).sort().values
        return float(torch.cat([angle.diff(), angle[:1] + 2 * math.pi - angle[-1:]]).max())

    before = largest_gap()
    after = []
    for _ in range(60):
        pool.draw(circle, 120)
        after.append(largest_gap())
    # 120 points spread evenly leave gaps of 0.052, and at random one of 0.28 on average.
    assert before > 1.0
    assert sum(after[20:]) / 40 < 0.2, sum(after[20:]) / 40


def test_jitter_walks_along_the_surface():
    pool = pool_of(300, fresh=0.0, jitter=0.05)
    sphere = problems.Sphere()
    a = pool.draw(sphere, 300).points
    order = pool.points.clone()
    b = pool.draw(sphere, 300)
    assert b.converged.all()
    moved = (pool.points - order).norm(dim=1)
    # Two tangential coordinates of deviation 0.05.
    assert 0.04 < float(moved.square().mean().sqrt()) / math.sqrt(2) < 0.06
    assert not torch.equal(a, b.points)


def test_it_goes_on_bit_for_bit_from_its_state():
    sphere = problems.Sphere()

    def run(stop):
        generator = torch.Generator().manual_seed(3)
        options = {"jitter": 0.02, "generator": generator}

        def draw_starts(count):
            return torch.rand(count, 3, generator=generator, dtype=torch.float64) * 2 - 1

        pool = SamplePool(70, draw_starts, **options)
        for step in range(10):
            if step == stop:
                kept = {
                    k: v.clone() if torch.is_tensor(v) else v for k, v in pool.state_dict().items()
                }
                random = generator.get_state()
                pool = SamplePool(70, draw_starts, **options)
                pool.load_state_dict(kept)
                generator.set_state(random)
            result = pool.draw(sphere, 30)
        return result.points

    assert torch.equal(run(None), run(4))


def test_a_state_can_be_gone_back_to_more_than_once():
    sphere, pool = problems.Sphere(), pool_of(60)
    pool.draw(sphere, 30)
    kept = copy.deepcopy(pool.state_dict())
    before = copy.deepcopy(kept)
    for _ in range(2):
        pool.load_state_dict(kept)
        for _ in range(3):
            pool.draw(sphere, 40)
    for name, value in before.items():
        assert torch.equal(kept[name], value) if torch.is_tensor(value) else kept[name] == value


def test_points_that_are_lost_do_not_change_the_state_they_came_from():
    pool = pool_of(20)
    kept = copy.deepcopy(pool.state_dict())
    pool.load_state_dict(kept)
    pool.draw(lambda x: math.nan * x[:, 0], 20)
    assert pool.state_dict()["lost"].all()
    assert not kept["lost"].any()


def test_a_state_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"state: expected points \(5, 3\), got \(70, 3\)"):
        pool_of(5).load_state_dict(pool_of(70).state_dict())


def test_levels_and_options_reach_project():
    pool = pool_of(64, level=0.1, fresh=0.0, max_iters=5, box=(-0.5, 1.0))
    result = pool.draw(problems.Sphere(0.7), 64)
    assert torch.equal(result.level, torch.full((64, 1), 0.1, dtype=torch.float64))
    assert float(result.points.min()) >= -0.5


def test_results_enter_the_sample_network():
    sphere = problems.Sphere()
    moved = ls.sample_network(sphere, pool_of().draw(sphere, 50))
    (g,) = torch.autograd.grad(moved.norm(dim=1).sum(), sphere.radius)
    torch.testing.assert_close(g, torch.tensor(50.0).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size: expected at least 1 point, got 0"),
        ({"jitter": -1.0}, r"jitter: expected a finite length >= 0, got -1\.0"),
        ({"fresh": 1.5}, r"fresh: expected a share from 0 to 1, got 1\.5"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        pool_of(**options)


def test_bad_count():
    with pytest.raises(ValueError, match="count: expected 1 to 200 points, got 201"):
        pool_of().draw(problems.Sphere(), 201)
