"""Curves whose shape, length and ends are known, traced as level sets."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import Circle, batch_norm_net, mlp, points
from torch import Tensor

import levelset_ext as ls
from levelset_ext.geometry import CurveEnd, trace_curve

Field = Callable[[Tensor], Tensor]
CLOSED = (CurveEnd.CLOSED, CurveEnd.CLOSED)


def sphere_and_plane(x: Tensor) -> Tensor:
    """The circle of radius 0.8 at height 0.6 on the unit sphere."""
    return torch.stack([(x * x).sum(1) - 1, x[:, 2] - 0.6], 1)


def ellipse(x: Tensor) -> Tensor:
    """Half axes 2 and 1, as a field (n,)."""
    return x[:, 0] ** 2 / 4 + x[:, 1] ** 2 - 1


ELLIPSE_LENGTH = 9.688448220547676  # 8 E(3/4)


def viviani(x: Tensor) -> Tensor:
    """An eight on the sphere of radius 2, which crosses itself at (2, 0, 0)."""
    return torch.stack([(x * x).sum(1) - 4, (x[:, 0] - 1) ** 2 + x[:, 1] ** 2 - 1], 1)


VIVIANI_LENGTH = 15.280791156110851  # 8 sqrt(2) E(1/2)


def linked_circles(x: Tensor) -> Tensor:
    """Re and Im of z^2 - w^2 for the stereographic (z, w): two fibres of Hopf's map, linked. They
    are the circles x = +-z, |x|^2 = 1 +- 2 y, of radius sqrt 2."""
    rest = (x * x).sum(1) - 1
    z, w = torch.complex(2 * x[:, 0], 2 * x[:, 1]), torch.complex(2 * x[:, 2], rest)
    f = z * z - w * w
    return torch.stack([f.real, f.imag], 1)


def line(x: Tensor) -> Tensor:
    """{(s, 2 s, 0.25)}"""
    return torch.stack([x[:, 1] - 2 * x[:, 0], x[:, 2] - 0.25], 1)


def in_four_dimensions(x: Tensor) -> Tensor:
    """(cos t, sin t, cos 2t, sin 2t), of length 2 pi sqrt 5."""
    a, b = x[:, 0], x[:, 1]
    return torch.stack([a * a + b * b - 1, x[:, 2] - a * a + b * b, x[:, 3] - 2 * a * b], 1)


# --- shapes, lengths, orders ------------------------------------------------------------------

EXACT = {
    "circle": (sphere_and_plane, 3, 2 * math.pi * 0.8),
    "ellipse": (ellipse, 2, ELLIPSE_LENGTH),
    "four dimensions": (in_four_dimensions, 4, 2 * math.pi * math.sqrt(5)),
}


@pytest.mark.parametrize("count", [1, 2, 5, 60])
@pytest.mark.parametrize("name", EXACT)
def test_one_closed_curve_from_any_number_of_seeds(name: str, count: int) -> None:
    fn, d, length = EXACT[name]
    trace = trace_curve(fn, points(count, d), box=(-4, 4), step=0.1)
    assert len(trace) == 1
    assert (trace.seed_curve == 0).all()
    curve = trace[0]
    assert curve.closed
    assert curve.ends == CLOSED
    assert curve.crossings == 0
    assert curve.length == pytest.approx(length, rel=2e-3)
    assert curve.length < length  # a polyline with its vertices on the curve is shorter
    assert curve.residual < 1e-8
    assert curve.vertices.shape == (len(curve), d)
    assert curve.spacings.max() <= 0.1 * 1.51
    # In order: two steps along the curve are nearly twice as far as one.
    x = curve.vertices
    two = np.linalg.norm(np.roll(x, -2, 0) - x, axis=1)
    one = curve.spacings + np.roll(curve.spacings, -1)
    assert (two > 0.95 * one).all()


@pytest.mark.parametrize("name", EXACT)
def test_length_and_distance_errors_are_of_second_order(name: str) -> None:
    fn, d, length = EXACT[name]
    seed = torch.ones(1, d, dtype=torch.float64)
    steps = [0.1, 0.05, 0.025]
    short, away = [], []
    for step in steps:
        curve = trace_curve(fn, seed, box=(-4, 4), step=step, max_turn=1.0)[0]
        curve = curve.resample(step)  # equal edges: the law is then one number
        short.append(length - curve.length)
        middle = torch.from_numpy(curve.vertices[curve.edges].mean(1))
        away.append(float(ls.project(fn, middle, tol=1e-12).points.sub(middle).norm(dim=1).max()))
    for errors in (short, away):
        orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
        assert orders == pytest.approx([2, 2], abs=0.12)
    if name == "circle":  # the constants too
        kappa = 1 / 0.8
        assert short[-1] == pytest.approx(length * (kappa * steps[-1]) ** 2 / 24, rel=0.02)
        assert away[-1] == pytest.approx(kappa * steps[-1] ** 2 / 8, rel=0.02)


def test_edges_shorten_where_the_curve_bends() -> None:
    curve = trace_curve(
        lambda x: x[:, 0] ** 2 + 100 * x[:, 1] ** 2 - 1,
        torch.tensor([[0.0, 0.1]], dtype=torch.float64),
        box=(-2, 2),
        step=0.05,
    )[0]
    assert curve.closed
    at_the_tip = np.abs(curve.vertices[curve.edges[:, 0], 0]) > 0.999
    assert curve.spacings[at_the_tip].max() < 0.01
    assert curve.spacings.max() > 0.04
    x = curve.vertices
    assert np.abs(x[:, 0] ** 2 + 100 * x[:, 1] ** 2 - 1).max() < 1e-7


def test_a_level_other_than_zero() -> None:
    start = torch.ones(1, 3, dtype=torch.float64)
    curve = trace_curve(sphere_and_plane, start, [0.44, -0.6], box=(-2, 2))[0]
    assert np.linalg.norm(curve.vertices, axis=1) == pytest.approx(1.2)
    assert np.abs(curve.vertices[:, 2]).max() < 1e-9
    assert curve.samples.level.tolist()[0] == pytest.approx([0.44, -0.6])


# --- several branches -------------------------------------------------------------------------


def test_two_linked_circles() -> None:
    one = torch.tensor([[1.0, 2.0, 1.0]], dtype=torch.float64)
    trace = trace_curve(linked_circles, one, box=(-4, 4), step=0.1)
    assert [curve.closed for curve in trace] == [True]
    many = 1.5 * points(50)
    trace = trace_curve(linked_circles, many, box=(-4, 4), step=0.1)
    assert len(trace) == 2
    sides = set()
    for k, curve in enumerate(trace):
        assert curve.closed
        assert curve.length == pytest.approx(2 * math.pi * math.sqrt(2), rel=1e-3)
        x, y, z = curve.vertices.T
        side = 1.0 if abs(x - z).max() < 1e-6 else -1.0
        sides.add(side)
        assert np.abs(x - side * z).max() < 1e-8
        assert np.abs((curve.vertices**2).sum(1) - 1 - side * 2 * y).max() < 1e-8
        on_it = trace.seeds.points.numpy()[trace.seed_curve == k]
        assert len(on_it) > 0
        assert np.abs(on_it[:, 0] - side * on_it[:, 2]).max() < 1e-8
    assert sides == {1.0, -1.0}


@pytest.mark.parametrize("count", [1, 3, 30])
@pytest.mark.parametrize("step", [0.3, 0.05])
def test_an_eight_is_run_through_straight(count: int, step: float) -> None:
    trace = trace_curve(viviani, points(count), box=(-3, 3), step=step)
    assert len(trace) == 1
    assert trace[0].closed
    assert trace[0].crossings == 2  # both times it comes to (2, 0, 0)
    assert trace[0].length == pytest.approx(VIVIANI_LENGTH, rel=3e-3)
    assert np.abs(viviani(torch.from_numpy(trace[0].vertices)).numpy()).max() < 1e-7


def test_half_an_eight_ends_at_the_box() -> None:
    seed = torch.tensor([[0.0, 0.0, 2.0]], dtype=torch.float64)
    (curve,) = trace_curve(viviani, seed, box=((-3, -3, 0.2), (3, 3, 3)), step=0.05)
    assert not curve.closed
    assert curve.ends == (CurveEnd.BOX, CurveEnd.BOX)
    assert curve.crossings == 0
    assert (curve.vertices[[0, -1], 2] == 0.2).all()
    # (1 + cos t, sin t, 2 sin t/2) with speed sqrt(1 + cos^2 t/2), from z = 0.2 over 2 to 0.2
    t = np.linspace(2 * math.asin(0.1), 2 * math.pi - 2 * math.asin(0.1), 100_001)
    speed = np.sqrt(1 + np.cos(t / 2) ** 2)
    assert curve.length == pytest.approx(np.trapezoid(speed, t), rel=1e-3)


@pytest.mark.parametrize("gap", [0.1, 0.02, 0.005])
def test_no_jump_to_a_branch_beside(gap: float) -> None:
    """Concentric circles: a step of 0.05 is longer than the gap."""

    def fn(x: Tensor) -> Tensor:
        r = torch.linalg.vector_norm(x, dim=1)
        return (r - 1) * (r - 1 - gap)

    start = torch.tensor([[1.0, 0.0], [0.0, 1.0 + gap]], dtype=torch.float64)
    trace = trace_curve(fn, start, box=(-2, 2), step=0.05)
    assert len(trace) == 2
    for curve, radius in zip(trace, (1 + gap, 1), strict=True):
        assert curve.closed
        assert np.linalg.norm(curve.vertices, axis=1) == pytest.approx(radius, abs=1e-6)


def test_branches_that_pass_near_a_crossing_are_told_apart() -> None:
    """x y = eps turns by a right angle within sqrt eps = 0.03, a third of a step."""
    start = torch.tensor([[0.5, 0.002], [-0.5, -0.002]], dtype=torch.float64)
    trace = trace_curve(lambda x: x[:, 0] * x[:, 1] - 1e-3, start, box=(-1, 1), step=0.1)
    assert len(trace) == 2
    for curve in trace:
        assert curve.ends == (CurveEnd.BOX, CurveEnd.BOX)
        assert curve.crossings == 0
        assert abs(np.sign(curve.vertices).sum()) == curve.vertices.size
    # Nearer than min_step they count as crossing, which is what min_step is documented to mean.
    trace = trace_curve(
        lambda x: x[:, 0] * x[:, 1] - 1e-7, start, box=(-1, 1), step=0.1, min_step=0.02
    )
    assert sorted(curve.crossings for curve in trace)[-1] == 1


@pytest.mark.parametrize("width", [1.0, 0.8, 0.4])
@pytest.mark.parametrize("turned", [0.0, 0.3])
def test_corners_right_blunt_and_sharp(width: float, turned: float) -> None:
    """A diamond whose corners turn by 90 degrees, or by 2 atan w and 180 - 2 atan w."""
    c, s = math.cos(turned), math.sin(turned)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    size = torch.tensor([1.0, 1 / width], dtype=torch.float64)
    start = torch.tensor([[0.7, 0.1], [-0.2, 0.4]], dtype=torch.float64)
    fn = lambda x: ((x @ turn).abs() * size).sum(1) - 1  # noqa: E731
    (curve,) = trace_curve(fn, start, box=(-2, 2), step=0.1)
    assert curve.closed
    assert curve.length == pytest.approx(4 * math.hypot(1, width), rel=4e-3)
    assert curve.residual < 1e-8


def test_a_piecewise_linear_network() -> None:
    torch.manual_seed(3)
    net = ls.networks.ImplicitMLP(3, 2, 64, 3, activation="relu").double()
    with torch.no_grad():
        net.last.bias.copy_(-net(torch.tensor([[0.1, 0.2, -0.1]], dtype=torch.float64))[0])
    trace = trace_curve(net, 0.1 * points(5), box=(-1, 1), step=0.02)
    assert len(trace) >= 1
    for curve in trace:
        assert curve.closed or curve.ends == (CurveEnd.BOX, CurveEnd.BOX)


@pytest.mark.parametrize("seed", range(3))
def test_a_network_gives_the_same_curves_from_few_seeds_and_from_many(seed: int) -> None:
    net = mlp(2, seed=seed)
    with torch.no_grad():
        net[-1].bias.sub_(net(torch.zeros(1, 3, dtype=torch.float64))[0])
    many = trace_curve(net, 2 * points(80), box=(-3, 3), step=0.05)
    assert len(many) >= 1
    firsts = [int(np.flatnonzero(many.seed_curve == k)[0]) for k in range(len(many))]
    few = trace_curve(net, 2 * points(80)[firsts], box=(-3, 3), step=0.05)
    assert len(few) == len(many)
    for a, b in zip(many, few, strict=True):
        assert a.closed == b.closed
        assert a.length == pytest.approx(b.length, rel=1e-3)


# --- ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_a_line_ends_on_the_faces_of_the_box(count: int) -> None:
    start = torch.linspace(-0.3, 0.4, count, dtype=torch.float64)[:, None].expand(count, 3)
    (curve,) = trace_curve(line, start, box=((-1, -1.5, -1), (1, 1, 1)), step=0.11)
    assert not curve.closed
    assert curve.ends == (CurveEnd.BOX, CurveEnd.BOX)
    low, high = sorted(curve.vertices[[0, -1]].tolist())
    assert low == pytest.approx([-0.75, -1.5, 0.25], abs=1e-12)
    assert high == pytest.approx([0.5, 1, 0.25], abs=1e-12)
    assert low[1] == -1.5
    assert high[1] == 1
    assert curve.length == pytest.approx(1.25 * math.sqrt(5), abs=1e-12)


def test_a_seed_on_the_face_and_a_line_along_the_edge() -> None:
    start = torch.tensor([[0.5, 1.0, 0.25]], dtype=torch.float64)
    (curve,) = trace_curve(line, start, box=(-1, 1), step=0.1)
    assert curve.length == pytest.approx(math.sqrt(5), abs=1e-9)
    diagonal = trace_curve(
        lambda x: torch.stack([x[:, 0] - x[:, 1], x[:, 0] - x[:, 2]], 1),
        torch.zeros(1, 3, dtype=torch.float64),
        box=(-1, 1),
        step=0.1,
    )
    assert np.abs(diagonal[0].vertices[[0, -1]]) == pytest.approx(1.0, abs=1e-12)
    assert diagonal[0].ends == (CurveEnd.BOX, CurveEnd.BOX)


def test_every_component_of_a_cut_circle() -> None:
    """The box cuts the unit circle into four arcs of 2 (asin 0.9 - acos 0.9) each."""
    start = points(40, 2)
    trace = trace_curve(lambda x: (x * x).sum(1) - 1, start, box=(-0.9, 0.9), step=0.05)
    assert len(trace) == 4
    arc = math.asin(0.9) - math.acos(0.9)
    for curve in trace:
        assert curve.ends == (CurveEnd.BOX, CurveEnd.BOX)
        assert curve.length == pytest.approx(arc, rel=1e-3)
        assert np.abs(curve.vertices).max() == 0.9


def test_a_curve_that_just_ends_is_stuck_there() -> None:
    def half(x: Tensor) -> Tensor:  # NaN for x > 0.5: there is nothing to go on with
        return torch.where(x[:, 0] > 0.5, torch.nan, x[:, 1])

    start = torch.tensor([[0.0, 0.1]], dtype=torch.float64)
    (curve,) = trace_curve(half, start, box=(-1, 1), step=0.1)
    assert set(curve.ends) == {CurveEnd.BOX, CurveEnd.STUCK}
    assert curve.vertices[:, 0].max() == pytest.approx(0.5, abs=2e-3)


def test_the_budget_of_vertices() -> None:
    start = torch.ones(1, 3, dtype=torch.float64)
    (curve,) = trace_curve(sphere_and_plane, start, box=(-2, 2), step=0.01, max_points=50)
    assert len(curve) == 50
    assert curve.ends == (CurveEnd.MAX_POINTS, CurveEnd.MAX_POINTS)
    assert not curve.closed


def test_a_budget_below_the_number_of_seeds_goes_to_curves() -> None:
    trace = trace_curve(lambda x: x.norm(dim=1) - 0.5, points(200, 2), box=(-1, 1), max_points=50)
    assert 40 < sum(len(curve) for curve in trace) <= 50
    assert all(CurveEnd.MAX_POINTS in curve.ends for curve in trace)
    assert "cut short by max_points, from 200 seeds" in trace.message
    assert set(trace.seed_curve) == {-1, *range(len(trace))}


def test_a_level_that_is_not_there_says_so() -> None:
    trace = trace_curve(sphere_and_plane, points(20), [-2.0, 0.0], box=(-2, 2))
    assert len(trace) == 0
    assert list(trace) == []
    assert "no curve: of 20 seeds 20 did not reach the level set" in trace.message
    assert (trace.seed_curve == -1).all()
    trace = trace_curve(sphere_and_plane, points(20), box=((2, 2, 2), (3, 3, 3)))
    assert "20 reached it outside the box" in trace.message
    trace = trace_curve(viviani, torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64), box=(-3, 3))
    assert "1 where D_xF has no full rank" in trace.message
    assert trace_curve(viviani, points(0), box=(-3, 3)).message == "no curve: no seeds"


# --- resampling -------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [0.5, 0.03, 0.004])
def test_resampling_keeps_to_the_curve_and_to_the_bound(spacing: float) -> None:
    curve = trace_curve(sphere_and_plane, points(3), box=(-2, 2), step=0.1)[0].resample(spacing)
    assert curve.closed
    assert curve.spacings.max() <= spacing
    assert curve.spacings.max() <= 1.05 * curve.spacings.min()
    assert curve.residual < 1e-8
    assert len(curve) <= 1.1 * 2 * math.pi * 0.8 / spacing + 3
    (piece,) = trace_curve(viviani, points(1), box=((-3, -3, 0.2), (3, 3, 3)), step=0.1)
    again = piece.resample(spacing)
    assert again.spacings.max() <= spacing
    assert (again.vertices[[0, -1]] == piece.vertices[[0, -1]]).all()
    assert again.ends == piece.ends
    assert np.abs(viviani(torch.from_numpy(again.vertices)).numpy()).max() < 1e-7


def test_resampling_an_eight() -> None:
    curve = trace_curve(viviani, points(4), box=(-3, 3), step=0.1)[0].resample(0.01)
    assert curve.spacings.max() <= 0.01
    assert curve.length == pytest.approx(VIVIANI_LENGTH, rel=1e-4)
    assert np.abs(viviani(torch.from_numpy(curve.vertices)).numpy()).max() < 1e-7


@pytest.mark.parametrize("spacing", [0.0, -1.0, math.nan, 1e-9])
def test_no_such_spacing(spacing: float) -> None:
    curve = trace_curve(sphere_and_plane, points(1), box=(-2, 2))[0]
    with pytest.raises(ValueError, match="spacing: expected a length"):
        curve.resample(spacing)


# --- the caller's things ----------------------------------------------------------------------


def test_gradient_of_the_points_for_the_radius() -> None:
    net = Circle(radius=0.7, height=0.2)
    curve = trace_curve(net, points(3), box=(-2, 2))[0]
    assert curve.samples.points.numpy() == pytest.approx(curve.vertices)
    p = ls.sample_network(net, curve.samples)
    assert torch.equal(p, curve.samples.points)
    radius = torch.linalg.vector_norm(p[:, :2], dim=1).mean()
    slopes = torch.autograd.grad(radius, [net.radius, net.height], retain_graph=True)
    assert [float(slope) for slope in slopes] == pytest.approx([1.0, 0.0], abs=1e-9)
    slopes = torch.autograd.grad(p[:, 2].mean(), [net.radius, net.height])
    assert [float(slope) for slope in slopes] == pytest.approx([0.0, 1.0], abs=1e-9)


def test_the_module_is_left_as_it_is() -> None:
    net = batch_norm_net(2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    seeds = points(10)
    kept = seeds.clone()
    trace = trace_curve(net, seeds, box=(-3, 3))
    for curve in trace:
        curve.resample(0.05)
    assert torch.equal(seeds, kept)
    assert net.training
    assert all(module.training for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_function_that_ends_with_squeeze_and_a_curve_that_leaves_the_box() -> None:
    def plane(x: Tensor) -> Tensor:
        return (x[:, :1] - 0.2 * x[:, 1:2]).squeeze()

    (curve,) = trace_curve(plane, torch.zeros(1, 2), box=(-1, 1), step=0.1)
    assert np.allclose(np.abs(curve.vertices[[0, -1], 1]), 1.0)


def test_without_grad_in_inference_mode_and_in_float32() -> None:
    wanted = 2 * math.pi * 0.8
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            start = torch.ones(1, 3, dtype=torch.float64)
            curve = trace_curve(sphere_and_plane, start, box=(-2, 2))[0]
            assert curve.length == pytest.approx(wanted, rel=1e-3)
    curve = trace_curve(sphere_and_plane, torch.ones(1, 3), box=(-2, 2))[0]
    assert curve.closed
    assert curve.samples.points.dtype == torch.float32
    assert curve.vertices.dtype == np.float64
    assert curve.length == pytest.approx(wanted, rel=1e-3)


def test_a_steep_and_a_flat_scale_change_nothing() -> None:
    lengths = []
    for scale in (1e-6, 1.0, 1e6):
        curve = trace_curve(lambda x, s=scale: s * viviani(x), points(3), box=(-3, 3), step=0.1)[0]
        lengths.append(curve.length)
    assert lengths == pytest.approx([lengths[1]] * 3, rel=1e-9)


ONE = torch.ones(1, 3, dtype=torch.float64)
BAD: dict[str, tuple[Field, Tensor, dict[str, object], str]] = {
    "a surface": (lambda x: x[:, 0], ONE, {}, r"l = d - 1 = 2 .* got l = 1"),
    "points only": (lambda x: x, ONE, {}, r"l = d - 1 = 2 .* got l = 3"),
    "plane, two outputs": (lambda x: x, ONE[:, :2], {}, r"l = d - 1 = 1 .* got l = 2"),
    "one dimension": (lambda x: x, ONE[:, :1], {}, r"seeds: expected \(n, d\)"),
    "images": (lambda x: x, torch.ones(2, 3, 3), {}, r"seeds: expected \(n, d\)"),
    "box of two": (sphere_and_plane, ONE, {"box": ((0, 0), (1, 1))}, "box: expected lower"),
    "no pair": (sphere_and_plane, ONE, {"box": 3.0}, "box: expected a pair"),
    "endless box": (sphere_and_plane, ONE, {"box": (0, math.inf)}, "box: expected finite"),
    "box upside down": (sphere_and_plane, ONE, {"box": (1, -1)}, "box: expected finite lower"),
    "step 0": (sphere_and_plane, ONE, {"step": 0.0}, "step: expected"),
    "min_step": (sphere_and_plane, ONE, {"step": 0.1, "min_step": 0.2}, "min_step: expected"),
    "max_turn": (sphere_and_plane, ONE, {"max_turn": 4.0}, "max_turn: expected"),
    "tol": (sphere_and_plane, ONE, {"tol": -1.0}, "tol: expected"),
    "max_points": (sphere_and_plane, ONE, {"max_points": 1}, "max_points: expected"),
    "three levels": (sphere_and_plane, ONE, {"level": [0.0, 0.0, 0.0]}, "level: expected"),
    "level NaN": (sphere_and_plane, ONE, {"level": math.nan}, "level: expected finite"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_curve_is_a_clear_error(kind: str) -> None:
    fn, seeds, settings, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        trace_curve(fn, seeds, **{"box": (-1, 1), **settings})  # type: ignore[arg-type]
