"""Projection onto level sets: Newton's theory, levels, limits, statuses."""

import itertools
import math

import numpy as np
import problems
import pytest
import torch
from problems import same_bits

import levelset_ext as ls
from levelset_ext.samplers import projection
from levelset_ext.samplers.projection import project_from

S = ls.Status
F64 = torch.float64
METHODS = ("newton", "gradient_descent", "lbfgs")


def assert_consistent(fn, r):
    """F and D_xF of the result are those of its points, for every row that is finite."""
    rows = r.points.flatten(1).isfinite().all(1)
    values, jacobian = ls.value_and_jacobian(fn, r.points[rows])
    torch.testing.assert_close(r.values[rows], values, rtol=1e-12, atol=1e-14, equal_nan=True)
    torch.testing.assert_close(r.jacobian[rows], jacobian, rtol=1e-12, atol=1e-14, equal_nan=True)
    assert torch.equal(r.converged, r.status == S.CONVERGED)
    assert not (r.status == S.RUNNING).any()


# --- the theory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("l", [1, 2, 3, 8])
@pytest.mark.parametrize("level", [0.0, 0.7])
def test_lemma_1_one_step_on_an_affine_field_is_the_orthogonal_projection(l, level):  # noqa: E741
    fn, x = problems.Affine(l, 10), problems.points(20, 10)
    r = ls.project(fn, x, level, max_iters=1, tol=1e-10)
    torch.testing.assert_close(r.points, fn.projection(x, level))
    assert r.converged.all()
    assert r.iterations.tolist() == [1] * 20
    # and every further step stays there
    again = ls.project(fn, r.points, level, max_iters=5, tol=0.0)
    torch.testing.assert_close(again.points, r.points)


@pytest.mark.parametrize(
    ("fn", "d"),
    [(problems.Quadric(), 3), (problems.Torus(), 3), (problems.Circle(), 3), (problems.Three(), 5)],
)
def test_newton_converges_quadratically(fn, d):
    start = ls.project(fn, problems.points(40, d), tol=1e-12, max_iters=50)
    x = start.points[start.converged] + 0.02 * problems.points(
        int(start.converged.sum()), d, seed=6
    )
    errors = [ls.project(fn, x, max_iters=k, tol=0.0).residual for k in range(4)]
    for before, after in itertools.pairwise(errors):
        assert (after <= 20 * before**2 + 1e-14).all()
    assert errors[0].max() > 1e-3
    assert errors[3].max() < 1e-10


def test_points_reach_the_sphere_the_torus_and_the_circle():
    x = problems.points(200)
    sphere = ls.project(problems.Sphere(0.7), x, tol=1e-12)
    assert sphere.converged.all()
    torch.testing.assert_close(sphere.points, 0.7 * x / x.norm(dim=1, keepdim=True))
    assert sphere.iterations.max() == 1
    torus = ls.project(problems.Torus(), x, tol=1e-12)
    assert torus.converged.float().mean() > 0.95
    circle = ls.project(problems.Circle(0.7, 0.2), x, tol=1e-12)
    assert circle.converged.all()
    torch.testing.assert_close(circle.points[:, :2].norm(dim=1), torch.full((200,), 0.7, dtype=F64))
    torch.testing.assert_close(circle.points[:, 2], torch.full((200,), 0.2, dtype=F64))


def test_the_decision_boundary_of_an_affine_classifier():
    fn, x = problems.Classifier(2), problems.points(6, 784).view(6, 1, 28, 28)
    r = ls.project(fn, x, tol=1e-10)
    normal = (fn.linear.weight[0] - fn.linear.weight[1]).detach()
    offset = (fn.linear.bias[0] - fn.linear.bias[1]).detach()
    distance = (x.flatten(1) @ normal + offset).abs() / normal.norm()
    torch.testing.assert_close((r.points - x).flatten(1).norm(dim=1), distance)
    assert r.converged.all()


