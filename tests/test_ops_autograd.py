"""Derivatives of the ops, and the ops inside torch's machinery: library, compile, vmap."""

import copy
import functools
import math

import problems
import pytest
import reference
import torch
from problems import same_bits
from torch.autograd import gradcheck, gradgradcheck

import levelset_ext as ls
from levelset_ext import ops
from levelset_ext.ops import nearest_distance, newton_update, pinv_adjoint, pinv_apply

raw = torch.ops.levelset_ext
INF = math.inf


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def pinv_inputs(l, d, n=2):  # noqa: E741
    jacobian = problems.well_conditioned(n, l, d)
    return leaves(jacobian, problems.points(n, l), problems.points(n, d, seed=4))


def newton_inputs(n, l, d):  # noqa: E741
    return leaves(
        problems.points(n, d),
        problems.points(n, l, seed=5),
        problems.well_conditioned(n, l, d),
        problems.points(n, l, seed=6),
    )


# --- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("l", "d"), [(1, 2), (1, 5), (2, 2), (2, 4), (3, 4), (4, 4)])
def test_pinv_derivatives(l, d):  # noqa: E741
    jacobian, r, g = pinv_inputs(l, d)
    for op, argument in ((pinv_apply, r), (pinv_adjoint, g)):
        assert gradcheck(op, (jacobian, argument))
        assert gradgradcheck(op, (jacobian, argument))


@pytest.mark.parametrize("l", [1, 2, 3])
def test_pinv_derivatives_are_those_of_the_reference(l):  # noqa: E741
    jacobian, r, g = pinv_inputs(l, 7, n=5)
    for op, formula, argument in (
        (pinv_apply, reference.pinv_apply, r),
        (pinv_adjoint, reference.pinv_adjoint, g),
    ):
        got = torch.autograd.grad(op(jacobian, argument).sin().sum(), (jacobian, argument))
        expected = torch.autograd.grad(
            formula(jacobian, argument).sin().sum(), (jacobian, argument)
        )
        torch.testing.assert_close(got, expected)


NEWTON_CASES = {
    "plain": {},
    "capped": {"max_step": 0.3},
    "some capped": {"max_step": 1.0},
    "box": {"lower": (-0.4, -0.3, -0.9), "upper": (0.5, 0.2, 0.3)},
    "capped in a box": {"max_step": 0.7, "upper": (0.5, 0.2, 0.3)},
}


@pytest.mark.parametrize("l", [1, 2, 3])
@pytest.mark.parametrize("case", NEWTON_CASES)
def test_newton_derivatives(l, case):  # noqa: E741
    inputs = newton_inputs(5, l, 3)
    options = dict(NEWTON_CASES[case])
    corners = [k for k in ("lower", "upper") if k in options]
    inputs += leaves(*(torch.tensor(options.pop(k), dtype=torch.float64) for k in corners))

    def update(*args):
        return newton_update(*args[:4], **dict(zip(corners, args[4:], strict=True)), **options)[0]

    def formula(*args):
        return reference.newton_update(
            *args[:4], **dict(zip(corners, args[4:], strict=True)), **options
        )

    assert gradcheck(update, inputs)
    assert gradgradcheck(update, inputs)
    got = torch.autograd.grad(update(*inputs).sin().sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(formula(*inputs).sin().sum(), inputs))


@pytest.mark.parametrize("shape", [(), (2,), (1, 2), (4, 2)])
def test_gradient_of_a_shared_level_is_the_sum_over_rows(shape):
    p, values, jacobian, _ = newton_inputs(4 if shape != (1, 2) else 1, 2, 3)
    level = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda c: newton_update(p, values, jacobian, c)[0], (level,))


def test_rows_that_stay_pass_their_point_through_and_nothing_else():
    p, values, jacobian, level = newton_inputs(6, 1, 3)
    with torch.no_grad():
        values[0] = level[0]
        values[1] = math.nan
        jacobian[2] = 0
        jacobian[3, 0, 0] = math.nan
    status = torch.ones(6, dtype=torch.int8)
    status[4] = ls.Status.STALLED
    moved, after = newton_update(p, values, jacobian, level, status=status, tol=1e-12)
    assert not after.requires_grad
    assert after[5] == ls.Status.RUNNING
    weight = problems.points(6, 3, seed=11)
    grads = torch.autograd.grad((moved * weight).sum(), (p, values, jacobian, level))
    assert same_bits(grads[0][:5], weight[:5])
    for gradient in grads[1:]:
        assert not gradient[:5].any()
        assert gradient[5].abs().sum() > 0


