"""The compiled ops: values, statuses, refusals. Derivatives are in test_ops_autograd.py."""

import math
import threading

import problems
import pytest
import reference
import torch
from problems import same_bits

import levelset_ext as ls
from levelset_ext import ops
from levelset_ext.ops import (
    level_rows,
    nearest_distance,
    newton_update,
    newton_update_,
    pinv_adjoint,
    pinv_apply,
    rank_tolerance,
)

FLOATS = (torch.float32, torch.float64)
SIZES = [
    (1, 2), (1, 3), (1, 17), (1, 2000), (2, 2), (2, 3), (2, 64), (2, 2000),
    (3, 3), (3, 50), (8, 8), (8, 300),
]  # fmt: skip
S = ls.Status
NAN, INF = math.nan, math.inf


def newton_inputs(n=6, l=1, d=3, dtype=torch.float64):  # noqa: E741
    p = problems.points(n, d, dtype)
    return p, problems.points(n, l, dtype, seed=5), problems.well_conditioned(n, l, d, dtype)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("l", "d"), SIZES)
def test_apply_and_adjoint_are_the_pseudo_inverse(l, d, dtype):  # noqa: E741
    n = 7
    jacobian = problems.well_conditioned(n, l, d, dtype)
    r, g = problems.points(n, l, dtype), problems.points(n, d, dtype, seed=3)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    y, status = pinv_apply(jacobian, r, return_status=True)
    s, adjoint_status = pinv_adjoint(jacobian, g, return_status=True)
    assert y.shape == (n, d)
    assert s.shape == (n, l)
    assert y.dtype == s.dtype == dtype
    assert status.tolist() == adjoint_status.tolist() == [S.CONVERGED] * n
    torch.testing.assert_close(
        y.double(), reference.pinv_apply(jacobian, r), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(
        s.double(), reference.pinv_adjoint(jacobian, g), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_hand_tables(dtype):
    def t(*numbers):
        return torch.tensor(numbers, dtype=dtype)

    equal = torch.testing.assert_close
    # l = 1: J = (3, 4), |J|^2 = 25.
    equal(pinv_apply(t([[3.0, 4.0]]), t([50.0])), t([6.0, 8.0]))
    equal(pinv_adjoint(t([[3.0, 4.0]]), t([25.0, 0.0])), t([3.0]))
    # l = 2: rows along the axes, of different lengths.
    axes = t([[2.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
    equal(pinv_apply(axes, t([1.0, 1.0])), t([0.5, 0.0, 0.25]))
    equal(pinv_adjoint(axes, t([1.0, 7.0, 1.0])), t([0.5, 0.25]))
    # l = 2, oblique: J = (1 0; 1 1), J^-1 = (1 0; -1 1).
    oblique = t([[1.0, 0.0], [1.0, 1.0]])
    equal(pinv_apply(oblique, t([2.0, 5.0])), t([2.0, 3.0]))
    equal(pinv_adjoint(oblique, t([2.0, 5.0])), t([-3.0, 5.0]))
    # l = 3: a permutation with signs.
    turn = t([[0.0, 1.0, 0.0], [0.0, 0.0, -2.0], [4.0, 0.0, 0.0]])
    equal(pinv_apply(turn, t([1.0, 2.0, 4.0])), t([1.0, 1.0, -1.0]))
    # Newton on F = 3 x + 4 y - 5 at (3, 4): F = 20, step 20 / 25 (3, 4).
    p, status = newton_update(t([3.0, 4.0]), t([20.0]), t([[3.0, 4.0]]))
    assert p.shape == (1, 2)
    torch.testing.assert_close(p, t([0.6, 0.8]), atol=1e-6, rtol=1e-5)
    assert status.tolist() == [S.RUNNING]
    # and to the level 10: F - c = 10.
    torch.testing.assert_close(
        newton_update(t([3.0, 4.0]), t([20.0]), t([[3.0, 4.0]]), 10.0)[0], t([1.8, 2.4])
    )


def test_apply_gives_the_shortest_solution_and_adjoint_is_its_transpose():
    jacobian = problems.well_conditioned(5, 3, 9)
    r, g = problems.points(5, 3), problems.points(5, 9, seed=8)
    y = pinv_apply(jacobian, r)
    torch.testing.assert_close((jacobian @ y[:, :, None])[:, :, 0], r)
    # In the row space: applying the projector J+ J changes nothing.
    torch.testing.assert_close(pinv_apply(jacobian, (jacobian @ y[:, :, None])[:, :, 0]), y)
    torch.testing.assert_close((y * g).sum(1), (r * pinv_adjoint(jacobian, g)).sum(1))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("l", "d"), [(1, 3), (2, 3), (3, 20)])
def test_newton_update_is_equation_4(l, d, dtype):  # noqa: E741
    p, values, jacobian = newton_inputs(9, l, d, dtype)
    level = problems.points(9, l, dtype, seed=6)
    lower, upper = torch.full((d,), -0.9, dtype=dtype), torch.full((d,), 0.8, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for kwargs in ({}, {"max_step": 0.4}, {"lower": lower, "upper": upper}):
        got, status = newton_update(p, values, jacobian, level, **kwargs)
        doubles = {k: v.double() if torch.is_tensor(v) else v for k, v in kwargs.items()}
        expected = reference.newton_update(
            p.double(), values.double(), jacobian.double(), level.double(), **doubles
        )
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
        assert status.tolist() == [S.RUNNING] * 9


# --- the rank rule --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("l", [2, 3])
def test_rank_rule_is_the_documented_fraction(dtype, l):  # noqa: E741
    tolerance = rank_tolerance(dtype)
    assert tolerance == (2.0**-20 if dtype == torch.float64 else 2.0**-17)
    for factor, expected in ((2.0, S.CONVERGED), (0.5, S.RANK_DEFICIENT)):
        rows = torch.eye(l, 4, dtype=dtype)
        rows[-1] = rows[0]
        rows[-1, -1] = factor * tolerance
        _, status = pinv_apply(rows[None], torch.ones(1, l, dtype=dtype), return_status=True)
        assert status.item() == expected


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("l", [1, 2, 3])
def test_rank_rule_and_accuracy_do_not_depend_on_the_scale_of_an_output(dtype, l):  # noqa: E741
    jacobian = problems.well_conditioned(4, l, 6, dtype)
    r = problems.points(4, l, dtype)
    plain = pinv_apply(jacobian, r)
    # A tall scale and a tiny one, whose squares leave the range of float32.
    for scale in (2.0**80, 2.0**-80):
        scales = torch.ones(l, dtype=dtype)
        scales[-1] = scale
        y, status = pinv_apply(jacobian * scales[:, None], r * scales, return_status=True)
        assert status.tolist() == [S.CONVERGED] * 4
        torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-6)


def test_no_clamp_shortens_steps_of_flat_networks():
    # |grad F|^2 = 1e-12, far below the 1e-6 that a clamp would put there.
    jacobian = torch.tensor([[[1e-6, 0.0]]])
    assert pinv_apply(jacobian, torch.tensor([[1e-6]])).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-4])
def test_two_nearly_parallel_rows_keep_their_digits_in_float32(angle):
    generator = torch.Generator().manual_seed(4)
    q, _ = torch.linalg.qr(torch.randn(200, 40, 2, generator=generator, dtype=torch.float64))
    first, across = q[:, :, 0], q[:, :, 1]
    jacobian = torch.stack([first, first * math.cos(angle) + across * math.sin(angle)], 1).float()
    r, g = problems.points(200, 2, torch.float32), problems.points(200, 40, torch.float32, seed=3)
    # What a backward stable solve loses: the condition number 2 / angle once, and twice where the
    # right-hand side has a part outside the row space. The Gram determinant would cost a factor
    # 1 / angle more.
    y, exact = pinv_apply(jacobian, r), reference.pinv_apply(jacobian, r)
    assert ((y - exact).norm(dim=1) / exact.norm(dim=1)).max() < 8 * 6e-8 / angle
    s, exact = pinv_adjoint(jacobian, g), reference.pinv_adjoint(jacobian, g)
    assert ((s - exact).norm(dim=1) / g.norm(dim=1)).max() < 4 * 6e-8 / angle**2


def test_more_outputs_than_dimensions_are_rank_deficient():
    y, status = pinv_apply(torch.randn(3, 3, 2), torch.randn(3, 3), return_status=True)
    assert status.tolist() == [S.RANK_DEFICIENT] * 3
    assert not y.any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("l", [1, 2, 3])
@pytest.mark.parametrize("d", [3, 40])
def test_bad_rows_get_their_status_and_zeros(dtype, l, d):  # noqa: E741
    jacobian = problems.well_conditioned(6, l, d, dtype)
    r, g = problems.points(6, l, dtype), problems.points(6, d, dtype)
    good_y, good_s = pinv_apply(jacobian, r), pinv_adjoint(jacobian, g)
    jacobian[1] = 0
    jacobian[2, -1, d - 1] = NAN
    jacobian[3, 0, d - 1] = -INF
    jacobian[4, -1] = 0
    expected = [S.CONVERGED, S.RANK_DEFICIENT, S.NON_FINITE, S.NON_FINITE, S.RANK_DEFICIENT, 0]
    for op, argument, good in ((pinv_apply, r, good_y), (pinv_adjoint, g, good_s)):
        result, status = op(jacobian, argument, return_status=True)
        assert status.tolist() == expected
        assert not result[1:5].any()
        assert same_bits(result[[0, 5]], good[[0, 5]])


def test_a_subnormal_gradient_counts_as_zero():
    _, status = pinv_apply(torch.full((1, 1, 3), 1e-39), torch.ones(1, 1), return_status=True)
    assert status.item() == S.RANK_DEFICIENT


def test_newton_statuses():
    n = 10
    p, values, jacobian = newton_inputs(n)
    level = torch.zeros(n, 1, dtype=torch.float64)
    plain, _ = newton_update(p, values, jacobian, level, tol=1e-9)
    running = torch.ones(n, dtype=torch.int8)
    values[0] = 1e-10
    values[1] = NAN
    values[2] = INF
    jacobian[3] = 0
    jacobian[4, 0, 1] = NAN
    level[5] = NAN
    p = p.clone()
    p[6, 0] = INF
    values[7], p[7] = 1e-7, 1e12  # no float64 lies between p and p - step
    running[8] = S.STALLED
    values[8] = NAN
    got, status = newton_update(p, values, jacobian, level, status=running, tol=1e-9)
    assert status.tolist() == [
        S.CONVERGED, S.NON_FINITE, S.NON_FINITE, S.RANK_DEFICIENT, S.NON_FINITE, S.NON_FINITE,
        S.NON_FINITE, S.STALLED, S.STALLED, S.RUNNING,
    ]  # fmt: skip
    assert same_bits(got[[0, 1, 2, 3, 4, 5, 7, 8]], p[[0, 1, 2, 3, 4, 5, 7, 8]])
    assert same_bits(got[9], plain[9])


def test_newton_tolerance_is_on_the_largest_output_and_inclusive():
    p = torch.zeros(3, 2, dtype=torch.float64)
    values = torch.tensor([[0.5, -0.25], [0.25, -0.5], [0.5, -0.5000001]], dtype=torch.float64)
    jacobian = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    _, status = newton_update(p, values, jacobian, tol=0.5)
    assert status.tolist() == [S.CONVERGED, S.CONVERGED, S.RUNNING]
    _, status = newton_update(p, torch.zeros(3, 2, dtype=torch.float64), jacobian, tol=0.0)
    assert status.tolist() == [S.CONVERGED] * 3


def test_newton_step_that_overflows_is_refused():
    p, jacobian = torch.zeros(1, 2), torch.full((1, 1, 2), 1e-30)
    got, status = newton_update(p, torch.full((1, 1), 1e30), jacobian)
    assert status.item() == S.RANK_DEFICIENT
    assert not got.any()


def test_newton_step_cap_is_a_length():
    p, values, jacobian = newton_inputs(50, 2, 5)
    free, _ = newton_update(p, values, jacobian)
    capped, _ = newton_update(p, values, jacobian, max_step=0.5)
    step, shorter = free - p, capped - p
    length = step.norm(dim=1)
    assert (length > 0.5).any()
    assert (length < 0.5).any()
    torch.testing.assert_close(shorter.norm(dim=1), length.clamp(max=0.5))
    torch.testing.assert_close(shorter / shorter.norm(dim=1, keepdim=True), step / length[:, None])
    assert same_bits(capped[length < 0.5], free[length < 0.5])


def test_newton_box_is_exact_and_a_row_it_holds_is_stalled():
    p, values, jacobian = newton_inputs(50, 1, 3)
    lower, upper = torch.tensor([-0.1, -INF, 0.0]).double(), torch.tensor([0.1, 0.3, INF]).double()
    free, _ = newton_update(p, values, jacobian)
    got, _ = newton_update(p, values, jacobian, lower=lower, upper=upper)
    assert same_bits(got, torch.minimum(torch.maximum(free, lower), upper))
    corner = torch.zeros(1, 2, dtype=torch.float64)
    _, status = newton_update(
        corner, torch.ones(1, 1).double(), torch.ones(1, 1, 2).double(), lower=corner[0]
    )
    assert status.item() == S.STALLED


@pytest.mark.parametrize("l", [1, 2, 3])
@pytest.mark.parametrize("d", [2, 3, 5, 7, 16, 784])
@pytest.mark.parametrize("beside", [1.0, 1e-20])
def test_a_point_that_is_not_finite_is_no_less_so_in_a_box(l, d, beside):  # noqa: E741
    if d < l:
        l = d  # noqa: E741  # as many as have full rank
    p, values, jacobian = newton_inputs(9, l, d)
    p[4, 0], p[7, d - 1] = INF, -INF
    jacobian[1] *= beside  # a row that the vector loops leave to the row math
    one = torch.ones(d, dtype=torch.float64)
    _, status = newton_update(p, values, jacobian, lower=-one, upper=one)
    assert (status == S.NON_FINITE).nonzero()[:, 0].tolist() == [4, 7]


@pytest.mark.parametrize("d", [2, 3, 5, 16])
@pytest.mark.parametrize("beside", [1.0, 1e-20])
def test_codes_that_are_no_status_do_not_run(d, beside):
    p, values, jacobian = newton_inputs(9, 1, d)
    jacobian[4] *= beside
    before = torch.tensor([-1, -2, 1, 7, 1, 127, -127, 1, 0], dtype=torch.int8)
    got, status = newton_update(p, values, jacobian, status=before)
    runs = before == S.RUNNING
    assert torch.equal(status[~runs], before[~runs])
    assert same_bits(got[~runs], p[~runs])
    assert not (got[runs][[0, 2]] == p[runs][[0, 2]]).all()


@pytest.mark.parametrize("l", [1, 2, 3, 8])
def test_a_long_step_whose_square_overflows_is_a_step(l):  # noqa: E741
    jacobian = 1e-80 * torch.eye(l, 9, dtype=torch.float64)[None]
    values = torch.full((1, l), 1e80, dtype=torch.float64)
    got, status = newton_update(torch.zeros(1, 9).double(), values, jacobian, max_step=0.5)
    assert status.item() == S.RUNNING
    assert got.norm().item() == pytest.approx(0.5)


@pytest.mark.parametrize("way", ["newton", "bracket", "apply out", "newton out"])
def test_what_is_written_in_place_is_known_to_autograd(way):
    p, values, jacobian = newton_inputs(4, 1, 3)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss = (weight * p).sum()  # keeps p for its backward
    status = torch.ones(4, dtype=torch.int8)
    if way == "newton":
        ops.newton_update_(p, status, values, jacobian)
    elif way == "bracket":
        ends = torch.cat([values, -values], 1)
        ops.bracket_update_(p, status, ops.bracket_state(4), p - 1, p + 1, ends)
    elif way == "apply out":
        ops.pinv_apply(jacobian, values, out=p)
    else:
        newton_update(p.clone(), values, jacobian, out=p)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- rows are independent -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("l", "d"), [(1, 3), (1, 2), (1, 50), (2, 3), (2, 50), (3, 50)])
def test_a_row_does_not_depend_on_its_batch_or_on_threads(l, d, dtype):  # noqa: E741
    n = 2000
    p, values, jacobian = newton_inputs(n, l, d, dtype)
    g = problems.points(n, d, dtype, seed=9)

    def everything(rows):
        return (
            pinv_apply(jacobian[rows], values[rows]),
            pinv_adjoint(jacobian[rows], g[rows]),
            *newton_update(p[rows], values[rows], jacobian[rows], max_step=0.7),
        )

    whole = everything(slice(None))
    parts = [everything(slice(0, 1)), everything(slice(1, 1001)), everything(slice(1001, n))]
    for k, tensor in enumerate(whole):
        assert same_bits(torch.cat([part[k] for part in parts]), tensor)
    torch.set_num_threads(2)
    for k, tensor in enumerate(everything(slice(None))):
        assert same_bits(tensor, whole[k])
    backwards = everything(torch.arange(n - 1, -1, -1))
    assert all(same_bits(a.flip(0), b) for a, b in zip(backwards, whole, strict=True))


def test_concurrent_calls():
    jacobian, r = problems.well_conditioned(3000, 2, 30), problems.points(3000, 2)
    expected = pinv_apply(jacobian, r)
    clouds = [problems.points(500, 3, seed=k) for k in range(6)]
    queries = problems.points(300, 3, seed=99)
    nearest = [reference.nearest_distance(queries, c) for c in clouds]
    failures = []

    def work(k):
        try:
            for _ in range(15):
                assert same_bits(pinv_apply(jacobian, r), expected)
                distance, index = nearest_distance(queries, clouds[k])
                assert torch.equal(index, nearest[k][1])
                torch.testing.assert_close(distance, nearest[k][0])
        except BaseException as error:  # a thread's exception would be lost
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- kinds of input -------------------------------------------------------------------------------


@pytest.mark.parametrize("l", [1, 2, 3])
def test_strided_expanded_and_transposed_inputs(l):  # noqa: E741
    n, d = 6, 5
    p, values, jacobian = newton_inputs(n, l, d)

    def views(t):
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
        wide[..., ::2] = t
        turned = t.movedim(0, -1).contiguous().movedim(-1, 0)
        return wide[..., ::2], turned

    for k in range(2):
        P, V, J = views(p)[k], views(values)[k], views(jacobian)[k]
        assert not J.is_contiguous()
        assert same_bits(pinv_apply(J, V), pinv_apply(jacobian, values))
        assert same_bits(pinv_adjoint(J, P), pinv_adjoint(jacobian, p))
        assert same_bits(newton_update(P, V, J)[0], newton_update(p, values, jacobian)[0])
        assert same_bits(nearest_distance(P, P.flip(0))[0], nearest_distance(p, p.flip(0))[0])
    one = jacobian[:1].expand(n, l, d)
    assert same_bits(pinv_apply(one, values), pinv_apply(one.contiguous(), values))


def test_inputs_are_left_alone():
    p, values, jacobian = newton_inputs(5, 2, 4)
    status = torch.ones(5, dtype=torch.int8)
    kept = [t.clone() for t in (p, values, jacobian, status)]
    result, after = newton_update(p, values, jacobian, status=status, tol=1.0)
    pinv_apply(jacobian, values)
    pinv_adjoint(jacobian, p)
    nearest_distance(p, p)
    assert all(same_bits(a, b) for a, b in zip((p, values, jacobian, status), kept, strict=True))
    assert result.data_ptr() != p.data_ptr()
    assert after.data_ptr() != status.data_ptr()


@pytest.mark.parametrize("l", [1, 2, 3])
def test_empty_batches(l):  # noqa: E741
    p, values, jacobian = newton_inputs(4, l, 3)
    assert pinv_apply(jacobian[:0], values[:0]).shape == (0, 3)
    assert pinv_adjoint(jacobian[:0], p[:0]).shape == (0, l)
    moved, status = newton_update(p[:0], values[:0], jacobian[:0])
    assert moved.shape == (0, 3)
    assert status.shape == (0,)
    distance, index = nearest_distance(p[:0], p)
    assert distance.shape == index.shape == (0,)
    newton_update_(p, torch.ones(4, dtype=torch.int8), values[:0], jacobian[:0],
                   index=torch.zeros(0, dtype=torch.int64))  # fmt: skip


def test_mixed_dtypes_promote_as_arithmetic_does():
    p, values, jacobian = newton_inputs(4, 2, 3)
    assert pinv_apply(jacobian.float(), values).dtype == torch.float64
    assert pinv_adjoint(jacobian, p.float()).dtype == torch.float64
    assert newton_update(p.float(), values.float(), jacobian.float(), 0.5)[0].dtype == torch.float32
    moved, _ = newton_update(p.float(), values, jacobian)
    assert same_bits(moved, newton_update(p.float().double(), values, jacobian)[0])
    assert nearest_distance(p.float(), p)[0].dtype == torch.float64
    half = jacobian.float().bfloat16()
    assert same_bits(pinv_apply(half, values.float()), pinv_apply(half.float(), values.float()))


def test_autocast_changes_nothing():
    p, values, jacobian = (t.float() for t in newton_inputs(8, 2, 5))

    def run():
        return (
            pinv_apply(jacobian, values),
            pinv_adjoint(jacobian, p),
            newton_update(p, values, jacobian)[0],
            nearest_distance(p, p.flip(0) + 0.1)[0],
        )

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    assert all(same_bits(a, b) for a, b in zip(plain, cast, strict=True))


# --- levels ---------------------------------------------------------------------------------------


def test_level_shapes():
    like = torch.zeros(4, 3, dtype=torch.float64)
    assert level_rows(2, 4, 2, like).tolist() == [[2.0, 2.0]]
    assert level_rows(torch.tensor([1.0, 2.0]), 4, 2, like).tolist() == [[1.0, 2.0]]
    column = torch.arange(4.0)
    assert level_rows(column, 4, 1, like).tolist() == [[0.0], [1.0], [2.0], [3.0]]
    full = torch.arange(8.0).view(4, 2)
    assert level_rows(full, 4, 2, like).tolist() == full.tolist()
    assert level_rows([0.5, 1.5], 2, 1, like).tolist() == [[0.5], [1.5]]
    assert level_rows(full, 4, 2, like).dtype == torch.float64
    for bad, l in ((torch.zeros(4), 2), (torch.zeros(3), 1), (torch.zeros(2, 4), 2), (full, 1)):  # noqa: E741
        with pytest.raises(ValueError, match=r"^level: expected a scalar, \(l,\)"):
            level_rows(bad, 4, l, like)


def test_levels_in_the_update():
    p, values, jacobian = newton_inputs(4, 2, 3)
    full = problems.points(4, 2, seed=8)
    assert same_bits(
        newton_update(p, values, jacobian, full)[0], newton_update(p, values - full, jacobian)[0]
    )
    two = torch.tensor([0.25, -1.0], dtype=torch.float64)
    assert same_bits(
        newton_update(p, values, jacobian, two)[0], newton_update(p, values - two, jacobian)[0]
    )


# ruff: noqa: E501 (the tables of refusals)

# --- refusals -------------------------------------------------------------------------------------

F32, F64, I8 = torch.float32, torch.float64, torch.int8


def z(*shape, dtype=F32):
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (pinv_apply, (z(4, 3), z(4, 1)), r"^jacobian: expected a tensor \(n, l, d\), got shape \(4, 3\)"),
        (pinv_apply, (z(4, 2, 3), z(4, 3)), r"^residual: expected \(n, l\) = \(4, 2\), got \(4, 3\)"),
        (pinv_apply, (z(4, 2, 3), z(5, 2)), r"^residual: expected \(n, l\) = \(4, 2\), got \(5, 2\)"),
        (pinv_apply, (z(4, 2, 3), z(4)), r"^residual: "),
        (pinv_apply, (z(4, 0, 3), z(4, 0)), r"^jacobian: expected 1 to 8 outputs l .*, got 0"),
        (pinv_apply, (z(4, 9, 30), z(4, 9)), r"^jacobian: expected 1 to 8 outputs l .*, got 9"),
        (pinv_apply, (z(4, 1, 3, dtype=torch.bfloat16), z(4, 1, dtype=torch.bfloat16)),
         r"^jacobian: expected float32 or float64 on the CPU, got bfloat16"),
        (pinv_apply, (z(4, 1, 3, dtype=torch.int32), z(4, 1, dtype=torch.int32)),
         r"^jacobian: expected float32 or float64 on the CPU, got int32"),
        (pinv_adjoint, (z(4, 2, 3), z(4, 2)), r"^gradient: expected \(n, d\) = \(4, 3\), got \(4, 2\)"),
        (pinv_adjoint, (z(2, 3), z(2, 3)), r"^jacobian: expected a tensor \(n, l, d\)"),
        (newton_update, (z(4), z(4, 1), z(4, 1, 1)), r"^points: expected a tensor \(n, d\)"),
        (newton_update, (z(4, 3), z(4), z(4, 1, 3)), r"^values: "),
        (newton_update, (z(4, 3), z(5, 1), z(4, 1, 3), z(4, 1)), r"^values: expected \(n, l\) = \(4, 1\)"),
        (newton_update, (z(4, 3), z(4, 1), z(4, 3)), r"^jacobian: expected a tensor \(n, l, d\)"),
        (newton_update, (z(4, 3), z(4, 1), z(4, 1, 2)), r"^jacobian: expected .* = \(4, 1, 3\), got \(4, 1, 2\)"),
        (newton_update, (z(4, 3), z(4, 1), z(5, 1, 3)), r"^jacobian: expected .* = \(4, 1, 3\)"),
        (newton_update, (z(4, 3), z(4, 1), z(4, 1, 3), z(3)), r"^level: expected a scalar"),
    ],
)  # fmt: skip
def test_wrong_shapes_and_dtypes_are_named(op, arguments, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        op(*arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"status": z(5, dtype=I8)}, r"^status: expected \(n,\) = \(4,\), got \(5,\)"),
        ({"status": z(4)}, r"^status: expected dtype int8, got float32"),
        ({"lower": z(2)}, r"^lower: expected \(d,\) = \(3,\), got \(2,\)"),
        ({"upper": z(1, 3)}, r"^upper: expected \(d,\) = \(3,\), got \(1, 3\)"),
        ({"tol": -1.0}, r"^tol: expected a number >= 0, got -1"),
        ({"tol": NAN}, r"^tol: expected a number >= 0"),
        ({"max_step": 0.0}, r"^max_step: expected a length > 0, got 0"),
        ({"max_step": NAN}, r"^max_step: expected a length > 0"),
    ],
)
def test_wrong_options_are_named(kwargs, message):
    with pytest.raises(RuntimeError, match=message):
        newton_update(z(4, 3), z(4, 1), z(4, 1, 3), **kwargs)
    status = kwargs.get("status", torch.ones(4, dtype=I8))
    rest = {k: v for k, v in kwargs.items() if k != "status"}
    with pytest.raises(RuntimeError, match=message):
        newton_update_(z(4, 3), status, z(4, 1), z(4, 1, 3), **rest)


