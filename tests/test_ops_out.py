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


def test_a_tangent_that_would_be_lost_is_refused():
    points, values, jacobian = arguments(4, 2, 3)
    status, out = torch.ones(4, dtype=torch.int8), torch.empty_like(points)

    def calls(dual):
        yield lambda: pinv_apply(jacobian, dual, out=out)
        yield lambda: newton_update(points, dual, jacobian, out=out)
        yield lambda: newton_update_(points, status, dual, jacobian)

    with forward_ad.dual_level():
        for call in calls(forward_ad.make_dual(values, torch.ones_like(values))):
            for mode in (torch.enable_grad, torch.no_grad):
                with mode(), pytest.raises(RuntimeError, match="expected a tensor that needs no"):
                    call()
        for call in calls(values):
            call()
    for k in range(3):
        with pytest.raises(RuntimeError):
            torch.func.jvp(
                lambda v, k=k: list(calls(v))[k]()[0], (values,), (torch.ones_like(values),)
            )


@pytest.mark.parametrize("how", ["meta lower", "meta values", "meta level"])
def test_a_tensor_without_numbers_among_others_is_refused(how):
    points, values, jacobian = arguments(4, 2, 3)
    given = {"lower": torch.zeros(3, dtype=points.dtype, device="meta")} if "lower" in how else {}
    if how == "meta values":
        values = values.to("meta")
    level = values.to("meta") if how == "meta level" else values
    given = (level, None, given.get("lower"), None, 0.0, math.inf)
    with pytest.raises(RuntimeError, match=r"expected tensors on|device"):
        torch.ops.levelset_ext.newton_update(points, values, jacobian, *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("slope", "value"), [(1.0, 1e-23), (1.0, 1e-30), (1e-15, 1e6), (2.0, 3.0)])
def test_the_derivative_of_a_capped_step_at_any_scale(dtype, slope, value):
    points = torch.zeros(1, 2, dtype=dtype)
    values = torch.tensor([[value]], dtype=dtype, requires_grad=True)
    jacobian = torch.tensor([[[slope, 0.0]]], dtype=dtype, requires_grad=True)
    moved, _ = newton_update(points, values, jacobian, max_step=0.1)
    by_value, by_slope = torch.autograd.grad(moved[0, 0], (values, jacobian), retain_graph=True)
    (across,) = torch.autograd.grad(moved[0, 1], jacobian)
    capped = value / slope > 0.1
    assert by_value.item() == pytest.approx(0.0 if capped else -1 / slope)
    assert by_slope[0, 0, 0].item() == pytest.approx(0.0 if capped else value / slope**2)
    # Turning J turns the step: d/dJ_2 of -s J / |J|^2, with s short of the cap.
    expected = -0.1 / slope if capped else -value / slope**2
    assert across[0, 0, 1].item() == pytest.approx(expected, rel=1e-5)


def test_a_way_without_autograd_is_not_taken_by_a_tensor_that_needs_it():
    points, values, jacobian = arguments(4, 2, 3)
    for name, tensor in (("points", points), ("values", values), ("jacobian", jacobian)):
        tensor.requires_grad_()
        moved, status = newton_update(points, values, jacobian, tol=0.0)
        assert moved.requires_grad, name
        assert not status.requires_grad
        assert torch.autograd.grad(moved.sum(), tensor)[0].abs().sum() > 0, name
        tensor.requires_grad_(False)
