"""Eq. 13 against hand-made values, and the networks it trains."""

from __future__ import annotations

import math

import pytest
import torch

import levelset_ext as ls
from levelset_ext.networks import ImplicitMLP, fc1, fc2


class Ball(torch.nn.Module):
    """F(x) = s (|x| - r): the signed distance to a sphere, times a slope."""

    def __init__(self, radius: float, slope: float = 1.0) -> None:
        super().__init__()
        self.radius = torch.nn.Parameter(torch.tensor(radius, dtype=torch.float64))
        self.slope = slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slope * (torch.linalg.vector_norm(x, dim=1) - self.radius)


def sphere_points(n: int, radius: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return radius * x / torch.linalg.vector_norm(x, dim=1, keepdim=True)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("slope", [1.0, 0.25])
def test_value_is_the_formula(p: float, slope: float) -> None:
    net, cloud = Ball(0.9, slope), sphere_points(500, 1.0)
    start = 1.1 * sphere_points(64, 1.0, seed=1)
    zero, general = ls.project(net, start, tol=1e-12), ls.level_points(net, start)
    loss = ls.losses.reconstruction(net, [zero, general], cloud, cloud[:50], lam=3.0, p=p)

    def term(points: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        distance = torch.cdist(points, cloud).amin(1)
        return (distance - t.abs()).abs().pow(p).mean().pow(1 / p)

    terms = [term(zero.points, torch.zeros(64)), term(start, net(start).detach())]
    misfit = net(cloud[:50]).abs().mean()
    torch.testing.assert_close(loss.levels, torch.stack(terms))
    torch.testing.assert_close(loss.cloud, misfit.detach())
    torch.testing.assert_close(loss.total, sum(terms) + 3.0 * misfit)


def test_rows_that_did_not_converge_stand_for_the_level_they_are_on() -> None:
    cloud = sphere_points(100, 1.0)
    start = torch.cat([sphere_points(4, 0.9), sphere_points(6, 0.5, seed=1)])

    def quadric(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(1) - 0.81 + 0.0 * weight

    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    found = ls.project(quadric, start, max_iters=1)
    assert found.converged.tolist() == [True] * 4 + [False] * 6
    t = torch.where(found.converged, 0.0, quadric(found.points).detach())
    expected = (torch.cdist(found.points, cloud).amin(1) - t.abs()).abs().mean()
    loss = ls.losses.reconstruction(quadric, found, cloud)
    torch.testing.assert_close(loss.levels[0], expected)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_gradient_is_that_of_a_moving_level_set(p: float) -> None:
    """For the sphere, p(r) moves radially with r: differentiate the true geometry numerically."""
    cloud = sphere_points(400, 1.0)
    start = 0.7 * sphere_points(32, 1.0, seed=2)

    def by_formula(radius: float) -> float:
        unit = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
        zero = (torch.cdist(radius * unit, cloud).amin(1)).pow(p).mean().pow(1 / p)
        # A point at |x| = 0.7 is on the level t = 0.7 - 0.8 and keeps that t as r moves.
        t = 0.7 - 0.8
        level = torch.cdist((radius + t) * unit, cloud).amin(1)
        return float(zero + (level - abs(t)).abs().pow(p).mean().pow(1 / p) + 2 * abs(1 - radius))

    net = Ball(0.8)
    samples = [ls.project(net, start, tol=1e-13), ls.level_points(net, start)]
    ls.losses.reconstruction(net, samples, cloud, lam=2.0, p=p).total.backward()
    h = 1e-6
    numeric = (by_formula(0.8 + h) - by_formula(0.8 - h)) / (2 * h)
    assert net.radius.grad is not None
    assert float(net.radius.grad) == pytest.approx(numeric, rel=1e-5)


def test_rows_that_cannot_move_are_left_out() -> None:
    net, cloud = Ball(0.9), sphere_points(100, 1.0)
    start = sphere_points(8, 1.0)
    spoiled = start.clone()
    spoiled[3] = math.nan
    spoiled[5] = 0.0  # |x| has no gradient here
    good = ls.project(net, start[[0, 1, 2, 4, 6, 7]])
    bad = ls.project(net, spoiled)
    assert bad.status[3] == ls.Status.NON_FINITE
    expected = ls.losses.reconstruction(net, good, cloud)
    loss = ls.losses.reconstruction(net, bad, cloud)
    torch.testing.assert_close(loss.total, expected.total)
    loss.total.backward()
    assert net.radius.grad is not None
    assert torch.isfinite(net.radius.grad)


def test_two_outputs_measure_the_distance_to_a_curve() -> None:
    net = torch.nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        net.bias.zero_()
    cloud = torch.stack(
        [torch.linspace(-1, 1, 201), torch.zeros(201), torch.zeros(201)], 1
    ).double()
    samples = ls.project(net, torch.tensor([[0.25, 0.5, -0.5]], dtype=torch.float64))
    shifted = cloud + torch.tensor([0.0, 0.3, 0.4], dtype=torch.float64)
    loss = ls.losses.reconstruction(net, samples, shifted, lam=1.0)
    assert float(loss.levels[0]) == pytest.approx(0.5)
    assert float(loss.cloud) == pytest.approx(0.5)


def test_bad_arguments_are_named() -> None:
    net, cloud = Ball(0.9), sphere_points(10, 1.0)
    samples = ls.project(net, cloud)
    with pytest.raises(ValueError, match="p: expected"):
        ls.losses.reconstruction(net, samples, cloud, p=0.5)
    with pytest.raises(ValueError, match="lam: expected"):
        ls.losses.reconstruction(net, samples, cloud, lam=-1.0)
    with pytest.raises(ValueError, match="samples: expected"):
        ls.losses.reconstruction(net, [], cloud)
    with pytest.raises(TypeError, match="samples: expected LevelSetResults, got Tensor"):
        ls.losses.reconstruction(net, [cloud], cloud)
    with pytest.raises(ValueError, match="cloud_batch: expected a tensor of at least one point"):
        ls.losses.reconstruction(net, samples, cloud, cloud[:0])
    with pytest.raises(ValueError, match="nearest: expected 1 entries"):
        ls.losses.reconstruction(net, samples, cloud, nearest=[None, None])
    with pytest.raises(TypeError, match="result: expected the LevelSetResult"):
        ls.sample_network(net, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="box: expected numbers as lower, got NaN"):
        ls.project(net, cloud, box=(math.nan, 1.0))


def test_flat_rows_are_left_out_on_request() -> None:
    net, cloud = Ball(0.9, slope=0.25), sphere_points(100, 1.0)
    samples = ls.project(net, sphere_points(16, 1.1, seed=4), tol=1e-12)
    kept = ls.losses.reconstruction(net, samples, cloud, min_slope=0.2)
    left_out = ls.losses.reconstruction(net, samples, cloud, min_slope=0.3)
    assert float(kept.levels[0]) > 0.05
    assert float(left_out.levels[0]) == 0.0
    left_out.total.backward()
    assert net.radius.grad is not None


def test_a_known_nearest_point_gives_the_same_loss() -> None:
    net, cloud = Ball(0.9), sphere_points(300, 1.0)
    samples = ls.level_points(net, 1.2 * sphere_points(40, 1.0, seed=5))
    _, index = ls.ops.nearest_distance(samples.points, cloud)
    grads = []
    for nearest in (None, [None], [index]):
        net.radius.grad = None
        ls.losses.reconstruction(net, samples, cloud, nearest=nearest, p=2.0).total.backward()
        grads.append(float(net.radius.grad))
    assert grads[0] == grads[1] == grads[2] != 0.0


def test_a_known_nearest_point_is_that_of_the_rows_that_are_left() -> None:
    cloud = sphere_points(300, 1.0)
    samples = ls.project(Ball(0.9), 1.2 * sphere_points(9, 1.0, seed=5))
    samples.jacobian[:3] *= 0.1  # flat: left out
    _, index = ls.ops.nearest_distance(samples.points, cloud)
    loss = ls.losses.reconstruction(Ball(0.9), samples, cloud, nearest=[index], min_slope=0.5)
    expected = torch.cdist(samples.points[3:], cloud).amin(1).mean()
    torch.testing.assert_close(loss.levels[0], expected)


def plane_points(n: int, noise: float, seed: int = 0) -> torch.Tensor:
    """Points of the square |x|, |y| < 1 in the plane z = 0."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(n, 3, generator=generator, dtype=torch.float64) - 1
    x[:, 2] = noise * torch.randn(n, generator=generator, dtype=torch.float64)
    return x


def test_distance_to_a_disk() -> None:
    disks = ls.losses.Disks(
        torch.zeros(1, 3, dtype=torch.float64),
        torch.tensor([[0.0, 0.0, -1.0]], dtype=torch.float64),
        torch.tensor([0.5], dtype=torch.float64),
    )
    x = torch.tensor(
        [[0.1, 0.2, 0.3], [0.9, 0.0, -0.3], [0.0, 0.0, 0.0], [0.0, 1.5, 0.0]], dtype=torch.float64
    ).requires_grad_()
    distance = disks.distance(x, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(distance, torch.tensor([0.3, 0.5, 0.0, 1.0]).double())
    (gradient,) = torch.autograd.grad(distance.sum(), x)
    expected = [[0.0, 0.0, 1.0], [0.8, 0.0, -0.6], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    torch.testing.assert_close(gradient, torch.tensor(expected).double())


def test_disks_lie_on_the_surface_between_the_points() -> None:
    """Between the points of a plane the distance to the plane comes out, and not to the points;
    with noise it is nearer to the truth than the points are; beyond the edge it grows."""
    generator = torch.Generator().manual_seed(1)
    x = 1.2 * torch.rand(400, 3, generator=generator, dtype=torch.float64) - 0.6
    x[:, 2] *= 0.05
    exact = plane_points(2000, 0.0)
    disks = ls.losses.fit_disks(exact)
    torch.testing.assert_close(disks.normals[:, 2].abs(), torch.ones(2000).double())
    distance, index = ls.ops.nearest_distance(x, exact)
    mine = disks.distance(x, index)
    assert float((distance - x[:, 2].abs()).mean()) > 5e-3
    assert float((mine - x[:, 2].abs()).abs().mean()) < 5e-4
    noisy = plane_points(2000, 0.01)
    disks = ls.losses.fit_disks(noisy)
    assert float(disks.centers[:, 2].abs().mean()) < 0.6 * float(noisy[:, 2].abs().mean())
    off = torch.tensor([[1.5, 0.0, 0.0]], dtype=torch.float64)
    disks = ls.losses.fit_disks(exact)
    (found,) = disks.distance(off, ls.ops.nearest_distance(off, exact)[1])
    assert 0.4 < float(found) < 0.55


@pytest.mark.parametrize("d", [2, 3])
def test_disks_are_tangent_to_what_is_round(d: int) -> None:
    """On a sphere planes lie a sixth of their sagitta inside; quadrics are wrong by its square."""
    generator = torch.Generator().manual_seed(3)
    cloud = torch.randn(3000 if d == 3 else 800, d, generator=generator, dtype=torch.float64)
    cloud /= cloud.norm(dim=1, keepdim=True)
    disks = ls.losses.fit_disks(cloud)
    away = (disks.centers.norm(dim=1) - 1).abs()
    assert float(away.max()) < 2e-3
    assert float(away.mean()) < 1e-4
    planes = ls.losses.fit_disks(cloud, 5 if d == 2 else 11)  # too few for a quadric
    assert float(away.mean()) < 0.1 * float((planes.centers.norm(dim=1) - 1).abs().mean())
    assert float((disks.normals * cloud).sum(1).abs().min()) > 0.999
    torch.testing.assert_close(disks.normals.norm(dim=1), torch.ones(len(cloud)).double())
    # The height is along the normal of the disk, not of the neighbours' plane.
    moved = disks.centers - cloud
    torch.testing.assert_close(moved, (moved * disks.normals).sum(1, keepdim=True) * disks.normals)


def test_a_quadric_is_its_own_fit() -> None:
    """Heights of a paraboloid come out exactly, whatever its directions and scale."""
    generator = torch.Generator().manual_seed(4)
    flat = 0.4 * torch.rand(500, 2, generator=generator, dtype=torch.float64) - 0.2
    flat[0] = 0.0
    height = 0.8 * flat[:, :1] ** 2 - 0.5 * flat[:, :1] * flat[:, 1:] + 0.3 * flat[:, 1:] ** 2
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    cloud = 7.0 * torch.cat([flat, height], 1) @ turn
    noisy = cloud.clone()
    noisy[0] += 7.0 * 0.02 * turn[2]  # lifted off the surface by 0.14
    disks = ls.losses.fit_disks(noisy, neighbours=400)
    # Its weight pulls the fit toward it, by a share that the others outweigh.
    assert float((disks.centers[0] - cloud[0]).norm()) < 0.005
    assert float((disks.normals[0] @ turn[2]).abs()) > 0.9999


def test_disks_of_a_cloud_of_another_size_are_of_that_size() -> None:
    cloud = sphere_points(60, 1.0)
    small, large = ls.losses.fit_disks(cloud), ls.losses.fit_disks(100 * cloud)
    torch.testing.assert_close(large.centers, 100 * small.centers)
    torch.testing.assert_close(large.radii, 100 * small.radii)
    cosine = (large.normals * small.normals).sum(1).abs()
    torch.testing.assert_close(cosine, torch.ones(60).double())


@pytest.mark.parametrize(("covered", "expected"), [(1, [1, 1, 2, 4]), (2, [3, 2, 3, 6])])
def test_the_radius_is_the_distance_to_a_neighbour(covered: int, expected: list[int]) -> None:
    cloud = torch.tensor([[0.0, 0], [1, 0], [3, 0], [7, 0]]).double()
    disks = ls.losses.fit_disks(cloud, 3, covered)
    torch.testing.assert_close(disks.radii, torch.tensor(expected).double())


@pytest.mark.parametrize("case", ["line", "equal", "few"])
def test_disks_of_what_is_no_surface_are_finite(case: str) -> None:
    cloud = torch.zeros(40, 3)
    if case == "line":
        cloud[:, 0] = torch.linspace(0, 1, 40)
    elif case == "few":
        cloud = sphere_points(3, 1.0).float()
    disks = ls.losses.fit_disks(cloud, 20)
    assert all(bool(torch.isfinite(part).all()) for part in disks)
    torch.testing.assert_close(disks.normals.norm(dim=1), torch.ones(len(cloud)))
    torch.testing.assert_close(disks.centers, cloud, rtol=0, atol=1e-6)


def test_gradient_with_disks_is_that_of_a_moving_level_set() -> None:
    cloud = sphere_points(400, 1.0)
    disks = ls.losses.fit_disks(cloud)
    start = 0.9 * sphere_points(32, 1.0, seed=2)
    unit = start / 0.9

    def by_formula(radius: float) -> float:
        def distance(x: torch.Tensor) -> torch.Tensor:
            return disks.distance(x, ls.ops.nearest_distance(x, cloud)[1])

        # Points at |x| = 0.9 keep their level t = 0.9 - 0.95 as the radius moves.
        level = distance((radius - 0.05) * unit) - 0.05
        zero = distance(radius * unit)
        return float(zero.square().mean().sqrt() + level.square().mean().sqrt())

    net = Ball(0.95)
    samples = [ls.project(net, start, tol=1e-13), ls.level_points(net, start)]
    loss = ls.losses.reconstruction(net, samples, cloud, lam=0.0, p=2.0, disks=disks)
    assert float(loss.total.detach()) == pytest.approx(by_formula(0.95), rel=1e-9)
    loss.total.backward()
    h = 1e-7
    numeric = (by_formula(0.95 + h) - by_formula(0.95 - h)) / (2 * h)
    assert net.radius.grad is not None
    assert float(net.radius.grad) == pytest.approx(numeric, rel=1e-5)


def test_bad_disks_are_named() -> None:
    cloud = sphere_points(50, 1.0)
    with pytest.raises(ValueError, match="neighbours: expected at least d = 3, got 2"):
        ls.losses.fit_disks(cloud, 2, 1)
    with pytest.raises(ValueError, match="covered: expected 1 to 31, got 32"):
        ls.losses.fit_disks(cloud, covered=32)
    assert ls.losses.fit_disks(cloud[:5]).radii.shape == (5,)  # fewer points than neighbours


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_table_a1_networks() -> None:
    assert count(fc1()) == (3 * 512 + 512) + 2 * (512 * 512 + 512) + 512 + 1
    assert count(fc1(outputs=2)) == count(fc1()) + 513
    assert count(fc2()) == (3 * 509 + 509) + 6 * (512 * 509 + 509) + 509 + 1
    assert fc2()(torch.zeros(4, 3)).shape == (4, 1)


@pytest.mark.parametrize(
    ("activation", "beta"), [("relu", 1.0), ("silu", 40.0), ("softplus", 30.0)]
)
def test_activation_is_what_it_says(activation: str, beta: float) -> None:
    net = ImplicitMLP(3, 2, 16, 3, activation=activation, beta=beta, skip=True).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    functions = {
        "relu": torch.relu,
        "silu": lambda z: z * torch.sigmoid(beta * z),
        "softplus": lambda z: torch.nn.functional.softplus(z, beta=beta, threshold=1e9),
    }
    for layer in net.hidden:
        torch.nn.init.normal_(layer.bias)
    h = x
    for index, layer in enumerate(net.hidden):
        h = functions[activation](layer(h if index == 0 else torch.cat([h, x], 1)))
    torch.testing.assert_close(net(x), net.last(h))


@pytest.mark.parametrize("skip", [False, True])
def test_the_first_layer_reads_waves_of_one_slope(skip: bool) -> None:
    frequencies, beta = (3.0, 7.0), 5.0
    net = ImplicitMLP(2, 1, 16, 3, beta=beta, skip=skip, frequencies=frequencies).double()
    for layer in net.hidden:
        torch.nn.init.normal_(layer.weight)
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(20, 2, dtype=torch.float64)
    sines = [torch.sin(k * x) / k for k in frequencies]
    cosines = [torch.cos(k * x) / k for k in frequencies]
    h = torch.cat([*sines, *cosines, x], 1)
    for index, layer in enumerate(net.hidden):
        z = layer(torch.cat([h, x], 1) if skip and index > 0 else h)
        h = z * torch.sigmoid(beta * z)
    # pi / 2 is kept in float32.
    torch.testing.assert_close(net(x), net.last(h), rtol=1e-6, atol=1e-6)
    assert set(net.state_dict()) == set(ImplicitMLP(2, 1, 16, 3, skip=skip).state_dict())


def test_waves_come_in_as_they_are_learnt() -> None:
    made = [ImplicitMLP(3, 1, 16, 3, frequencies=frequencies) for frequencies in ((), (4.0, 8.0))]
    for net in made:
        net.init_sphere_(0.6, torch.Generator().manual_seed(1))
        net.hidden[0].weight.data[:, -3:] = torch.linspace(-1, 1, 48).reshape(16, 3)
        for layer, other in zip(net.hidden[1:], made[0].hidden[1:], strict=True):
            layer.load_state_dict(other.state_dict())
        net.last.load_state_dict(made[0].last.state_dict())
    x = torch.randn(20, 3)
    torch.testing.assert_close(made[1](x), made[0](x))
    made[1](x).sum().backward()
    assert bool((made[1].hidden[0].weight.grad[:, :-3] != 0).any())


@pytest.mark.parametrize("frequencies", [(0.0,), (2.0, -1.0), (math.inf,)])
def test_frequencies_are_positive(frequencies: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="frequencies: expected finite numbers > 0, got"):
        ImplicitMLP(3, 1, 8, 2, frequencies=frequencies)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_sphere_start_is_about_a_signed_distance(activation: str) -> None:
    generator = torch.Generator().manual_seed(3)
    net = ImplicitMLP(activation=activation).init_sphere_(0.7, generator)
    directions = sphere_points(2000, 1.0).float()
    for radius in (0.3, 0.5, 0.9, 1.0):
        values = net(directions * radius)[:, 0].detach()
        assert float((values - (radius - 0.7)).mean().abs()) < 0.05
        assert bool((values.sign() == math.copysign(1, radius - 0.7)).float().mean() > 0.8)
    _, jacobian = ls.value_and_jacobian(net, directions * 0.8)
    assert 0.8 < float(torch.linalg.vector_norm(jacobian, dim=2).mean()) < 1.3
