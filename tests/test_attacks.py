"""Attacks on problems whose answer is known, against another library, and the accounting."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from levelset_ext import attacks
from levelset_ext.attacks.pgd import Settings, climb
from levelset_ext.margin import margin
from levelset_ext.networks import build


class Affine(nn.Module):
    """f = W x + b over the flattened image."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def problem(classes: int = 4, n: int = 12, size: int = 5) -> tuple[Affine, Tensor, Tensor]:
    """An affine classifier, images far from the ends of [0, 1], and what it says about them."""
    network = Affine(
        torch.randn(classes, size * size, dtype=torch.float64),
        0.1 * torch.randn(classes, dtype=torch.float64),
    )
    x = 0.5 + 0.1 * (torch.rand(n, 1, size, size, dtype=torch.float64) - 0.5)
    with torch.no_grad():
        return network, x, network(x).argmax(1)


def distances(network: Affine, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """Exact distance of each row to the boundary, ignoring the box."""
    with torch.no_grad():
        f = network(x)
        gap = f.gather(1, y[:, None]) - f
        rows = network.weight[y][:, None] - network.weight[None]
        size = rows.abs().sum(2) if norm == "linf" else rows.norm(dim=2)
        return torch.where(gap == 0, torch.inf, gap / size).min(1).values


# --- exact answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "attack", ["pgd-margin", "pgd-xent", "pgd-rescaled-xent", "multi-targeted"]
)
def test_two_classes_fall_exactly_beyond_their_distance(norm: str, attack: str) -> None:
    network, x, y = problem(classes=2)
    near = distances(network, x, y, norm)
    for row in range(4):
        for factor, falls in ((0.995, False), (1.005, True)):
            eps = factor * float(near[row])
            one = slice(row, row + 1)
            result = attacks.evaluate(
                network, x[one], y[one], attack, eps=eps, step=eps / 4, iters=60, norm=norm
            )
            assert bool(result.success[0]) == falls
            assert result.clean_accuracy == 1.0
            assert result.robust_accuracy == float(not falls)
            assert float(result.distance[0]) <= eps * (1 + 1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_many_classes_fall_exactly_beyond_their_distance(norm: str) -> None:
    network, x, y = problem(classes=6, n=24)
    near = distances(network, x, y, norm)
    eps = float(near.median())
    clear = (near / eps - 1).abs() > 0.01
    result = attacks.evaluate(
        network, x, y, "multi-targeted", eps=eps, step=eps / 4, iters=60, norm=norm
    )
    assert torch.equal(result.success[clear], (near < eps)[clear])
    assert clear.sum() > 20


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", [2, 5])
def test_deepfool_is_exact_on_affine_networks(norm: str, classes: int) -> None:
    network, x, y = problem(classes)
    result = attacks.deepfool(network, x, y, norm=norm, overshoot=1e-6)
    assert result.success.all()
    near = distances(network, x, y, norm)
    assert torch.allclose(result.distance, near * (1 + 1e-6), rtol=1e-9)
    assert (result.iterations == 1).all()
    few = attacks.deepfool(network, x, y, norm=norm, overshoot=1e-6, classes=1)
    assert (few.distance >= near).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_deepfool_in_an_evaluation_stays_in_the_ball(norm: str) -> None:
    network, x, y = problem(n=20)
    near = distances(network, x, y, norm)
    eps = float(near.median()) * 1.01
    result = attacks.evaluate(network, x, y, "deepfool", eps=eps, norm=norm)
    clear = (near / eps - 1).abs() > 1e-5
    assert torch.equal(result.success[clear], (near < eps)[clear])
    assert result.distance.max() <= eps * (1 + 1e-5)


def test_one_logit() -> None:
    network, x, _ = problem(classes=1)
    y = torch.where(network(x.detach())[:, 0] > 0, 1, -1).detach()
    near = ((network(x)[:, 0].abs()) / network.weight.abs().sum()).detach()
    eps = float(near.median())
    for labels in (y, (y > 0).long()):
        result = attacks.evaluate(
            network, x, labels, "pgd-xent,pgd-margin", eps=eps, step=eps / 4, iters=20, binary=True
        )
        assert result.clean_accuracy == 1.0
        clear = (near / eps - 1).abs() > 1e-6
        assert torch.equal(result.success[clear], (near < eps)[clear])
        assert torch.allclose(result.clean_margin, network(x)[:, 0].abs())


def test_one_logit_of_a_network_that_ends_with_squeeze_when_one_row_is_left() -> None:
    network, x, _ = problem(classes=1)
    squeezed = lambda x: network(x).squeeze()  # noqa: E731
    y = (squeezed(x) > 0).long()
    near = (network(x)[:, 0].abs() / network.weight.abs().sum()).detach()
    eps = float(near.sort().values[-2:].mean())  # all but one are in reach
    size = dict(eps=eps, step=eps / 4, iters=20, binary=True)
    result = attacks.evaluate(squeezed, x, y, "pgd-margin,deepfool", batch=len(x) - 1, **size)
    assert int((~result.success).sum()) == 1
    expected = attacks.evaluate(network, x, y, "pgd-margin,deepfool", batch=len(x) - 1, **size)
    assert torch.equal(result.adversarial, expected.adversarial)


def test_the_box_holds() -> None:
    network, x, y = problem()
    x = x.round()  # every pixel at an end of [0, 1]
    result = attacks.evaluate(network, x, network(x).argmax(1), "pgd-margin", eps=0.2, step=0.05)
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    assert (result.adversarial - x).abs().max() <= 0.2 + 1e-12
    assert y.shape == result.success.shape


# --- against advertorch ------------------------------------------------------------------------


def smooth_network() -> tuple[nn.Module, Tensor, Tensor]:
    network = build("convnet-2a", 5, (1, 8, 8))
    x = torch.rand(6, 1, 8, 8)
    return network, x, network.eval()(x).argmax(1).detach()


@pytest.mark.parametrize("loss", ["xent", "margin"])
def test_step_for_step_as_advertorch(loss: str) -> None:
    _need("advertorch")
    network, x, y = smooth_network()
    torch.manual_seed(3)
    offsets = torch.empty_like(x).uniform_(-1, 1) * 0.2
    start = (x + offsets).clamp(0, 1)
    for iters in range(8):
        theirs, success = attacks.advertorch_pgd(
            network, x, y, loss=loss, eps=0.2, step=0.03, iters=iters, seed=3
        )
        ours = attacks.pgd(
            network, x, y, objective=loss, eps=0.2, step=0.03, iters=iters, start=start,
            early_stop=False,
        )  # fmt: skip
        assert torch.equal(ours.adversarial, theirs)
        assert torch.equal(ours.success, success)


def _need(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def test_advertorch_leaves_no_trace_in_other_modules() -> None:
    _need("advertorch")
    attacks.advertorch_adapter.load_advertorch()
    import torch.autograd.gradcheck  # noqa: F401

    assert not hasattr(sys.modules["torch.autograd.gradcheck"], "zero_gradients")
    had_torchvision = "torchvision" in sys.modules
    assert not had_torchvision or hasattr(sys.modules["torchvision"], "__file__")


def test_advertorch_in_an_evaluation() -> None:
    _need("advertorch")
    network, x, y = problem(classes=2)
    near = distances(network, x, y, "linf")
    eps = float(near.median())
    result = attacks.evaluate(
        network, x, y, "advertorch-xent,advertorch-margin", eps=eps, step=eps / 4, iters=20
    )
    clear = (near / eps - 1).abs() > 1e-6
    assert torch.equal(result.success[clear], (near < eps)[clear])


# --- AutoAttack --------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 5])
def test_autoattack(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _need("pyautoattack")
    network, x, y = problem(classes, n=8, size=3)
    network, x = network.float(), x.float()
    near = distances(network, x, y, "linf")
    before = torch.get_rng_state(), random.getstate(), sys.gettrace()
    result = attacks.evaluate(network, x, y, "autoattack", eps=1.05 * float(near.max()))
    assert result.robust_accuracy == 0.0
    again = attacks.evaluate(network, x, y, "autoattack", eps=1.05 * float(near.max()))
    assert torch.equal(result.adversarial, again.adversarial)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert sys.gettrace() is before[2]
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("package", ["pyautoattack", "advertorch"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, y = problem()
    if package == "pyautoattack":
        monkeypatch.setitem(sys.modules, "pyautoattack", None)
        name = "autoattack"
    else:
        monkeypatch.delitem(sys.modules, "advertorch.attacks", raising=False)
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        name = "advertorch-xent"
    with pytest.raises(ImportError, match=f"{package}.* to be installed"):
        attacks.evaluate(network, x, y, f"pgd-margin,{name}")


# --- accounting --------------------------------------------------------------------------------


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network that is right about most rows of a made-up problem."""
    x = torch.rand(160, 1, 4, 4)
    y = (x.flatten(1)[:, :8].sum(1) > 4).long() + 2 * (x.flatten(1)[:, 8:].sum(1) > 4).long()
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    y[:8] = (y[:8] + 1) % 4
    return network, x, y


def test_worst_case_of_several_attacks() -> None:
    network, x, y = trained()
    names = ["pgd-xent", "pgd-margin", "multi-targeted"]
    settings: dict[str, Any] = {"eps": 0.05, "step": 0.01, "iters": 10, "restarts": 2}
    alone = [attacks.evaluate(network, x, y, name, **settings) for name in names]
    together = attacks.evaluate(network, x, y, ",".join(names), **settings)
    each = attacks.evaluate(network, x, y, names, cascade=False, **settings)
    union = torch.stack([a.success for a in alone]).any(0)
    assert torch.equal(together.success, union)
    assert torch.equal(each.success, union)
    assert 0 < together.robust_accuracy < together.clean_accuracy < 1
    assert together.attacks[1].attacked == each.attacks[0].attacked - together.attacks[0].broken
    assert [r.broken for r in each.attacks] == [int((a.success & a.correct).sum()) for a in alone]
    assert together.robust_accuracy_after(0) == alone[0].robust_accuracy
    assert together.robust_accuracy_after(2) == together.robust_accuracy
    # What is reported as broken is broken, and within reach.
    f = network(together.adversarial)
    assert torch.equal(margin(f, y) > 0, ~together.success)
    assert torch.equal(together.prediction, f.argmax(1))
    assert (together.adversarial - x).abs().max() <= 0.05 + 1e-6
    wrong = ~together.correct
    assert torch.equal(together.adversarial[wrong], x[wrong])
    assert (together.broken_by[wrong] == -2).all()


def test_rows_do_not_depend_on_the_batch() -> None:
    network, x, y = problem(n=30)
    names = "pgd-xent,multi-targeted"
    settings: dict[str, Any] = {"eps": 0.06, "step": 0.01, "iters": 5, "restarts": 2, "seed": 5}
    whole = attacks.evaluate(network, x, y, names, **settings)
    small = attacks.evaluate(network, x, y, names, batch=7, **settings)
    assert torch.equal(whole.success, small.success)
    assert torch.allclose(whole.adversarial, small.adversarial)
    assert torch.equal(whole.step, small.step)
    tail = attacks.evaluate(network, x[20:], y[20:], names, rows=range(20, 30), **settings)
    assert torch.allclose(whole.adversarial[20:], tail.adversarial)
    other = attacks.evaluate(network, x, y, names, **{**settings, "seed": 6})
    assert not torch.allclose(whole.adversarial, other.adversarial)


def counting(network: nn.Module, sizes: list[int]) -> Callable[[Tensor], Tensor]:
    def evaluate(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return network(x)

    return evaluate


def test_one_forward_per_step_and_broken_rows_leave() -> None:
    network, x, y = trained()
    right = network(x).argmax(1) == y
    x, y = x[right], y[right]
    sizes: list[int] = []
    result = attacks.pgd(
        counting(network, sizes), x, y, eps=0.05, step=0.01, iters=10, objective="margin"
    )
    assert len(sizes) == 1 + 10 + 1  # the images, the steps, the last point
    left = [len(x) - int(((result.step >= 0) & (result.step < t)).sum()) for t in range(11)]
    assert sizes == [len(x), *left]
    assert left[-1] < left[0]


def test_a_row_broken_on_the_way_counts() -> None:
    """A step that jumps over a thin wrong slab: seen in passing, not at the end."""

    def network(x: Tensor) -> Tensor:
        z = x.flatten(1)[:, 0]
        slab = torch.relu(0.05 - (z - 0.5).abs()) * 100 - z  # wrong for 0.45 < z < 0.55
        return torch.stack([torch.zeros_like(z), slab], 1)

    x = torch.full((1, 1), 0.7, dtype=torch.float64)
    y = torch.tensor([0])
    start = torch.full((1, 1), 0.52, dtype=torch.float64)
    common: dict[str, Any] = {"eps": 0.3, "step": 0.1, "iters": 1, "start": start}
    assert attacks.pgd(network, x, y, **common).success.all()
    assert attacks.pgd(network, x, y, **common).step.tolist() == [0]
    assert not attacks.pgd(network, x, y, early_stop=False, **common).success.any()


def test_nothing_about_the_network_changes() -> None:
    network = build("resnet-18", 3, (3, 8, 8)).train()
    x = torch.rand(3, 3, 8, 8)
    y = copy.deepcopy(network).eval()(x).argmax(1)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    x_before, state = x.clone(), torch.get_rng_state()
    names = "pgd-xent,pgd-margin,multi-targeted,deepfool,transfer"
    with torch.no_grad():
        result = attacks.evaluate(
            network, x, y, names, eps=1e-6, step=1e-6, iters=2, source=network
        )
    assert result.clean_accuracy == 1.0  # in eval mode
    assert all(m.training for m in network.modules())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert torch.equal(x, x_before)
    assert not x.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_inference_mode_and_layers_that_work_in_place() -> None:
    network = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(16, 3)).double()
    x = torch.rand(4, 1, 4, 4, dtype=torch.float64)
    y = network(x.clone()).argmax(1)
    names = "pgd-margin,multi-targeted,deepfool"
    expected = attacks.evaluate(network, x, y, names, eps=0.1)
    with torch.inference_mode():
        got = attacks.evaluate(network, x.clone(), y.clone(), names, eps=0.1)
    assert torch.equal(expected.success, got.success)
    assert torch.equal(expected.adversarial, got.adversarial)


def test_all_rows_wrong_and_no_rows() -> None:
    network, x, y = problem()
    result = attacks.evaluate(network, x, (y + 1) % 4, "pgd-xent,multi-targeted,deepfool")
    assert (result.clean_accuracy, result.robust_accuracy) == (0.0, 0.0)
    assert [r.attacked for r in result.attacks] == [0, 0, 0]
    assert attacks.alarms(result) == []
    empty = attacks.evaluate(network, x[:0], y[:0])
    assert len(empty) == 0
    assert attacks.alarms(empty) == []


def test_a_tie_is_not_robust() -> None:
    result = attacks.evaluate(
        lambda x: 0 * x.flatten(1)[:, :3], torch.rand(4, 5), torch.zeros(4, dtype=torch.int64)
    )
    assert result.clean_accuracy == 0.0


def test_l2_step_survives_tiny_gradients() -> None:
    network, x, y = problem(classes=2, n=4)
    with torch.no_grad():
        network.weight.mul_(1e-28)
        network.bias.mul_(1e-28)
    network, x = network.float(), x.float()
    near = distances(network.double(), x.double(), y, "l2")
    eps = 1.05 * float(near.max())
    result = attacks.evaluate(network.float(), x, y, eps=eps, step=eps / 4, norm="l2")
    assert result.robust_accuracy == 0.0


def test_a_row_whose_gradient_is_not_a_number_stays_for_the_l2_step() -> None:
    x = torch.full((2, 2), 0.5, dtype=torch.float64)
    slope = torch.tensor([[3.0, 4.0], [NAN, NAN]], dtype=torch.float64)
    start = torch.tensor([[0.0, 0.0], [0.03, 0.04]], dtype=torch.float64)
    settings = Settings(0.2, 0.1, 1, norm="l2")
    found = climb(lambda delta: (delta * slope).sum(1), x, start, settings)
    expected = torch.tensor([[0.06, 0.08], [0.03, 0.04]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_a_row_that_a_less_likely_class_breaks_is_not_one_of_the_last_restart() -> None:
    """The likeliest wrong class can never win; the other one does in the second run of four."""
    weight = torch.tensor([[0.0], [0.0], [10.0]], dtype=torch.float64)
    network = Affine(weight, torch.tensor([0.0, -0.1, -5.99], dtype=torch.float64))
    x, y = torch.full((6, 1), 0.5, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    found = attacks.evaluate(
        network, x, y, "multi-targeted", eps=0.1, step=0.05, iters=5, restarts=2
    )
    (record,) = found.attacks
    assert (record.broken, record.late_restart) == (6, 0)


def test_random_starts_fill_the_ball() -> None:
    def start(norm: str, rows: range) -> Tensor:
        return attacks.random_start((50,), rows, seed=1, restart=2, norm=norm, eps=0.3)

    box, ball = start("linf", range(400)), start("l2", range(400))
    assert box.abs().max() <= 0.3
    assert abs(float(box.std()) - 0.3 / 3**0.5) < 0.005
    assert ball.norm(dim=1).max() <= 0.3 + 1e-6
    assert abs(float((ball.norm(dim=1) / 0.3).pow(50).mean()) - 0.5) < 0.05
    assert torch.equal(start("linf", range(7, 9)), box[7:9])


# --- alarms ------------------------------------------------------------------------------------


def test_alarm_of_saturated_cross_entropy() -> None:
    network, x, y = trained()
    loud = copy.deepcopy(network)
    with torch.no_grad():
        loud[3].weight.mul_(1e4)
        loud[3].bias.mul_(1e4)
    settings: dict[str, Any] = {"eps": 0.1, "step": 0.02, "iters": 20}
    figures = {
        name: attacks.evaluate(loud, x, y, name, **settings).robust_accuracy
        for name in ("pgd-xent", "pgd-rescaled-xent", "pgd-margin")
    }
    assert figures["pgd-xent"] > figures["pgd-margin"] + 0.2
    assert abs(figures["pgd-rescaled-xent"] - figures["pgd-margin"]) < 0.05
    result = attacks.evaluate(loud, x, y, "pgd-xent,pgd-margin", **settings)
    text = " ".join(attacks.alarms(result))
    assert "exactly zero at" in text
    assert "the median margin is" in text
    assert "pgd-margin breaks" in text
    alone = attacks.alarms(attacks.evaluate(network, x, y, "pgd-xent", **settings))
    assert any("rests on cross entropy alone" in sentence for sentence in alone)


def test_alarm_of_deepfool_alone() -> None:
    network, x, y = trained()
    for names, alarmed in (("deepfool", True), ("deepfool,pgd-margin", False)):
        result = attacks.evaluate(network, x, y, names, eps=0.01, step=0.005, iters=4)
        assert result.robust_accuracy > 0
        told = attacks.alarms(result)
        assert any("rests on DeepFool alone" in sentence for sentence in told) == alarmed


def test_alarm_of_a_weaker_attack_side_by_side_counts_the_difference() -> None:
    network, x, y = problem()
    names = "pgd-xent,pgd-margin"
    found = attacks.evaluate(network, x, y, names, eps=1e-9, iters=1, cascade=False)
    xent, other = found.attacks
    assert xent.attacked == other.attacked == 12
    xent.broken = other.broken = 5
    assert not any("pgd-margin breaks" in sentence for sentence in attacks.alarms(found))
    other.broken = 7
    assert any("pgd-margin breaks 2 of 12 rows" in s for s in attacks.alarms(found))


class Rounded(nn.Module):
    """Says nearly the same as a network, and lies about its gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        f = self.inner(x)
        # The value is rounded; the gradient points the other way.
        return torch.round(50 * f.detach()) / 50 + f.detach() - f


def test_alarm_of_a_black_box_ahead_of_the_white_box() -> None:
    network, x, y = trained()
    result = attacks.evaluate(
        Rounded(network), x, y, "pgd-margin,transfer", eps=0.1, step=0.02, source=network
    )
    assert any("black-box" in s and "transfer breaks" in s for s in attacks.alarms(result))
    clean = attacks.evaluate(
        network, x, y, "pgd-margin,transfer", eps=0.1, step=0.02, source=network
    )
    assert not any("black-box" in s for s in attacks.alarms(clean))


def test_a_network_without_a_gradient() -> None:
    network, x, y = trained()
    result = attacks.evaluate(
        lambda z: network(z).detach(), x, y, "pgd-margin,deepfool,transfer", eps=0.1, source=network
    )
    text = " ".join(attacks.alarms(result))
    assert "exactly zero at 152 of 152" in text
    assert "The black-box attack transfer breaks" in text


def test_alarm_of_too_few_steps() -> None:
    network, x, y = trained()
    result = attacks.evaluate(network, x, y, eps=0.15, step=0.02, iters=4)
    assert any("more steps are likely" in s for s in attacks.alarms(result))
    enough = attacks.evaluate(network, x, y, eps=0.02, step=0.02, iters=40)
    assert not any("more steps" in s for s in attacks.alarms(enough))


# --- bad input ---------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.tensor([0, 1, 4])}, "y: expected values in 0 ... 3 for 4 classes"),
        ({"y": torch.tensor([0, 1, -1])}, "y: expected values in 0 ... 3"),
        ({"y": torch.tensor([0, 1])}, r"y: expected shape \(n,\) = \(3,\), got \(2,\)"),
        ({"y": torch.tensor([0.0, 1.0, 2.0])}, "y: expected an integer dtype"),
        ({"x": torch.full((3, 1, 5, 5), 1.5)}, r"x: expected values in \[0, 1\], got .* 1.5"),
        ({"x": torch.full((3, 1, 5, 5), NAN)}, r"x: expected values in \[0, 1\], got .* nan"),
        ({"x": torch.zeros(3, 1, 5, 5, dtype=torch.uint8)}, "x: expected floating-point images"),
        ({"attack": "fgsm"}, "attack: expected one of pgd-xent.*got 'fgsm'"),
        ({"attack": ""}, "attack: expected one of"),
        ({"attack": []}, "attack: expected at least one"),
        ({"attack": "pgd-xent,pgd-xent"}, "got 'pgd-xent' twice"),
        ({"attack": "transfer"}, "source: expected a network"),
        ({"norm": "l1"}, "norm: expected one of linf, l2, got 'l1'"),
        ({"eps": -0.1}, "eps: expected a finite number >= 0"),
        ({"step": NAN}, "step: expected a finite number"),
        ({"iters": -1}, "iters: expected"),
        ({"iters": 2.5}, "iters: expected an integer"),
        ({"iters": 2.0}, r"iters: expected an integer, got 2\.0"),
        ({"restarts": 0}, "restarts: expected at least 1"),
        ({"batch": 0}, "batch: expected at least 1"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    network, x, _ = problem(n=3)
    arguments = {"x": x.float(), "y": torch.tensor([0, 1, 2]), "attack": "pgd-margin"}
    with pytest.raises(ValueError, match=message):
        attacks.evaluate(network.float(), **{**arguments, **change})


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("iters", [0, 3])
def test_a_start_is_brought_into_the_ball(norm: str, early_stop: bool, iters: int) -> None:
    network, x, y = problem(n=20)
    found = attacks.pgd(
        network, x, y, eps=0.01, step=0.001, iters=iters, norm=norm, start=1 - x,
        early_stop=early_stop,
    )  # fmt: skip
    moved = (found.adversarial - x).flatten(1)
    order = torch.inf if norm == "linf" else 2
    assert (torch.linalg.vector_norm(moved, order, dim=1) <= 0.01 + 1e-9).all()
    assert moved.any()


def test_a_start_is_that_of_the_first_restart_alone() -> None:
    network, x, y = problem()
    small = {"eps": 1e-3, "step": 1e-4, "iters": 1, "restarts": 2}
    given = attacks.pgd(network, x, y, start=x.clone(), **small)
    assert not bool(given.success.any())
    assert torch.equal(given.adversarial, attacks.pgd(network, x, y, **small).adversarial)


def test_unsigned_labels() -> None:
    network, x, y = problem(n=3)
    some = {"eps": 0.1, "step": 0.1, "iters": 1}
    expected = attacks.evaluate(network, x, y, **some)
    assert torch.equal(
        attacks.evaluate(network, x, y.to(torch.uint16), **some).adversarial, expected.adversarial
    )
    single = Affine(network.weight[:1].detach(), network.bias[:1].detach())
    with pytest.raises(ValueError, match="y: expected 0 and 1, or -1 and 1"):
        attacks.evaluate(single, x, torch.full_like(y, -1).view(torch.uint64), binary=True)


def test_targets_are_called_by_their_name() -> None:
    network, x, y = problem(n=3)
    one = {"eps": 0.1, "step": 0.1, "iters": 1, "objective": "targeted"}
    with pytest.raises(ValueError, match=r"targets: expected values in 0 \.\.\. "):
        attacks.pgd(network, x, y, targets=y + 100, **one)
    with pytest.raises(ValueError, match=r"targets: expected shape \(n,\) = \(3,\)"):
        attacks.pgd(network, x, y, targets=y[:2], **one)


def test_bad_networks() -> None:
    network, x, y = problem(n=3)
    single = Affine(network.weight[:1].detach(), network.bias[:1].detach())
    with pytest.raises(ValueError, match=r"model: expected logits .* K >= 2 .* binary=True"):
        attacks.evaluate(single, x, torch.zeros_like(y))
    with pytest.raises(ValueError, match="y: expected 0 and 1, or -1 and 1"):
        attacks.evaluate(single, x, torch.tensor([0, 1, 2]), binary=True)
    with pytest.raises(ValueError, match=r"model: expected one logit .* got shape \(1, 4\)"):
        attacks.evaluate(network, x, y, binary=True)
    with pytest.raises(ValueError, match=r"model: expected finite logits at x, got .* 3 of 3 rows"):
        attacks.evaluate(lambda z: z.flatten(1)[:, :2] * NAN, x, torch.zeros_like(y))
    with pytest.raises(ValueError, match="model: expected a tensor of logits, got int"):
        attacks.evaluate(lambda z: 3, x, y)
    with pytest.raises(TypeError, match="model: expected a module or a callable, got int"):
        attacks.evaluate(3, x, y)  # type: ignore[arg-type]
    with torch.no_grad():
        network.weight[0, 0] = NAN
    with pytest.raises(ValueError, match="model: expected finite weights, got NaN or inf in weig"):
        attacks.evaluate(network, x, y)


def test_names_with_steps() -> None:
    network, x, y = problem()
    result = attacks.evaluate(
        network, x, y, "pgd-xent-3,transfer-xent-5,multi-targeted-7", eps=1e-9, source=network
    )
    assert [(r.kind, r.iters) for r in result.attacks] == [
        ("pgd-xent", 3),
        ("transfer-xent", 5),
        ("multi-targeted", 7),
    ]


def test_climb_keeps_the_best_of_start_and_iterates() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.full((40, 3), 0.5, dtype=torch.float64)
    start = (torch.rand(x.shape, generator=generator, dtype=x.dtype) - 0.5) * 0.4
    tops = (torch.rand(x.shape, generator=generator, dtype=x.dtype) - 0.5) * 0.4
    seen: list[torch.Tensor] = []

    def value(delta: torch.Tensor) -> torch.Tensor:
        seen.append(delta.detach().clone())
        return -(delta - tops).square().sum(1)

    settings = Settings(0.2, 0.15, 4, keep_best=True)
    found = climb(value, x, start, settings)
    path = torch.stack(seen)
    assert path.shape == (5, 40, 3)  # one more evaluation than steps
    values = -(path - tops).square().sum(2)
    best = values.argmax(0)
    assert torch.equal(found, path[best, torch.arange(40)])
    assert {0, 1, 2, 3} <= set(best.tolist())  # of some row it is the start, of some an iterate
    last = climb(value, x, start, replace(settings, keep_best=False))
    assert torch.equal(last, path[-1])


def test_climb_does_not_keep_what_is_not_a_number() -> None:
    x = torch.full((2, 1), 0.5)

    def value(delta: torch.Tensor) -> torch.Tensor:
        return (delta[:, 0] - 0.05).log()

    found = climb(value, x, torch.tensor([[0.0], [0.1]]), Settings(0.2, 0.05, 2, keep_best=True))
    assert float(found[1]) == pytest.approx(0.2)
    assert float(found[0]) == pytest.approx(-0.1)  # the last of its iterates
