"""Boundary points near examples: where they lie, whose they are, and what it costs to find them."""

import pytest
import torch
from problems import RowCounter, same_bits
from torch import nn

import levelset_ext as ls
from levelset_ext.margin import margin
from levelset_ext.samplers import find_boundary, margin_field
from levelset_ext.samplers.boundary import _walk

S = ls.Status


def classifier(d=6, classes=4, scale=6.0, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(d, 32), nn.ReLU(), nn.Linear(32, classes)).double()
    with torch.no_grad():
        net[0].weight *= scale
        net[0].bias -= net[0].weight.sum(1) / 2  # kinks through the middle of the unit cube
        net[2].bias -= net(torch.rand(2000, d).double()).mean(0)  # no class dominates
    return net


def batch(n=200, d=6, classes=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, d, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_points_are_on_the_boundary_of_their_example_and_in_its_box():
    net = classifier()
    x, y = batch()
    found = find_boundary(net, x, y, 0.2, 0.3, 0.02, 30, generator=seeded())
    assert 50 < len(found) < 200
    assert found.correct.any()
    assert not found.correct.all()
    assert found.rows.tolist() == sorted(set(found.rows.tolist()))
    values = margin(net(found.result.points), y[found.rows]).detach()
    assert values.abs().max() <= 1e-5
    torch.testing.assert_close(found.result.values[:, 0], values)
    assert bool(found.result.converged.all())
    offset = (found.result.points - x[found.rows]).abs().amax(1)
    assert (offset[found.correct] <= 0.2 + 1e-12).all()
    assert (offset[~found.correct] <= 0.3 + 1e-12).all()
    assert offset[~found.correct].max() > 0.2
    assert found.result.points.min() >= 0
    assert found.result.points.max() <= 1
    torch.testing.assert_close(found.margins, margin(net(x), y).detach())
    assert torch.equal(found.correct, (found.margins > 0)[found.rows])
    assert torch.equal(found.crossed.nonzero()[:, 0], found.rows)
    _, jacobian = ls.value_and_jacobian(margin_field(net, y[found.rows]), found.result.points)
    torch.testing.assert_close(found.result.jacobian, jacobian)


def test_every_row_crosses_where_an_affine_classifier_lets_it():
    # margin = |w|_1-steep along the signs of w: it reaches 0 at |m| / |w|_1.
    w = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    x = torch.randn(300, 3, generator=seeded(3), dtype=torch.float64)
    y = torch.randint(0, 2, (300,), generator=seeded(4))
    found = find_boundary(lambda z: z @ w, x, y, 0.3, 0.4, 0.05, 40, box=None, random_start=False)
    reach = (x @ w).abs() / 3.5
    correct = (torch.where(y > 0, 1.0, -1.0) * (x @ w)) > 0
    expected = reach < torch.where(correct, 0.3, 0.4)
    assert torch.equal(found.crossed, expected)
    assert torch.equal(found.rows, expected.nonzero()[:, 0])


def test_rows_that_crossed_are_not_evaluated_again_and_known_values_are_used():
    net = classifier()
    x, y = batch()
    counter = RowCounter(net)
    found = find_boundary(counter, x, y, 0.2, 0.3, 0.02, 30, generator=seeded())
    sizes = [len(b) for b in counter.batches]
    assert sizes[:2] == [200, 200]  # at the examples, at the random start
    walk = sizes[1:32]
    assert walk == sorted(walk, reverse=True)
    assert walk[-1] < 100
    # The search evaluates no ends: first batch of it is the first point between them, not 2 x rows.
    search = sizes[32:]
    m = int(found.crossed.sum())
    assert search[0] <= m
    assert search[-1] == m  # the gradient at the answers
    assert sum(search[:-1]) == int(found.result.iterations.sum())
    # One small step is nearly linear: about one evaluation a row.
    assert sum(search[:-1]) < 3 * m


def test_drawing_is_reproducible_and_independent_of_the_other_rows():
    net = classifier()
    x, y = batch()
    first = find_boundary(net, x, y, 0.2, 0.3, 0.02, 10, generator=seeded(7))
    again = find_boundary(net, x, y, 0.2, 0.3, 0.02, 10, generator=seeded(7))
    assert same_bits(first.result.points, again.result.points)
    other = find_boundary(net, x, y, 0.2, 0.3, 0.02, 10, generator=seeded(8))
    assert not torch.equal(first.result.points[:5], other.result.points[:5])


def test_step_scale_and_per_row_settings():
    w = torch.ones(2, dtype=torch.float64)
    x = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.445, 0.445]], dtype=torch.float64)

    def field(z):
        return z @ w - 0.94  # margin 0.06 at the first two, -0.05 at the third

    y = torch.ones(3, dtype=torch.int64)
    # A step changes the margin by twice its length.
    few = {"iters": 1, "random_start": False}
    assert find_boundary(field, x, y, 0.4, 0.4, 0.02, **few).rows.tolist() == []
    assert find_boundary(field, x, y, 0.4, 0.4, 0.04, **few).rows.tolist() == [0, 1, 2]
    # Scaled by eps / step_eps on correct rows alone.
    scaled = find_boundary(field, x, y, 0.4, 0.4, 0.02, step_eps=0.2, **few)
    assert scaled.rows.tolist() == [0, 1]
    assert find_boundary(field, x, y, 0.4, 0.4, 0.04, step_eps=0.8, **few).rows.tolist() == [2]
    eps = torch.tensor([0.4, 0.01, 0.4])
    assert find_boundary(field, x, y, eps, eps, 0.04, **few).rows.tolist() == [0, 2]
    steps = torch.tensor([0.001, 0.04, 0.04])
    assert find_boundary(field, x, y, 0.4, 0.4, steps, **few).rows.tolist() == [1, 2]
    # Two steps; and none, where only the random start can have crossed.
    two, none = few | {"iters": 2}, few | {"iters": 0}
    assert find_boundary(field, x, y, 0.4, 0.4, 0.02, **two).rows.tolist() == [0, 1, 2]
    assert find_boundary(field, x, y, 0.4, 0.4, 0.02, **none).rows.tolist() == []
    assert len(find_boundary(field, x, y, 0.4, 0.4, 0.02, iters=0, generator=seeded(3))) > 0


