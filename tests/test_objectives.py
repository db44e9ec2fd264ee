"""The objectives that the method is compared with: closed forms, finite differences, no traces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import levelset_ext as ls
from levelset_ext import attacks
from levelset_ext.objectives.adversarial import MMA, Madry, Trades
from levelset_ext.objectives.base import Step
from levelset_ext.objectives.linearized import CURE, LLR, LargeMargin
from levelset_ext.objectives.plain import CrossEntropy, Hinge
from levelset_ext.samplers import margin_field

DTYPE = torch.float64

# Small, and with the forwards that a step makes: in eval mode without gradients of parameters, and
# in the mode of the network.
OBJECTIVES = {
    "cross-entropy": (CrossEntropy(), 0, 1),
    "hinge": (Hinge(), 0, 1),
    "madry": (Madry(0.1, 0.03, 4), 4, 1),
    "madry-margin": (Madry(0.1, 0.03, 4, "margin"), 4, 1),
    "trades": (Trades(2.0, 0.1, 0.03, 4), 5, 2),
    "mma": (MMA(0.2, 0.05, 4), None, 1),
    "large-margin": (LargeMargin(0.5), 0, 1),
    "large-margin-full": (LargeMargin(0.5, "linf", False), 0, 1),
    "llr": (LLR(0.1, steps=3, step=0.05), 4, 2),
    "llr-grad": (LLR(0.1, steps=3, step=0.05, penalty="grad_l2"), 4, 2),
    "gradient-alone": (LLR(lam=0.0, penalty="grad_l2"), 0, 1),
    "cure": (CURE(0.2), 0, 2),
}
every = pytest.mark.parametrize("name", OBJECTIVES)


class Affine(nn.Module):
    """W x + b over the flattened image; one logit (n,) if W is a vector."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.transpose(0, -1) + self.bias


class Recording(nn.Module):
    """An MLP that notes of each forward the rows, its mode and whether weights want gradients."""

    def __init__(
        self, classes: int = 3, inputs: int = 4, activation: type[nn.Module] = nn.Softplus
    ):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, 6), nn.Linear(6, classes)
        self.activation = activation()
        self.log: list[tuple[int, bool, bool]] = []
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.log.append((len(x), self.training, self.first.weight.requires_grad))
        return self.last(self.activation(self.first(x.flatten(1))))


