"""Ops that write to memory they are given, and how a call finds its way to an op."""

import math

import problems
import pytest
import torch
from problems import same_bits
from torch.autograd import forward_ad

from levelset_ext import ops
from levelset_ext.ops import newton_update, newton_update_, pinv_adjoint, pinv_apply

raw = torch.ops.levelset_ext
SHAPES = [(1, 2), (2, 3), (1, 40), (2, 40), (3, 5)]


def arguments(n, l, d, dtype=torch.float64):  # noqa: E741
    jacobian = problems.well_conditioned(n, l, d).to(dtype)
    return problems.points(n, d, dtype), problems.points(n, l, dtype, seed=5), jacobian


@pytest.mark.parametrize(("l", "d"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_out_gets_what_the_op_returns(l, d, dtype):  # noqa: E741
    points, values, jacobian = arguments(37, l, d, dtype)
    jacobian[5] = 0.0
    out = torch.full_like(points, math.nan)
    y, status = pinv_apply(jacobian, values, return_status=True, out=out)
    expected, expected_status = pinv_apply(jacobian, values, return_status=True)
    assert y is out
    assert same_bits(y, expected)
    assert torch.equal(status, expected_status)
    assert pinv_apply(jacobian, values, out=out) is out
    lower = torch.full((d,), -0.5, dtype=dtype)
    options = {"lower": lower, "tol": 0.1, "max_step": 0.7}
    moved, status = newton_update(points, values, jacobian, 0.1, out=out, **options)
    expected, expected_status = newton_update(points, values, jacobian, 0.1, **options)
    assert moved is out
    assert same_bits(moved, expected)
    assert torch.equal(status, expected_status)


def test_out_of_an_empty_batch():
    points, values, jacobian = arguments(0, 1, 3)
    out = torch.empty_like(points)
    assert pinv_apply(jacobian, values, out=out).shape == (0, 3)
    assert newton_update(points, values, jacobian, out=out)[1].shape == (0,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p, v, j: p.new_empty(4, 3), r"out: expected \(n, d\) = \(6, 3\), got \(4, 3\)"),
        (lambda p, v, j: p.new_empty(6, 3).float(), "out: expected .*float64"),
        (lambda p, v, j: p.new_empty(6, 6)[:, ::2], "out: expected a contiguous tensor"),
        (lambda p, v, j: p, "out: expected memory of its own"),
        (lambda p, v, j: j.view(-1)[1:19].view(6, 3), "out: expected memory of its own"),
    ],
)
def test_out_that_cannot_be_written_to_is_refused(make, message):
    points, values, jacobian = arguments(6, 2, 3)
    before = points.clone(), jacobian.clone()
    with pytest.raises(RuntimeError, match=message):
        newton_update(points, values, jacobian, out=make(points, values, jacobian))
    assert torch.equal(points, before[0])
    assert torch.equal(jacobian, before[1])


def test_a_gradient_that_would_be_lost_is_refused():
    points, values, jacobian = arguments(4, 2, 3)
    out = torch.empty_like(points)
    for name, call in (
        ("residual", lambda: pinv_apply(jacobian, values, out=out)),
        ("values", lambda: newton_update(points, values, jacobian, out=out)),
    ):
        values.requires_grad_()
        with pytest.raises(RuntimeError, match=f"{name}: expected a tensor that needs no gradient"):
            call()
        with torch.no_grad():
            call()
        values.requires_grad_(False)


@pytest.mark.parametrize("l", [1, 2])
def test_opcheck_of_the_out_forms(l):  # noqa: E741
    points, values, jacobian = arguments(5, l, 3)
    out, level = torch.empty_like(points), torch.zeros(1, l, dtype=torch.float64)
    torch.library.opcheck(raw.pinv_apply_out.default, (jacobian, values, out))
    torch.library.opcheck(
        raw.newton_update_out.default,
        (points, values, jacobian, level, None, None, None, 0.0, math.inf, out),
    )


def test_vmap_of_an_op_that_writes_is_refused():
    points, values, jacobian = (torch.stack([t, t]) for t in arguments(5, 1, 3))
    status = torch.ones(2, 5, dtype=torch.int8)
    for call in (
        lambda p, s, v, j: pinv_apply(j, v, out=p),
        lambda p, s, v, j: newton_update(p + 1, v, j, out=p)[0],
        lambda p, s, v, j: newton_update_(p, s, v, j),
    ):
        with pytest.raises(RuntimeError, match="join the mapped dimension with the rows"):
            torch.vmap(call)(points, status, values, jacobian)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compile_of_the_out_forms(fresh_compiler):
    """Functionalised: the memory that was given is written, and read again afterwards."""

    def two_steps(points, values, jacobian, room):
        moved, status = newton_update(points, values, jacobian, 0.1, out=room)
        step = pinv_apply(jacobian, values, out=torch.empty_like(points))
        return moved + step, status, room.sum()

    points, values, jacobian = arguments(6, 2, 3)
    rooms = [torch.zeros_like(points) for _ in range(2)]
    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        compiled(points, values, jacobian, rooms[0]),
        two_steps(points, values, jacobian, rooms[1]),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    assert same_bits(rooms[0], rooms[1])


# --- the way to an op -----------------------------------------------------------------------------


def test_the_ways_of_a_call_give_the_same_bits():
    _, values, jacobian = arguments(9, 2, 3)
    expected = raw.pinv_apply(jacobian, values)[0]
    function = ops.PinvApply.apply(jacobian, values)[0]
    plain = pinv_apply(jacobian, values)
    with torch.no_grad():
        quiet = pinv_apply(jacobian.requires_grad_(), values)
    with torch.inference_mode():
        inference = pinv_apply(jacobian, values)
    differentiable = pinv_apply(jacobian, values)
    assert differentiable.requires_grad
    assert not any(t.requires_grad for t in (plain, quiet, inference))
    for got in (function, plain, quiet, inference, differentiable.detach()):
        assert same_bits(got.clone(), expected)


def test_a_tensor_that_has_left_its_transform_is_a_plain_one():
    _, values, jacobian = arguments(4, 1, 3)
    left = []

    def loss(r):
        left.append(r)
        return pinv_apply(jacobian, r).sum()

    torch.func.grad(loss)(values)
    assert torch.equal(pinv_apply(jacobian, left[0]), pinv_apply(jacobian, values))


def test_a_dual_number_that_needs_no_gradient_is_refused_too():
    points, values, jacobian = arguments(4, 2, 3)
    for op, argument in ((pinv_apply, values), (pinv_adjoint, points)):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(argument, torch.ones_like(argument))
            with pytest.raises((RuntimeError, NotImplementedError)):
                op(jacobian, dual)


def test_a_way_without_autograd_is_not_taken_by_a_tensor_that_needs_it():
    points, values, jacobian = arguments(4, 2, 3)
    for name, tensor in (("points", points), ("values", values), ("jacobian", jacobian)):
        tensor.requires_grad_()
        moved, status = newton_update(points, values, jacobian, tol=0.0)
        assert moved.requires_grad, name
        assert not status.requires_grad
        assert torch.autograd.grad(moved.sum(), tensor)[0].abs().sum() > 0, name
        tensor.requires_grad_(False)