# --- levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_levels_of_every_shape(method):
    x = problems.points(4)
    options = {"tol": 1e-9, "max_iters": 300, "method": method}
    fn = problems.Affine(1)
    column = torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=F64)
    for level, expected in (
        (0.5, torch.full((4, 1), 0.5, dtype=F64)),
        (torch.tensor(0.5), torch.full((4, 1), 0.5, dtype=F64)),
        (torch.tensor([0.5]), torch.full((4, 1), 0.5, dtype=F64)),
        ([0.5], torch.full((4, 1), 0.5, dtype=F64)),
        (column, column[:, None]),
        (column[:, None], column[:, None]),
        (column.float(), column.float().double()[:, None]),
    ):
        r = ls.project(fn, x, level, **options)
        assert same_bits(r.level, expected)
        assert r.converged.all()
        torch.testing.assert_close(r.values, expected, rtol=0, atol=2e-9)
    fn = problems.Affine(2)
    two, full = torch.tensor([0.5, -0.5], dtype=F64), problems.points(4, 2, seed=8)
    for level, expected in ((0.25, 0.25), (two, two), (full, full), (full.T.contiguous().T, full)):
        r = ls.project(fn, x, level, **options)
        assert torch.equal(r.level, torch.as_tensor(expected, dtype=F64).expand(4, 2))
        assert r.converged.all()
        torch.testing.assert_close(r.values, r.level, rtol=0, atol=2e-9)


def test_a_square_level_is_one_row_each():
    fn, x = problems.Affine(2), problems.points(2)
    level = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=F64)
    assert same_bits(ls.project(fn, x, level).level, level)
    with pytest.raises(ValueError, match=r"^level: expected a scalar, \(l,\) = \(2,\), \(n, l\)"):
        ls.project(fn, problems.points(3), torch.zeros(3))


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
def test_the_tolerance_is_used_and_no_more_is_done(method, tol):
    fn, x = problems.Quadric(), 0.3 * problems.points(30)
    r = ls.project(fn, x, tol=tol, max_iters=400, method=method)
    assert r.converged.all()
    assert (r.residual <= tol).all()
    # The point before the last update was not within tol, so the tolerance is what stopped it.
    for k in r.iterations.unique().tolist():
        if k:
            rows = r.iterations == k
            earlier = ls.project(fn, x, tol=0.0, max_iters=k - 1, method=method)
            assert (earlier.residual[rows] > tol).all()


@pytest.mark.parametrize("method", METHODS)
def test_no_iterations_only_judge(method):
    fn, x = problems.Affine(1), problems.points(6)
    x[0] = fn.projection(x[:1])[0]
    x[1] = math.nan
    r = ls.project(fn, x, max_iters=0, tol=1e-9, method=method)
    assert same_bits(r.points, x)
    expected = [S.CONVERGED, S.NON_FINITE] + [S.MAX_ITERATIONS] * 4
    assert r.status.tolist() == expected
    assert not r.iterations.any()
    assert_consistent(fn, r)


@pytest.mark.parametrize("method", METHODS)
def test_finished_rows_are_never_evaluated_again(method):
    inner, x = problems.Quadric(), 0.4 * problems.points(30)
    fn = problems.RowCounter(inner)
    r = ls.project(fn, x, tol=1e-6, max_iters=200, method=method)
    assert r.converged.all()
    assert r.iterations.min() < r.iterations.max()
    for row in range(30):
        final = r.points[row]
        visits = [k for k, batch in enumerate(fn.batches) if (batch == final).all(1).any()]
        # Evaluated where it ended (by lbfgs once in the line search, once with its gradient), and
        # not in any batch after that.
        assert len(visits) <= (1 if method == "newton" else 2)
    if method == "newton":
        assert fn.rows == int((r.iterations + 1).sum())
        assert len(fn.batches) == int(r.iterations.max()) + 1


def test_what_was_found_just_now_is_a_start_that_needs_no_evaluation():
    inner, x = problems.Quadric(), 0.4 * problems.points(30)
    x[0] = math.nan
    first = ls.project(inner, x, tol=1e-6)
    before = [getattr(first, name).clone() for name in ("points", "values", "jacobian")]
    fn = problems.RowCounter(inner)
    known = project_from(fn, first, 0.05, 200, 1e-6)
    fresh = problems.RowCounter(inner)
    expected = ls.project(fresh, first.points, 0.05, tol=1e-6, max_iters=200)
    for name in ("points", "values", "jacobian", "level", "status", "iterations"):
        assert same_bits(getattr(known, name), getattr(expected, name))
    assert known.converged[1:].all()
    assert known.status[0] == S.NON_FINITE
    assert len(fn.batches) == len(fresh.batches) - 1
    assert fn.rows == fresh.rows - 30
    for name, value in zip(("points", "values", "jacobian"), before, strict=True):
        assert same_bits(getattr(first, name), value)


def test_bad_rows_are_not_evaluated_again_either():
    fn = problems.RowCounter(problems.Quadric())
    x = problems.points(4)
    x[0], x[1] = 0.0, math.nan
    ls.project(fn, x, tol=1e-12, max_iters=10)
    assert all(len(batch) <= 2 for batch in fn.batches[1:])


