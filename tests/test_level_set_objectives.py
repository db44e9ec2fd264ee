"""The objectives made of Eq. 11 and Eq. 12: closed forms, batch norm, warm starts, no traces."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import levelset_ext as ls
from levelset_ext.margin import margin
from levelset_ext.networks import build
from levelset_ext.objectives import GeometricSvm, Robust, with_batch_statistics
from levelset_ext.samplers import margin_field

DTYPE = torch.float64
BOTH = pytest.mark.parametrize("search", ["margin", "xent"])


class TwoLogits(nn.Module):
    """Logits 0 and w x + b, so that the margin of class 1 is affine."""

    def __init__(self, w: Tensor, b: float) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), nn.Parameter(torch.tensor(b, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        f = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(f), f], 1)


def problem(n: int = 12, d: int = 6, seed: int = 0) -> tuple[TwoLogits, Tensor, Tensor]:
    """Examples far enough from 0 and 1 that no box of 0.2 is cut, the first two of them wrong."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(d, generator=g, dtype=DTYPE)
    x = 0.5 + 0.3 * (torch.rand(n, d, generator=g, dtype=DTYPE) - 0.5)
    net = TwoLogits(w, float(-0.5 * w.sum()))
    y = (net(x)[:, 1] > 0).long()
    y[:2] = 1 - y[:2]
    return net, x, y.detach()


def convolutional(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with batch norm whose running statistics are not those of any batch yet."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 3),
    ).double()
    x = torch.rand(16, 1, 6, 6, dtype=DTYPE)
    y = net.eval()(x).argmax(1)
    y[0] = (y[0] + 1) % 3
    return net.train(), x, y


def gradients(net: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


@pytest.mark.parametrize("distance", ["along", "linf"])
def test_the_margin_search_of_an_affine_margin_gives_eq_12_in_closed_form(distance: str) -> None:
    net, x, y = problem()
    settings = {"eps_correct": 0.2, "eps_wrong": 0.2, "step": 0.02, "iters": 60}
    objective = Robust(distance=distance, lam_correct=2.0, lam_wrong=3.0, lost=0.0, **settings)
    step = objective(net, x, y, generator=torch.Generator().manual_seed(1))
    samples = ls.find_boundary(
        net,
        x,
        y,
        0.2,
        0.2,
        0.02,
        60,
        generator=torch.Generator().manual_seed(1),
    )
    assert len(samples) >= 8
    assert bool((samples.margins[samples.rows] < 0).any())
    side = torch.where(samples.correct, 1.0, -1.0).to(DTYPE)
    centres, points = x[samples.rows], samples.result.points
    weight = torch.where(samples.correct, 2.0, 3.0).to(DTYPE)
    target = ((0.2 - side * (centres - points).abs().amax(1)) * weight).sum() / len(x)
    torch.testing.assert_close(step.loss.detach(), target)

    # The points move along a fixed line, or the gradient of F: x + t v with w (x + t v) + b = 0.
    w, b = net.w, net.b
    v = points - centres if distance == "along" else w.detach().expand_as(points)
    moved = points - v * ((points @ w + b) / (v @ w))[:, None]
    there = ((0.2 - side * (centres - moved).abs().amax(1)) * weight).sum() / len(x)
    torch.testing.assert_close(gradients(net, step.loss), gradients(net, there))


@pytest.mark.parametrize("box", [0.2, 0.06])
def test_the_xent_search_adds_the_cross_entropy_at_the_ends(box: float) -> None:
    net, x, y = problem()
    objective = Robust(
        eps_correct=box, step=0.05, iters=8, search="xent", distance="along", ends=0.5
    )
    step = objective(net, x, y, generator=torch.Generator().manual_seed(2))
    # Sign steps on one affine margin end in a corner of the box, whatever the start.
    sign = torch.where(y == 1, -1.0, 1.0).to(DTYPE)[:, None] * net.w.detach().sign()
    assert step.offsets is not None
    torch.testing.assert_close(step.offsets, box * sign)
    logits = net(x + box * sign)
    cross_entropy = functional.cross_entropy(logits, y)
    torch.testing.assert_close(step.figures["cross_entropy"], cross_entropy.detach())
    margins, ends = margin(net(x), y), margin(logits, y)
    over = (margins > 0) & (ends <= 0)
    assert 0 < int(over.sum()) < int((ends <= 0).sum())
    assert bool((ends > 0).any()) == (box < 0.2)  # of a smaller box some ends are still correct
    reach = (margins / net.w.abs().sum())[over]
    eq_12 = (box - reach).sum() / len(x)
    torch.testing.assert_close(step.loss.detach(), (eq_12 + 0.5 * cross_entropy).detach())
    torch.testing.assert_close(step.figures["correct"], eq_12.detach())
    assert float(step.figures["crossed"]) == float(over.double().mean())
    # v is held, so the distance along it is F(x) / (w v) with |v| = 1 in the norm of the box.
    along = (x @ net.w + net.b) / -(sign * net.w).sum(1)
    there = (box - along[over]).sum() / len(x) + 0.5 * cross_entropy
    torch.testing.assert_close(gradients(net, step.loss), gradients(net, there))


def test_eq_12_has_all_its_digits_under_autocast() -> None:
    net, x, y = problem()
    net, x = net.float(), x.float()
    objective = Robust(
        eps_correct=0.2, step=0.05, iters=8, search="xent", distance="along", ends=0.0
    )

    def gradient() -> Tensor:
        return gradients(net, objective(net, x, y, generator=torch.Generator()).loss)

    plain = gradient()
    assert plain.abs().max() > 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gradient(), plain, rtol=1e-4, atol=1e-5)


