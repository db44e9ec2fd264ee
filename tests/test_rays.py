"""Rays against level sets: hits and their gradients."""

import itertools
import math

import numpy as np
import problems
import pytest
import torch

import levelset_ext as ls
from levelset_ext.geometry import Camera, intersect_rays, ray_crossings

F64 = torch.float64


def toward(target, n=300, distance=2.0, seed=3):
    """Rays from a sphere around the origin toward points within ``target`` of it."""
    origins = problems.points(n, seed=seed)
    origins = distance * origins / origins.norm(dim=1, keepdim=True)
    aim = target * (2 * torch.rand(n, 3, dtype=F64) - 1)
    return origins, 3 * (aim - origins)


def sphere_t(origins, directions, radius):
    """First distance along unit rays, infinite for a miss."""
    v = directions / directions.norm(dim=1, keepdim=True)
    b = (origins * v).sum(1)
    under = b * b - origins.square().sum(1) + radius**2
    root = under.clamp(min=0).sqrt()
    near = torch.where(-b - root > 0, -b - root, -b + root)
    return torch.where((under > 0) & (near > 0), near, math.inf)


# --- hits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lipschitz", [None, 1.0])
def test_sphere(lipschitz):
    o, v = toward(0.9)
    fn = problems.Sphere(0.7)
    hits = intersect_rays(fn, o, v, far=5.0, tol=1e-13, lipschitz=lipschitz)
    expected = sphere_t(o, v, 0.7)
    assert 100 < hits.mask.sum() < 290
    assert torch.equal(hits.mask, torch.isfinite(expected))
    torch.testing.assert_close(hits.t, expected, rtol=0, atol=1e-11)
    assert torch.equal(hits.rows, torch.nonzero(hits.mask).squeeze(1))
    assert torch.isnan(hits.points[~hits.mask]).all()
    assert not hits.inside.any()
    p = hits.points[hits.mask].detach()
    assert (p.norm(dim=1) - 0.7).abs().max() < 1e-12
    torch.testing.assert_close(hits.normals[hits.mask], p / 0.7, rtol=0, atol=1e-11)


def test_inside_starts_levels_and_the_part_that_is_searched():
    fn = problems.Quadric(0.7)
    o, v = 0.3 * problems.points(50).clamp(-1, 1), problems.points(50, seed=9)
    hits = intersect_rays(fn, o, v, 0.15, far=2.0, tol=1e-13, differentiable=False)
    assert hits.inside.all()
    torch.testing.assert_close(hits.t, sphere_t(o, v, 0.8), rtol=0, atol=1e-11)
    axis = torch.tensor([1.0, 0, 0], dtype=F64)
    o = torch.tensor([[-2.0, 0, 0]], dtype=F64)

    def t(**options):
        hits = intersect_rays(fn, o, axis, tol=1e-13, **options)
        return hits.t.item()

    assert t(far=4.0) == pytest.approx(1.3)
    assert t(near=1.5, far=4.0) == pytest.approx(2.7)
    assert t(near=2.8, far=4.0) == math.inf
    assert t(far=1.2) == math.inf
    assert t(box=(0.0, 1.0)) == pytest.approx(2.7)
    assert t(box=((-1, 0.1, -1), (1.0, 1, 1))) == math.inf
    assert t(box=(-1.0, (1, 1, 1)), step=0.05) == pytest.approx(1.3)
    # A start on the surface counts as above: it leaves, or goes in at once.
    on = torch.tensor([[0.7, 0, 0], [-0.7, 0, 0]], dtype=F64)
    hits = intersect_rays(lambda x: x[:, 0].abs() - 0.7, on, axis, far=3.0, tol=1e-13)
    assert hits.t.tolist() == [math.inf, 0.0]


