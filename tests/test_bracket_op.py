"""The compiled bracket update: against plain renderings, refusals, torch's machinery.

What the statuses promise is tested in C++ (tests/cpp/bracket_test.cpp) and, through the sampler, in
test_false_position.py.
"""

import math

import problems
import pytest
import torch
from problems import same_bits

import levelset_ext as ls
from levelset_ext import _C
from levelset_ext.ops import bracket_state, bracket_update_

S = ls.Status
VARIANTS = list(_C.bracket_variants)
raw = torch.ops.levelset_ext.bracket_update_


def plain_search(f, variant, evaluations):
    """Where each method evaluates f on [0, 1], written from the textbooks: lists of places."""
    places = []
    x1, x2 = (0.0, 1.0) if abs(f(0.0)) <= abs(f(1.0)) else (1.0, 0.0)  # x1 the newest
    f1, f2 = f(x1), f(x2)
    weight = f2
    x3 = f3 = None
    checkpoint, since = 1.0, 0
    for _ in range(evaluations):
        width = abs(x2 - x1)
        if width <= checkpoint / 2:
            checkpoint, since = width, 0
        else:
            since += 1
        t = 0.5
        if variant in ("regula_falsi", "illinois", "anderson_bjorck"):
            t = f1 / (f1 - weight)
            if variant == "anderson_bjorck" and since > 3:
                t = 0.5
        elif variant == "chandrupatla" and x3 is not None:
            xi, phi = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2)
            if phi**2 < xi and (1 - phi) ** 2 < 1 - xi:
                t = f1 / (f2 - f1) * f3 / (f2 - f3)
                t += (x3 - x1) / (x2 - x1) * f1 / (f3 - f1) * f2 / (f3 - f2)
        x = x1 + t * (x2 - x1)
        places.append(x)
        value = f(x)
        if abs(value) < 1e-12:
            break
        if (value < 0) == (f1 < 0):
            if variant == "illinois":
                weight *= 0.5
            elif variant == "anderson_bjorck":
                m = 1 - value / f1
                weight *= m if m > 0 else 0.5
            x3, f3 = x1, f1
        else:
            x3, f3 = x2, f2
            x2, f2 = x1, f1
            weight = f2
        x1, f1 = x, value
    return places


FUNCTIONS = {
    "cubic": lambda x: x**3 + 0.2 * x - 0.4,
    "exp": lambda x: math.exp(6 * x) - 20,
    "sine": lambda x: math.sin(3 * x - 1.3) + 0.1,
    "flat": lambda x: (2 * x - 1.2) ** 5,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_places_are_those_of_the_method(variant, name):
    f = FUNCTIONS[name]
    expected = plain_search(f, variant, 9)
    start, end = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    points, status, state = start.clone(), torch.ones(1, dtype=torch.int8), bracket_state(1)
    values = torch.tensor([[f(0.0), f(1.0)]], dtype=torch.float64)
    for place in expected:
        bracket_update_(points, status, state, start, end, values, variant=variant)
        assert status.item() == S.RUNNING
        assert points.item() == pytest.approx(place, rel=1e-7, abs=1e-9)
        assert state[0, _C.bracket_at].item() == points.item()
        values = torch.tensor([[f(points.item())]], dtype=torch.float64)


def inputs(n=6, d=5, dtype=torch.float64):
    start, end = problems.points(n, d, dtype), problems.points(n, d, dtype, seed=4)
    values = torch.stack([torch.linspace(-1, -0.3, n), torch.linspace(0.2, 1, n)], 1).to(dtype)
    status = torch.ones(n, dtype=torch.int8)
    return start.clone(), status, bracket_state(n), start, end, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 2, 3, 700])
@pytest.mark.parametrize("variant", VARIANTS)
def test_first_point_is_on_the_segment_where_the_chord_says(variant, d, dtype):
    points, status, state, start, end, values = inputs(40, d, dtype)
    bracket_update_(points, status, state, start, end, values, 0.1, variant=variant)
    s = (values[:, 0] - 0.1) / (values[:, 0] - values[:, 1])
    if variant in ("bisection", "chandrupatla"):
        s = torch.full_like(s, 0.5)
    torch.testing.assert_close(points, start + s[:, None] * (end - start), rtol=2e-6, atol=2e-6)
    assert status.tolist() == [S.RUNNING] * 40


