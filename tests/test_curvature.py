"""Curvature of level sets against closed forms, in float64, and its gradient."""

import math

import problems
import pytest
import torch
from torch import nn

import levelset_ext as ls
from levelset_ext.geometry import curvature, curvature_penalty

F64 = torch.float64
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def on(fn, n=40, d=3, level=0.0):
    r = ls.project(fn, problems.points(n, d), level, tol=1e-13, max_iters=100)
    assert r.converged.all()
    return r.points


class Ellipsoid(nn.Module):
    """x^2/a^2 + y^2/b^2 + z^2/c^2 - 1, no distance."""

    axes = (1.3, 0.9, 0.6)

    def forward(self, x):
        return (x / torch.tensor(self.axes, dtype=x.dtype)).square().sum(1) - 1


def cylinder(x):
    return 3 * (x[:, :2].square().sum(1) - 0.25)


@pytest.mark.parametrize("d", [2, 3, 4, 6])
@pytest.mark.parametrize("make", [problems.Sphere, problems.Quadric])
def test_sphere_in_any_dimension(make, d):
    fn = make(0.7, d) if make is problems.Sphere else make(0.7)
    p = on(fn, d=d)
    k = curvature(fn, p)
    r = torch.full((40,), 1 / 0.7, dtype=F64)
    torch.testing.assert_close(k.mean, r, **TIGHT)
    torch.testing.assert_close(k.gaussian, r ** (d - 1), **TIGHT)
    torch.testing.assert_close(k.principal, r[:, None].expand(40, d - 1), **TIGHT)
    torch.testing.assert_close(k.normals, p / 0.7, **TIGHT)
    assert not k.mean.requires_grad
    # The other sign of F looks from the other side.
    other = curvature(lambda x: -fn(x), p)
    torch.testing.assert_close(other.mean, -k.mean, **TIGHT)
    torch.testing.assert_close(other.gaussian, (-1) ** (d - 1) * k.gaussian, **TIGHT)


def test_cylinder_and_its_directions():
    p = on(cylinder)
    k = curvature(cylinder, p)
    torch.testing.assert_close(k.principal, torch.tensor([[2.0, 0.0]], dtype=F64).expand(40, 2))
    torch.testing.assert_close(k.gaussian, torch.zeros(40, dtype=F64), rtol=0, atol=1e-11)
    around = torch.stack([-p[:, 1], p[:, 0], torch.zeros_like(p[:, 0])], 1) / 0.5
    assert ((k.directions[:, 0] * around).sum(1).abs() - 1).abs().max() < 1e-11
    assert (k.directions[:, 1, 2].abs() - 1).abs().max() < 1e-11


def test_torus():
    fn = problems.Torus(1.0, 0.3)
    p = on(fn, 200)
    k = curvature(fn, p)
    ring = p[:, :2].norm(dim=1)
    across = (ring - 1.0) / 0.3 / ring  # cos(v) / (R + r cos v)
    torch.testing.assert_close(k.gaussian, across / 0.3, **TIGHT)
    torch.testing.assert_close(k.mean, (across + 1 / 0.3) / 2, **TIGHT)
    torch.testing.assert_close(k.principal[:, 0], torch.full_like(ring, 1 / 0.3), **TIGHT)
    torch.testing.assert_close(k.principal[:, 1], across, **TIGHT)
    assert (k.gaussian < 0).any()
    assert (k.gaussian > 0).any()
    frame = torch.cat([k.directions, k.normals[:, None]], 1)
    torch.testing.assert_close(frame @ frame.mT, torch.eye(3, dtype=F64).expand(200, 3, 3))


def test_ellipsoid_and_ellipse():
    fn = Ellipsoid()
    p = on(fn)
    a, b, c = fn.axes
    k = curvature(fn, p)
    h = (p.square() / torch.tensor([a**4, b**4, c**4], dtype=F64)).sum(1)
    torch.testing.assert_close(k.gaussian, 1 / (a * b * c * h) ** 2, **TIGHT)
    mean = (a * a + b * b + c * c - p.square().sum(1)) / (2 * (a * b * c) ** 2 * h**1.5)
    torch.testing.assert_close(k.mean, mean, **TIGHT)

    def ellipse(x):
        return (x[:, 0] / a) ** 2 + (x[:, 1] / b) ** 2 - 1

    p = on(ellipse, d=2)
    k = curvature(ellipse, p)
    h = p[:, 0] ** 2 / a**4 + p[:, 1] ** 2 / b**4
    torch.testing.assert_close(k.mean, 1 / ((a * b) ** 2 * h**1.5), **TIGHT)
    torch.testing.assert_close(k.gaussian, k.mean)


def test_other_levels_and_float32():
    fn = problems.Quadric(0.7)
    k = curvature(fn, on(fn, level=0.15))
    torch.testing.assert_close(k.mean, torch.full_like(k.mean, (0.49 + 0.15) ** -0.5), **TIGHT)
    single = curvature(fn, on(fn).float())
    assert single.mean.dtype == torch.float32
    torch.testing.assert_close(single.mean, torch.full_like(single.mean, 1 / 0.7))


def test_the_default_dtype_changes_nothing():
    fn, x = problems.Quadric(0.7), problems.points(4).float()
    expected = curvature(fn, x)
    torch.set_default_dtype(F64)
    try:
        found = curvature(fn, x)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), tensor)