def test_torus_all_crossings_alternate_and_the_first_is_the_hit():
    fn = problems.Torus(1.0, 0.3)
    o, v = toward(0.9, distance=2.5)
    first = intersect_rays(fn, o, v, far=6.0, tol=1e-13)
    every = ray_crossings(fn, o, v, far=6.0, tol=1e-13)
    assert (torch.bincount(every.rows, minlength=300) % 2 == 0).all()
    assert torch.bincount(every.rows).max() == 4
    least = torch.full((300,), math.inf, dtype=F64).scatter_reduce(0, every.rows, every.t, "amin")
    torch.testing.assert_close(first.t, least, rtol=0, atol=1e-11)
    # Quartic along each ray: F (F + 2 r) times positive things; roots are its real ones.
    unit = v / v.norm(dim=1, keepdim=True)
    for row in range(40):
        a, b = o[row].numpy(), unit[row].numpy()
        square = np.poly1d([1.0, 2 * a @ b, a @ a])
        flat = np.poly1d([b[:2] @ b[:2], 2 * a[:2] @ b[:2], a[:2] @ a[:2]])
        roots = ((square + (1 - 0.09)) ** 2 - 4 * flat).roots
        real = np.sort(roots[np.abs(roots.imag) < 1e-9].real)
        got = every.t[every.rows == row].sort().values
        np.testing.assert_allclose(got, real, atol=1e-9)
        chords = real[1::2] - real[::2]
        assert every.length_below[row].item() == pytest.approx(chords.sum(), abs=1e-9)


def test_tangent_rays_dips_and_misses():
    """A ray that dips in by less than a step; one that touches; parallel rays of a plane."""
    fn = problems.Sphere(0.7)
    depth = torch.tensor([1e-2, 1e-5, 1e-9, 0.0, -1e-9, -0.1], dtype=F64)
    o = torch.stack([torch.full_like(depth, -2.0), 0.7 - depth, torch.zeros_like(depth)], 1)
    x = torch.tensor([1.0, 0, 0], dtype=F64)
    hits = intersect_rays(fn, o, x, far=4.0, tol=1e-14)
    assert hits.mask.tolist() == [True, True, True, False, False, False]
    assert hits.points[0, 0].item() == pytest.approx(-math.sqrt(0.49 - 0.69**2), abs=1e-9)
    both = ray_crossings(fn, o, x, far=4.0, tol=1e-14)
    assert torch.bincount(both.rows, minlength=6).tolist() == [2, 2, 2, 0, 0, 0]

    plane = problems.Affine(1)
    along = torch.linalg.svd(plane.A.detach())[2][1]
    o = problems.points(4)
    assert not intersect_rays(plane, o, along, far=10.0).mask.any()
    v = problems.points(4, seed=5)
    unit = v / v.norm(dim=1, keepdim=True)
    exact = -(plane(o)[:, 0] / (unit @ plane.A[0])).detach()
    hits = intersect_rays(plane, o, v, near=-100.0, far=100.0, tol=1e-12)
    torch.testing.assert_close(hits.t.detach(), exact, rtol=1e-10, atol=1e-10)