@pytest.mark.parametrize("l", [1, 2, 3])
def test_bad_rows_do_not_spread_into_the_gradients_of_others(l):  # noqa: E741
    jacobian, r, g = pinv_inputs(l, 5, n=4)
    bad = jacobian.detach().clone()
    bad[1], bad[2, 0, 0] = 0, math.nan
    bad.requires_grad_()
    for op, argument in ((pinv_apply, r), (pinv_adjoint, g)):
        expected = torch.autograd.grad(op(jacobian, argument).sin().sum(), (jacobian, argument))
        (spoiled,) = leaves(argument)
        with torch.no_grad():
            spoiled[1], spoiled[2, 0] = math.nan, INF
        got = torch.autograd.grad(op(bad, spoiled).sin().sum(), (bad, spoiled))
        for a, b in zip(got, expected, strict=True):
            assert same_bits(a[[0, 3]], b[[0, 3]])
            assert not a[[1, 2]].any()


def test_a_constant_box_and_status_need_no_gradient_and_a_differentiable_corner_gets_one():
    p, values, jacobian, _ = newton_inputs(4, 1, 3)
    lower = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    newton_update(p, values, jacobian, lower=lower)[0].sum().backward()
    assert lower.grad is not None
    held = newton_update(p, values, jacobian)[0] < 0
    assert torch.equal(lower.grad, held.sum(0).double())


def test_nearest_derivatives():
    x, cloud = leaves(problems.points(6, 3), problems.points(9, 3, seed=3))
    assert gradcheck(lambda a, b: nearest_distance(a, b)[0], (x, cloud))
    assert gradgradcheck(lambda a, b: nearest_distance(a, b)[0], (x, cloud))
    distance, index = nearest_distance(x, cloud)
    assert not index.requires_grad
    (gradient,) = torch.autograd.grad(distance.sum(), x)
    torch.testing.assert_close(gradient.norm(dim=1), torch.ones(6, dtype=torch.float64))


def test_nearest_gradient_at_distance_zero_is_zero():
    cloud = problems.points(5, 3)
    x, cloud = leaves(torch.cat([cloud[:2], cloud[2:3] + 1]), cloud)
    distance, _ = nearest_distance(x, cloud)
    grads = torch.autograd.grad(distance.sum(), (x, cloud), create_graph=True)
    assert not grads[0][:2].any()
    torch.testing.assert_close(grads[0][2].norm(), torch.ones((), dtype=torch.float64))
    # The cloud point nearest to the third query moves against it, no other moves.
    assert grads[1].abs().amax(1).count_nonzero() == 1
    (second,) = torch.autograd.grad(grads[0].square().sum(), x)
    assert second.isfinite().all()


def test_nearest_gradient_of_a_query_that_is_not_finite_is_zero_and_stays_in_its_row():
    cloud = problems.points(5, 3)
    x = cloud + 0.01
    x[0, 0], x[1, 0] = math.nan, INF
    x, cloud = leaves(x, cloud)
    distance, _ = nearest_distance(x, cloud)
    grads = torch.autograd.grad(distance, (x, cloud), torch.ones_like(distance))
    assert not grads[0][:2].any()
    assert grads[1].isfinite().all()
    assert (grads[1][2:].norm(dim=1) > 0.99).all()


def test_autocast_around_backward_changes_nothing():
    jacobian, r, g = (t.detach().float().requires_grad_() for t in pinv_inputs(2, 6, n=8))
    p, values, big, level = (t.detach().float().requires_grad_() for t in newton_inputs(8, 2, 6))

    def run():
        loss = pinv_apply(jacobian, r).sin().sum() + pinv_adjoint(jacobian, g).sin().sum()
        loss = loss + newton_update(p, values, big, level, max_step=0.9)[0].sin().sum()
        loss = loss + nearest_distance(p, g)[0].sum()
        inputs = (jacobian, r, g, p, values, big, level)
        return torch.autograd.grad(loss, inputs)

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    assert all(same_bits(a, b) for a, b in zip(plain, cast, strict=True))


# --- the two routes -------------------------------------------------------------------------------


def newton_function(*args, tol=0.0, max_step=INF):
    return ops.NewtonUpdate.apply(*args, None, None, None, tol, max_step)[0]