def test_raw_ops_refuse_mixed_dtypes_by_name():
    raw = torch.ops.levelset_ext
    with pytest.raises(
        RuntimeError, match=r"^residual: expected the dtype of jacobian \(float32\)"
    ):
        raw.pinv_apply(z(4, 1, 3), z(4, 1, dtype=F64))
    for name, position in (("values", 1), ("jacobian", 2), ("level", 3), ("lower", 5)):
        arguments = [z(4, 3), z(4, 1), z(4, 1, 3), z(4, 1), None, z(3), None, 0.0, INF]
        arguments[position] = arguments[position].double()
        with pytest.raises(RuntimeError, match=rf"^{name}: expected the dtype of points"):
            raw.newton_update(*arguments)


@pytest.mark.cuda
def test_raw_ops_refuse_mixed_devices_by_name():
    with pytest.raises(RuntimeError, match=r"^residual: expected the device of jacobian"):
        pinv_apply(z(4, 1, 3).cuda(), z(4, 1))


@pytest.mark.parametrize(
    ("x", "cloud", "message"),
    [
        (z(4, 3), z(5, 2), r"^cloud: expected \(m, d\) with the d of query"),
        (z(4), z(5, 3), r"^cloud: "),
        (z(4, 3), z(0, 3), r"^cloud: expected at least one point"),
        (z(4, 3, dtype=torch.int64), z(5, 3, dtype=torch.int64), r"^query: expected float32 or float64"),
    ],
)  # fmt: skip
def test_nearest_refusals(x, cloud, message):
    with pytest.raises(RuntimeError, match=message):
        nearest_distance(x, cloud)


