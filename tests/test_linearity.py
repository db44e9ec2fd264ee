"""gamma(eps, x) on losses whose deviation from linear is known, and against a grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from levelset_ext import attacks

DTYPE = torch.float64


class WithLoss(nn.Module):
    """One logit with cross entropy u(x) = a . x + x^T A x + c > 0 for the label 0."""

    def __init__(self, a: Tensor, square: Tensor, c: float = 2.0) -> None:
        super().__init__()
        self.a, self.square, self.c = nn.Parameter(a), nn.Parameter(square), c

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        u = x @ self.a + ((x @ self.square) * x).sum(1) + self.c
        return torch.log(torch.expm1(u))


def grid(eps: float, points: int = 41) -> Tensor:
    line = torch.linspace(-eps, eps, points, dtype=DTYPE)
    return torch.cartesian_prod(line, line)


def mlp(inputs: int = 2, classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 12), nn.Tanh(), nn.Linear(12, classes)).double()


def test_a_loss_that_is_affine_has_none() -> None:
    network = WithLoss(torch.tensor([0.7, -0.4], dtype=DTYPE), torch.zeros(2, 2, dtype=DTYPE))
    x = torch.rand(5, 2, dtype=DTYPE)
    found = attacks.local_linearity(
        network, x, torch.zeros(5, dtype=torch.int64), 0.3, steps=5, binary=True
    )
    assert found.max < 1e-12


def test_the_default_step_crosses_the_box_two_and_a_half_times() -> None:
    network, x = mlp(), torch.rand(4, 2, dtype=DTYPE)
    y = torch.arange(4) % 3
    left_out = attacks.local_linearity(network, x, y, 0.2, steps=3, restarts=1)
    given = attacks.local_linearity(network, x, y, 0.2, steps=3, restarts=1, step=2.5 * 0.2 / 3)
    assert torch.equal(left_out.gamma, given.gamma)


@pytest.mark.parametrize("square", [[[1.0, 0.3], [0.3, 0.5]], [[1.0, 0.0], [0.0, -0.6]]])
def test_a_quadratic_loss_against_a_grid(square: list[list[float]]) -> None:
    a = torch.tensor(square, dtype=DTYPE)
    network = WithLoss(torch.tensor([0.7, -0.4], dtype=DTYPE), a)
    x = torch.rand(6, 2, dtype=DTYPE)
    deltas = grid(0.25)
    exact = ((deltas @ a) * deltas).sum(1).abs().max()
    found = attacks.local_linearity(
        network, x, torch.zeros(6, dtype=torch.int64), 0.25, restarts=8, binary=True
    )
    # The same at every x, as the curvature is; inside an edge, as of the saddle, up to a step.
    torch.testing.assert_close(found.gamma, exact.expand(6), rtol=1e-3, atol=0)
    assert found.mean == pytest.approx(float(found.gamma.mean()))
    assert found.mean <= found.max <= exact * (1 + 1e-12)
    assert len(found) == 6


def test_the_point_after_the_last_step_counts() -> None:
    """With the loss |x|^2 a step of the width of the box ends in a corner, the exact maximum."""
    network = WithLoss(torch.zeros(2, dtype=DTYPE), torch.eye(2, dtype=DTYPE))
    x, y = torch.full((4, 2), 0.5, dtype=DTYPE), torch.zeros(4, dtype=torch.int64)
    found = attacks.local_linearity(network, x, y, 0.25, steps=1, step=0.5, binary=True)
    torch.testing.assert_close(found.gamma, torch.full((4,), 2 * 0.25**2, dtype=DTYPE))
    torch.testing.assert_close(found.delta.abs(), torch.full((4, 2), 0.25, dtype=DTYPE))


@pytest.mark.parametrize("clip", [False, True])
def test_a_network_against_a_grid_and_its_own_delta(clip: bool) -> None:
    network = mlp()
    with torch.no_grad():
        network[0].weight *= 4
    x = torch.rand(8, 2, dtype=DTYPE) * 0.3
    y = torch.randint(0, 3, (8,))
    eps = 0.4
    found = attacks.local_linearity(network, x, y, eps, restarts=12, clip=clip)
    assert found.delta.abs().max() <= eps * (1 + 1e-12)
    if clip:
        assert (x + found.delta).min() >= 0
    point = x.clone().requires_grad_()
    losses = functional.cross_entropy(network(point), y, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), point)

    def deviation(deltas: Tensor) -> Tensor:
        with torch.no_grad():
            moved = functional.cross_entropy(network(x + deltas), y, reduction="none")
            return (moved - losses.detach() - (deltas * gradient).sum(1)).abs()

    torch.testing.assert_close(deviation(found.delta), found.gamma)
    best = torch.zeros(8, dtype=DTYPE)
    for delta in grid(eps, 25):
        moves = delta.expand(8, 2)
        best = torch.maximum(best, deviation((x + moves).clamp(0, 1) - x if clip else moves))
    # The grid is not finer than the search; both are lower bounds.
    assert (found.gamma >= best * 0.98).all()


def test_a_row_depends_on_its_number_and_the_seed_alone() -> None:
    network, x, y = mlp(), torch.rand(7, 2, dtype=DTYPE), torch.randint(0, 3, (7,))

    def gamma(rows: list[int], **options: int) -> Tensor:
        options = {"steps": 3, "restarts": 2} | options
        return attacks.local_linearity(network, x[rows], y[rows], 0.2, rows=rows, **options).gamma

    together = gamma(list(range(7)))
    torch.testing.assert_close(together, gamma(list(range(7)), batch=2), rtol=1e-12, atol=0)
    some = [5, 0, 3]
    torch.testing.assert_close(together[some], gamma(some), rtol=1e-12, atol=0)
    assert torch.equal(together, gamma(list(range(7))))
    assert not torch.equal(gamma([0, 1], steps=1), gamma([0, 1], steps=1, seed=1))


def test_more_restarts_find_no_less() -> None:
    network, x, y = mlp(), torch.rand(10, 2, dtype=DTYPE), torch.randint(0, 3, (10,))
    one, three = (
        attacks.local_linearity(network, x, y, 0.3, steps=4, restarts=k).gamma for k in (1, 3)
    )
    assert (three >= one).all()
    assert attacks.local_linearity(network, x, y, 0.0, steps=2).max == 0


def test_it_leaves_no_trace() -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    network(torch.rand(16, 3))
    state = {k: v.clone() for k, v in network.state_dict().items()}
    x, y = torch.rand(5, 3), torch.randint(0, 3, (5,))
    with torch.inference_mode():
        found = attacks.local_linearity(network, x, y, 0.1, steps=3)
    assert network.training
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert not found.gamma.requires_grad
    # With the running statistics, of which a row is independent.
    network.eval()
    again = attacks.local_linearity(network, x, y, 0.1, steps=3)
    assert torch.equal(found.gamma, again.gamma)


def test_a_loss_that_is_not_finite_is_infinitely_far_from_linear() -> None:
    def network(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0].sqrt(), x[:, 1]], 1)

    x = torch.tensor([[0.1, 0.5], [0.9, 0.5]], dtype=DTYPE)
    found = attacks.local_linearity(network, x, torch.tensor([0, 0]), 0.3, restarts=4)
    assert torch.isinf(found.gamma[0])
    assert torch.isfinite(found.gamma[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -0.1}, "eps: expected a finite number >= 0"),
        ({"steps": -1}, "steps: expected a finite number >= 0"),
        ({"steps": 2.0}, "steps: expected an integer"),
        ({"step": float("nan")}, "step: expected a finite number"),
        ({"restarts": 0}, "restarts: expected at least 1"),
        ({"batch": 0}, "batch: expected at least 1"),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"rows": [1]}, "rows: expected 2 numbers"),
        ({"y": torch.tensor([0, 3])}, "y: expected values in 0 ... 2"),
        ({"x": torch.full((2, 2), 2.0, dtype=DTYPE)}, "x: expected values in"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 2, dtype=DTYPE), "y": torch.tensor([0, 1]), "eps": 0.1}
    with pytest.raises(ValueError, match=message):
        attacks.local_linearity(mlp(), **(arguments | change))