def newton_registered(*args, tol=0.0, max_step=INF):
    return raw.newton_update(*args, None, None, None, tol, max_step)[0]


def _first(op):
    return lambda *args: op(*args)[0]


ROUTES = {
    "apply": (_first(ops.PinvApply.apply), _first(raw.pinv_apply), pinv_apply),
    "adjoint": (_first(ops.PinvAdjoint.apply), _first(raw.pinv_adjoint), pinv_adjoint),
    "newton": (newton_function, newton_registered, _first(newton_update)),
    "nearest": (_first(ops.NearestDistance.apply), _first(raw.nearest), _first(nearest_distance)),
}


def route_inputs(name, l, d):  # noqa: E741
    if name == "newton":
        return newton_inputs(4, l, d)
    if name == "nearest":
        return leaves(problems.points(4, d), problems.points(9, d, seed=3))
    jacobian, r, g = pinv_inputs(l, d, n=4)
    return [jacobian, r if name == "apply" else g]


@pytest.mark.parametrize("l", [1, 2, 3])
@pytest.mark.parametrize("name", ROUTES)
def test_autograd_functions_registered_ops_and_public_functions_agree(name, l):  # noqa: E741
    inputs = route_inputs(name, l, 4)
    results = []
    for op in ROUTES[name]:
        value = op(*inputs)
        grads = torch.autograd.grad(value.sin().sum(), inputs, create_graph=True)
        twice = torch.autograd.grad(sum(g.cos().sum() for g in grads), inputs)
        results.append([value, *grads, *twice])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("l", [1, 2, 3])
def test_opcheck(l):  # noqa: E741
    p, values, jacobian, level = newton_inputs(4, l, 4)
    _, r, g = pinv_inputs(l, 4, n=4)
    # Everything for l = 2; the other row codes differ in the kernel only.
    every = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    check = functools.partial(torch.library.opcheck, test_utils=every if l == 2 else every[::2])
    check(raw.pinv_apply, (jacobian, r))
    check(raw.pinv_adjoint, (jacobian, g))
    check(raw.nearest, (p, g))
    status = torch.tensor([1, 0, 1, 1], dtype=torch.int8)
    lower, upper = torch.full((4,), -0.5).double(), torch.full((4,), 0.5).double()
    check(raw.newton_update, (p, values, jacobian, level, None, None, None, 0.0, INF))
    check(raw.newton_update, (p, values, jacobian, level[:1], status, lower, upper, 0.1, 0.5))
    plain = [t.detach() for t in (p, values, jacobian, level)]
    arguments = (*plain[1:4], None, lower, upper, 0.0, 0.5)
    check(raw.newton_update_, (plain[0].clone(), status, *arguments))
    index = torch.tensor([3, 1])
    check(
        raw.newton_update_,
        (
            plain[0].clone(),
            status,
            plain[1][:2],
            plain[2][:2],
            plain[3],
            index,
            None,
            None,
            0.0,
            INF,
        ),
    )


def test_opcheck_of_empty_batches():
    p, values, jacobian, level = (t.detach()[:0] for t in newton_inputs(4, 2, 3))
    torch.library.opcheck(raw.pinv_apply, (jacobian, values))
    torch.library.opcheck(raw.pinv_adjoint, (jacobian, p))
    torch.library.opcheck(raw.nearest, (p, torch.randn(4, 3).double()))
    torch.library.opcheck(
        raw.newton_update, (p, values, jacobian, level, None, None, None, 0.0, INF)
    )


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones():
    inputs = [t.detach().float() for t in newton_inputs(4, 2, 5)]
    p, values, jacobian, level = (t.to("meta") for t in inputs)
    for op, arguments in (
        (raw.pinv_apply, (jacobian, values)),
        (raw.pinv_adjoint, (jacobian, p)),
        (raw.newton_update, (p, values, jacobian, level, None, None, None, 0.0, INF)),
        (raw.nearest, (p, p)),
    ):
        real = op(*(torch.ones(a.shape) if isinstance(a, torch.Tensor) else a for a in arguments))
        for a, b in zip(op(*arguments), real, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype


# --- compile --------------------------------------------------------------------------------------


@pytest.mark.parametrize("l", [1, 2, 3])
@pytest.mark.parametrize("name", ROUTES)
def test_compile_forward_and_backward_in_one_graph(name, l, fresh_compiler):  # noqa: E741
    inputs = route_inputs(name, l, 4)
    op = ROUTES[name][2]

    def loss(*args):
        return op(*args).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    got = torch.autograd.grad(compiled(*inputs), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*inputs), inputs))