def test_relu_has_no_curvature_and_gets_a_zero_penalty():
    net = ls.networks.ImplicitMLP(3, 1, 16, 2, activation="relu").double().init_sphere_(0.5)
    x = problems.points(10)
    k = curvature(net, x)
    for tensor in (k.mean, k.gaussian, k.principal, k.shape):
        assert not tensor.any()
    assert curvature_penalty(net, x).item() == 0
    plane = curvature(lambda x: x[:, 0] + 2 * x[:, 1], x)
    assert not plane.mean.any()


@pytest.mark.parametrize("d", [2, 3, 4])
def test_rows_without_a_gradient_are_nan_in_every_dimension(d):
    fn = problems.Quadric(0.7)
    x = on(fn, 4, d)
    x[1] = 0.0
    for tensor in vars(curvature(fn, x)).values():
        nan = torch.isnan(tensor).reshape(4, -1)
        assert nan.all(1).tolist() == nan.any(1).tolist() == [False, True, False, False]


def test_rows_without_a_gradient_are_nan_and_leave_the_others():
    fn = problems.Quadric(0.7)
    x = on(fn, 4)
    x[1] = 0.0
    k = curvature(fn, x)
    for tensor in (k.mean, k.gaussian, k.principal[:, 0], k.normals[:, 0]):
        assert torch.isnan(tensor).tolist() == [False, True, False, False]
    net = problems.mlp()
    bad = x.clone()
    bad[1] = math.nan
    whole = curvature_penalty(net, bad)
    assert whole.item() == pytest.approx(0.75 * curvature_penalty(net, x[[0, 2, 3]]).item())
    whole.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_the_penalty_leaves_out_points_where_f_is_not_smooth():
    scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    x = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0.5, 0.5]], dtype=torch.float64)
    for fn in (
        lambda x: (scale * x).norm(dim=1) - 1,
        lambda x: scale * x.square().sum(1).sqrt() - 1,
    ):
        for rows in ([0, 1, 2], [0, 2]):
            loss = curvature_penalty(fn, x[rows]) * len(rows)
            (gradient,) = torch.autograd.grad(loss, scale, allow_unused=True)
            assert loss.item() == pytest.approx(2.0 + 4.0)
            assert gradient is None or abs(gradient.item()) < 1e-9


@pytest.mark.parametrize("d", [2, 3, 4])
@pytest.mark.parametrize("kind", ["total", "mean", "gaussian"])
def test_penalty_gradient_against_finite_differences(kind, d):
    net = problems.mlp(1, d, 6)
    x = 0.3 * problems.points(5, d)
    loss = curvature_penalty(net, x, kind)
    assert loss.item() > 0
    got = torch.autograd.grad(loss, net[0].bias)[0][2].item()
    bias = net[0].bias

    with torch.no_grad():
        step = torch.zeros_like(bias)
        step[2] = 1e-5
        bias += step
        high = curvature_penalty(net, x, kind).item()
        bias -= 2 * step
        low = curvature_penalty(net, x, kind).item()
        bias += step
    assert got == pytest.approx((high - low) / 2e-5, rel=1e-5, abs=1e-9)


def test_gradient_through_moving_samples():
    """Total curvature 2/r^2 of a sphere's own points, as r changes: the points have to follow."""
    fn = problems.Quadric(0.7)
    r = ls.project(fn, problems.points(6), tol=1e-13, max_iters=100)
    p = ls.sample_network(fn, r)
    curvature_penalty(fn, p).backward()
    assert fn.radius.grad.item() == pytest.approx(-4 / 0.7**3, rel=1e-10)
    # At points that stay, the level set through them is the same sphere for every radius.
    fn.radius.grad = None
    k = curvature(fn, r.points, create_graph=True)
    assert not k.mean.requires_grad or torch.autograd.grad(
        k.mean.sum(), fn.radius, allow_unused=True
    )[0] in (None, 0)


def test_penalty_smooths_a_training():
    net = problems.mlp(1, 2, 12)
    x = 0.5 * problems.points(16, 2)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    first = curvature_penalty(net, x, limit=100.0).item()
    for _ in range(15):
        optimizer.zero_grad()
        curvature_penalty(net, x, limit=100.0).backward()
        optimizer.step()
    assert curvature_penalty(net, x).item() < 0.7 * first


def test_leaves_no_trace_and_checks_its_arguments():
    net = problems.batch_norm_net()
    x = problems.points(5)
    mean = net[1].running_mean.clone()
    with torch.no_grad():
        curvature(net, x)
        assert not curvature_penalty(net, x).requires_grad
    assert net.training
    assert torch.equal(net[1].running_mean, mean)
    assert all(p.grad is None for p in net.parameters())
    assert len(curvature(net, x[:0]).mean) == 0
    assert curvature_penalty(net, x[:0]).item() == 0
    with pytest.raises(ValueError, match=r"^points: expected \(n, d\) with d >= 2"):
        curvature(net, x[:, :1])
    with pytest.raises(ValueError, match=r"^kind: expected one of total"):
        curvature_penalty(net, x, "mena")
    with pytest.raises(ValueError, match=r"^fn: expected one output"):
        curvature(problems.Affine(2), x)
    with pytest.raises(ValueError, match=r"^limit: expected a number > 0"):
        curvature_penalty(net, x, limit=0)