def binary(n: int = 10, d: int = 5, seed: int = 0) -> tuple[Affine, Tensor, Tensor, Tensor]:
    """One affine logit, images far from 0 and 1, labels that are mostly right, and y = +-1."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(d, generator=g, dtype=DTYPE)
    x = 0.5 + 0.2 * (torch.rand(n, d, generator=g, dtype=DTYPE) - 0.5)
    net = Affine(w, -0.5 * w.sum() + 0.02)
    y = (net(x) > 0).long().detach()
    y[0] = 1 - y[0]
    return net, x, y, 2.0 * y - 1


def two(net: Affine) -> Affine:
    """The same classifier with two logits."""
    w = torch.stack([-0.25 * net.weight.detach(), 0.75 * net.weight.detach()])
    return Affine(w, torch.stack([-0.25 * net.bias.detach(), 0.75 * net.bias.detach()]))


def gradients(loss: Tensor, net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True))


def batch(n: int = 7, d: int = 4, classes: int = 3) -> tuple[Tensor, Tensor]:
    return torch.rand(n, d, dtype=DTYPE), torch.randint(0, classes, (n,))


def by_differences(loss: Callable[[], Tensor], net: nn.Module, h: float = 1e-5) -> list[Tensor]:
    """The gradient of a loss by central differences in every parameter."""
    found = []
    for p in net.parameters():
        g = torch.zeros_like(p)
        for k in range(p.numel()):
            values = []
            for side in (h, -h):
                with torch.no_grad():
                    p.view(-1)[k] += side
                values.append(float(loss().detach()))
                with torch.no_grad():
                    p.view(-1)[k] -= side
            g.view(-1)[k] = (values[0] - values[1]) / (2 * h)
        found.append(g)
    return found


# --- plain ----------------------------------------------------------------------------------------


def test_cross_entropy_and_hinge() -> None:
    net = Affine(torch.randn(4, 5, dtype=DTYPE), torch.randn(4, dtype=DTYPE))
    x, y = batch(9, 5, 4)
    f = net(x)
    expected = -f.log_softmax(1).gather(1, y[:, None]).mean()
    torch.testing.assert_close(CrossEntropy()(net, x, y).loss, expected)
    others = f.scatter(1, y[:, None], -torch.inf).amax(1)
    margins = f.gather(1, y[:, None])[:, 0] - others
    step = Hinge()(net, x, y)
    torch.testing.assert_close(step.loss, (1 - margins).clamp(min=0).mean())
    assert float(step.figures["accuracy"]) == pytest.approx(float((margins > 0).double().mean()))


def test_cross_entropy_and_hinge_of_one_logit() -> None:
    net, x, y, sign = binary()
    f = net(x)
    torch.testing.assert_close(
        CrossEntropy()(net, x, y).loss,
        functional.binary_cross_entropy_with_logits(f, y.to(DTYPE)),
    )
    torch.testing.assert_close(Hinge()(net, x, y).loss, (1 - sign * f).clamp(min=0).mean())


# --- adversarial ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["xent", "margin"])
@pytest.mark.parametrize("logits", [1, 2])
def test_madry_on_an_affine_binary_network_is_exact(attack: str, logits: int) -> None:
    one, x, y, sign = binary()
    net = one if logits == 1 else two(one)
    eps = 0.07
    step = Madry(eps, 0.02, 8, attack)(net, x, y)
    worst = sign * one(x) - eps * one.weight.abs().sum()
    expected = functional.softplus(-worst).mean()
    torch.testing.assert_close(step.loss, expected)
    assert float(step.figures["accuracy"]) == pytest.approx(float((worst > 0).double().mean()))
    if logits == 1:  # Danskin: the worst offset may be held
        for a, b in zip(gradients(step.loss, net), gradients(expected, one), strict=True):
            torch.testing.assert_close(a, b)


def test_madry_with_steps_that_shrink() -> None:
    one, x, y, sign = binary()
    start = torch.zeros_like(x)
    objective = Madry(0.5, 0.04, 3, warm_start=1.0, step_last=0.01)
    step = objective(one, x, y, offsets=start)
    moved = (0.04 + 0.02 + 0.01) * one.weight.abs().sum()
    torch.testing.assert_close(step.loss, functional.softplus(moved - sign * one(x)).mean())


def test_a_warm_start_of_madry_from_a_larger_box_stays_in_its_own() -> None:
    one, x, y, sign = binary()
    worst = -sign[:, None] * one.weight.detach().sign()
    objective = Madry(0.3, 0.01, 3, warm_start=1.0, keep_best=True)
    step = objective(one, x, y, offsets=0.45 * worst)
    assert step.offsets is not None
    inside = (x + 0.3 * worst).clamp(0, 1) - x
    torch.testing.assert_close((x + step.offsets).clamp(0, 1) - x, inside)
    assert float(step.offsets.abs().max()) < 0.3 + 1e-12


@pytest.mark.parametrize(("iters", "moved"), [(1, 0.02), (2, 0.025)])
def test_the_first_and_the_last_step_of_madry_grow_over_the_warmup(
    iters: int, moved: float
) -> None:
    one, _, y, _ = binary()
    x = torch.full((len(y), one.weight.shape[0]), 0.5, dtype=DTYPE)
    objective = Madry(0.4, 0.04, iters, warmup=0.5, warm_start=1.0, step_last=0.01)
    step = objective(one, x, y, offsets=torch.zeros_like(x), progress=0.25)
    assert step.offsets is not None
    torch.testing.assert_close(step.offsets.abs(), torch.full_like(x, moved))


def test_trades_without_weight_is_cross_entropy() -> None:
    net, (x, y) = Recording(), batch()
    step = Trades(0.0, 0.1, 0.03, 3)(net, x, y)
    plain = CrossEntropy()(net, x, y)
    torch.testing.assert_close(step.loss, plain.loss)
    for a, b in zip(gradients(step.loss, net), gradients(plain.loss, net), strict=True):
        torch.testing.assert_close(a, b)
    assert step.figures["divergence"] > 0


def test_trades_of_a_constant_network_has_no_divergence() -> None:
    net = Affine(torch.zeros(3, 4, dtype=DTYPE), torch.randn(3, dtype=DTYPE))
    step = Trades(6.0, 0.1, 0.03, 3)(net, *batch())
    assert abs(float(step.figures["divergence"])) < 1e-15
    torch.testing.assert_close(step.loss.detach(), step.figures["cross_entropy"])


def test_trades_on_an_affine_network_is_the_divergence_of_a_corner() -> None:
    net, x, y, _ = binary(n=1)
    eps, beta = 0.1, 3.0
    step = Trades(beta, eps, 0.02, 12)(net, x, y)

    def loss(side: float) -> Tensor:
        f = net(x)
        # A corner as seen from the network's own weight: the offset is a constant.
        g = net(x + side * eps * net.weight.detach().sign())
        p, q = torch.sigmoid(f), torch.sigmoid(g)
        kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        return functional.binary_cross_entropy_with_logits(f, y.to(DTYPE)) + beta * kl.mean()

    # Which of the two PGD climbs depends on the noise it starts with.
    expected = min((loss(1.0), loss(-1.0)), key=lambda v: abs(float((v - step.loss).detach())))
    torch.testing.assert_close(step.loss, expected)
    for a, b in zip(gradients(step.loss, net), gradients(expected, net), strict=True):
        torch.testing.assert_close(a, b)


def test_the_search_of_trades_increases_the_divergence_from_x() -> None:
    """KL(f(x) || f(x')) and not the other way round, which has other gradients away from x."""
    # Divergences that are not small, where the two are not alike.
    net = Affine(2 * torch.randn(5, 4, dtype=DTYPE), 2 * torch.randn(5, dtype=DTYPE))
    x, y = batch(24, 4, 5)
    eps, length, steps = 0.5, 0.1, 7
    step = Trades(1.0, eps, length, steps)(net, x, y, generator=torch.Generator().manual_seed(3))

    def found(swapped: bool) -> Tensor:
        noise = torch.randn(x.shape, dtype=DTYPE, generator=torch.Generator().manual_seed(3))
        end = (x + 0.001 * noise).clamp(0, 1)
        p = net(x).detach().softmax(1)
        for _ in range(steps):
            end.requires_grad_()
            q = net(end).softmax(1)
            a, b = (q, p) if swapped else (p, q)
            (gradient,) = torch.autograd.grad((a * (a.log() - b.log())).sum(), end)
            end = (end.detach() + length * gradient.sign()).clamp(x - eps, x + eps).clamp(0, 1)
        q = net(end).detach().softmax(1)
        return (p * (p.log() - q.log())).sum(1).mean()

    torch.testing.assert_close(step.figures["divergence"], found(swapped=False))
    assert abs(float(found(swapped=True) - step.figures["divergence"])) > 1e-3


@pytest.mark.parametrize("logits", [1, 2])
@pytest.mark.parametrize("loss", ["xent", "slm"])
def test_mma_on_an_affine_network_finds_the_exact_distance(logits: int, loss: str) -> None:
    one, x, y, sign = binary(n=30)
    net = one if logits == 1 else two(one)
    margins, size = (sign * one(x)).detach(), one.weight.detach().abs().sum()
    d = margins / size
    correct = margins > 0
    eps_max = float(d[correct].sort().values[10:12].mean())  # no row lies at the side of the box
    near = correct & (d < eps_max)
    assert 0 < near.sum() < correct.sum() < 30
    step = MMA(eps_max, eps_max / 10, 12, tol=1e-12, loss=loss, clean_weight=0.25)(net, x, y)
    torch.testing.assert_close(
        step.figures["distance"], d[correct].clamp(max=eps_max).mean(), rtol=1e-9, atol=0
    )
    assert float(step.figures["crossed"]) == pytest.approx(float(near.double().mean()))
    assert float(step.figures["accuracy"]) == pytest.approx(float(correct.double().mean()))

    clean = functional.softplus(-sign * one(x))
    points = x - (d * sign)[:, None] * one.weight.detach().sign()
    at_boundary = -sign * one(points)  # the soft margin of two classes is the margin
    term = functional.softplus(at_boundary) if loss == "xent" else at_boundary
    margins_part = torch.where(near, term, 0.0).sum() + torch.where(correct, 0.0, clean).sum()
    expected = 0.25 * clean.mean() + 0.75 * margins_part / 30
    torch.testing.assert_close(step.loss, expected)
    if logits == 1:
        for a, b in zip(gradients(step.loss, net), gradients(expected, one), strict=True):
            torch.testing.assert_close(a, b)


def test_soft_logit_margin_climbs_where_cross_entropy_has_underflowed() -> None:
    slm = attacks.OBJECTIVES["slm"]
    logits = torch.randn(6, 4, dtype=DTYPE, requires_grad=True)
    y = torch.randint(0, 4, (6,))
    values = slm(logits, y, None)
    for row, j in enumerate(y.tolist()):
        rest = [k for k in range(4) if k != j]
        expected = logits[row, rest].exp().sum().log() - logits[row, j]
        torch.testing.assert_close(values[row], expected)
    (ours,) = torch.autograd.grad(values.sum(), logits)
    losses = functional.cross_entropy(logits, y, reduction="none")
    (theirs,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(ours * (1 - (-losses.detach()).exp())[:, None], theirs)
    sure = torch.tensor([[500.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(slm(sure, torch.tensor([0]), None).sum(), sure)
    assert gradient.tolist() == [[-1.0, 1.0]]


def test_mma_soft_margin_of_many_classes_and_points_on_the_boundary() -> None:
    net, x = Recording(4), torch.rand(20, 4, dtype=DTYPE)
    with torch.no_grad():
        net.first.weight *= 3
        y = net(x).argmax(1)
    objective = MMA(0.6, 0.02, 30, tol=1e-9, search=40, loss="slm", clean_weight=0.0)
    walked = []

    def kept(points: Tensor) -> None:
        if points.shape[0] > 20:
            walked.append(points[20:])

    net.register_forward_pre_hook(lambda module, inputs: kept(inputs[0]))
    step = objective(net, x, y)
    assert step.figures["accuracy"] == 1
    points = walked[-1]
    assert float(step.figures["crossed"]) * 20 == len(points) > 0
    logits = net(points).detach()
    top = logits.topk(2, 1).values
    assert (top[:, 0] - top[:, 1]).abs().max() < 1e-8
    assert points.min() >= 0
    assert points.max() <= 1


def test_mma_without_a_correct_row_is_cross_entropy() -> None:
    net, x, y, _ = binary()
    y = 1 - y
    y[0] = 1 - y[0]
    step = MMA(0.1, 0.05, 2)(net, x, y)
    torch.testing.assert_close(step.loss, CrossEntropy()(net, x, y).loss)
    assert torch.isnan(step.figures["distance"])
    assert step.figures["crossed"] == 0


def test_eps_grows_over_the_warmup() -> None:
    net, x, y, sign = binary()
    objective = Madry(0.08, 0.02, 10, warmup=0.5)
    for progress, eps in ((0.0, 0.0), (0.25, 0.04), (0.5, 0.08), (1.0, 0.08)):
        expected = functional.softplus(eps * net.weight.abs().sum() - sign * net(x)).mean()
        torch.testing.assert_close(objective(net, x, y, progress=progress).loss, expected)
    start = Trades(6.0, 0.1, 0.01, 3, warmup=0.3)(net, x, y, progress=0.0)
    assert start.figures["divergence"] == 0
    start = MMA(0.1, 0.05, 2, warmup=0.3)(net, x, y, progress=0.0)
    assert start.figures["crossed"] == 0
    assert LLR(warmup=0.3)(net, x, y, progress=0.0).figures["gamma"] == 0
    half = MMA(0.1, 0.05, 2, warmup=1.0)(net, x, y, progress=0.5).figures["distance"]
    assert half <= 0.05


# --- large margin ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("linf", 1), ("l1", torch.inf)])
@pytest.mark.parametrize("constant", [True, False])
def test_large_margin_of_an_affine_network_is_the_exact_distance(
    norm: str, dual: float, constant: bool
) -> None:
    net = Affine(torch.randn(4, 5, dtype=DTYPE), torch.randn(4, dtype=DTYPE))
    x, y = batch(12, 5, 4)
    f = net(x)
    rows = net.weight[y][:, None] - net.weight[None]
    sizes = torch.linalg.vector_norm(rows, dual, dim=2)
    own = torch.arange(4) == y[:, None]
    sizes = torch.where(own, 1.0, sizes.detach() if constant else sizes)
    quotient = (f.gather(1, y[:, None]) - f) / sizes
    distance = torch.where(own, torch.inf, quotient).amin(1)
    expected = (0.8 - distance).clamp(min=0).mean()
    step = LargeMargin(0.8, norm, constant, eps=1e-14)(net, x, y)
    torch.testing.assert_close(step.loss, expected)
    torch.testing.assert_close(step.figures["distance"], distance.detach().mean())
    for a, b in zip(gradients(step.loss, net), gradients(expected, net), strict=True):
        torch.testing.assert_close(a, b)


def test_the_gradient_of_large_margin_is_of_one_boundary_where_two_are_as_near() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=DTYPE)
    net = Affine(weight, torch.tensor([2.0, 0.0, 0.0], dtype=DTYPE))
    x, y = torch.full((1, 2), 0.5, dtype=DTYPE), torch.zeros(1, dtype=torch.int64)
    step = LargeMargin(3.0, eps=1e-14)(net, x, y)
    torch.testing.assert_close(step.loss.detach(), torch.tensor(3.0 - 1.5, dtype=DTYPE))
    step.loss.backward()
    assert net.bias.grad is not None
    assert sorted(net.bias.grad.tolist()) == pytest.approx([-1.0, 0.0, 1.0])


def test_large_margin_of_one_logit() -> None:
    net, x, y, sign = binary()
    expected = (0.2 - sign * net(x) / net.weight.detach().norm()).clamp(min=0).mean()
    torch.testing.assert_close(LargeMargin(0.2, eps=1e-14)(net, x, y).loss, expected)


def test_large_margin_is_one_newton_iteration_on_the_margin() -> None:
    net, (x, y) = Recording(4), batch(15, 4, 4)
    field = margin_field(net, y)
    far = 1e3  # every row counts, so the loss is far minus the mean of the distances
    step = LargeMargin(far, "l2", classes=1, eps=1e-14)(net, x, y)

    newton = ls.project(field, x, 0.0, max_iters=1, tol=1e-12)
    sign = torch.sign(field(x).detach())
    length = (newton.points - x).norm(dim=1)
    torch.testing.assert_close(step.loss.detach(), far - (sign * length).mean())

    # Where that iteration ends, as a function of theta: Eq. 9 with p = x, J at x and c = 0.
    at_x = ls.project(field, x, 0.0, max_iters=0)
    at_x = dataclasses.replace(at_x, values=torch.zeros_like(at_x.values))
    p = ls.sample_network(field, at_x, frozen=True)
    torch.testing.assert_close(p.detach(), newton.points)
    ours = far - (sign * (x - p).norm(dim=1)).mean()
    for a, b in zip(gradients(step.loss, net), gradients(ours, net), strict=True):
        torch.testing.assert_close(a, b)
    # At the point that Newton converges to it is another gradient: one step is not the boundary.
    there = ls.LevelSetResult.cat(
        [ls.project(margin_field(net, y[k : k + 1]), x[k : k + 1], 0.0) for k in range(15)]
    )
    exact = far - (sign * (x - ls.sample_network(field, there)).norm(dim=1)).mean()
    assert not torch.allclose(gradients(exact, net)[0], gradients(ours, net)[0], rtol=1e-3)


def test_large_margin_looks_at_the_likeliest_rivals() -> None:
    net, (x, y) = Recording(5), batch(15, 4, 5)
    distances = [
        float(LargeMargin(classes=k)(net, x, y).figures["distance"]) for k in (1, 2, 4, 10)
    ]
    assert distances[0] >= distances[1] >= distances[2] == distances[3]


# --- LLR and CURE ---------------------------------------------------------------------------------


class WithLoss(nn.Module):
    """One logit with cross entropy u(x) = a . x + x^T A x + 2 > 0 for the label 0."""

    def __init__(self, square: list[list[float]]) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.7, -0.4], dtype=DTYPE))
        self.square = nn.Parameter(torch.tensor(square, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(torch.expm1(x @ self.a + ((x @ self.square) * x).sum(1) + 2))


def test_llr_and_cure_of_an_affine_loss() -> None:
    net = WithLoss([[0.0, 0.0], [0.0, 0.0]])
    x, y = torch.rand(5, 2, dtype=DTYPE), torch.zeros(5, dtype=torch.int64)
    step = LLR(0.2, 4.0, 3.0, 5, 0.1, "grad_l2")(net, x, y)
    assert step.figures["gamma"] < 1e-12
    torch.testing.assert_close(step.figures["penalty"], net.a.detach().norm())
    expected = (x @ net.a + 2).mean() + 3 * net.a.norm()
    torch.testing.assert_close(step.loss, expected)
    assert CURE(0.5)(net, x, y).figures["curvature"] < 1e-20


def test_the_slope_of_llr_is_a_mean_of_moduli() -> None:
    net = WithLoss([[0.0, 0.0], [0.0, 0.0]])
    x, y = torch.rand(5, 2, dtype=DTYPE), torch.zeros(5, dtype=torch.int64)
    objective, generator = LLR(0.2, 4.0, 3.0, 1, 1e-9), torch.Generator().manual_seed(3)
    step = objective(net, x, y, generator=generator)
    # Of an affine loss no step finds a larger deviation than the start has.
    start = 0.2 * (2 * torch.rand(x.shape, dtype=DTYPE, generator=generator.manual_seed(3)) - 1)
    slopes = start @ net.a.detach()
    assert float(slopes.min()) < 0 < float(slopes.max())
    torch.testing.assert_close(step.figures["penalty"], slopes.abs().mean(), rtol=0, atol=1e-7)


def test_llr_and_cure_of_a_quadratic_loss() -> None:
    net = WithLoss([[1.0, 0.0], [0.0, 0.3]])
    x, y = torch.rand(6, 2, dtype=DTYPE), torch.zeros(6, dtype=torch.int64)
    eps = 0.25
    step = LLR(eps, 1.0, 0.0, 10, 0.1)(net, x, y)
    line = torch.linspace(-eps, eps, 21, dtype=DTYPE)
    deltas = torch.cartesian_prod(line, line)
    with torch.no_grad():
        brute = ((deltas @ net.square) * deltas).sum(1).abs().max()
    torch.testing.assert_close(step.figures["gamma"], brute)
    with torch.no_grad():
        gradient = net.a + 2 * x @ net.square
        z = gradient.sign() / 2**0.5
        curvature = (2 * 0.3 * z @ net.square).square().sum(1).mean()
    torch.testing.assert_close(CURE(0.3)(net, x, y).figures["curvature"], curvature)


@pytest.mark.parametrize(
    "objective",
    [
        LLR(0.2, 2.0, 1.5),
        LLR(0.2, 2.0, 1.5, penalty="grad_l2"),
        LLR(lam=0.0, mu=0.7, penalty="grad_l2"),
        CURE(0.3, 2.0),
        LargeMargin(0.9, "l2", False),
    ],
    ids=lambda o: f"{type(o).__name__}-{getattr(o, 'penalty', '')}",
)
def test_second_derivatives_against_finite_differences(
    objective: LLR | CURE | LargeMargin, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, (x, y) = Recording(), batch(5)
    delta = 0.4 * torch.rand(5, 4, dtype=DTYPE) - 0.2
    monkeypatch.setattr(LLR, "_search", lambda *arguments: delta)

    def loss() -> Tensor:
        return objective(net, x, y).loss

    for a, b in zip(gradients(loss(), net), by_differences(loss, net), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_llr_stays_in_the_box_if_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    net, y = Recording(), torch.randint(0, 3, (6,))
    x = torch.rand(6, 4, dtype=DTYPE).round()
    found = []
    search = LLR._search
    monkeypatch.setattr(LLR, "_search", lambda *a: found.append(search(*a)) or found[-1])
    for clip in (False, True):
        LLR(0.2, clip=clip)(net, x, y)
        assert found[-1].abs().max() <= 0.2
        assert ((x + found[-1]).clamp(0, 1) == x + found[-1]).all() == clip


# --- all of them ----------------------------------------------------------------------------------


def run(name: str, net: nn.Module, x: Tensor, y: Tensor, seed: int = 1) -> Step:
    return OBJECTIVES[name][0](net, x, y, generator=torch.Generator().manual_seed(seed))


@every
def test_the_generator_decides_everything_random(name: str) -> None:
    net, (x, y) = Recording(), batch()
    before = torch.random.get_rng_state()
    first, second, other = (run(name, net, x, y, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.loss, second.loss)
    for a, b in zip(gradients(first.loss, net), gradients(second.loss, net), strict=True):
        assert torch.equal(a, b)
    drawn = name.startswith(("madry", "trades", "llr"))
    assert drawn or torch.equal(first.loss, other.loss)


@every
def test_forwards_and_what_is_left_behind(name: str) -> None:
    net, (x, y) = Recording(), batch()
    x.requires_grad_()
    kept = x.detach().clone()
    step = run(name, net, x, y)
    _, searching, losing = OBJECTIVES[name]
    modes = [(training, wants) for _, training, wants in net.log]
    # Either in eval mode without gradients of parameters, or in train mode with them.
    assert modes.count((True, True)) == losing
    assert modes.count((False, False)) + losing == len(modes)
    assert searching is None or modes.count((False, False)) == searching
    assert net.training
    assert torch.equal(x.detach(), kept)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert step.loss.dim() == 0
    assert step.loss.requires_grad
    assert all(v.dim() == 0 and not v.requires_grad for v in step.figures.values())
    assert set(step.figures) >= {"accuracy"}
    step.loss.backward()
    assert x.grad is None
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@every
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(name: str, training: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    net(torch.rand(32, 4, dtype=DTYPE))
    net.train(training)
    state = {k: v.clone() for k, v in net.named_buffers()}
    run(name, net, *batch()).loss.backward()
    assert all(m.training == training for m in net.modules())
    # Only the forwards of the loss count, and in eval mode none does.
    count = int(net[1].num_batches_tracked) - int(state["1.num_batches_tracked"])
    assert count == (OBJECTIVES[name][2] if training else 0)
    assert training or all(torch.equal(v, state[k]) for k, v in net.named_buffers())
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@every
def test_one_logit_is_two(name: str) -> None:
    one, x, y, _ = binary()
    a, b = run(name, one, x, y), run(name, two(one), x, y)
    torch.testing.assert_close(a.loss, b.loss)
    for key, value in a.figures.items():
        torch.testing.assert_close(value, b.figures[key], equal_nan=True)
    column = nn.Sequential(one, nn.Unflatten(0, (-1, 1)))
    torch.testing.assert_close(run(name, column, x, y).loss, a.loss)


@every
def test_a_single_row_of_one_logit_that_ends_with_squeeze(name: str) -> None:
    class Squeeze(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.squeeze()

    one, x, y, _ = binary()
    squeezed = nn.Sequential(one, Squeeze())
    a, b = (run(name, net, x[-1:], y[-1:]) for net in (one, squeezed))
    torch.testing.assert_close(b.loss, a.loss)


@every
def test_images_and_a_network_that_works_in_place(name: str) -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2.0)

    net = nn.Sequential(
        InPlace(),
        nn.Conv2d(1, 3, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(27, 4),
    )
    x, y = torch.rand(5, 1, 8, 8), torch.randint(0, 4, (5,))
    kept = x.clone()
    step = run(name, net, x, y)
    assert torch.equal(x, kept)
    step.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@every
def test_it_describes_itself(name: str) -> None:
    objective = OBJECTIVES[name][0]
    fields = dataclasses.asdict(objective)
    assert type(objective)(**fields) == objective
    assert all(isinstance(v, int | float | str | None) for v in fields.values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.eps = 1.0


@every
def test_bad_batches(name: str) -> None:
    x, _ = batch(2)
    with pytest.raises(ValueError, match=r"y: expected values in 0 \.\.\. 2 for 3 classes"):
        run(name, Recording(), x, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="network: expected logits"):
        run(name, nn.Unflatten(1, (2, 2)), x, torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["madry", "trades", "mma"])
def test_images_outside_the_box(name: str) -> None:
    with pytest.raises(ValueError, match="x: expected values in"):
        run(name, Recording(), 2 * torch.ones(2, 4, dtype=DTYPE), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Madry(eps=-0.1), "eps: expected a finite number >= 0, got -0.1"),
        (lambda: Madry(step=0.0), "step: expected a finite number > 0"),
        (lambda: Madry(step_last=-0.1), "step_last: expected a finite number > 0"),
        (lambda: Madry(iters=0), "iters: expected an integer >= 1"),
        (lambda: Madry(iters=2.0), "iters: expected an integer >= 1"),
        (lambda: Madry(attack="slm"), "attack: expected one of xent, margin, got 'slm'"),
        (lambda: Madry(warmup=1.5), r"warmup: expected a share in \[0, 1\]"),
        (lambda: Trades(beta=float("inf")), "beta: expected a finite number"),
        (lambda: Trades(eps=float("nan")), "eps: expected a finite number"),
        (lambda: MMA(eps_max=0.0), "eps_max: expected a finite number > 0"),
        (lambda: MMA(0.5, 0.01, 40), r"step: expected step \* iters >= eps_max = 0.5"),
        (lambda: MMA(search=0), "search: expected an integer >= 1"),
        (lambda: MMA(clean_weight=2.0), "clean_weight: expected a share"),
        (lambda: MMA(loss="hinge"), "loss: expected one of xent, slm"),
        (lambda: LargeMargin(gamma=0.0), "gamma: expected a finite number > 0"),
        (lambda: LargeMargin(norm="l3"), "norm: expected one of linf, l2, l1"),
        (lambda: LargeMargin(classes=0), "classes: expected an integer >= 1"),
        (lambda: LargeMargin(eps=0.0), "eps: expected a finite number > 0"),
        (lambda: LLR(steps=0), "steps: expected an integer >= 1"),
        (lambda: LLR(penalty="l2"), "penalty: expected one of llr, grad_l2"),
        (lambda: LLR(mu=-1.0), "mu: expected a finite number >= 0"),
        (lambda: CURE(h=0.0), "h: expected a finite number > 0"),
        (lambda: CURE(lam=-1.0), "lam: expected a finite number >= 0"),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