def test_examples_whose_boundary_is_out_of_reach_move_a_fresh_network() -> None:
    net, x, y = problem()
    net.b.data += 50.0  # one class everywhere, no boundary in any box
    y = torch.arange(len(x)) % 2
    objective = Robust(eps_correct=0.1, eps_wrong=0.1, step=0.05, iters=3)
    step = objective(net, x, y)
    assert float(step.figures["crossed"]) == 0
    wrong = y == 0
    expected = functional.cross_entropy(net(x[wrong]), y[wrong], reduction="sum") / len(x)
    torch.testing.assert_close(step.loss, expected)
    assert gradients(net, step.loss).abs().max() > 1e-3
    # Without that term the loss is 0, with a way for gradients.
    silent = Robust(eps_correct=0.1, eps_wrong=0.1, step=0.05, iters=3, lost=0.0)(net, x, y)
    assert float(silent.loss.detach()) == 0
    assert not gradients(net, silent.loss).any()


@BOTH
def test_a_batch_of_nothing_has_no_mean(search: str) -> None:
    net, x, y = problem()
    step = Robust(search=search)(net, x[:0], y[:0])
    assert step.loss.isnan()
    assert step.figures["accuracy"].isnan()


def test_wrong_examples_whose_boundary_is_in_reach_add_no_cross_entropy() -> None:
    net, x, y = problem()
    y[2:6] = 1 - y[2:6]
    reach = (margin(net(x), y) / net.w.abs().sum()).detach()
    box = float(-reach[:6].sort().values[2:4].mean())
    step = Robust(eps_correct=0.1, eps_wrong=box, iters=60, lost=1.0)(net, x, y)
    far = reach < -box
    assert int(far.sum()) == 3
    expected = functional.cross_entropy(net(x[far]), y[far], reduction="sum") / len(x)
    torch.testing.assert_close(step.figures["cross_entropy"], expected.detach())
    eq_12 = step.figures["correct"] + step.figures["wrong"]
    torch.testing.assert_close(step.loss.detach(), eq_12 + expected.detach())


@BOTH
def test_batch_norm_normalises_every_point_by_the_clean_batch(search: str) -> None:
    net, x, y = convolutional()
    objective = Robust(
        eps_correct=0.3, eps_wrong=0.3, step=0.05, iters=12, search=search, ends=0.0, lost=0.0
    )
    other = copy.deepcopy(net)
    step = objective(net, x, y, generator=torch.Generator().manual_seed(0))
    logits = other(x)  # in train mode: the statistics of x, and the running ones moved once
    for (name, ours), (_, once) in zip(net.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(ours, once, msg=name)
    assert all(m.training for m in net.modules())
    assert float(step.figures["crossed"]) > 0.2
    assert bool(torch.isfinite(gradients(net, step.loss)).all())

    field = with_batch_statistics(copy.deepcopy(net), x)
    torch.testing.assert_close(field(x), logits)
    torch.testing.assert_close(field(x[3:5]), logits[3:5])  # whatever rows there are
    found = ls.find_boundary(field, x, y, 0.3, 0.3, 0.05, 12)
    level = margin_field(field, y[found.rows])(found.result.points)
    torch.testing.assert_close(level, torch.zeros_like(level), atol=1e-5, rtol=0)


def test_the_gradient_with_batch_norm_is_that_of_the_loss_as_a_whole() -> None:
    """Finite differences of the objective, its search and its statistics included: along the
    segment on which it was found, a boundary point moves as p(theta) says."""
    net, x, y = convolutional()
    objective = Robust(
        eps_correct=0.3, step=0.3, iters=2, search="xent", distance="along", ends=0.3, tol=1e-12
    )

    def loss() -> Tensor:
        return objective(net, x, y, generator=torch.Generator().manual_seed(0)).loss

    assert float(objective(net, x, y).figures["crossed"]) > 0.2
    parameters = list(net.parameters())
    random = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=random, dtype=DTYPE) for p in parameters]
    grads = torch.autograd.grad(loss(), parameters)
    slope = sum(float((g * v).sum()) for g, v in zip(grads, directions, strict=True))
    h = 1e-6
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, v in zip(parameters, directions, strict=True):
                p += sign * h * v
        values.append(float(loss().detach()))
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(slope, rel=1e-4)