# --- in place -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("l", [1, 2, 3])
def test_in_place_agrees_with_functional(l, dtype):  # noqa: E741
    n, d = 30, 6
    p, values, jacobian = newton_inputs(n, l, d, dtype)
    jacobian[3], values[4] = 0, NAN
    level = problems.points(n, l, dtype, seed=7)
    status = torch.ones(n, dtype=I8)
    status[::3] = S.CONVERGED
    box = {
        "lower": torch.full((d,), -0.8, dtype=dtype),
        "upper": torch.full((d,), 0.9, dtype=dtype),
    }
    expected, after = newton_update(
        p, values, jacobian, level, status=status, tol=0.01, max_step=0.6, **box
    )
    here, there = p.clone(), status.clone()
    assert (
        newton_update_(here, there, values, jacobian, level, tol=0.01, max_step=0.6, **box) is None
    )
    assert same_bits(here, expected)
    assert torch.equal(there, after)
    assert same_bits(here[::3], p[::3])


def test_in_place_on_an_index_list():
    n = 20
    p, values, jacobian = newton_inputs(n, 2, 4)
    level = problems.points(n, 2, seed=7)
    status = torch.ones(n, dtype=I8)
    status[7] = S.MAX_ITERATIONS
    expected, _ = newton_update(p, values, jacobian, level, status=status)
    index = torch.randperm(n)[:12]
    if not (index == 7).any():
        index[0] = 7
    here, there = p.clone(), status.clone()
    newton_update_(here, there, values[index], jacobian[index], level, index=index)
    assert same_bits(here[index], expected[index])
    others = torch.ones(n, dtype=torch.bool)
    others[index] = False
    assert same_bits(here[others], p[others])
    assert (there[others] == S.RUNNING).all()
    assert there[7] == S.MAX_ITERATIONS
    assert same_bits(here[7], p[7])


