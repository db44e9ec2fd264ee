"""The optimizer of the preset "fast"."""

import copy
import math

import pytest
import torch

from levelset_ext.recipes.soap import Soap, _largest_quotient


def test_the_first_step_is_the_polar_factor() -> None:
    """In the eigenbasis of its own factors a gradient is its singular values on the diagonal, and
    Adam's first step takes each of them to 1: U S V^T becomes U V^T."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(5, 5, dtype=torch.float64))
    weight.grad = torch.randn(5, 5, dtype=torch.float64)
    u, _, v = torch.linalg.svd(weight.grad)
    Soap([weight], 0.1, eps=1e-9).step()
    # Off the diagonal are zeros up to rounding, which Adam would blow up without eps.
    torch.testing.assert_close(weight.detach(), -0.1 * u @ v, atol=1e-5, rtol=0)


def test_vectors_get_adam() -> None:
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(7, dtype=torch.float64))
    theirs = torch.nn.Parameter(ours.detach().clone())
    soap = Soap([ours], 0.01, (0.9, 0.99), eps=1e-12)
    adam = torch.optim.Adam([theirs], 0.01, (0.9, 0.99), eps=1e-12)
    for _ in range(20):
        ours.grad = torch.randn(7, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        soap.step()
        adam.step()
    torch.testing.assert_close(ours, theirs)


def test_it_does_not_depend_on_the_basis_of_inputs_and_outputs() -> None:
    """Rotating a layer's inputs and outputs rotates its path, as long as the bases are refreshed
    by the same rule; Adam's would change."""
    torch.manual_seed(1)
    p = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    first = torch.randn(4, 3, dtype=torch.float64)
    plain, turned = torch.nn.Parameter(first.clone()), torch.nn.Parameter(p @ first @ q)
    optimizers = [Soap([w], 0.05, refresh=3, eps=1e-9) for w in (plain, turned)]
    for _ in range(12):
        gradient = torch.randn(4, 3, dtype=torch.float64)
        plain.grad, turned.grad = gradient, p @ gradient @ q
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(p @ plain.detach() @ q, turned.detach(), atol=1e-6, rtol=0)


def test_mean_squares_stay_with_their_directions_when_a_refreshment_swaps_these() -> None:
    """The first bases have the smallest eigenvalue first, refreshed ones the largest. Adam's steps
    of a gradient that stays the same are all of length lr."""
    weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = Soap([weight], 0.1, refresh=1, eps=1e-12)
    for step in range(1, 4):
        weight.grad = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        optimizer.step()
        expected = -0.1 * step * torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close(weight.detach(), expected, atol=1e-9, rtol=0)


def test_an_ill_conditioned_fit_needs_fewer_steps_than_with_adam() -> None:
    """min |X W - Y|^2 with inputs that are strongly correlated, in float64."""
    torch.manual_seed(2)
    basis = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
    x = torch.randn(400, 16, dtype=torch.float64) @ (torch.logspace(0, -2, 16)[:, None] * basis)
    y = x @ torch.randn(16, 8, dtype=torch.float64)

    def after(make: type[torch.optim.Optimizer]) -> float:
        w = torch.nn.Parameter(torch.zeros(16, 8, dtype=torch.float64))
        optimizer = make([w], lr=0.05)  # type: ignore[call-arg]
        for _ in range(300):
            optimizer.zero_grad()
            (x @ w - y).square().mean().backward()
            optimizer.step()
        return float((x @ w - y).square().mean().detach())

    assert after(Soap) < 0.3 * after(torch.optim.Adam)


def test_it_goes_on_bit_for_bit() -> None:
    def run(stop: int | None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(6, 5, generator=generator))
        bias = torch.nn.Parameter(torch.zeros(6))
        optimizer = Soap([weight, bias], refresh=4)
        for step in range(11):
            if step == stop:
                kept = copy.deepcopy(optimizer.state_dict())
                optimizer = Soap([weight, bias], refresh=4)
                optimizer.load_state_dict(kept)
            for parameter in (weight, bias):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        return torch.cat([weight.detach().flatten(), bias.detach()])

    assert torch.equal(run(None), run(6))


def test_bad_arguments_are_named() -> None:
    some = [torch.nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(ValueError, match="refresh: expected at least 1 step, got 0"):
        Soap(some, refresh=0)
    with pytest.raises(ValueError, match=r"betas: expected decays from 0 to below 1, got 1\.0"):
        Soap(some, betas=(0.9, 1.0))


def test_no_step_is_larger_than_adam_could_make_it() -> None:
    """Twenty small gradients, then a large one, all in directions of their own: when the bases turn
    toward it, the mean squares are still those of the small ones. Without a bound the longest of
    these steps is 1.6 times what 108 entries of lr make."""
    random = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(12, 9))
    optimizer = Soap([weight], lr=1.0, refresh=2)
    longest = 0.0
    for step in range(200):
        out, into = torch.randn(12, 1, generator=random), torch.randn(1, 9, generator=random)
        weight.grad = out @ into * (1e-3 if step % 20 else 1.0)
        before = weight.detach().clone()
        optimizer.step()
        longest = max(longest, float((weight.detach() - before).norm()))
    assert longest <= weight.numel() ** 0.5


@pytest.mark.parametrize("betas", [(0.95, 0.95), (0.9, 0.99), (0.5, 0.6)])
def test_the_bound_is_what_the_worst_gradients_reach(betas: tuple[float, float]) -> None:
    """m is a weighted sum of gradients and v of their squares: g_i = a_i / b_i makes most of the
    quotient, with a and b the weights."""
    first, second = betas
    age = torch.arange(4000, dtype=torch.float64)
    a, b = (1 - first) * first**age, (1 - second) * second**age
    kept = b > 1e-290
    gradient = a[kept] / b[kept]
    reached = float((a[kept] @ gradient) / (b[kept] @ gradient.square()).sqrt())
    assert _largest_quotient(first, second) == pytest.approx(reached, rel=1e-9)
    assert _largest_quotient(0.9, 0.81) == math.inf