def test_compile_the_autograd_functions(fresh_compiler):
    jacobian, r, _ = pinv_inputs(2, 4)
    compiled = torch.compile(
        lambda a, b: ops.PinvApply.apply(a, b)[0].sin().sum(), fullgraph=True, backend="aot_eager"
    )
    got = torch.autograd.grad(compiled(jacobian, r), (jacobian, r))
    expected = torch.autograd.grad(pinv_apply(jacobian, r).sin().sum(), (jacobian, r))
    torch.testing.assert_close(got, expected)


def test_compile_with_dynamic_batch(fresh_compiler):
    compiled = torch.compile(pinv_apply, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 5, 11):
        jacobian, r, _ = pinv_inputs(2, 4, n)
        assert same_bits(compiled(jacobian, r), pinv_apply(jacobian, r))


def test_compile_in_place(fresh_compiler):
    p, values, jacobian, level = (t.detach() for t in newton_inputs(6, 2, 3))
    expected, after = newton_update(p, values, jacobian, level, tol=0.1)

    def step(points, status, v, j, c):
        ops.newton_update_(points, status, v, j, c, tol=0.1)
        return points * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    points, status = p.clone(), torch.ones(6, dtype=torch.int8)
    doubled = compiled(points, status, values, jacobian, level)
    assert same_bits(points, expected)
    assert torch.equal(status, after)
    assert same_bits(doubled, 2 * expected)


def test_export():
    class Step(torch.nn.Module):
        def forward(self, p, values, jacobian):
            return newton_update(p, values, jacobian)[0]

    inputs = tuple(t.detach() for t in newton_inputs(4, 2, 3)[:3])
    program = torch.export.export(Step(), inputs)
    assert same_bits(program.module()(*inputs), Step()(*inputs))


# --- torch.func -----------------------------------------------------------------------------------


def stacked(*tensors):
    """Three versions of each tensor, along a new first dimension."""
    return [torch.stack([t, 1.5 * t + 0.1, -t]).detach() for t in tensors]


@pytest.mark.parametrize("route", [0, 1, 2])
@pytest.mark.parametrize("l", [1, 2, 3])
@pytest.mark.parametrize("name", ["apply", "adjoint", "newton"])
def test_vmap_is_the_loop(name, l, route):  # noqa: E741
    op = ROUTES[name][route]
    inputs = route_inputs(name, l, 4)
    many = stacked(*inputs)
    loop = torch.stack([op(*(t[k] for t in many)) for k in range(3)])
    assert same_bits(torch.vmap(op)(*many), loop)
    # mapped over the last dimension, and over one argument only
    last = [t.movedim(0, -1) for t in many]
    assert same_bits(torch.vmap(op, in_dims=-1, out_dims=1)(*last), loop.movedim(0, 1))
    for k in range(len(inputs)):
        arguments = [t.detach() for t in inputs]
        in_dims = [None] * len(inputs)
        arguments[k], in_dims[k] = many[k], 0
        got = torch.vmap(op, in_dims=tuple(in_dims))(*arguments)
        one_by_one = [
            op(*(a[i] if dim == 0 else a for a, dim in zip(arguments, in_dims, strict=True)))
            for i in range(3)
        ]
        assert same_bits(got, torch.stack(one_by_one))


def test_vmap_of_vmap_and_of_empty():
    jacobian, r, _ = (t.detach() for t in pinv_inputs(2, 3, n=4))
    many = [torch.stack([t, 2 * t]) for t in stacked(jacobian, r)]
    got = torch.vmap(torch.vmap(pinv_apply))(*many)
    assert same_bits(got[1, 2], pinv_apply(many[0][1, 2], many[1][1, 2]))
    assert torch.vmap(pinv_apply)(torch.zeros(3, 0, 1, 2), torch.zeros(3, 0, 1)).shape == (3, 0, 2)
    assert torch.vmap(pinv_apply)(torch.zeros(0, 4, 1, 2), torch.zeros(0, 4, 1)).shape == (0, 4, 2)