@pytest.mark.parametrize("wrong", [-1, 5])
def test_index_outside_the_points_is_refused_before_anything_is_written(wrong):
    p, values, jacobian = newton_inputs(5)
    here, status = p.clone(), torch.ones(5, dtype=I8)
    with pytest.raises(
        RuntimeError, match=rf"^index: expected rows of points, 0 to 4, got {wrong}"
    ):
        newton_update_(here, status, values[:2], jacobian[:2], index=torch.tensor([0, wrong]))
    assert same_bits(here, p)


def test_in_place_refusals():
    p, values, jacobian = newton_inputs(5)
    status = torch.ones(5, dtype=I8)
    for name, tensors in (
        ("points", (p.clone().requires_grad_(), values, jacobian, 0.0)),
        ("values", (p, values.clone().requires_grad_(), jacobian, 0.0)),
        ("jacobian", (p, values, jacobian.clone().requires_grad_(), 0.0)),
        ("level", (p, values, jacobian, torch.zeros(1, dtype=F64, requires_grad=True))),
    ):
        points, v, j, c = tensors
        with pytest.raises(
            RuntimeError, match=rf"^{name}: expected a tensor that needs no gradient"
        ):
            newton_update_(points, status, v, j, c)
    corner = torch.zeros(3, dtype=F64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^lower: expected a tensor that needs no gradient"):
        newton_update_(p, status, values, jacobian, lower=corner)
    with pytest.raises(RuntimeError, match=r"^points: expected a contiguous tensor"):
        newton_update_(p.T.contiguous().T, status, values, jacobian)
    with pytest.raises(RuntimeError, match=r"^status: expected a contiguous tensor"):
        newton_update_(p, torch.ones(10, dtype=I8)[::2], values, jacobian)
    with pytest.raises(RuntimeError, match=r"^index: expected dtype int64, got int32"):
        newton_update_(p, status, values, jacobian, index=torch.arange(5, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"^index: expected a tensor \(m,\)"):
        newton_update_(p, status, values, jacobian, index=torch.arange(5)[None])


# --- nearest distance -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("d", [1, 2, 3, 7])
def test_nearest_against_all_pairs(d, dtype):
    x, cloud = problems.points(200, d, dtype), problems.points(300, d, dtype, seed=3)
    distance, index = nearest_distance(x, cloud)
    expected, where = reference.nearest_distance(x, cloud)
    assert torch.equal(index, where)
    torch.testing.assert_close(distance, expected.to(dtype))
    assert distance.dtype == dtype
    assert index.dtype == torch.int64


def test_nearest_at_ties_duplicates_and_distance_zero():
    cloud = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 5.0], [1.0, 0.0]])
    distance, index = nearest_distance(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0]]), cloud)
    assert distance.tolist() == [1.0, 0.0, 0.0]
    assert index[0] in (0, 1, 3)
    assert index[1] in (0, 3)
    assert index[2] == 2