@pytest.mark.parametrize("method", METHODS)
def test_the_step_cap_holds_in_every_step(method):
    fn, x = problems.Quadric(3.0), 0.2 * problems.points(20)
    before = x
    for k in range(1, 8):
        r = ls.project(fn, x, max_iters=k, tol=1e-9, max_step=0.05, method=method)
        steps = (r.points - before).norm(dim=1)
        assert (steps <= 0.05 * (1 + 1e-9)).all()
        before = r.points
    free = ls.project(fn, x, max_iters=1, tol=1e-9, method=method)
    assert (free.points - x).norm(dim=1).max() > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_the_box_holds(method):
    fn, x = problems.Affine(1), problems.points(40).clamp(-0.5, 0.5)
    lower, upper = torch.tensor([-0.5, -0.4, -0.5]), 0.5
    x = torch.maximum(x, lower.double())
    for k in range(6):
        r = ls.project(fn, x, 0.3, max_iters=k, box=(lower, upper), method=method)
        assert (r.points >= lower).all()
        assert (r.points <= upper).all()
        assert_consistent(fn, r)
    one_side = ls.project(fn, x, 5.0, box=(None, 0.5), method=method)
    assert (one_side.points <= 0.5).all()
    event = problems.points(3, 784).view(3, 1, 28, 28).clamp(0, 1)
    r = ls.project(problems.Classifier(), event, box=(torch.zeros(28, 28), 1.0), method=method)
    assert (r.points >= 0).all()
    assert (r.points <= 1).all()


def test_a_row_the_box_holds_is_stalled():
    r = ls.project(lambda x: x.sum(1), torch.zeros(1, 2), 5.0, box=(-1.0, 1.0))
    assert r.points.tolist() == [[1.0, 1.0]]
    assert r.status.tolist() == [S.STALLED]
    assert r.iterations.tolist() == [1]
    assert r.values.tolist() == [[2.0]]


def test_a_tolerance_below_the_dtype_ends_stalled():
    # No float32 squares to 2, and near its root the step is less than half an ulp.
    r = ls.project(lambda x: x[:, 0] ** 2 - 2, torch.full((1, 1), 1.5), tol=0.0, max_iters=60)
    assert r.status.tolist() == [S.STALLED]
    assert 0 < r.residual.item() < 1e-6
    assert r.iterations.item() < 10


# --- rows that go wrong ---------------------------------------------------------------------------


def trouble(x):
    """|x|^2 - 1, but for rows with 10, 20, ... in front, each of which fails in its own way."""

    def one(row):
        ways = {
            10: lambda: 0.0 * row.sum() + 2.0,
            20: lambda: row.sum() * math.nan,
            30: lambda: (row[1] * 0.0).sqrt() + 2.0,  # infinity times zero in its derivative
            40: lambda: row.sum() + math.inf,
            50: lambda: row[1] * 1e-320 + 1.0,  # a subnormal gradient
        }
        return ways.get(row[0].item(), lambda: (row * row).sum() - 1)()

    return torch.stack([one(row) for row in x])


@pytest.mark.parametrize("method", METHODS)
def test_every_bad_row_has_its_status_and_leaves_the_others_alone(method):
    x = 0.4 * problems.points(12)
    alone = ls.project(trouble, x, tol=1e-8, max_iters=150, method=method)
    assert alone.converged.all()
    mixed = x.clone()
    codes = {1: 10.0, 3: 20.0, 5: 30.0, 7: 40.0}
    if method == "newton":
        codes[11] = 50.0
    for row, code in codes.items():
        mixed[row] = 0.0
        mixed[row, 0] = code
    mixed[9] = math.nan
    r = ls.project(trouble, mixed, tol=1e-8, max_iters=150, method=method)
    expected = {1: S.RANK_DEFICIENT, 3: S.NON_FINITE, 5: S.NON_FINITE, 7: S.NON_FINITE}
    expected |= {9: S.NON_FINITE}
    if method == "newton":
        expected[11] = S.RANK_DEFICIENT
    for row, status in expected.items():
        assert r.status[row] == status, (row, S(int(r.status[row])))
        assert r.iterations[row] == 0
    assert same_bits(r.points[list(expected)], mixed[list(expected)])
    rest = [k for k in range(12) if k not in expected]
    for name in ("points", "values", "jacobian", "level", "status", "iterations"):
        assert same_bits(getattr(r, name)[rest], getattr(alone, name)[rest]), name


def test_a_level_that_is_not_finite_is_a_bad_row():
    level = torch.tensor([0.0, math.nan, math.inf], dtype=F64)
    r = ls.project(problems.Affine(1), problems.points(3), level)
    assert r.status.tolist() == [S.CONVERGED, S.NON_FINITE, S.NON_FINITE]