def test_a_tie_counts_as_wrong_and_is_its_own_boundary_point():
    x = torch.full((1, 2), 0.5, dtype=torch.float64)
    found = find_boundary(lambda z: z[:, 0] - 0.5, x, torch.tensor([1]), random_start=False)
    assert found.correct.tolist() == [False]
    assert found.margins.tolist() == [0]
    assert found.result.residual.item() <= 1e-5


def test_points_that_stay_far_from_zero_are_dropped():
    # The margin jumps from 1 to -1: the search ends at the jump with |margin| = 1.
    def field(z):
        return torch.where(z[:, 0] > 0.5, 1.0, -1.0).double() + 0 * z[:, 0] + 1e-9 * z[:, 0]

    x = torch.full((3, 2), 0.52, dtype=torch.float64)
    y = torch.ones(3, dtype=torch.int64)
    found = find_boundary(field, x, y, random_start=False)
    assert len(found) == 0
    assert found.crossed.tolist() == [True] * 3
    kept = find_boundary(field, x, y, random_start=False, keep_below=2.0)
    assert kept.result.counts() == {"STALLED": 3}


def test_bad_rows_have_no_point_and_leave_the_others_alone():
    net = classifier()
    x, y = batch(20)
    settings = {"random_start": False, "iters": 20}
    good = find_boundary(net, x, y, **settings)
    bad = x.clone()
    bad[4] = torch.nan
    found = find_boundary(net, bad, y, **settings)
    assert 4 not in found.rows.tolist()
    keep = good.rows != 4
    assert torch.equal(found.rows, good.rows[keep])
    torch.testing.assert_close(found.result.points, good.result.points[keep])


def test_nothing_found_and_no_examples():
    net = classifier()
    x, y = batch(10)
    found = find_boundary(net, x, y, 0.0, 0.0)
    assert len(found) == 0
    assert found.result.points.shape == (0, 6)
    assert found.margins.shape == (10,)
    empty = find_boundary(net, x[:0], y[:0])
    assert len(empty) == 0
    saturated = find_boundary(lambda z: torch.ones(len(z), 3).double() * z.new_tensor([9, 0, 0]) +
                              0 * z[:, :1], x, torch.zeros(10, dtype=torch.int64))  # fmt: skip
    assert len(saturated) == 0


def test_nothing_of_the_caller_changes():
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5),
                        nn.Linear(16, 3)).double()  # fmt: skip
    net(torch.randn(50, 6).double())
    state = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = batch(30, classes=3)
    kept = x.clone()
    calls = []
    for p in net.parameters():
        p.register_hook(lambda g: calls.append(g))
    found = find_boundary(net, x, y)
    assert net.training
    assert not calls
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert same_bits(x, kept)
    assert not found.result.points.requires_grad
    with torch.inference_mode():
        inside = find_boundary(net, x, y, random_start=False)
    p = ls.sample_network(margin_field(net, y[inside.rows]), inside.result)
    p.sum().backward()
    assert any(q.grad is not None and q.grad.any() for q in net.parameters())