def test_statistics_are_measured_only_where_there_are_any() -> None:
    calls: list[int] = []

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    with_batch_statistics(Counting(3, 2), torch.rand(5, 3))
    normed = nn.Sequential(Counting(3, 2), nn.BatchNorm1d(2))
    with_batch_statistics(normed.eval(), torch.rand(5, 3))
    assert calls == []
    with_batch_statistics(normed.train(), torch.rand(5, 3))
    assert calls == [5]
    with pytest.raises(ValueError, match="x: expected more than one value per channel"):
        with_batch_statistics(normed, torch.rand(1, 3))


@pytest.mark.parametrize("part", ["whole", "child", "norm"])
@pytest.mark.parametrize(
    "objective", [Robust(0.3, 0.3, 0.1, 3), GeometricSvm()], ids=["robust", "svm"]
)
def test_batch_norm_is_found_where_torch_compile_has_wrapped(
    part: str, objective: Robust | GeometricSvm
) -> None:
    found = []
    for wrapped in ("nothing", part):
        torch.manual_seed(0)
        norm: Any = nn.BatchNorm1d(5).double()

        def wrap(name: str, module: nn.Module, at: str = wrapped) -> Any:
            return torch.compile(module, backend="eager") if name == at else module

        child = nn.Sequential(nn.Linear(3, 5).double(), wrap("norm", norm))
        net = wrap("whole", nn.Sequential(wrap("child", child), nn.Linear(5, 2).double()))
        x, y = torch.rand(9, 3, dtype=DTYPE), torch.arange(9) % 2
        step = objective(net, x, y, generator=torch.Generator().manual_seed(1))
        found.append((step.loss, gradients(net, step.loss), norm.running_mean, norm.running_var))
        assert int(norm.num_batches_tracked) == 1
        torch.testing.assert_close(with_batch_statistics(net, x)(x[:4]), net(x)[:4])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_shared_batch_norm_has_statistics_for_every_use() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first, self.second = nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.norm(torch.tanh(self.first(self.norm(x)))))

    torch.manual_seed(0)
    net, x = Twice().double(), torch.randn(9, 3, dtype=DTYPE)
    expected = copy.deepcopy(net)(x)
    field = with_batch_statistics(net, x)
    for _ in range(2):
        torch.testing.assert_close(field(x), expected)


@BOTH
def test_a_warm_start_goes_on_where_the_last_visit_ended(search: str) -> None:
    net, x, y = problem()
    net.w.data *= 0.1
    net.b.data = -net.w.data.sum() * 0.5
    few = {"eps_correct": 0.2, "eps_wrong": 0.2, "step": 0.02, "search": search}
    one = Robust(iters=1, warm_start=1.0, **few)
    offsets = 0.05 * torch.ones_like(x)
    first = one(net, x, y, offsets=offsets, generator=torch.Generator().manual_seed(0))
    assert first.offsets is not None
    moved = (first.offsets - offsets).abs()
    assert bool((torch.isclose(moved, moved.new_tensor(0.02)) | (moved < 1e-12)).all())
    fresh = Robust(iters=1, warm_start=0.0, **few)(
        net, x, y, offsets=offsets, generator=torch.Generator().manual_seed(0)
    )
    assert fresh.offsets is not None
    assert float((fresh.offsets - offsets).abs().max()) > 0.05
    half = Robust(iters=1, warm_start=0.5, **few)(
        net, x.repeat(50, 1), y.repeat(50), offsets=offsets.repeat(50, 1)
    )
    assert half.offsets is not None
    share = (half.offsets - 0.05).abs().amax(1).lt(0.021).double().mean()
    assert 0.4 < float(share) < 0.6


def test_a_warm_start_from_a_larger_box_stays_in_its_own() -> None:
    net, x, y = problem()
    worst = torch.where(y == 1, -1.0, 1.0).to(DTYPE)[:, None] * net.w.detach().sign()
    objective = Robust(
        eps_correct=0.1, eps_first=0.3, warmup=1.0, iters=2, search="xent", warm_start=1.0,
        keep_best=True,
    )  # fmt: skip
    for progress, box in ((0.5, 0.2), (1.0, 0.1)):
        step = objective(net, x, y, offsets=0.3 * worst, progress=progress)
        assert step.offsets is not None
        torch.testing.assert_close(step.offsets, box * worst)