def test_index_mask_threads_and_strides_do_not_change_a_row():
    n = 3000
    whole = inputs(n, 40)
    bracket_update_(*whole, 0.1)
    parts = inputs(n, 40)
    index = torch.randperm(n)[: n - 3]
    torch.set_num_threads(2)
    wide = torch.stack([whole[3]] * 2, 2).flatten(1)[:, ::2]
    assert not wide.is_contiguous()
    bracket_update_(*parts[:3], wide, parts[4], parts[5][index], 0.1, index=index)
    for k in range(3):
        assert same_bits(parts[k][index], whole[k][index])
    rest = torch.ones(n, dtype=torch.bool)
    rest[index] = False
    assert same_bits(parts[0][rest], whole[3][rest])
    assert not parts[2][rest].any()


def test_level_per_row_and_rows_that_do_not_run():
    points, status, state, start, end, values = inputs()
    status[1] = S.STALLED
    level = torch.tensor([0.0, 0.0, 0.15, 5.0, math.nan, 0.0]).double()
    before = points.clone()
    bracket_update_(points, status, state, start, end, values, level, tol=1e-3)
    expected = [S.RUNNING, S.STALLED, S.RUNNING, S.NOT_BRACKETED, S.NON_FINITE, S.RUNNING]
    assert status.tolist() == expected
    assert same_bits(points[1], before[1])
    assert same_bits(points[3], end[3])  # the end that is nearer to the level


def test_refusals():
    points, status, state, start, end, values = inputs()
    update = bracket_update_
    with pytest.raises(ValueError, match=r"variant: expected one of regula_falsi.*'newton'"):
        update(points, status, state, start, end, values, variant="newton")
    for message, arguments, options in (
        (r"status: expected \(n,\) = \(6,\)", (points, status[:5], state, start, end, values), {}),
        ("status: expected dtype int8", (points, status.long(), state, start, end, values), {}),
        (r"bracket: expected \(n, bracket_columns\)",
         (points, status, state[:, :5], start, end, values), {}),
        ("bracket: expected dtype float64",
         (points, status, state.float(), start, end, values), {}),
        (r"start: expected \(n, d\) = \(6, 5\)",
         (points, status, state, start[:2], end, values), {}),
        (r"end: expected \(n, d\) = \(6, 5\)",
         (points, status, state, start, end[:, :4], values), {}),
        (r"values: expected a tensor \(m, 1\)",
         (points, status, state, start, end, values[:, 0]), {}),
        (r"values: .*got \(6, 3\)",
         (points, status, state, start, end, torch.zeros(6, 3).double()), {}),
        ("index: expected rows of points, 0 to 5, got 6",
         (points, status, state, start, end, values[:1]), {"index": torch.tensor([6])}),
        ("index: expected dtype int64",
         (points, status, state, start, end, values[:1]),
         {"index": torch.tensor([1], dtype=torch.int32)}),
        ("tol: expected a number >= 0", (points, status, state, start, end, values), {"tol": -1.0}),
        ("points: expected a contiguous tensor",
         (points.T.contiguous().T, status, state, start, end, values), {}),
        ("bracket: expected a contiguous tensor",
         (points, status, torch.stack([state] * 2, 2)[:, :, 0], start, end, values), {}),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            update(*arguments, **options)
    assert not state.any()
    with pytest.raises(RuntimeError, match="variant: expected 0 to 4, got 7"):
        raw(points, status, state, start, end, values, torch.zeros(1, 1).double(), None, 0.0, 7,
            False)  # fmt: skip
    with pytest.raises(ValueError, match="level: expected a scalar"):
        update(points, status, state, start, end, values, torch.zeros(4))


def test_a_gradient_that_would_be_lost_is_refused():
    for k, name in ((0, "points"), (3, "start"), (4, "end"), (5, "values")):
        arguments = list(inputs())
        arguments[k] = arguments[k].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=f"{name}: expected a tensor that needs no gradient"):
            bracket_update_(*arguments)
        with torch.no_grad():
            bracket_update_(*arguments)
    with pytest.raises(RuntimeError, match="level: expected a tensor that needs no gradient"):
        bracket_update_(*inputs(), torch.zeros(6, requires_grad=True))


