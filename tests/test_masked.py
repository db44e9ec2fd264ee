"""The loops behind CUDA graphs, run on the CPU without a graph, against the ordinary samplers."""

import math

import problems
import pytest
import torch

import levelset_ext as ls
from levelset_ext.field import as_constant_field
from levelset_ext.samplers import CapturedFalsePosition, CapturedProjection
from levelset_ext.samplers.false_position import VARIANTS
from levelset_ext.samplers.masked import MaskedNewton, MaskedSearch, repeat

FIELDS = {
    "sphere": (problems.Sphere, 3, 1),
    "torus": (problems.Torus, 3, 1),
    "circle": (problems.Circle, 3, 2),
    "three": (problems.Three, 5, 3),
    "batch norm": (problems.batch_norm_net, 3, 1),
}


def newton(fn, x, level, max_iters, tol, **options):
    masked = MaskedNewton(as_constant_field(fn), x, level.shape[1], tol, **options)
    masked.begin(x, level)
    if repeat(masked.step, masked.state.status, max_iters) == max_iters:
        masked.evaluate()
    return masked.result(tol)


def same(found, expected):
    assert torch.equal(found.status, expected.status)
    assert torch.equal(found.iterations, expected.iterations)
    for name in ("points", "values", "jacobian", "level"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-10, equal_nan=True
        )


@pytest.mark.parametrize("max_iters", [0, 1, 12])
@pytest.mark.parametrize("name", FIELDS)
def test_newton_on_all_rows_is_newton(name, max_iters):
    make, d, l = FIELDS[name]  # noqa: E741
    fn, x = make(), problems.points(60, d)
    x[3], x[4] = math.nan, 0.0
    level = 0.05 * problems.points(60, l, seed=3)
    box = (torch.full((d,), -2.0).double(), torch.full((d,), 1.5).double())
    same(
        newton(fn, x, level, max_iters, 1e-8, max_step=0.7, bounds=box),
        ls.project(fn, x, level, max_iters, 1e-8, max_step=0.7, box=box),
    )


def test_newton_stops_when_no_row_runs_and_may_be_used_again():
    fn = problems.RowCounter(problems.Sphere())
    x, level = problems.points(20), torch.zeros(1, 1).double()
    masked = MaskedNewton(fn, x, 1, 1e-8)
    for start in (x, 2 * x):
        fn.batches.clear()
        masked.begin(start, level)
        steps = repeat(masked.step, masked.state.status, 50)
        result = masked.result(1e-8)
        same(result, ls.project(problems.Sphere(), start, 0.0, 50, 1e-8))
        assert len(fn.batches) == steps == int(result.iterations.max()) + 1


@pytest.mark.parametrize("max_iters", [0, 1, 3, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_search_on_all_rows_is_false_position(variant, max_iters):
    fn, n = problems.Sphere(), 40
    end = 2 * problems.points(n) + 0.5
    start = 0.1 * problems.points(n, seed=5)
    start[7], start[9] = end[7], math.nan
    level = 0.1 * problems.points(n, 1, seed=3)[:, 0]
    masked = MaskedSearch(as_constant_field(fn), start, 1e-9, variant)
    masked.begin(start, end, level, last=max_iters == 0)
    if repeat(masked.step, masked.state.status, max_iters - 1) == max_iters - 1:
        masked.step(last=True)
    masked.end()
    same(
        masked.result(1e-9),
        ls.false_position(fn, start, end, level, max_iters, 1e-9, variant),
    )


def test_without_cuda_the_ordinary_samplers_run_and_the_reason_is_said():
    fn, x = problems.Torus(), problems.points(9)
    captured = CapturedProjection(fn, x, max_iters=7, box=(-1.0, 1.0))
    assert captured.reason == "the points are on CPU, not on CUDA"
    same(captured(x, 0.1), ls.project(fn, x, 0.1, 7, box=(-1.0, 1.0)))
    search = CapturedFalsePosition(fn, x, variant="illinois")
    assert search.reason == captured.reason
    same(search(0 * x, x), ls.false_position(fn, 0 * x, x, variant="illinois"))


def test_arguments_are_checked():
    fn, x = problems.Torus(), problems.points(9)
    with pytest.raises(ValueError, match=r"x: expected \(9, 3\) of torch.float64"):
        CapturedProjection(fn, x)(x[:5])
    with pytest.raises(ValueError, match=r"end: expected \(9, 3\) of torch.float64"):
        CapturedFalsePosition(fn, x)(x, x.float())
    with pytest.raises(ValueError, match="tol"):
        CapturedProjection(fn, x, tol=-1)
    with pytest.raises(ValueError, match="variant"):
        CapturedFalsePosition(fn, x, variant="newton")
