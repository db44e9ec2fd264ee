"""Eq. 11 and Eq. 12: against the linear SVM, against formulas by hand, and without any point."""

import numpy as np
import problems
import pytest
import torch
from sklearn.svm import SVC
from torch import nn

import levelset_ext as ls
from levelset_ext.losses import geometric_svm, robust, svm_samples
from levelset_ext.losses.robust import boundary_distance
from levelset_ext.samplers import find_boundary

DTYPE = torch.float64


class Linear(nn.Module):
    """w . x + b, as one output."""

    def __init__(self, w, b):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=DTYPE))
        self.b = nn.Parameter(torch.tensor(b, dtype=DTYPE))

    def forward(self, x):
        return x @ self.w + self.b


def linear_svm(net, x, y, lam):
    """Eq. 10."""
    return (1 - y * net(x)).clamp(min=0).mean() + lam * net.w.square().sum()


def gradients(loss, net):
    return torch.autograd.grad(loss, list(net.parameters()))


def two_clouds(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = 0.35 * torch.randn(n, 2, generator=generator, dtype=DTYPE)
    y = torch.where(torch.arange(n) < n // 2, 1, -1)
    return y[:, None] * torch.tensor([1.2, 0.8], dtype=DTYPE) + noise, y


# --- geometric SVM --------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 3, 50])
@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_affine_with_l2_and_alpha_minus_2_is_the_linear_svm(d, lam):
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(30, d, generator=generator, dtype=DTYPE)
    y = torch.where(torch.rand(30, generator=generator) > 0.5, 1, -1)
    net = Linear(torch.randn(d, generator=generator, dtype=DTYPE).tolist(), 0.3)
    ours = geometric_svm(net, x, y, alpha=-2.0, lam=lam, distance="l2", tol=1e-12)
    theirs = linear_svm(net, x, y, lam)
    torch.testing.assert_close(ours.total, theirs, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(ours.total, net), gradients(theirs, net), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.margin, 1 / net.w.detach().norm())
    assert ours.used == 1


def test_training_ends_at_the_boundary_of_scikit_learn():
    x, y = two_clouds()
    n, lam = len(x), 0.05
    svc = SVC(kernel="linear", C=1 / (2 * n * lam), tol=1e-10).fit(x.numpy(), y.numpy())
    net = Linear([0.5, -0.2], 0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    mean = [torch.zeros_like(p) for p in net.parameters()]
    steps, tail = 1500, 500
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 / (1 + 0.02 * step)  # the hinge has a kink at its minimum
        optimizer.zero_grad()
        loss = geometric_svm(net, x, y, alpha=-2.0, lam=lam, distance="l2", max_iters=3, tol=1e-12)
        loss.total.backward()
        optimizer.step()
        if step >= steps - tail:
            for m, p in zip(mean, net.parameters(), strict=True):
                m += p.detach() / tail
    w, b = (m.numpy() for m in mean)
    np.testing.assert_allclose(w, svc.coef_[0], atol=2e-3)
    np.testing.assert_allclose(b, svc.intercept_[0], atol=2e-3)


def test_defaults_are_linf_and_alpha_minus_1_and_labels_may_be_0_and_1():
    x, y = two_clouds(10)
    net = Linear([0.7, -2.0], 0.2)
    loss = geometric_svm(net, x, (y > 0).long(), lam=0.3)
    # In L_inf the projection along w is |w|_inf / |w|^2 long per unit of F.
    delta = 2.0 / net.w.detach().square().sum()
    with torch.no_grad():
        hinge = (1 - y * net(x)).clamp(min=0).mean()
    torch.testing.assert_close(loss.hinge, hinge, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(loss.regularizer, 0.3 / delta)
    torch.testing.assert_close(loss.total.detach(), loss.hinge + loss.regularizer)


def test_labels_may_be_unsigned():
    x, y = two_clouds(10)
    net, y = Linear([0.7, -2.0], 0.2), (y > 0).long()
    found = find_boundary(net, x, y, 9.0, 9.0, 0.1, box=None, random_start=False)
    for of in (
        lambda labels: geometric_svm(net, x, labels).total,
        lambda labels: robust(net, x, labels, found, eps=9.0).total,
    ):
        assert torch.equal(of(y.to(torch.uint16)), of(y))


def test_two_logits_are_their_difference():
    x, y = two_clouds(12)
    one = Linear([0.7, -2.0], 0.2)

    def two(z):
        value = one(z)
        return torch.stack([-0.25 * value, 0.75 * value], 1)

    a, b = (geometric_svm(fn, x, y, lam=0.1).total for fn in (one, two))
    torch.testing.assert_close(a, b)
    for g, h in zip(gradients(a, one), gradients(b, one), strict=True):
        torch.testing.assert_close(g, h)


def test_a_single_row_of_a_network_that_ends_with_squeeze():
    x, y = two_clouds(12)
    net = Linear([0.7, -2.0], 0.2)
    squeezed = lambda z: net(z).squeeze()  # noqa: E731
    x, y = x[:1], y[:1]
    a, b = (geometric_svm(fn, x, y).total for fn in (net, squeezed))
    torch.testing.assert_close(a, b)
    samples = find_boundary(net, x, y, 9.0, 9.0, 0.1, box=None)
    assert len(samples) == 1
    a, b = (robust(fn, x, y, samples, eps=9.0).total for fn in (net, squeezed))
    assert a > 0
    torch.testing.assert_close(a, b)


def test_samples_can_be_handed_in_and_delta_is_the_smaller_side():
    class Bent(nn.Module):
        """Steeper above 0 than below: level 1 is nearer to the boundary than level -1."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(1.0, dtype=DTYPE))

        def forward(self, x):
            z = self.w * x[:, 0]
            return torch.where(z > 0, 4 * z, z)

    net = Bent()
    x = torch.tensor([[0.5, 0.0], [-0.4, 1.0]], dtype=DTYPE)
    samples = svm_samples(net, x)
    assert samples.below.points[:, 0].tolist() == pytest.approx([-1, -1], abs=1e-4)
    loss = geometric_svm(net, x, torch.tensor([1, -1]), samples, lam=1.0)
    torch.testing.assert_close(loss.margin, torch.tensor(0.25, dtype=DTYPE), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        loss.total, geometric_svm(net, x, torch.tensor([1, -1]), lam=1.0).total
    )
    with pytest.raises(ValueError, match="samples: expected those of N = 1"):
        geometric_svm(net, x[:1], torch.tensor([1]), samples)


def test_the_samples_of_the_svm_evaluate_no_point_twice():
    fn = problems.RowCounter(problems.mlp())
    samples = svm_samples(fn, problems.points(20))
    assert samples.boundary.converged.all()
    points = torch.cat(fn.batches)
    assert len(points) == len(points.unique(dim=0))
    torch.testing.assert_close(samples.values, fn.fn(problems.points(20))[:, 0])


def test_a_field_without_a_gradient_gives_zero_with_a_graph():
    net = Linear([0.0, 0.0], 1.0)
    loss = geometric_svm(net, torch.randn(4, 2, dtype=DTYPE), torch.ones(4, dtype=torch.int64))
    assert loss.total == 0
    assert loss.used == 0
    assert all(not g.any() for g in gradients(loss.total, net))


def test_one_side_of_the_boundary_is_enough():
    class Saturated(nn.Module):
        """Goes on below 0, and is flat from 1/2 on: there is no level 1."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.0, dtype=DTYPE))

        def forward(self, x):
            return (self.w * x[:, 0]).clamp(max=0.5)

    x = torch.tensor([[0.2, 0.0], [-0.4, 1.0]], dtype=DTYPE)
    loss = geometric_svm(Saturated(), x, torch.tensor([1, -1]), lam=1.0)
    assert loss.used == 1
    torch.testing.assert_close(loss.margin, torch.tensor(0.5, dtype=DTYPE))
    torch.testing.assert_close(loss.regularizer, torch.tensor(2.0, dtype=DTYPE))


@pytest.mark.parametrize("distance", ["linf", "l2"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_side_that_is_not_finite_leaves_the_gradient_to_the_other(bad, distance):
    x, y = two_clouds(4)
    net = Linear([0.7, -2.0], 0.2)
    samples = svm_samples(net, x)
    good = geometric_svm(net, x, y, samples, lam=0.1, distance=distance).total
    samples.below.points[0] = bad
    loss = geometric_svm(net, x, y, samples, lam=0.1, distance=distance)
    assert loss.used == 1
    torch.testing.assert_close(loss.total, good)  # both sides are as far
    for g, h in zip(gradients(loss.total, net), gradients(good, net), strict=True):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_first_row_that_is_none_gives_zeros_as_gradients(rows):
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.rand(rows, 2, dtype=DTYPE), torch.zeros(rows, dtype=torch.int64)
    x[0] = torch.nan
    samples = find_boundary(net, x, y, 0.0, 0.0, 0.01, 2)
    flat = svm_samples(net, torch.full_like(x, torch.nan))
    for loss in (robust(net, x, y, samples), geometric_svm(net, x, y, flat)):
        assert loss.total == 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(loss.total, net))


def test_bad_rows_leave_the_others_alone():
    x, y = two_clouds(6)
    net = Linear([0.7, -2.0], 0.2)
    good = geometric_svm(net, x[1:], y[1:], lam=0.1)
    x[0, 0] = torch.nan
    loss = geometric_svm(net, x, y, lam=0.1)
    torch.testing.assert_close(loss.total * 6, good.total * 5)
    for a, b in zip(gradients(loss.total, net), gradients(good.total, net), strict=True):
        torch.testing.assert_close(a * 6, b * 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.0}, "alpha: expected an exponent < 0"),
        ({"lam": -1.0}, "lam: expected a number >= 0"),
        ({"distance": "l1"}, "distance: expected one of linf, l2"),
        ({"y": torch.tensor([0, 2])}, "y: expected 0 and 1"),
        ({"y": torch.tensor([1])}, "y: expected shape"),
    ],
)
def test_svm_refusals(change, message):
    arguments = {"x": torch.zeros(2, 2, dtype=DTYPE), "y": torch.tensor([0, 1])} | change
    with pytest.raises(ValueError, match=message):
        geometric_svm(Linear([1.0, 0.0], 0.0), arguments.pop("x"), arguments.pop("y"), **arguments)


def test_svm_refuses_many_classes():
    with pytest.raises(ValueError, match="binary network"):
        geometric_svm(nn.Linear(2, 3), torch.zeros(2, 2), torch.tensor([0, 1]))


# --- robust loss ----------------------------------------------------------------------------------


def affine_case(d=4, n=12, seed=0):
    """A binary linear classifier, examples on both sides near the boundary, and their samples."""
    generator = torch.Generator().manual_seed(seed)
    net = Linear((torch.randn(d, generator=generator, dtype=DTYPE) + 0.1).tolist(), 0.05)
    x = 0.2 * torch.randn(n, d, generator=generator, dtype=DTYPE)
    y = torch.randint(0, 2, (n,), generator=generator)
    samples = find_boundary(net, x, y, 0.5, 0.6, 0.05, 30, box=None, generator=generator, tol=1e-12)
    return net, x, y, samples


@pytest.mark.parametrize("distance", ["rho", "linf", "l2", "l1"])
def test_robust_is_equation_12(distance):
    net, x, y, samples = affine_case()
    assert 0 < samples.correct.sum() < len(samples) <= 12
    eps, lam = torch.rand(12, dtype=DTYPE), torch.rand(12, dtype=DTYPE)
    loss = robust(net, x, y, samples, eps=eps, lam=lam, distance=distance)
    expected = torch.zeros((), dtype=DTYPE)
    for k, row in enumerate(samples.rows.tolist()):
        offset = (x[row] - samples.result.points[k]).abs()
        d = {
            "rho": offset[net.w.abs().argmax()],
            "linf": offset.max(),
            "l2": offset.norm(),
            "l1": offset.sum(),
        }[distance]
        label_sign = 1 if y[row] > 0 else -1
        sign = 1 if label_sign * net(x[row : row + 1]) > 0 else -1
        expected = expected + lam[row] * (eps[row] - sign * d).clamp(min=0)
    torch.testing.assert_close(loss.total, expected.detach() / 12)
    torch.testing.assert_close(loss.correct + loss.wrong, loss.total.detach())


@pytest.mark.parametrize("distance", ["rho", "linf", "l2", "l1"])
def test_robust_gradient_is_that_of_points_moving_by_equation_8(distance):
    net, x, y, samples = affine_case()
    loss = robust(net, x, y, samples, eps=0.9, lam=(2.0, 0.5), distance=distance)
    got = gradients(loss.total, net)
    # p moves by -w (dw . p + db) / |w|^2, and the distance by its own derivative at p.
    w = net.w.detach()
    expected_w, expected_b = torch.zeros_like(w), torch.zeros((), dtype=DTYPE)
    for k, row in enumerate(samples.rows.tolist()):
        p = samples.result.points[k].clone().requires_grad_()
        one = samples.result[k]
        d = boundary_distance(x[row : row + 1], p[None], one, distance)
        sign = 1.0 if samples.correct[k] else -1.0
        weight = 2.0 if samples.correct[k] else 0.5
        term = weight * (0.9 - sign * d).clamp(min=0).sum() / 12
        (by_p,) = torch.autograd.grad(term, p)
        along = -(by_p @ w) / (w @ w)
        expected_w += along * p.detach()
        expected_b += along
    torch.testing.assert_close(got[0], expected_w)
    torch.testing.assert_close(got[1], expected_b)


def test_a_step_pushes_the_boundary_from_correct_and_over_wrong_examples():
    net, x, y, samples = affine_case(n=40, seed=3)

    def mean_distance(correct):
        label_sign = torch.where(y > 0, 1.0, -1.0).to(DTYPE)
        with torch.no_grad():
            signed = label_sign * net(x) / net.w.norm()
        mask = (samples.margins > 0) == correct
        chosen = torch.zeros(40, dtype=torch.bool)
        chosen[samples.rows] = True
        return signed[mask & chosen].mean()

    for correct, weights in ((True, (1.0, 0.0)), (False, (0.0, 1.0))):
        before = mean_distance(correct)
        loss = robust(net, x, y, samples, eps=2.0, lam=weights, distance="l2")
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients(loss.total, net), strict=True):
                p -= 0.05 * g
        assert mean_distance(correct) > before


def test_rho_is_at_most_linf():
    _, x, _, samples = affine_case(n=30)
    rho, linf, l2, l1 = (
        boundary_distance(x[samples.rows], samples.result.points, samples.result, d)
        for d in ("rho", "linf", "l2", "l1")
    )
    assert (rho <= linf).all()
    assert (linf <= l2 * (1 + 1e-12)).all()
    assert (l2 <= l1 * (1 + 1e-12)).all()


def test_no_row_bracketed_is_zero_with_a_graph():
    class Reshaping(nn.Module):
        """Cannot take a batch without rows."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x.view(x.size(0), -1))

    net = Reshaping()
    x, y = torch.rand(5, 2, 2), torch.zeros(5, dtype=torch.int64)
    samples = find_boundary(net, x, y, 0.0, 0.0, 0.01, 2)
    assert len(samples) == 0
    loss = robust(net, x, y, samples)
    assert loss.total == 0
    loss.total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())
    with pytest.raises(ValueError, match="distance: expected one of"):
        robust(net, x, y, samples, distance="l3")


def test_no_row_of_a_network_without_finite_values_is_zero():
    net = Linear([1.0, 1.0], 1e308)
    x, y = torch.full((3, 2), 1e308, dtype=DTYPE), torch.ones(3, dtype=torch.int64)
    assert torch.isinf(net(x)).all()
    found = find_boundary(net, x, y, 0.0, 0.0, 0.1, 2, box=None)
    assert robust(net, x, y, found).total == 0


def test_all_wrong_rows_and_saturated_correct_rows():
    net, x, y, samples = affine_case()
    wrong = robust(net, x, y, samples, eps=0.4, lam=(0.0, 1.0))
    assert wrong.correct == 0
    assert wrong.wrong > 0
    far = robust(net, x, y, samples, eps=0.0, lam=(1.0, 0.0))  # every correct row is past its eps
    assert far.total == 0
    assert all(not g.any() for g in gradients(far.total, net))


def test_robust_refusals():
    net, x, y, samples = affine_case()
    for change, message in (
        ({"eps": -0.1}, "eps: expected numbers >= 0"),
        ({"lam": torch.ones(3)}, "lam: expected a number"),
        ({"eps": (0.1, 0.2, 0.3)}, "eps: expected a pair"),
        ({"distance": "l3"}, "distance: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            robust(net, x, y, samples, **change)
    with pytest.raises(ValueError, match="samples: expected those of the batch"):
        robust(net, x[:3], y[:3], samples)


def test_batch_norm_uses_one_set_of_statistics_and_keeps_it():
    net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).double()
    net(torch.randn(64, 4, dtype=DTYPE) + 0.5)
    net.train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = torch.rand(32, 4, dtype=DTYPE), torch.randint(0, 3, (32,))
    samples = find_boundary(net, x, y)
    assert len(samples) > 5
    assert samples.result.residual[samples.result.converged].max() <= 1e-5
    loss = robust(net, x, y, samples)
    loss.total.backward()
    assert net.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert any(p.grad.any() for p in net.parameters())
    # The points are on the boundary of the network that p(theta) evaluates.
    values = ls.samplers.margin_field(net, y[samples.rows])(samples.result.points)
    torch.testing.assert_close(values, samples.result.values[:, 0])
