"""Root search on segments: roots that mpmath and SciPy know, statuses, counts of evaluations."""

import math

import mpmath
import problems
import pytest
import torch
from problems import RowCounter, same_bits
from scipy import optimize
from torch import nn

import levelset_ext as ls
from levelset_ext.samplers.false_position import VARIANTS, search_segments

S = ls.Status
F64 = torch.float64
SAFE = [v for v in VARIANTS if v != "regula_falsi"]


def line(f):
    """A field that is f of the first coordinate."""
    return lambda x: f(x.flatten(1)[:, 0])


def segment(a, b, dtype=F64, d=1):
    return torch.full((1, d), a, dtype=dtype), torch.full((1, d), b, dtype=dtype)


SMOOTH = {
    "cubic": (lambda x: x**3 - 2 * x - 5, lambda x: x**3 - 2 * x - 5, 2, 3),
    "cosine": (lambda x: torch.cos(x) - x, lambda x: mpmath.cos(x) - x, 0, 1),
    "exp": (lambda x: torch.exp(x) - 2 - x, lambda x: mpmath.exp(x) - 2 - x, 0.5, 2),
    "log": (lambda x: torch.log(x) - 0.3, lambda x: mpmath.log(x) - mpmath.mpf(0.3), 0.2, 4),
    "tanh": (lambda x: torch.tanh(3 * x) + 0.2, lambda x: mpmath.tanh(3 * x) + 0.2, -2, 1),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SMOOTH)
def test_roots_of_smooth_functions(variant, name):
    f, exact, a, b = SMOOTH[name]
    with mpmath.workdps(40):
        root = float(mpmath.findroot(exact, (mpmath.mpf(a), mpmath.mpf(b)), solver="anderson"))
    for dtype, tol in ((F64, 1e-13), (torch.float32, 2e-6)):
        start, end = segment(a, b, dtype, 3)
        r = ls.false_position(line(f), start, end, tol=tol, variant=variant, max_iters=200)
        assert r.status.item() == S.CONVERGED
        assert r.points[0].tolist() == pytest.approx([root] * 3, abs=50 * tol)
        assert r.residual.item() <= tol


def test_roots_are_those_of_scipy():
    generator = torch.Generator().manual_seed(0)
    net = problems.mlp(d=4, width=32)
    a = 2 * torch.randn(200, 4, generator=generator, dtype=F64)
    b = 2 * torch.randn(200, 4, generator=generator, dtype=F64)
    with torch.no_grad():
        level = (net(a) + 0.3 * (net(b) - net(a)))[:, 0]  # strictly between
    for variant in SAFE:
        r = ls.false_position(net, a, b, level, tol=1e-13, variant=variant, max_iters=100)
        assert bool(r.converged.all())
        for k in range(0, 200, 20):

            def along(s, k=k):
                with torch.no_grad():
                    return (net((a[k] + s * (b[k] - a[k]))[None])[0, 0] - level[k]).item()

            found = ((r.points[k] - a[k]) @ (b[k] - a[k]) / (b[k] - a[k]).square().sum()).item()
            assert abs(along(found)) < 1e-12
            root = optimize.brentq(along, 0, 1, xtol=1e-15)
            # There may be several roots; this one is one that SciPy finds around it.
            near = [found - 1e-6, found + 1e-6]
            if abs(root - found) > 1e-9 and along(near[0]) * along(near[1]) < 0:
                root = optimize.brentq(along, *near, xtol=1e-15)
            assert root == pytest.approx(found, abs=1e-9)


WORST = {
    "x^9": (lambda x: x**9, -1, 1.5),
    "x^9, far": (lambda x: x**9, -0.5, 10),
    "exp - 1": (lambda x: torch.exp(x) - 1, -20, 15),
    "exp - 1e-4": (lambda x: torch.exp(x) - 1e-4, -30, 5),
    "x^20 - 1": (lambda x: x**20 - 1, 0, 1.5),
    "atan, far": (torch.atan, -1e3, 1e5),
    "hinge": (lambda x: torch.relu(x - 0.99) * 100 - 1e-3, 0, 1),
}