def test_nearest_sees_a_cloud_changed_in_place():
    cloud = problems.points(50, 3)
    x = problems.points(20, 3, seed=3)
    nearest_distance(x, cloud)
    for change in (
        lambda: cloud.mul_(-2.0),
        lambda: cloud[7].copy_(x[0]),
        lambda: cloud.numpy().__setitem__((3, 0), 100.0),  # behind torch's back
    ):
        change()
        distance, index = nearest_distance(x, cloud)
        expected, where = reference.nearest_distance(x, cloud)
        assert torch.equal(index, where)
        torch.testing.assert_close(distance, expected)


def test_nearest_of_numbers_that_another_cloud_had_before_it_changed():
    cloud, x = torch.rand(200, 3, dtype=torch.float64), torch.rand(50, 3, dtype=torch.float64)
    same = cloud.clone()
    expected = nearest_distance(x, cloud)
    cloud.copy_(1 - cloud.flip(0))
    for a, b in zip(nearest_distance(x, same), expected, strict=True):
        assert torch.equal(a, b)


def test_nearest_with_many_clouds_in_turn():
    clouds = [problems.points(40, 3, seed=k) for k in range(7)] + [problems.points(40, 3).float()]
    x = problems.points(20, 3, seed=30)
    for _ in range(3):
        for cloud in clouds:
            distance, _ = nearest_distance(x, cloud)
            torch.testing.assert_close(distance, reference.nearest_distance(x, cloud)[0])