@pytest.mark.parametrize("method", METHODS)
def test_a_point_that_is_not_finite_is_a_bad_row_although_its_value_is(method):
    x = torch.tensor([[math.inf, 0.0]], dtype=F64)
    r = ls.project(lambda x: torch.tanh(x).sum(1), x, 1.0, max_iters=0, method=method)
    assert r.residual.tolist() == [0.0]
    assert r.status.tolist() == [S.NON_FINITE]


@pytest.mark.parametrize("method", METHODS)
def test_a_row_on_the_level_set_needs_no_gradient(method):
    x = torch.tensor([[0.0, 0.0], [0.3, 0.4]], dtype=F64)
    r = ls.project(lambda x: x.square().sum(1).sqrt(), x, torch.tensor([0.0, 0.5]), method=method)
    assert r.jacobian[0].isnan().all()
    assert r.status.tolist() == [S.CONVERGED] * 2
    assert r.iterations.tolist() == [0, 0]


def test_parallel_gradients_are_rank_deficient():
    def fn(x):
        return torch.stack([x.sum(1), 2 * x.sum(1) + 1], 1)

    r = ls.project(fn, problems.points(3))
    assert r.status.tolist() == [S.RANK_DEFICIENT] * 3
    assert same_bits(r.points, problems.points(3))


# --- what comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_iters", [0, 1, 3, 30])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("fn", "d"),
    [(problems.Quadric(), 3), (problems.Torus(), 3), (problems.Circle(), 3), (problems.Three(), 5),
     (problems.mlp(2), 3)],
)  # fmt: skip
def test_values_and_jacobian_are_those_of_the_returned_points(fn, d, method, max_iters):
    x = 2 * problems.points(25, d)
    r = ls.project(fn, x, 0.05, max_iters=max_iters, method=method, max_step=0.7)
    assert_consistent(fn, r)
    torch.testing.assert_close(r.residual, (r.values - r.level).abs().amax(1))
    assert (r.residual[r.converged] <= 1e-5).all()
    assert (r.iterations <= max_iters).all()
    assert (r.status[r.residual > 1e-5] != S.CONVERGED).all()


@pytest.mark.parametrize("fn", [problems.Quadric(), problems.Circle()])
def test_the_slower_methods_reach_the_same_set_at_a_higher_price(fn):
    x = 0.5 + 0.2 * problems.points(20)
    price = {}
    for method in METHODS:
        counter = problems.RowCounter(fn)
        r = ls.project(counter, x, tol=1e-6, max_iters=2000, method=method)
        assert r.converged.all(), method
        assert (fn(r.points).reshape(20, -1).abs() <= 1e-6).all()
        price[method] = counter.rows
    assert price["newton"] < price["lbfgs"] < price["gradient_descent"]
    assert price["gradient_descent"] > 5 * price["newton"]


def test_step_size_and_history_are_used():
    fn, x = problems.Quadric(), 0.5 + 0.2 * problems.points(10)

    def end(**options):
        return ls.project(fn, x, tol=1e-12, max_iters=4, **options).points

    slow = end(method="gradient_descent", step_size=0.01)
    assert (slow - x).norm() < (end(method="gradient_descent", step_size=0.1) - x).norm()
    three = problems.Three()
    y = problems.points(10, 5)
    short = ls.project(three, y, max_iters=6, method="lbfgs", history=1, tol=1e-14)
    long = ls.project(three, y, max_iters=6, method="lbfgs", history=6, tol=1e-14)
    assert not same_bits(short.points, long.points)