@pytest.mark.parametrize("variant", SAFE)
@pytest.mark.parametrize("name", WORST)
def test_worst_cases_end_within_the_default_budget(variant, name):
    f, a, b = WORST[name]
    r = ls.false_position(line(f), *segment(a, b), variant=variant)
    assert r.status.item() == S.CONVERGED


def test_regula_falsi_creeps_where_the_others_do_not():
    f, a, b = WORST["x^9"]
    r = ls.false_position(line(f), *segment(a, b), variant="regula_falsi")
    assert r.status.item() == S.MAX_ITERATIONS
    assert r.iterations.item() == 40
    assert r.residual.item() > 1e-3


# name: evaluations between the ends to |F| <= 1e-10, for each variant in the order of VARIANTS
COUNTS = {
    "cubic": (24, 32, 6, 5, 5),
    "cosine": (8, 30, 7, 5, 5),
    "exp": (31, 34, 8, 7, 7),
    "log": (40, 32, 8, 7, 6),
    "tanh": (8, 35, 9, 8, 8),
}


@pytest.mark.parametrize("name", COUNTS)
def test_evaluation_counts(name):
    f, _, a, b = SMOOTH[name]
    for variant, most in zip(VARIANTS, COUNTS[name], strict=True):
        counter = RowCounter(line(f))
        r = ls.false_position(counter, *segment(a, b), tol=1e-10, variant=variant, max_iters=1000)
        assert r.iterations.item() <= most
        # Both ends in one batch, one row an iteration, and the gradient at the answer.
        assert counter.rows == 2 + r.iterations.item() + 1


def test_rows_that_are_done_are_not_evaluated_again():
    n = 50
    counter = RowCounter(line(lambda x: x**3 - 0.5))
    start = torch.linspace(-2, 0.5, n, dtype=F64)[:, None]
    end = torch.linspace(0.9, 3, n, dtype=F64)[:, None]
    r = ls.false_position(counter, start, end, tol=1e-9)
    assert bool(r.converged.all())
    assert r.iterations.unique().numel() > 3
    assert counter.rows == 2 * n + int(r.iterations.sum()) + n
    sizes = [len(b) for b in counter.batches]
    assert sizes[0] == 2 * n
    assert sizes[1:-1] == sorted(sizes[1:-1], reverse=True)


def test_known_end_values_are_not_evaluated_again():
    f = line(lambda x: x**3 - 0.5)
    start, end = segment(-1, 2)
    plain = ls.false_position(f, start, end)
    for known in (
        {"start_values": f(start)},
        {"end_values": f(end)[:, None]},
        {"start_values": f(start), "end_values": f(end)},
    ):
        counter = RowCounter(f)
        r = ls.false_position(counter, start, end, **known)
        assert same_bits(r.points, plain.points)
        assert counter.rows == 2 - len(known) + r.iterations.item() + 1
    with pytest.raises(ValueError, match=r"end_values: expected \(n,\) or \(n, 1\) with n = 1"):
        ls.false_position(f, start, end, end_values=torch.zeros(2))