def test_steps_shrink_to_the_last_and_grow_with_the_box() -> None:
    net, x, y = problem()
    x = torch.full_like(x, 0.5)
    y = torch.ones_like(y)
    objective = Robust(
        eps_correct=0.4, eps_first=0.0, warmup=0.5, step=0.1, step_last=0.025, iters=3,
        search="xent", warm_start=1.0,
    )  # fmt: skip
    for progress, box in ((0.25, 0.5), (1.0, 1.0)):
        step = objective(net, x, y, offsets=torch.zeros_like(x), progress=progress)
        assert step.offsets is not None
        expected = -box * (0.1 + 0.05 + 0.025) * net.w.detach().sign()
        torch.testing.assert_close(step.offsets, expected.expand_as(x))


@BOTH
def test_the_box_grows_and_nothing_of_the_network_changes(search: str) -> None:
    net, x, y = convolutional()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    objective = Robust(
        eps_correct=0.2, eps_wrong=0.01, eps_first=0.0, warmup=0.5, iters=5, search=search
    )
    sizes = []
    for progress in (0.1, 0.25, 0.5, 1.0):
        step = objective(net, x, y, progress=progress)
        assert step.offsets is not None
        sizes.append(float(step.offsets[1:].abs().max()))
    limits = torch.tensor([0.04, 0.1, 0.2, 0.2])
    assert bool((torch.tensor(sizes) <= limits + 1e-6).all())
    assert sizes[0] < sizes[1] < sizes[2]
    assert all(bool((p.grad == 1).all()) for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert not x.requires_grad


@BOTH
def test_reduced_precision_leaves_eq_12_in_full(search: str) -> None:
    net = build("convnet-2a", shape=(1, 8, 8), classes=3)
    x, y = torch.rand(24, 1, 8, 8), torch.arange(24) % 3
    objective = Robust(
        eps_correct=0.3, eps_wrong=0.3, step=0.1, iters=4, search=search, tol=1e-4, keep_below=1e-3
    )
    with torch.autocast("cpu", torch.bfloat16):
        step = objective(net, x, y, generator=torch.Generator().manual_seed(0))
    assert step.loss.dtype == torch.float32
    assert bool(torch.isfinite(gradients(net, step.loss)).all())
    if float(step.figures["crossed"]) > 0:
        # bfloat16 alone keeps three digits of a margin of about 0.1.
        assert float(step.figures["converged"]) > 0.5


def test_eq_11_grows_its_lambda_over_a_share_of_the_training() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 1)).double()
    x = torch.rand(10, 4, dtype=DTYPE)
    y = torch.arange(10) % 2
    objective = GeometricSvm(lam=0.5, lam_first=0.1, warmup=0.5, max_iters=30)
    for progress, lam in ((0.0, 0.1), (0.25, 0.3), (0.5, 0.5), (1.0, 0.5)):
        step = objective(net, x, y, progress=progress)
        expected = ls.losses.geometric_svm(net, x, y, lam=lam, max_iters=30).total
        torch.testing.assert_close(step.loss, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distance": "l3"}, "distance: expected one of rho, linf, l2, l1, along"),
        ({"search": "pgd"}, "search: expected"),
        ({"eps_correct": -0.1}, "eps_correct"),
        ({"step": 0.0}, "step"),
        ({"step_eps": 0.0}, "step_eps: expected a finite number > 0"),
        ({"search": "xent", "step_last": 0.0}, "step_last: expected a finite number > 0"),
        ({"iters": -1}, "iters"),
        ({"warm_start": 1.5}, "warm_start"),
        ({"lost": -1.0}, "lost"),
    ],
)
def test_settings_of_robust_that_make_no_sense(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Robust(**change)  # type: ignore[arg-type]


@BOTH
def test_a_network_with_batch_norm_trains_with_eq_12(search: str) -> None:
    net, x, _ = convolutional()
    y = torch.arange(len(x)) % 3
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    objective = Robust(
        eps_correct=0.03, eps_wrong=0.1, step=0.01, iters=8, search=search, distance="along"
    )
    broken = []
    for step_number in range(60):
        step = objective(net, x, y, generator=torch.Generator().manual_seed(step_number))
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        if 5 <= step_number < 55:
            continue
        found = ls.find_boundary(net, x, y, 0.03, 0.0, 0.01, 5, random_start=False)
        broken.append(float((found.crossed | (found.margins <= 0)).double().mean()))
    assert broken[0] > 0.5
    assert max(broken[-5:]) < 0.5 * broken[0]


def test_resnet_18_takes_a_step_of_eq_12() -> None:
    torch.manual_seed(0)
    net = build("resnet-18", shape=(1, 8, 8), classes=2).train()
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
    step = Robust(eps_correct=0.3, eps_wrong=0.3, step=0.1, iters=2)(net, x, y)
    grown = gradients(net, step.loss)
    assert bool(torch.isfinite(grown).all())
    assert bool(grown.any())
    assert int(dict(net.named_buffers())["bn1.num_batches_tracked"]) == 1