def test_rows_that_are_not_finite_leave_the_others():
    def fn(x):
        return torch.where(x[:, 1] > 0.5, torch.nan, x.norm(dim=1) - 0.3)

    o = torch.tensor([[-1.0, 0.6, 0], [-1, 0, 0], [0, -1, 0]])
    v = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    hits = intersect_rays(fn, o, v, far=2.0)
    assert hits.mask.tolist() == [False, True, True]
    assert hits.t.dtype == torch.float32
    assert hits.t[1:].tolist() == pytest.approx([0.7, 0.7], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_directions_may_have_any_length(dtype):
    """Also lengths whose squares the dtype of the rays does not hold."""
    origins = torch.tensor([[0.0, 0, -2]])
    direction = torch.tensor([0.01, 0.02, 1.0], dtype=F64)

    def found(length):
        given = (length * direction).to(dtype).requires_grad_()
        hits = intersect_rays(problems.Sphere(0.5).float(), origins, given, far=4.0)
        (gradient,) = torch.autograd.grad(hits.t.sum(), given)
        return hits.t.detach(), length * gradient.double()

    t, gradient = found(1.0)
    for length in (1e-30, 1e-22, 1e20, 1e30):
        torch.testing.assert_close(found(length), (t, gradient), rtol=1e-5, atol=1e-6)


def test_an_origin_that_is_not_finite_misses_the_box_and_leaves_the_others():
    origins = torch.tensor([[0, 0, 2.0], [0, 0, math.nan], [0, math.nan, 2], [0, 0, math.inf]])
    for step in (None, 0.01):
        options = {"box": (-1, 1), "step": step}
        hits = intersect_rays(problems.Sphere(0.5), origins, -origins[0], **options)
        assert hits.mask.tolist() == [True, False, False, False]
        assert hits.t.tolist() == pytest.approx([1.5] + [math.inf] * 3, abs=1e-5)


def test_steps_shorter_than_the_numbers_are_apart():
    """From an origin so far away the march has to get on all the same."""
    fn = lambda x: x.norm(dim=1) - 0.7  # noqa: E731
    for far in (1e5, 3e5, 1e6):
        origin, down = torch.tensor([[0.0, 0, far]]), torch.tensor([0.0, 0, -1])
        hits = intersect_rays(fn, origin, down, box=(-1.0, 1.0), tol=0.2)
        assert len(hits.t) == 1
    near = torch.tensor([[0.0, 0, 301.0]])
    hits = intersect_rays(fn, near, down, near=300.29, far=300.31, step=1e-6, tol=1e-3)
    assert hits.mask.all()


def test_a_dip_between_two_equal_samples_counts_once():
    ball = lambda x: x.norm(dim=1) - 0.05  # noqa: E731
    for start in (-1.0625, -1.05, -1.0625 - 1 / 64):
        ray = torch.tensor([[start, 0, 0]], dtype=torch.float64)
        found = ray_crossings(ball, ray, torch.tensor([1.0, 0, 0]).double(), far=2.125, step=0.125)
        expected = torch.tensor([-0.05 - start, 0.05 - start], dtype=torch.float64)
        torch.testing.assert_close(found.t, expected, rtol=0, atol=1e-6)
        assert found.length_below.item() == pytest.approx(0.1, abs=1e-6)


def test_two_dips_side_by_side_are_both_found():
    fn = lambda x: torch.minimum((x[:, 0] - 0.3).abs(), (x[:, 0] - 0.7).abs()) - 0.01  # noqa: E731
    ray = torch.zeros(1, 2, dtype=torch.float64)
    found = ray_crossings(fn, ray, torch.tensor([1.0, 0]).double(), far=1.0, step=0.25)
    assert found.t.tolist() == pytest.approx([0.29, 0.31, 0.69, 0.71], abs=1e-6)


def test_crossings_of_a_field_that_is_not_finite_are_refused():
    fn = lambda x: torch.where(x[:, 0] > 0.5, torch.nan, x.norm(dim=1) - 0.3)  # noqa: E731
    with pytest.raises(ValueError, match=r"^fn: expected finite values, got 1 of 1 that are not"):
        ray_crossings(fn, torch.zeros(1, 2), torch.tensor([1.0, 0]), far=1.0)


def test_a_batch_without_a_hit_has_a_gradient_of_zeros():
    fn = problems.Sphere(0.7)
    for z, wanted in itertools.product((3.0, math.nan), (None, True)):
        origins = torch.tensor([[0.0, 0, z], [0, 0, 3]], dtype=torch.float64)
        hits = intersect_rays(fn, origins, torch.tensor([0, 0, 1.0]).double(), far=5.0,
                              differentiable=wanted)  # fmt: skip
        assert not hits.mask.any()
        loss = hits.points[hits.mask].sum()
        gradients = torch.autograd.grad(loss, list(fn.parameters()))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_batches_and_no_rays_or_hits():
    fn = problems.RowCounter(problems.Sphere(0.7))
    o, v = toward(0.9, 50)
    small = intersect_rays(fn, o, v, far=5.0, batch=7, differentiable=False)
    assert max(len(batch) for batch in fn.batches) <= 7
    whole = intersect_rays(problems.Sphere(0.7), o, v, far=5.0)
    assert problems.same_bits(small.t, whole.t.detach())
    none = intersect_rays(fn, o[:0], v[:0], far=5.0)
    assert len(none) == len(none.result) == 0
    missed = intersect_rays(fn, o, -v, far=5.0)
    assert not missed.mask.any()
    assert len(missed.result) == 0
    assert ray_crossings(fn, o, -v, far=5.0).length_below.sum() == 0


# --- gradients ------------------------------------------------------------------------------------


def test_distance_follows_radius_and_centre():
    fn = problems.Sphere(0.7)
    o, v = toward(0.45, 40)
    hits = intersect_rays(fn, o, v, far=5.0, tol=1e-13)
    weight = problems.points(40, seed=8)[:, 0]
    (got_r, got_c) = torch.autograd.grad((hits.t * weight)[hits.mask].sum(), [fn.radius, fn.centre])

    def total(radius, centre):
        return (sphere_t(o - centre, v, radius) * weight)[hits.mask].sum().item()

    eps, zero = 1e-6, torch.zeros(3, dtype=F64)
    slope = (total(0.7 + eps, zero) - total(0.7 - eps, zero)) / (2 * eps)
    assert got_r.item() == pytest.approx(slope, rel=1e-6)
    for k in range(3):
        shift = eps * torch.eye(3, dtype=F64)[k]
        slope = (total(0.7, shift) - total(0.7, -shift)) / (2 * eps)
        assert got_c[k].item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_gradient_with_respect_to_the_rays():
    fn = problems.mlp()
    level = fn(torch.zeros(1, 3, dtype=F64)).item()
    o = (0.5 * problems.points(6)).requires_grad_()
    v = problems.points(6, seed=7).requires_grad_()
    weight = problems.points(6, seed=8)

    def found():
        hits = intersect_rays(fn, o, v, level, near=-4.0, far=4.0, tol=1e-14, max_iters=200)
        return hits, hits.t[hits.mask].sum() + (hits.points * weight)[hits.mask].sum()

    hits, loss = found()
    assert hits.mask.sum() >= 3
    bias = fn[0].bias
    got = torch.autograd.grad(loss, [o, v, bias])
    for tensor, gradient in zip((o, v, bias), got, strict=True):
        for k in (0, 4, 7):
            flat = tensor.detach().view(-1)
            with torch.no_grad():
                flat[k] += 1e-6
                high = found()[1].item()
                flat[k] -= 2e-6
                low = found()[1].item()
                flat[k] += 1e-6
            slope = (high - low) / 2e-6
            assert gradient.view(-1)[k].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_values_do_not_depend_on_gradients_and_nothing_is_touched():
    net = problems.batch_norm_net()
    o, v = problems.points(20), problems.points(20, seed=5)
    level = 0.1
    with torch.no_grad():
        constant = intersect_rays(net, o, v, level, far=3.0)
    hits = intersect_rays(net, o, v, level, far=3.0)
    assert problems.same_bits(hits.t.detach(), constant.t)
    assert problems.same_bits(hits.points.detach(), constant.points)
    assert not constant.t.requires_grad
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    with torch.inference_mode():
        assert problems.same_bits(intersect_rays(net, o, v, level, far=3.0).t, constant.t)
    frozen = problems.Sphere().requires_grad_(False)
    o, v = toward(0.4, 5)
    assert not intersect_rays(frozen, o, v, far=5.0).t.requires_grad
    with pytest.raises(RuntimeError, match=r"^fn: .*without a graph"):
        intersect_rays(frozen, o, v, far=5.0, differentiable=True)


def test_fitting_a_radius_to_a_depth_image():
    camera = Camera.look_at((0, 0, 3.0), width=8, height=8)
    row, column = (index.ravel() + 0.5 for index in np.mgrid[:8, :8])
    o, v = (torch.from_numpy(a) for a in camera.rays(column, row))
    depth = sphere_t(o, v, 0.62)
    net = problems.Quadric(0.4)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(16):
        hits = intersect_rays(net, o, v, near=2.0, far=3.5, step=0.2, tol=1e-9)
        both = hits.mask & torch.isfinite(depth)
        optimizer.zero_grad()
        (hits.t[both] - depth[both]).square().mean().backward()
        optimizer.step()
    assert net.radius.item() == pytest.approx(0.62, abs=2e-4)


def test_moving_one_point_to_a_target_along_its_ray():
    """One distance changes, the other is asked to stay."""
    net = ls.networks.ImplicitMLP(3, 1, 16, 1, activation="softplus", beta=10.0)
    net.double().init_sphere_(0.5, torch.Generator().manual_seed(0))
    o = torch.tensor([[0.1, 0.2, 3.0], [3.0, 0.1, 0.2]], dtype=F64)
    goal = None
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(50):
        hits = intersect_rays(net, o, -o, near=1.5, far=3.0, step=0.3, tol=1e-9)
        if goal is None:
            assert hits.mask.all()
            goal = hits.t.detach() + torch.tensor([0.05, 0.0], dtype=F64)
        optimizer.zero_grad()
        (hits.t - goal).square().sum().backward()
        optimizer.step()
    assert (hits.t - goal).abs().max() < 5e-3


# --- refusals -------------------------------------------------------------------------------------


def test_unusable_arguments():
    fn, o, v = problems.Sphere(), problems.points(4), problems.points(4, seed=5)
    cases = [
        (r"^directions: expected \(n, d\) = \(4, 3\)", (o, v[:3]), {"far": 1.0}),
        (r"^directions: expected finite lengths > 0, got 1 rows", (o, v * (v != v[1])), {"far": 1}),
        (r"^far: expected a finite length", (o, v), {}),
        (r"^near: expected a number or \(n,\) = \(4,\)", (o, v), {"near": v, "far": 1.0}),
        (r"^step: expected a length > 0", (o, v), {"far": 1.0, "step": 0.0}),
        (r"^lipschitz: expected a number > 0", (o, v), {"far": 1.0, "lipschitz": -1.0}),
        (r"^level: expected a finite number", (o, v, math.nan), {"far": 1.0}),
        (r"^batch: expected an integer", (o, v), {"far": 1.0, "batch": 0}),
        (r"^tol: expected a finite number", (o, v), {"far": 1.0, "tol": -1.0}),
        (r"^box: expected a pair", (o, v), {"box": 3}),
    ]
    for message, args, options in cases:
        with pytest.raises(ValueError, match=message):
            intersect_rays(fn, *args, **options)
    with pytest.raises(ValueError, match=r"^fn: expected one output"):
        intersect_rays(problems.Affine(2), o, v, far=1.0)
    with pytest.raises(TypeError, match=r"^directions: expected a tensor, got list"):
        intersect_rays(fn, o, [0.0, 0.0, 1.0], far=1.0)
    for shape in ((3,), (2, 2, 3)):
        with pytest.raises(ValueError, match=r"^origins: expected (a tensor )?\(n, "):
            intersect_rays(fn, torch.zeros(shape), v, far=1.0)
    # Rays of the plane for a network of space, and the other way round.
    flat = torch.rand(4, 2, dtype=F64)
    with pytest.raises(ValueError, match=r"^directions: expected \(n, d\) = \(4, 2\)"):
        intersect_rays(fn, flat, v, far=1.0)
    with pytest.raises(RuntimeError, match=r"4x2 and 3x"):
        intersect_rays(problems.mlp(), flat, flat, far=1.0)
    with pytest.raises(TypeError, match=r"^origins: expected a floating dtype"):
        intersect_rays(fn, o.long(), v, far=1.0)