# --- statuses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_statuses(variant):
    nan, inf = math.nan, math.inf
    rows = [
        (-1.0, 2.0, S.CONVERGED),
        (1.0, 2.0, S.NOT_BRACKETED),
        (-2.0, -1.0, S.NOT_BRACKETED),
        (0.5, 0.5, S.NOT_BRACKETED),
        (0.0, 0.0, S.CONVERGED),
        (0.0, 1.0, S.CONVERGED),
        (-1.0, 0.0, S.CONVERGED),
        (nan, 1.0, S.NON_FINITE),
        (-1.0, nan, S.NON_FINITE),
        (-1.0, inf, S.NON_FINITE),
        (2.0, -1.0, S.CONVERGED),
    ]
    start, end = (torch.tensor([[r[k]] for r in rows], dtype=F64) for k in range(2))
    r = ls.false_position(line(lambda x: x + x**3), start, end, variant=variant, max_iters=100)
    assert r.status.tolist() == [row[2] for row in rows]
    assert r.points[1].item() == 1  # the better end
    assert r.points[2].item() == -1
    assert r.iterations[[1, 2, 3, 4, 5, 6, 7]].tolist() == [0] * 7
    assert r.iterations[0] > 0
    good = ls.false_position(
        line(lambda x: x + x**3), start[:1], end[:1], variant=variant, max_iters=100
    )
    assert same_bits(r.points[:1], good.points)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_jump_is_stalled_next_to_it(variant):
    f = line(lambda x: torch.where(x < 0.3, -1.0, 2.0).to(x.dtype) + 0 * x)
    for dtype in (torch.float32, F64):
        r = ls.false_position(f, *segment(0, 1, dtype), variant=variant, max_iters=3000)
        assert r.status.item() == S.STALLED
        assert r.points.item() == pytest.approx(0.3, rel=1e-6)


def test_float32_margins_in_the_thousands_are_stalled_not_converged():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    with torch.no_grad():
        net[2].weight *= 2e4

    def field(x):
        logits = net(x)
        return logits[:, 0] - logits[:, 1]

    start, end = 2 * torch.randn(300, 20), 2 * torch.randn(300, 20)
    with torch.no_grad():
        sides = field(start).sign() * field(end).sign()
    r = ls.false_position(field, start[sides < 0], end[sides < 0])
    counts = r.counts()
    assert set(counts) <= {"CONVERGED", "STALLED"}
    assert counts["STALLED"] > 0.3 * len(r)
    with torch.no_grad():
        scale = torch.minimum(field(start[sides < 0]).abs(), field(end[sides < 0]).abs())
    stalled = r.status == S.STALLED
    assert (r.residual[stalled] > 1e-5).all()
    assert r.residual.median() < 1e-6 * scale.median()


def test_values_and_jacobian_belong_to_the_returned_points():
    net = problems.mlp()
    start, end = 4 * problems.points(300), 4 * problems.points(300, seed=9)
    for max_iters in (0, 1, 40):
        r = ls.false_position(net, start, end, -0.2, max_iters=max_iters)
        values, jacobian = ls.value_and_jacobian(net, r.points)
        torch.testing.assert_close(r.values, values)
        torch.testing.assert_close(r.jacobian, jacobian)
        assert r.level.unique().tolist() == [-0.2]
        assert (r.iterations <= max_iters).all()
        bracketed = r.status != S.NOT_BRACKETED
        assert 10 < bracketed.sum() < 300
        assert set(r.status[bracketed].tolist()) <= (
            {S.CONVERGED} if max_iters == 40 else {S.CONVERGED, S.MAX_ITERATIONS}
        )
        # On the segment: what is across it is nothing.
        along = end - start
        s = ((r.points - start) * along).sum(1, keepdim=True) / along.square().sum(1, keepdim=True)
        torch.testing.assert_close(r.points, start + s * along)
        assert ((s >= 0) & (s <= 1)).all()


def test_level_per_row_and_images():
    net = problems.Classifier()
    start, end = torch.randn(30, 1, 28, 28).double(), torch.randn(30, 1, 28, 28).double()
    with torch.no_grad():
        level = 0.5 * (net(start) + net(end))
    r = ls.false_position(net, start, end, level, tol=1e-10)
    assert bool(r.converged.all())
    assert r.points.shape == (30, 1, 28, 28)
    assert r.jacobian.shape == (30, 1, 1, 28, 28)
    assert same_bits(r.level, level[:, None])