@pytest.mark.parametrize("level", [0.5, "shared", "rows", "mapped", "mapped shared"])
def test_vmap_with_levels_status_and_box(level):
    p, values, jacobian, full = (t.detach() for t in newton_inputs(4, 2, 3))
    many = stacked(p, values, jacobian)
    status = torch.tensor([1, 0, 1, 4], dtype=torch.int8)
    levels = {
        "shared": torch.tensor([0.1, 0.2], dtype=torch.float64),
        "rows": full,
        "mapped": torch.stack([full, -full, 2 * full]),
        "mapped shared": torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], dtype=torch.float64),
    }
    c = levels.get(level, level)
    mapped = isinstance(level, str) and "mapped" in level
    lower = torch.full((3,), -0.5, dtype=torch.float64)

    def step(a, b, j, c):
        return newton_update(a, b, j, c, status=status, lower=lower, max_step=0.8)

    got = torch.vmap(step, in_dims=(0, 0, 0, 0 if mapped else None))(*many, c)
    for k in range(3):
        expected = step(*(t[k] for t in many), c[k] if mapped else c)
        assert same_bits(got[0][k], expected[0])
        assert torch.equal(got[1][k], expected[1])


def test_vmap_over_what_all_rows_share_is_refused():
    p, values, jacobian, level = (t.detach() for t in newton_inputs(4, 2, 3))
    corners = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"^lower: expected one for all of vmap"):
        torch.vmap(lambda c: newton_update(p, values, jacobian, level, lower=c)[0])(corners)
    clouds = torch.stack([problems.points(5, 3), problems.points(5, 3, seed=3)])
    with pytest.raises(RuntimeError, match=r"^cloud: expected one for all of vmap"):
        torch.vmap(lambda c: nearest_distance(p, c)[0])(clouds)
    with pytest.raises(RuntimeError, match="newton_update_"):
        torch.vmap(
            lambda a: ops.newton_update_(a, torch.ones(4, dtype=torch.int8), values, jacobian)
        )(torch.stack([p, p]))


def test_vmap_of_nearest_over_the_queries():
    x, cloud = problems.points(12, 3).view(3, 4, 3), problems.points(9, 3, seed=3)
    distance, index = torch.vmap(nearest_distance, in_dims=(0, None))(x, cloud)
    expected = nearest_distance(x.view(12, 3), cloud)
    assert same_bits(distance.view(12), expected[0])
    assert torch.equal(index.view(12), expected[1])


@pytest.mark.parametrize("l", [1, 2, 3])
@pytest.mark.parametrize("name", ROUTES)
def test_func_grad_and_jacrev(name, l):  # noqa: E741
    inputs = [t.detach() for t in route_inputs(name, l, 4)]
    op = ROUTES[name][2]
    every = tuple(range(len(inputs)))
    got = torch.func.grad(lambda *a: op(*a).sin().sum(), argnums=every)(*inputs)
    wanted = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(op(*wanted).sin().sum(), wanted)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
    full = torch.func.jacrev(op, argnums=every)(*inputs)
    slow = torch.autograd.functional.jacobian(op, tuple(inputs))
    torch.testing.assert_close(full, slow)


def test_vmap_of_grad():
    jacobian, r, _ = (t.detach() for t in pinv_inputs(2, 4, n=3))
    many = stacked(jacobian, r)
    gradient = torch.func.grad(lambda a, b: pinv_apply(a, b).sin().sum(), argnums=(0, 1))
    got = torch.vmap(gradient)(*many)
    for k in range(3):
        torch.testing.assert_close(tuple(g[k] for g in got), gradient(many[0][k], many[1][k]))


@pytest.mark.parametrize("name", ROUTES)
def test_forward_mode_is_refused_and_never_zero(name):
    inputs = tuple(t.detach() for t in route_inputs(name, 1, 3))
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(ROUTES[name][2], inputs, tuple(torch.ones_like(t) for t in inputs))


def test_deepcopy_and_checkpoint_of_an_op():
    jacobian, r, _ = pinv_inputs(2, 4)
    copied = copy.deepcopy((jacobian.detach(), r.detach()))
    assert same_bits(pinv_apply(*copied), pinv_apply(jacobian, r))
    plain = torch.autograd.grad(pinv_apply(jacobian, r).sin().sum(), (jacobian, r))
    for reentrant in (True, False):
        y = torch.utils.checkpoint.checkpoint(pinv_apply, jacobian, r, use_reentrant=reentrant)
        jacobian.grad = r.grad = None
        y.sin().sum().backward()
        assert same_bits(jacobian.grad, plain[0])
        assert same_bits(r.grad, plain[1])
