"""Random search by squares: what it changes, what it finds, and its place in the trainings."""

import itertools

import pytest
import torch
from torch import nn

from levelset_ext.attacks import pgd, search_squares
from levelset_ext.attacks.pgd import Settings, climb
from levelset_ext.objectives import Madry, Robust
from levelset_ext.objectives.common import search_in_box

EPS = 0.25


def images(n=6, channels=2, height=8, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, height, width, generator=generator, dtype=torch.float64)
    return x, generator


def start(x, generator):
    delta = (torch.rand(x.shape, generator=generator, dtype=x.dtype) * 2 - 1) * EPS
    return (x + delta).clamp(0, 1) - x


def test_a_proposal_is_one_square_of_one_sign_per_channel():
    x, generator = images(n=200)
    delta = start(x, generator)
    seen = []

    def value(d):
        seen.append(d.clone())
        return torch.full((len(d),), float(len(seen)))  # every proposal is kept

    search_squares(value, x, delta, EPS, 1, generator)
    before, after = seen
    sides, unchanged = set(), 0
    for row in range(len(x)):
        changed = (before[row] != after[row]).any(0)
        rows, columns = torch.nonzero(changed, as_tuple=True)
        if len(rows) == 0:  # a small square whose pixels were at these ends already
            unchanged += 1
            continue
        top, left = int(rows.min()), int(columns.min())
        side = int(max(rows.max() - top, columns.max() - left)) + 1
        sides.add(side)
        for channel in range(x.shape[1]):
            patch = (channel, slice(top, top + side), slice(left, left + side))
            corner = [(x[row] + s * EPS).clamp(0, 1)[patch] for s in (-1, 1)]
            there = (x[row] + after[row])[patch]
            assert any(torch.allclose(there, kind) for kind in corner)
    assert unchanged < 10
    assert sides == set(range(1, 7))  # 0.8 of 8 pixels, log-uniform from one


def test_the_value_never_falls_and_the_bounds_hold():
    x, generator = images()
    delta = start(x, generator)
    weights = torch.randn(x.shape, generator=generator, dtype=x.dtype)

    def value(d):
        assert float(d.abs().max()) <= EPS + 1e-12
        assert float((x + d).min()) >= -1e-12
        assert float((x + d).max()) <= 1 + 1e-12
        return (weights * d).sum((1, 2, 3))

    known = search_squares(value, x, delta, EPS, 20, torch.Generator().manual_seed(3), value(delta))
    found = search_squares(value, x, delta, EPS, 20, torch.Generator().manual_seed(3))
    assert torch.equal(known, found)
    found = delta
    for _ in range(5):
        before, found = value(found), search_squares(value, x, found, EPS, 20, generator)
        assert bool((value(found) >= before).all())


def test_a_linear_value_is_brought_to_its_maximum():
    x, generator = images()
    signs = torch.where(torch.arange(10) < 5, -1.0, 1.0).double()  # halves of every image

    def value(d):
        return (signs * d).sum((1, 2, 3))

    best = value((x + EPS * signs).clamp(0, 1) - x)
    found = search_squares(value, x, torch.zeros_like(x), EPS, 3000, generator)
    assert torch.allclose(value(found), best)


def test_rows_whose_value_is_not_a_number_stay():
    x, generator = images()
    delta = start(x, generator)
    wanted = torch.arange(len(x)) % 2 == 0

    def value(d):
        good = d.sum((1, 2, 3))
        return torch.where(
            wanted, good, torch.where((d == delta).all(3).all(2).all(1), good, float("nan"))
        )

    found = search_squares(value, x, delta, EPS, 10, generator)
    assert torch.equal(found[~wanted], delta[~wanted])
    assert not torch.equal(found[wanted], delta[wanted])


class Rounded(nn.Module):
    """Two logits that tell bright from dark images, in steps: no gradient anywhere."""

    def forward(self, x):
        bright = (x.mean((1, 2, 3)) * 64).round() / 64 - 0.5
        return torch.stack((-bright, bright), 1)


def test_squares_break_what_hides_its_gradient():
    x = torch.full((8, 1, 8, 8), 0.6)
    y = torch.ones(8, dtype=torch.int64)
    network = Rounded()
    attacked = pgd(network, x, y, eps=EPS, step=0.05, iters=20, objective="xent", random=False)
    assert not bool(attacked.success.any())

    def value(d):
        return nn.functional.cross_entropy(network(x + d), y, reduction="none")

    generator = torch.Generator().manual_seed(0)
    found = search_squares(value, x, torch.zeros_like(x), EPS, 100, generator)
    assert bool((network(x + found).argmax(1) != y).all())


@pytest.mark.parametrize("objective", [Madry, Robust])
def test_a_training_sees_where_the_squares_end(objective):
    made = {
        Madry: lambda squares: Madry(EPS, 0.05, 2, warm_start=1.0, squares=squares),
        Robust: lambda squares: Robust(
            EPS, EPS, 0.05, 2, search="xent", warm_start=1.0, squares=squares
        ),
    }[objective]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    x, y = torch.rand(30, 1, 8, 8), torch.arange(30) % 3
    offsets = torch.zeros_like(x)

    def entropy(squares):
        step = made(squares)(
            network, x, y, generator=torch.Generator().manual_seed(1), offsets=offsets
        )
        there = (x + step.offsets).clamp(0, 1)
        assert float((there - x).abs().max()) <= EPS + 1e-6
        return nn.functional.cross_entropy(network(there), y, reduction="none")

    without, with_squares = entropy(0), entropy(30)
    assert bool((with_squares >= without - 1e-6).all())
    assert bool(with_squares.mean() > without.mean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Madry(squares=-1), "squares: expected an integer >= 0, got -1"),
        (lambda: Robust(search="xent", squares=1.5), "squares: expected an integer >= 0, got 1.5"),
        (
            lambda: Robust(search="margin", squares=2),
            "squares: expected none with search 'margin', got 2",
        ),
        (
            lambda: search_squares(lambda d: d.sum(1), torch.rand(3, 4), torch.zeros(3, 4), EPS, 1),
            r"x: expected images \(n, channels, height, width\), got shape \(3, 4\)",
        ),
        (
            lambda: search_squares(
                lambda d: d.sum((1, 2, 3)), torch.rand(3, 1, 4, 4), torch.zeros(3, 1, 4, 5), EPS, 1
            ),
            r"delta: expected shape \(3, 1, 4, 4\), got \(3, 1, 4, 5\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("squares", [0, 3])
@pytest.mark.parametrize("keep_best", [False, True])
def test_a_search_evaluates_nothing_twice(squares, keep_best):
    x, generator = images()
    weights = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    seen = []

    def value(d):
        seen.append(d.detach().clone())
        return (weights * d - d.square()).sum((1, 2, 3))

    begin = start(x, generator)
    settings = Settings(EPS, 0.07, 4, keep_best=keep_best)
    found = search_in_box(value, x, begin, settings, squares, torch.Generator().manual_seed(3))
    # What the steps started from, their ends if their value is asked for, the proposals.
    assert len(seen) == 4 + (keep_best or squares > 0) + squares
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    ends = climb(value, x, begin, settings)
    if squares:
        ends = search_squares(value, x, ends, EPS, squares, torch.Generator().manual_seed(3))
    assert torch.equal(found, ends)