def test_lbfgs_takes_its_pairs_newest_first(monkeypatch):
    orders = []
    plain = projection._two_loop

    def noted(gradient, moves, changes, order):
        orders.append(order)
        return plain(gradient, moves, changes, order)

    monkeypatch.setattr(projection, "_two_loop", noted)
    x = problems.points(4, 5)
    ls.project(problems.Three(), x, max_iters=5, method="lbfgs", history=3, tol=0.0)
    assert orders == [[], [0], [1, 0], [2, 1, 0], [0, 2, 1]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes_dtypes_and_silence(method, dtype, mode, capfd):
    fn, x = problems.batch_norm_net(), problems.points(8, 3, dtype)
    fn.to(dtype)
    outside = ls.project(fn, x, method=method)
    with mode():
        inside = ls.project(fn, x.clone(), method=method)
    for name in ("points", "values", "jacobian", "level"):
        tensor = getattr(inside, name)
        assert same_bits(tensor, getattr(outside, name))
        assert tensor.dtype == dtype
        assert not tensor.requires_grad
        assert not tensor.is_inference()
    ls.sample_network(fn, inside).sum().backward()
    with torch.inference_mode():
        stay = ls.level_points(fn, x)
    ls.sample_network(fn, stay).sum().backward()
    assert capfd.readouterr() == ("", "")


def test_autocast_does_not_touch_the_arithmetic_around_the_network():
    def fn(x):
        with torch.autocast("cpu", enabled=False):
            return problems.Circle()(x)

    x = 0.5 + 0.2 * problems.points(10, 3, torch.float32)
    for method in METHODS:
        plain = ls.project(fn, x, method=method, max_iters=10)
        with torch.autocast("cpu", torch.bfloat16):
            cast = ls.project(fn, x, method=method, max_iters=10)
        assert same_bits(plain.points, cast.points), method


@pytest.mark.parametrize("method", METHODS)
def test_empty_batches_and_strided_points(method):
    fn = problems.mlp(2)
    r = ls.project(fn, problems.points(0), method=method)
    assert r.points.shape == (0, 3)
    assert r.values.shape == (0, 2)
    assert r.jacobian.shape == (0, 2, 3)
    x = problems.points(6)
    strided = torch.stack([x, -x], 2)[:, :, 0]
    assert not strided.is_contiguous()
    assert same_bits(
        ls.project(fn, strided, method=method).points, ls.project(fn, x, method=method).points
    )


def test_a_row_does_not_depend_on_the_batch_of_a_row_wise_field():
    fn, x = problems.Torus(), problems.points(64)
    whole = ls.project(fn, x, max_iters=6, max_step=0.3)
    torch.set_num_threads(2)
    parts = ls.LevelSetResult.cat([ls.project(fn, x[k : k + 8], max_iters=6, max_step=0.3)
                                   for k in range(0, 64, 8)])  # fmt: skip
    assert same_bits(whole.points, parts.points)
    assert same_bits(whole.values, parts.values)
    assert torch.equal(whole.iterations, parts.iterations)


def test_an_integer_of_numpy_is_one():
    fn, x = problems.Sphere(), problems.points(4, 3)
    a, b = (ls.project(fn, x, max_iters=kind(3)) for kind in (int, np.int64))
    assert same_bits(a.points, b.points)
    with pytest.raises(ValueError, match=r"^max_iters: expected an integer"):
        ls.project(fn, x, max_iters=np.bool_(True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_iters": -1}, r"^max_iters: expected an integer >= 0, got -1"),
        ({"max_iters": 2.5}, r"^max_iters: "),
        ({"max_iters": True}, r"^max_iters: "),
        ({"tol": -1e-3}, r"^tol: expected a finite number >= 0, got -0.001"),
        ({"tol": math.nan}, r"^tol: "),
        ({"tol": math.inf}, r"^tol: "),
        (
            {"method": "bfgs"},
            r"^method: expected one of newton, gradient_descent, lbfgs, got 'bfgs'",
        ),
        ({"max_step": 0.0}, r"^max_step: expected a length > 0, got 0.0"),
        ({"max_step": math.nan}, r"^max_step: "),
        ({"box": 1.0}, r"^box: expected a pair"),
        ({"box": (0.0, torch.zeros(2))}, r"^box: expected upper as a scalar or \(3,\), got \(2,\)"),
        ({"box": (1.0, 0.0)}, r"^box: expected lower <= upper"),
        ({"step_size": 0.0}, r"^step_size: "),
        ({"history": 0}, r"^history: expected at least 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        ls.project(problems.mlp(), problems.points(3), **options)
    if "max_iters" not in options:
        return
    with pytest.raises(ValueError, match=message):
        ls.project(problems.mlp(), problems.points(3), method="lbfgs", **options)


@pytest.mark.parametrize("method", ["newton", "gradient_descent", "lbfgs"])
def test_more_than_eight_outputs_are_refused_at_once(method):
    net = torch.nn.Linear(12, 9).double()  # runs as its compiled field where it can
    x = problems.points(3, 12)
    for fn, points in ((problems.Affine(9, 12), x), (net, x), (net, x[:0])):
        with pytest.raises(ValueError, match=r"^fn: expected 1 to 8 outputs, got 9$"):
            ls.project(fn, points, method=method)


def test_half_precision_is_refused_by_name():
    with pytest.raises(RuntimeError, match="expected float32 or float64 on the CPU"):
        ls.project(lambda x: x.sum(1), torch.ones(3, 2, dtype=torch.bfloat16))