@pytest.mark.parametrize("variant", [0, 4])
def test_opcheck(variant):
    points, status, state, start, end, values = inputs()
    level = torch.zeros(1, 1).double()
    index = torch.tensor([4, 1])
    torch.library.opcheck(raw, (points, status, state, start, end, values, level, None, 0.0,
                                variant, False))  # fmt: skip
    torch.library.opcheck(raw, (points, status, state, start, end, values[index], level, index,
                                1e-3, variant, True))  # fmt: skip


def test_compiles_without_graph_breaks(fresh_compiler):
    def step(points, status, state, start, end, values):
        bracket_update_(points, status, state, start, end, values, 0.1, variant="illinois")
        return points * 2

    eager, compiled = inputs(), inputs()
    expected = step(*eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert same_bits(got, expected)
    assert all(same_bits(a, b) for a, b in zip(compiled, eager, strict=True))


def test_vmap_is_refused_by_name():
    many = [torch.stack([t, t]) for t in inputs()]
    with pytest.raises(RuntimeError, match="bracket_update_ works in place on the rows"):
        torch.vmap(lambda *a: bracket_update_(*a))(*many)


def test_no_rows_and_mixed_dtypes():
    points, status, state, start, end, values = inputs(0)
    bracket_update_(points, status, state, start, end, values)
    points, status, state, start, end, values = inputs()
    bracket_update_(points.float(), status, state, start, end, values)
    assert status.tolist() == [S.RUNNING] * 6


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_pass_in_vectors_has_the_bits_of_the_row_math(dtype, d, variant):
    n = 203  # several vectors and a rest
    start, end = torch.randn(n, d, dtype=dtype), torch.randn(n, d, dtype=dtype)
    values = torch.randn(n, 2, dtype=dtype)
    values[:150, 1] = -values[:150, 0] * torch.rand(150, dtype=dtype)  # most are bracketed
    values[5, 0], values[6, 1], values[7] = math.nan, math.inf, 1e-9
    values[40], values[41] = torch.tensor([1e-300, -1e300]), torch.tensor([3e38, -3e38])
    start[50], end[51, 0], end[52] = end[50], math.nan, start[52] + 1e-30
    start[53, 0], end[54, -1] = end[53, 0], math.inf
    for level in (torch.zeros(1, 1, dtype=dtype), 0.1 * torch.randn(n, 1, dtype=dtype)):
        found = []
        for index in (None, torch.arange(n)):  # with an index every row goes through the row math
            points, status = torch.zeros(n, d, dtype=dtype), torch.ones(n, dtype=torch.int8)
            status[100:103] = int(S.CONVERGED)
            bracket = bracket_state(n)
            rest = (start, end, values, level, index, 1e-6, variant, False)
            raw(points, status, bracket, *rest)
            found.append((points, status, torch.where((status == 1)[:, None], bracket, 0.0)))
        assert (found[0][1] == int(S.RUNNING)).sum() > 100
        assert torch.equal(found[0][1], found[1][1])
        for a, b in zip(*found, strict=True):
            assert same_bits(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("team", [0, 1, 2, 3])
@pytest.mark.parametrize("d", [3, 40, 700])
def test_cuda_searches_like_the_cpu(d, team, dtype):
    start, end = problems.points(200, d).to(dtype), problems.points(200, d, seed=4).to(dtype)
    start[:, 0], end[:, 0] = -start[:, 0].abs() - 0.1, end[:, 0].abs() + 0.1
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    answers = []
    for device, kind in (("cpu", wide), ("cuda", dtype)):
        a, b = start.to(device, kind), end.to(device, kind)
        points, status = a.clone(), torch.ones(200, dtype=torch.int8, device=device)
        state, level = bracket_state(200, device), torch.zeros(1, 1, device=device, dtype=kind)
        values = torch.stack([a[:, 0], b[:, 0]], 1)
        tol = 0.01 if wide != dtype else 1e-5
        for k in range(30):
            raw(points, status, state, a, b, values, level, None, tol, 4, k == 29, team)
            values = points[:, :1].clone()
        answers.append((points.cpu().to(wide), status.cpu()))
    assert answers[0][1].tolist() == [S.CONVERGED] * 200
    assert torch.equal(answers[0][1], answers[1][1])
    tolerance = 0.05 if wide != dtype else 1e-4
    torch.testing.assert_close(answers[0][0], answers[1][0], rtol=tolerance, atol=tolerance)
