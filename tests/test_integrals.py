"""Area, volume and integrals over random lines, against exact values."""

import math

import problems
import pytest
import torch
from torch import nn

import levelset_ext as ls
from levelset_ext.geometry import level_set_integral, level_set_volume, surface_area

F64 = torch.float64
UNIT, TORUS = (-1.0, 1.0), ((-1.4, -1.4, -0.4), (1.4, 1.4, 0.4))
MEASURES = {
    "sphere": (surface_area, problems.Sphere, UNIT, 3, 4 * math.pi * 0.49),
    "cut sphere": (surface_area, problems.Sphere, ((-1, -1, 0), (1, 1, 1)), 3, 2 * math.pi * 0.49),
    "torus": (surface_area, problems.Torus, TORUS, 3, 4 * math.pi**2 * 0.3),
    "circle": (surface_area, lambda: problems.Sphere(d=2), UNIT, 2, 2 * math.pi * 0.7),
    "3-sphere": (surface_area, lambda: problems.Sphere(d=4), UNIT, 4, 2 * math.pi**2 * 0.343),
    "ball": (level_set_volume, problems.Quadric, UNIT, 3, 4 / 3 * math.pi * 0.343),
    "disc": (level_set_volume, lambda: problems.Sphere(d=2), UNIT, 2, math.pi * 0.49),
    "solid torus": (level_set_volume, problems.Torus, TORUS, 3, 2 * math.pi**2 * 0.09),
}


@pytest.mark.parametrize("name", MEASURES)
def test_measures_without_a_mesh(name):
    measure, make, bounds, dim, truth = MEASURES[name]
    g = torch.Generator().manual_seed(5)
    found = measure(make(), bounds, lines=6000, dim=dim, generator=g)
    assert found.lines == 6000
    assert 0 < found.standard_error < 0.08 * truth
    assert abs(found.value - truth) < 4 * found.standard_error


def test_integrals_of_functions():
    g = torch.Generator().manual_seed(5)
    found = level_set_integral(
        problems.Sphere(), lambda p: torch.cat([p, p**2], 1), UNIT, lines=6000, generator=g
    )
    truth = torch.tensor([0.0] * 3 + [4 * math.pi * 0.7**4 / 3] * 3, dtype=F64)
    assert ((found.value - truth).abs() < 4 * found.standard_error).all()
    with pytest.raises(ValueError, match=r"^integrand: expected \(m,\) or \(m, k\)"):
        level_set_integral(problems.Sphere(), lambda p: p.sum(), UNIT, lines=10)


def test_the_interval_holds_the_truth_as_often_as_promised():
    g = torch.Generator().manual_seed(1)
    fn, truth, held = problems.Sphere(0.7, 2), 2 * math.pi * 0.7, 0
    for _ in range(80):
        estimate = surface_area(fn, UNIT, lines=100, lipschitz=1.0, step=0.1, generator=g, dim=2)
        low, high = estimate.interval()
        held += bool(low < truth < high)
    assert 70 <= held <= 80  # of 100, 95 +- 2.2


def test_a_network_and_unusable_arguments():
    net = ls.networks.ImplicitMLP(2, 1, 8, 1).init_sphere_(0.5)
    assert isinstance(net, nn.Module)
    found = surface_area(net, ((-2.0, -2.0), (2.0, 2.0)), lines=200)
    assert found.crossings > 0
    empty = surface_area(net, UNIT, level=1e6, lines=50, dim=2)
    assert empty.value == empty.standard_error == empty.crossings == 0
    with pytest.raises(ValueError, match=r"^lines: expected an integer >= 2"):
        surface_area(net, UNIT, lines=1, dim=2)
    with pytest.raises(ValueError, match=r"^bounds: expected lower < upper"):
        surface_area(net, (1.0, 1.0), dim=2)
    with pytest.raises(ValueError, match=r"^bounds: expected finite corners"):
        surface_area(net, (None, 1.0), dim=2)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: torch.sqrt(1 - x.norm(dim=1)) - 0.5,
        lambda x: torch.where(x.norm(dim=1) > 1, torch.inf, x.norm(dim=1) - 0.7),
        lambda x: torch.where(x[:, 0] > 0, torch.nan, x.norm(dim=1) - 0.7),
    ],
)
def test_fields_that_are_not_finite_in_the_box_are_refused(fn):
    for measure in (surface_area, level_set_volume):
        with pytest.raises(ValueError, match=r"^fn: expected finite values, got"):
            measure(fn, (-1.5, 1.5), lines=200, dim=3)


def test_a_field_that_is_finite_but_for_its_level_set_is_refused():
    def fn(x):
        found = x.norm(dim=1) - 0.7
        return torch.where(found.abs() < 1e-5, torch.nan, found)

    g = torch.Generator().manual_seed(5)
    with pytest.raises(ValueError, match=r"^fn: expected finite values, got none at \d+ crossings"):
        surface_area(fn, UNIT, lines=20, generator=g)


def test_bounds_that_do_not_fit_the_network():
    with pytest.raises(RuntimeError, match=r"x2 and 3x"):
        surface_area(problems.mlp(), ((-1.0, -1.0), (1.0, 1.0)), lines=10)
    with pytest.raises(ValueError, match=r"^fn: expected one output"):
        surface_area(problems.Affine(2), UNIT, lines=10)
    with pytest.raises(ValueError, match=r"^bounds: expected lower as a scalar or \(2,\), got"):
        surface_area(problems.Sphere(), ((-1.0,) * 3, (1.0,) * 2), lines=10)
    with pytest.raises(ValueError, match=r"^dim: expected at least 2, got 1"):
        surface_area(problems.Sphere(), UNIT, lines=10, dim=1)