def test_examples_that_all_have_no_margin_have_no_point():
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 3)
            nn.init.constant_(self.last.bias, float("nan"))

        def forward(self, x):
            return self.last(x.view(x.size(0), -1))  # which no batch of nothing can take

    found = find_boundary(Viewed(), torch.rand(6, 1, 2, 2), torch.zeros(6).long(), 0.3, 0.3)
    assert len(found.rows) == 0


def test_a_binary_network_that_ends_with_squeeze_when_one_row_is_left():
    net, x = nn.Linear(4, 1), torch.randn(8, 4)  # at different distances, so one crosses last
    y = (net(x)[:, 0] > 0).long()
    settings = dict(box=None, random_start=False)
    expected = find_boundary(net, x, y, 9.0, 9.0, 0.2, 40, **settings)
    found = find_boundary(lambda x: net(x).squeeze(), x, y, 9.0, 9.0, 0.2, 40, **settings)
    assert len(found.rows) == 8
    assert torch.equal(found.rows, expected.rows)
    torch.testing.assert_close(found.result.points, expected.result.points)


def test_what_is_found_under_autocast_is_true_in_full_precision():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))
    x = torch.rand(1500, 16)
    y = net(x).argmax(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = find_boundary(net, x, y, 0.3, step=0.02, iters=20, random_start=False)
    exact = margin(net(found.result.points), y[found.rows]).detach()
    torch.testing.assert_close(found.result.values[:, 0], exact, rtol=0, atol=1e-6)
    assert (exact[found.result.converged].abs() <= 1.2e-5).all()
    assert found.result.converged.float().mean() > 0.8  # some ends were across by rounding alone


def test_steps_shrink_geometrically():
    """Rows that never cross end at x minus the sum of the lengths, 0.16 + 0.08 + 0.04 + 0.02."""
    x = torch.zeros(2, 3, dtype=torch.float64)
    y = torch.ones(2, dtype=torch.int64)

    def ends(iters, last):
        return find_boundary(
            lambda z: z.sum(1) + 9, x, y, 1.0, 1.0, 0.16, iters,
            step_last=last, box=None, random_start=False,
        ).ends  # fmt: skip

    torch.testing.assert_close(ends(4, 0.02), torch.full_like(x, -0.3))
    per_row = ends(4, torch.tensor([0.16, 0.02]))
    torch.testing.assert_close(per_row[:, 0], torch.tensor([-0.64, -0.3]).double())
    torch.testing.assert_close(ends(1, 0.02), torch.full_like(x, -0.16))


def test_the_walk_keeps_the_last_place_on_its_own_side():
    net = classifier()
    x, y = batch(50)
    margins = margin(net(x), y).detach()
    correct = margins > 0

    def field(points, rows):
        return margin(net(points), y[rows])

    eps, steps = torch.full((50,), 0.3).double(), torch.full((50,), 0.03).double()
    start = (x + 0.3 * (2 * torch.rand(x.shape, generator=seeded()).double() - 1)).clamp(0, 1)
    alike = torch.ones_like(steps)
    before, after, values, crossed = _walk(
        field, x, start, margins, correct, eps, steps, alike, 20, (0.0, 1.0)
    )
    here = margin(net(before), y).detach()
    there = margin(net(after), y).detach()
    torch.testing.assert_close(values[crossed, 0], here[crossed])
    torch.testing.assert_close(values[crossed, 1], there[crossed])
    assert ((here > 0) == correct)[crossed].all()
    assert ((there > 0) != correct)[crossed].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(3, dtype=torch.int64)}, r"y: expected shape \(n,\) = \(2,\)"),
        ({"y": torch.tensor([0, 4])}, "y: expected values in 0 ... 3"),
        ({"y": torch.zeros(2)}, "y: expected an integer dtype"),
        ({"eps_correct": -0.1}, "eps_correct: expected finite lengths >= 0"),
        ({"eps_wrong": torch.zeros(5)}, "eps_wrong: expected a number"),
        ({"step": 0.0}, "step: expected finite lengths > 0"),
        ({"iters": -1}, "iters: expected an integer >= 0"),
        ({"step_last": 0.0}, "step_last: expected finite lengths > 0"),
        ({"step_eps": 0.0}, "step_eps: expected a length > 0"),
        ({"box": (1.0, 0.0)}, "box: expected low <= high"),
        (
            {"x": 3 * torch.ones(2, 6).double()},
            r"x: expected values within box = \(0.0, 1.0\), got",
        ),
        ({"keep_below": 0.0}, "keep_below: expected a number > 0"),
        ({"variant": "secant"}, "variant: expected one of"),
    ],
)
def test_refusals(change, message):
    arguments = {"fn": classifier(), "x": torch.rand(2, 6).double(), "y": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        find_boundary(**(arguments | change))
