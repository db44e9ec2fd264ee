"""Samplers replayed from CUDA graphs against the ordinary ones."""

import math

import problems
import pytest
import torch

import levelset_ext as ls
from levelset_ext.networks import ImplicitMLP
from levelset_ext.samplers import CapturedFalsePosition, CapturedProjection

pytestmark = pytest.mark.cuda


def same(found, expected):
    assert torch.equal(found.status, expected.status)
    assert torch.equal(found.iterations, expected.iterations)
    for name in ("points", "values", "jacobian", "level"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-10, equal_nan=True
        )


@pytest.mark.parametrize("max_iters", [0, 1, 2, 12])
@pytest.mark.parametrize(
    ("make", "d"),
    [(problems.Torus, 3), (problems.Circle, 3), (problems.Three, 5), (problems.batch_norm_net, 3)],
)
def test_projection(make, d, max_iters):
    fn = make().cuda()
    x = problems.points(60, d).cuda()
    captured = CapturedProjection(fn, x, max_iters=max_iters, tol=1e-8, max_step=0.7)
    assert captured.reason is None
    for start in (x, 2 * x):
        start[3] = math.nan
        expected = ls.project(fn, start, 0.02, max_iters, 1e-8, max_step=0.7)
        found = captured(start, 0.02)
        same(found, expected)
    captured(x, 0.5)
    same(found, expected)  # its memory is its own


@pytest.mark.parametrize("max_iters", [0, 1, 40])
def test_false_position(max_iters):
    fn = problems.Sphere().cuda()
    start, end = 0.1 * problems.points(40).cuda(), 2 * problems.points(40, seed=5).cuda()
    captured = CapturedFalsePosition(fn, start, max_iters=max_iters, tol=1e-9)
    assert captured.reason is None
    same(captured(start, end, 0.1), ls.false_position(fn, start, end, 0.1, max_iters, 1e-9))


def test_parameters_and_statistics_are_read_anew():
    fn = problems.batch_norm_net().cuda()
    x = problems.points(30).cuda()
    captured = CapturedProjection(fn, x, max_iters=5, tol=1e-8)
    with torch.no_grad():
        for p in fn.parameters():
            p.mul_(1.1)
        fn[1].running_mean.add_(0.1)
    same(captured(x), ls.project(fn, x, 0.0, 5, 1e-8))
    with torch.no_grad():
        fn[0].weight.data = fn[0].weight.data * 0.9  # other memory
    same(captured(x), ls.project(fn, x, 0.0, 5, 1e-8))


def test_a_network_that_waits_for_the_device_is_refused_with_a_reason():
    def waits(x):
        return x.square().sum(1) - (0.5 if bool((x > -9).all()) else 0.4)

    x = problems.points(20).cuda()
    captured = CapturedProjection(waits, x, tol=1e-8)
    assert "cannot be captured" in captured.reason
    same(captured(x), ls.project(waits, x, tol=1e-8))
    # Nothing is left behind: the stream, the modes, random numbers, the next capture.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.rand(3, device="cuda").isfinite().all()
    fn = problems.Sphere().cuda()
    assert CapturedProjection(fn, x, tol=1e-8).reason is None


def test_a_compiled_field_needs_no_graph():
    net = ImplicitMLP(3, 1, 32, 2).cuda()
    assert "compiled field" in CapturedProjection(net, torch.zeros(4, 3, device="cuda")).reason