def test_points_that_are_not_finite_are_never_nearest():
    cloud, x = problems.points(20, 3), problems.points(10, 3, seed=3)
    distance, index = nearest_distance(x, cloud)
    spoiled = torch.cat([torch.full((1, 3), NAN).double(), cloud, cloud[:2] * INF])
    got, where = nearest_distance(x, spoiled)
    assert same_bits(got, distance)
    assert torch.equal(where, index + 1)


def test_queries_that_are_not_finite_leave_the_others_alone():
    cloud, x = problems.points(20, 3), problems.points(10, 3, seed=3)
    distance, index = nearest_distance(x, cloud)
    x[4, 1], x[6, 0] = NAN, INF
    got, where = nearest_distance(x, cloud)
    assert got[4].isnan()
    assert got[6] == INF
    rest = [0, 1, 2, 3, 5, 7, 8, 9]
    assert same_bits(got[rest], distance[rest])
    assert torch.equal(where[rest], index[rest])
    assert ((where >= 0) & (where < 20)).all()


def test_a_cloud_without_a_finite_point_gives_no_finite_distance():
    distance, _ = nearest_distance(z(3, 2), torch.full((4, 2), NAN))
    assert not distance.isfinite().any()


def test_distances_beyond_the_range_of_squares():
    x = torch.tensor([[1e200, 0.0], [0.0, 0.5]], dtype=F64)
    distance, index = nearest_distance(x, torch.zeros(3, 2, dtype=F64))
    assert distance[0] > 1e199
    assert distance[1] == 0.5
    assert ((index >= 0) & (index < 3)).all()


def test_nearest_does_not_depend_on_threads():
    x, cloud = problems.points(3000, 3), problems.points(2000, 3, seed=3)
    one = nearest_distance(x, cloud)
    torch.set_num_threads(2)
    two = nearest_distance(x, cloud)
    assert same_bits(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_nearest_at_the_size_of_a_scan():
    from scipy.spatial import cKDTree

    x, cloud = problems.points(10_000, 3, F32), problems.points(170_000, 3, F32, seed=3)
    distance, index = nearest_distance(x, cloud)
    expected, where = cKDTree(cloud.numpy()).query(x.numpy())
    assert (index.numpy() == where).mean() > 0.9999
    torch.testing.assert_close(distance.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_every_public_op_is_listed():
    assert all(hasattr(ops, name) for name in ops.__all__)
