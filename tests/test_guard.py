"""Runs that diverge: noticed, taken back to good weights, written down; and none that do not."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reconstruct_command import SMALL, small_cloud
from torch import nn

from levelset_ext.data.images import Images
from levelset_ext.objectives import OBJECTIVES, CrossEntropy, Step
from levelset_ext.recipes import reconstruct as recipe
from levelset_ext.recipes.files import load_checkpoint
from levelset_ext.recipes.guard import MOST, Guard
from levelset_ext.recipes.training import TrainConfig, Training


class Walk:
    """A guarded module whose one number is the step it was at last."""

    def __init__(self, **more: Any) -> None:
        self.module = nn.Linear(1, 1, bias=False)
        self.optimizer = torch.optim.Adam(self.module.parameters())
        self.said: list[str] = []
        self.guard = Guard(self.module, self.optimizer, say=self.said.append, **more)
        self.step = 0
        self.noise = torch.Generator().manual_seed(0)

    def take(self, count: int, loss: float, share: float = 1.0, usable: bool = True) -> None:
        for _ in range(count):
            self.guard.begin(self.step)
            self.step += 1
            with torch.no_grad():
                self.module.weight.fill_(self.step)
            noisy = loss * math.exp(0.5 * float(torch.randn((), generator=self.noise)))
            self.guard.after(self.step, noisy, usable=usable, shares={"converged rows": share})

    @property
    def at(self) -> int:
        return int(self.module.weight)


def test_noise_decay_slow_growth_and_a_spike_are_left_alone() -> None:
    walk = Walk()
    walk.take(300, 1.0)
    for k in range(40):  # a loss that grows tenfold in 1000 steps, as with a growing eps
        walk.take(25, 1.0 + 9 * k / 40)
    walk.take(30, 1000.0)  # one window of it
    walk.take(100, 10.0)
    for k in range(20):
        walk.take(25, 10.0 / (k + 1) ** 3)
    walk.take(100, 0.02)  # up by an order, and still next to nothing beside the start
    assert walk.guard.returns == []
    assert walk.at == walk.step


def test_a_jump_goes_back_to_before_it_with_half_the_rate() -> None:
    walk = Walk()
    walk.take(410, 1.0)
    walk.take(40, 8.0)
    (entry,) = walk.guard.returns
    assert entry["back_to"] == walk.at == 400
    assert entry["step"] == 450
    assert walk.guard.rate == 0.5
    (line,) = walk.said
    assert line.startswith(f"diverged at step {entry['step']}: the loss rose from")
    assert "weights of step 400 and 0.5 of the learning rate" in line


def test_the_state_is_that_of_the_step_it_names() -> None:
    walk = Walk()
    walk.take(430, 1.0)
    walk.module(torch.ones(1, 1)).sum().backward()
    walk.optimizer.step()  # moves the optimizer's own state
    count = len(walk.guard.returns)
    while len(walk.guard.returns) == count:
        walk.take(1, 8.0)
    assert walk.at == 400
    assert not walk.optimizer.state_dict()["state"]


def test_the_share_of_converged_rows_falls() -> None:
    walk = Walk()
    walk.take(200, 1.0, share=0.99)
    walk.take(25, 1.0, share=0.7)
    walk.take(75, 1.0, share=0.97)
    assert walk.guard.returns == []
    walk.take(60, 0.9, share=0.73)  # with a lower loss, as seen
    assert "from 97 % to 73 %" in walk.guard.returns[0]["reason"]


def test_a_state_from_which_it_diverges_again_was_not_good() -> None:
    walk = Walk()
    walk.take(400, 1.0, share=0.999)

    def back_to() -> list[int]:
        return [entry["back_to"] for entry in walk.guard.returns]

    walk.take(50, 1.0, share=0.9)
    assert back_to() == [300]  # a hundred good steps followed
    # Measured by the range of step 300, not by that of the bad windows since.
    walk.take(50, 1.0, share=0.9)
    assert back_to() == [300, 200]
    assert walk.guard.rate == 0.25
    walk.take(50, 1.0, share=0.9)
    assert back_to() == [300, 200, 200]  # there is none before it
    walk.take(500, 1.0, share=0.99)
    assert len(back_to()) == 3
    assert walk.at == walk.step


def test_a_hundred_good_steps_follow_the_state_that_a_share_goes_back_to() -> None:
    walk = Walk()
    walk.take(375, 1.0, share=0.999)
    walk.take(50, 1.0, share=0.9)  # the first bad window began at 375, the second at 400
    assert [entry["back_to"] for entry in walk.guard.returns] == [200]


def test_the_start_comes_back_only_when_nothing_else_is_left() -> None:
    walk = Walk()
    walk.take(150, 1.0, share=0.999)
    walk.take(50, 1.0, share=0.9)
    walk.take(50, 1.0, share=0.9)
    assert [(e["step"], e["back_to"]) for e in walk.guard.returns] == [(200, 100), (250, 0)]


def test_a_share_that_recovered_is_forgotten() -> None:
    walk = Walk()
    walk.take(300, 1.0, share=0.999)
    walk.take(25, 1.0, share=0.9)  # one bad window
    walk.take(200, 1.0, share=0.999)
    walk.take(50, 8.0, share=0.999)
    (entry,) = walk.guard.returns
    assert "loss" in entry["reason"]
    assert entry["back_to"] == 500


def test_a_state_with_a_smaller_share_is_not_kept() -> None:
    walk = Walk()
    walk.take(375, 1.0, share=0.999)
    walk.take(25, 1.0, share=0.98)  # not bad, and not as good as before
    walk.take(50, 8.0, share=0.98)
    assert walk.guard.returns[0]["back_to"] == 300


def test_a_state_with_a_larger_loss_is_not_kept() -> None:
    guard = Guard(nn.Linear(1, 1))
    guard.begin(0)
    for step in range(1, 451):
        loss = 1.0 if step <= 375 else 1.5 if step <= 400 else 8.0  # 1.5 is not bad
        guard.after(step, loss, usable=True)
    assert [(e["step"], e["back_to"]) for e in guard.returns] == [(450, 300)]


def test_two_returns_to_one_state_bring_back_the_same_momentum() -> None:
    module = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)

    def move(gradient: float) -> None:
        module.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()

    move(1.0)
    guard = Guard(module, optimizer)
    guard.begin(0)
    found: list[float] = []
    for _ in range(2):
        move(8.0)
        for step in range(5):
            guard.after(step, math.nan, usable=False)
        found.append(float(optimizer.state[module.weight]["momentum_buffer"]))
    assert found == [1.0, 1.0]


def test_every_share_counts_and_the_message_names_the_one_that_fell() -> None:
    guard = Guard(nn.Linear(1, 1))
    guard.begin(0)
    for step in range(1, 301):
        signs = 0.999 if step <= 200 else 0.95
        shares = {"converged rows": 0.999, "signs": signs}
        guard.after(step, 1.0, usable=True, shares=shares)
    entry = guard.returns[0]
    assert entry["reason"] == "the share of signs fell from 100 % to 95 %"
    assert (entry["step"], entry["back_to"]) == (250, 100)


def test_steps_that_are_not_finite() -> None:
    walk = Walk()
    walk.take(150, 1.0)
    walk.take(4, math.nan, usable=False)
    walk.take(1, 1.0)
    assert walk.guard.returns == []
    walk.take(5, math.inf, usable=False)
    assert walk.at == 100
    walk.take(5 * (MOST - 1), math.nan, usable=False)
    with pytest.raises(RuntimeError, match="not finite in 5 steps in a row, after 4 returns"):
        walk.take(5, math.nan, usable=False)
    with pytest.raises(RuntimeError, match="not finite in 21 steps in a row"):
        Walk(active=False).take(50, math.nan, usable=False)


def test_weights_that_are_not_finite_are_no_good_state() -> None:
    walk = Walk()
    walk.take(180, 1.0)
    with torch.no_grad():
        walk.module.weight.fill_(math.nan)
    assert not walk.guard.sound()
    for step in range(181, 221):
        walk.guard.after(step, 1.0, usable=True, shares={"converged rows": 1.0})
    walk.guard.after(walk.step, 1.0, usable=True, last=True)
    assert walk.guard.returns[0]["reason"] == "the weights are not finite"
    assert walk.at == 100


def test_a_guard_that_is_loaded_decides_the_same() -> None:
    walk, again = Walk(), Walk()
    walk.take(333, 1.0)
    again.take(333, 1.0)
    state = again.guard.state()
    again.guard = Guard(again.module, again.optimizer)
    again.guard.load(state)
    for one in (walk, again):
        one.take(20, 1.0)
        one.take(80, 9.0)
    assert walk.guard.returns == again.guard.returns != []
    assert walk.at == again.at


def test_a_guard_that_is_loaded_between_two_bad_windows_decides_the_same() -> None:
    walk, again = Walk(), Walk()
    for one in (walk, again):
        one.take(375, 1.0, share=0.999)
        one.take(25, 1.0, share=0.9)
    again.guard = Guard(again.module, again.optimizer)
    again.guard.load(walk.guard.state())
    for one in (walk, again):
        one.take(25, 1.0, share=0.9)
    assert walk.guard.returns == again.guard.returns != []
    assert walk.at == again.at == 200


# --- whole runs -----------------------------------------------------------------------------


LONGER = replace(SMALL, steps=240, lam_steps=240, resolution=24, checkpoint_every=20)


def trained(out: Path, config: recipe.ReconstructConfig) -> recipe.TrainedRun[recipe.Training]:
    points = small_cloud().points
    watch = recipe.Observers([])
    return recipe.train_in_folder(
        recipe.Training, points, out, config, recipe.KIND, "cpu", False, lambda text: None, watch
    )


def blow_up(monkeypatch: pytest.MonkeyPatch, at: int, factor: float) -> None:
    """The learning rate from a step on, while nothing has divided it."""
    plain = recipe.Training._scheduled_rate

    def rate(self: recipe.Training) -> float:
        return plain(self) * (factor if self.step >= at and self.guard.rate == 1 else 1)

    monkeypatch.setattr(recipe.Training, "_scheduled_rate", rate)


def test_a_diverging_reconstruction_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blow_up(monkeypatch, 150, 100.0)
    said: list[str] = []
    found = recipe.reconstruct(small_cloud(), tmp_path / "kept", LONGER, say=said.append)
    (entry,) = found["divergences"]
    assert entry["back_to"] == 100
    assert 150 < entry["step"] <= 225
    assert any(line.startswith(f"diverged at step {entry['step']}") for line in said)
    assert json.loads((tmp_path / "kept" / "metrics.json").read_text())["divergences"] == [entry]
    assert found["watertight"]
    assert found["components"] == 1
    assert found["cloud_to_mesh"] < 0.03
    lost = trained(tmp_path, replace(LONGER, guard=False))
    assert lost.training.guard.returns == []
    assert lost.history["loss_other_levels"] > 3 * found["loss_other_levels"]


def test_a_reconstruction_that_loses_the_sign_of_its_network_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """|F| in place of F has the same loss to the last digit, and its projections converge."""
    plain = recipe.Training.sign_change_share

    def folded(self: recipe.Training, *args: Any) -> float:
        return plain(self, *args) * (0.5 if self.step >= 300 and self.guard.rate == 1 else 1)

    monkeypatch.setattr(recipe.Training, "sign_change_share", folded)
    config = replace(LONGER, steps=400, distance="disks")
    training = trained(tmp_path, config).training
    (entry,) = training.guard.returns
    assert "disks across which F changes its sign fell from" in entry["reason"]
    assert (entry["step"], entry["back_to"]) == (350, 200)
    # What was seen last is in the checkpoint: a run that goes on decides by the same figures.
    state = load_checkpoint(tmp_path / "checkpoint.pt", recipe.KIND)["training"]
    assert state["counters"]["sign_changes"] == training.sign_changes
    # The window after the return is about the weights that came back.
    assert state["guard"]["_bad"] == 0
    (_, shares), *_ = state["guard"]["_memory"][-2:]
    assert shares["disks across which F changes its sign"] > 0.9


def test_a_reconstruction_that_meets_nan_keeps_it_out_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, gradients and weights: skipped and counted, or gone back from."""
    config = replace(LONGER, steps=40, checkpoint_every=1)
    plain = recipe.losses.reconstruction
    calls = 0

    def loss(fn: Any, samples: Any, cloud: Any, *args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        found = plain(fn, samples, cloud, *args, **more)
        if calls in (5, 6, 20, 21, 22, 23, 24):
            return found._replace(total=found.total * math.nan)
        if calls == 9:  # a finite loss whose gradient is not
            return found._replace(total=found.total.detach() + (found.total * 0).sqrt())
        return found

    monkeypatch.setattr(recipe.losses, "reconstruction", loss)
    written: list[dict[str, Any]] = []
    save = recipe.save_checkpoint

    def noted(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        written.append(load_checkpoint(path, recipe.KIND)["training"])

    monkeypatch.setattr(recipe, "save_checkpoint", noted)
    training = trained(tmp_path, config).training
    assert training.skipped_steps == 8
    assert [entry["step"] for entry in training.guard.returns] == [24]
    assert len(written) == 40
    for state in written:
        tensors = [*state["network"].values()]
        tensors += [t for row in state["optimizer"]["state"].values() for t in row.values()]
        assert all(bool(torch.isfinite(torch.as_tensor(tensor)).all()) for tensor in tensors)


def test_weights_of_nan_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = recipe.Training.advance

    def advance(self: recipe.Training) -> Any:
        loss = plain(self)
        if self.step == 20:
            with torch.no_grad():
                next(self.network.parameters())[0, 0] = math.nan
        return loss

    monkeypatch.setattr(recipe.Training, "advance", advance)
    config = replace(LONGER, steps=23, checkpoint_every=1)
    run = trained(tmp_path, config)
    (entry,) = run.training.guard.returns
    assert (entry["step"], entry["reason"]) == (23, "the weights are not finite")
    assert run.training.guard.sound()
    kept = load_checkpoint(tmp_path / "checkpoint.pt", recipe.KIND)["training"]["network"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())


def test_the_average_of_the_weights_goes_back_with_them() -> None:
    random = torch.Generator().manual_seed(0)
    data = Images(torch.rand(8, 1, 2, 2, generator=random), torch.arange(8) % 2, "noise", 2)
    config = TrainConfig(batch=4, steps=20, lr=0.1, lr_warmup=0.0, ema=0.9)
    training = Training(data, config, network=nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    start = copy.deepcopy(training.result.state_dict())
    for _ in range(3):
        training.advance()
    assert not torch.equal(training.result.state_dict()["1.weight"], start["1.weight"])
    for step in range(4, 9):
        training.guard.after(step, math.nan, usable=False)
    assert training.guard.returns[0]["back_to"] == 0
    for name, tensor in training.result.state_dict().items():
        assert torch.equal(tensor, start[name]), name


class Ascent(CrossEntropy):
    """Cross entropy that is climbed from a share of the training on, for as long as it is let."""

    def __call__(self, network: Any, x: Any, y: Any, **more: Any) -> Step:
        found = super().__call__(network, x, y, **more)
        if more["progress"] >= 0.6 and not Turned.back:
            # Its value, with the gradient of the opposite.
            return Step(2 * found.loss.detach() - found.loss)
        return found


class Turned:
    back = False


def test_a_diverging_classifier_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    from levelset_ext.data.images import load_images
    from levelset_ext.recipes import train as classifier

    monkeypatch.setitem(OBJECTIVES, "broken", Ascent)
    data, test = load_images(None, "train", 200), load_images(None, "test", 200)
    config = classifier.preset("cross-entropy", data, batch=20, steps=200, settings={"ema": 0.5})
    config = replace(config, network="convnet-2a", objective="broken", schedule="constant")
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        Turned.back = Turned.back or text.startswith("diverged")

    monkeypatch.setattr(Turned, "back", False)
    metrics = classifier.train(data, test, tmp_path, config, say=say)
    (entry,) = metrics["divergences"]
    assert 120 < entry["step"] <= 180
    assert entry["back_to"] <= 125
    assert any("diverged" in line for line in said)
    assert metrics["clean_accuracy"] > 0.7