def test_nothing_of_the_caller_changes():
    net = problems.batch_norm_net()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    start, end = problems.points(40), problems.points(40, seed=9)
    kept = start.clone(), end.clone()
    with torch.inference_mode():
        r = ls.false_position(net, start, end)
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert all(same_bits(v, state[k]) for k, v in net.state_dict().items())
    assert same_bits(start, kept[0])
    assert same_bits(end, kept[1])
    p = ls.sample_network(net, r)
    p.square().sum().backward()
    assert any(q.grad.any() for q in net.parameters())


def test_a_row_does_not_depend_on_its_batch():
    f = line(lambda x: x**3 - 0.5)
    start, end = problems.points(64, 5) - 2, problems.points(64, 5, seed=3) + 2
    whole = ls.false_position(f, start, end)
    parts = [ls.false_position(f, start[k : k + 13], end[k : k + 13]) for k in range(0, 64, 13)]
    assert same_bits(torch.cat([p.points for p in parts]), whole.points)
    assert torch.equal(torch.cat([p.status for p in parts]), whole.status)


def test_no_rows():
    r = ls.false_position(lambda x: x.view(x.size(0), -1)[:, 0], torch.zeros(0, 2, 2),
                          torch.zeros(0, 2, 2))  # fmt: skip
    assert r.points.shape == (0, 2, 2)
    assert r.jacobian.shape == (0, 1, 2, 2)
    assert r.counts() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "secant"}, "variant: expected one of regula_falsi"),
        ({"tol": -1.0}, "tol: expected a finite number"),
        ({"max_iters": 1.5}, "max_iters: expected an integer"),
        ({"end": torch.zeros(3, 3)}, r"end: expected the shape of start, \(2, 3\)"),
        ({"end": torch.zeros(2, 3).double()}, "end: expected dtype and device of start"),
        ({"fn": lambda x: x}, "fn: expected one output"),
        ({"level": torch.zeros(5)}, "level: expected a scalar"),
    ],
)
def test_refusals(change, message):
    arguments = {"fn": lambda x: x[:, 0], "start": torch.zeros(2, 3), "end": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=message):
        ls.false_position(**(arguments | change))


@pytest.mark.parametrize(("value", "max_iters"), [(-1.0, 0), (0.0, 5)])
def test_two_outputs_are_refused_where_known_ends_leave_nothing_to_search(value, max_iters):
    with pytest.raises(ValueError, match=r"^fn: expected one output, .* got \(2, 2\)"):
        ls.false_position(
            lambda x: x[:, :2],
            torch.zeros(2, 3),
            torch.ones(2, 3),
            max_iters=max_iters,
            start_values=torch.full((2,), value),
            end_values=torch.ones(2),
        )


def test_fewer_evaluations_than_plain_false_position():
    """The table is benchmarks/false_position_counts.py; here one small network."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                        nn.Linear(64, 1)).double()  # fmt: skip
    start, end = 3 * torch.randn(400, 16).double(), 3 * torch.randn(400, 16).double()
    with torch.no_grad():
        sides = (net(start) * net(end))[:, 0]
        start, end = start[sides < 0], end[sides < 0]
        scale = torch.maximum(net(start).abs(), net(end).abs())
    n = len(start)

    evaluated = []

    def relative(x, rows):
        # |F| <= 1e-4 x the bracket's |F| is |F| <= 1e-4 for F divided by that.
        evaluated.append(len(rows))
        return net(x) / scale[rows]

    r = search_segments(
        relative, start, end, 0.0, 40, 1e-4, "anderson_bjorck", start_values=None, end_values=None
    )
    assert bool(r.converged.all())
    ours = sum(evaluated) - n  # without D_xF at the answer, which both need
    plain = search_segments(
        relative, start, end, 0.0, 40, 1e-4, "regula_falsi", start_values=None, end_values=None
    )
    theirs = 3 * n * int(plain.iterations.max())
    assert theirs >= 10 * ours
