"""``levelset-ext train``: what a run leaves behind, going on after a kill, schedules, bad input."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from levelset_ext.cli import main
from levelset_ext.data.images import Images, load_images, merge_labels
from levelset_ext.errors import InputError
from levelset_ext.networks import build
from levelset_ext.objectives import OBJECTIVES, Step
from levelset_ext.recipes import train as recipe
from levelset_ext.recipes.classifiers import load_classifier, save_classifier
from levelset_ext.recipes.history import RESERVED, History
from levelset_ext.recipes.train_presets import TUNABLE
from levelset_ext.recipes.training import accuracy, plain_config

pytest.importorskip("sklearn")

FILES = ["checkpoint.pt", "config.json", "history.csv", "metrics.json"]
# Objectives that search, with searches as short as they can be.
SHORT: dict[str, dict[str, Any]] = {
    "madry": {"eps": 0.1, "step": 0.05, "iters": 2},
    "trades": {"eps": 0.1, "step": 0.05, "iters": 2},
    "mma": {"eps_max": 0.1, "step": 0.05, "iters": 3},
    "llr": {"eps": 0.1, "steps": 2},
    "robust": {
        "eps_correct": 0.2,
        "eps_wrong": 0.2,
        "step": 0.05,
        "iters": 4,
        "search": "margin",
        "distance": "rho",
        "lam_correct": 1.0,
        "warmup": 0.0,
        "warm_start": 0.0,
    },
    "svm": {"max_iters": 3},
}


def digits(split: str = "train", rows: int = 60, classes: int = 10) -> Images:
    data = load_images(None, split, rows)
    if classes == 10:
        return data
    return Images(data.images, merge_labels(data.labels, classes), data.name, classes)


def small(objective: str, steps: int = 14, **more: Any) -> recipe.TrainConfig:
    """Three steps an epoch; checkpoints fall into the middle of one."""
    settings = {**SHORT.get(objective, {}), "checkpoint_every": 4, "log_every": 2, "ema": 0.9}
    data = digits(classes=2 if objective == "svm" else 10)
    return recipe.preset(objective, data, batch=24, steps=steps, seed=3, settings=settings, **more)


def same_state(a: Any, b: Any) -> bool:
    """Whether two checkpoints hold the same numbers to the bit, times apart."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same_state(a[k], b[k])
            for k in a
            if k not in ("seconds", "cpu_seconds", "samples_per_second", "open")
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b or (a != a and b != b)


def load(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_a_run_leaves_whole_files_that_attack_takes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["train", "cross-entropy", "--out", str(out), "--limit", "300", "--steps", "90",
                 "--batch", "50", "--lr", "0.01", "--set", "log_every=4"]) == 0  # fmt: skip
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "step 90/90" in captured.err
    names = {path.name for path in out.iterdir()} - {"history.png"}  # which needs matplotlib
    assert sorted(names) == FILES
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 90
    assert metrics["epochs"] == 15
    assert metrics["skipped_steps"] == 0
    assert metrics["clean_accuracy"] > 0.7
    assert metrics["last_epoch"]["loss"] < 0.5
    assert metrics["build"]["version"]

    with (out / "history.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted({*range(4, 91, 4), *range(6, 91, 6)})
    validated = [int(row["step"]) for row in rows if row["clean_accuracy"]]
    assert validated == list(range(6, 91, 6))
    assert float(rows[-1]["clean_accuracy"]) == pytest.approx(metrics["clean_accuracy"])
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert {"epoch", "lr", "seconds", "samples_per_second", "accuracy"} <= set(rows[0])

    attack = ["attack", str(out / "checkpoint.pt"), "--limit", "300", "--iters", "1"]
    assert main([*attack, "--attack", "pgd-margin"]) == 0
    attacked = json.loads(capfd.readouterr().out)
    assert attacked["clean_accuracy"] == metrics["clean_accuracy"]

    kept = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    again = ["train", "cross-entropy", "--out", str(out), "--limit", "300", "--steps", "90",
             "--batch", "50", "--lr", "0.01", "--set", "log_every=4", "--resume"]  # fmt: skip
    assert main(again) == 0
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir()} == kept
    assert main([*again, "--seed", "4"]) == 2
    assert "to resume, got other seed" in capfd.readouterr().err
    assert main([*again, "--limit", "299"]) == 2
    assert "got other data, test, rows" in capfd.readouterr().err
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir()} == kept


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains(objective: str, tmp_path: Path) -> None:
    classes = 2 if objective == "svm" else 10
    data = digits(rows=48, classes=classes)
    config = replace(small(objective, steps=2), settings=SHORT.get(objective, {}))
    metrics = recipe.train(data, digits("test", 20, classes), tmp_path, config)
    assert metrics["skipped_steps"] == 0
    assert math.isfinite(metrics["last_epoch"]["loss"])
    one_logit = load_classifier(tmp_path / "checkpoint.pt").config["options"]["classes"] == 1
    assert one_logit == (objective == "svm")


def test_robust_training_pushes_the_boundary_away(tmp_path: Path) -> None:
    """From a trained network: the mean distance to the boundary grows, the accuracy stays."""
    data, test = digits(rows=200), digits("test", 100)
    first = recipe.preset("cross-entropy", data, steps=60, batch=50, lr=1e-2)
    recipe.train(data, test, tmp_path / "plain", first)
    start = load_classifier(tmp_path / "plain" / "checkpoint.pt")
    settings = {**SHORT["robust"], "autocast": False, "ema": 0.0}
    config = recipe.preset("robust", data, steps=24, batch=50, lr=1e-3, settings=settings)
    metrics = recipe.train(data, test, tmp_path / "robust", config, init=start)
    with (tmp_path / "robust" / "history.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[-1]["converged"]) > 0.9
    assert metrics["last_epoch"]["accuracy"] > 0.9
    assert "distance" in metrics["last_epoch"]


def test_one_logit_from_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "svm")
    arguments = ["train", "svm", "--classes", "2", "--limit", "60", "--steps", "2", "--out", out]
    assert main([*arguments, "--set", "max_iters=3", "--fraction", "0.5"]) == 0
    assert json.loads((tmp_path / "svm" / "metrics.json").read_text())["rows"] == 30
    checkpoint = out + "/checkpoint.pt"
    assert main(["attack", checkpoint, "--merge-labels", "2", "--limit", "20", "--iters", "1"]) == 0
    # A further training starts from it, with its one logit.
    more = ["--init", checkpoint, "--classes", "2", "--limit", "60", "--steps", "1"]
    assert main(["train", "hinge", *more, "--out", str(tmp_path / "more")]) == 0
    assert load_classifier(tmp_path / "more" / "checkpoint.pt").config["options"]["classes"] == 1


WARM = {"search": "xent", "distance": "along", "warm_start": 0.8}


@pytest.mark.parametrize("objective", ["cross-entropy", "madry", "robust", "robust, warm"])
def test_goes_on_where_it_was_interrupted(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, warm = objective.partition(", ")
    config = replace(small(name), augment=not warm, held_out=0.1)
    if warm:
        config = replace(config, settings={**config.settings, **WARM}, autocast=True, shift=1)
    recipe.train(digits(), digits("test", 20), tmp_path / "whole", config)

    advance, steps = recipe.Training.advance, []

    def interrupted(self: recipe.Training) -> dict[str, float]:
        steps.append(self.step)
        if len(steps) in (6, 9):
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(recipe.Training, "advance", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            recipe.train(digits(), digits("test", 20), tmp_path / "cut", config, resume=True)
    recipe.train(digits(), digits("test", 20), tmp_path / "cut", config, resume=True)
    assert steps == [*range(6), *range(4, 7), *range(4, 14)]
    assert same_state(load(tmp_path / "whole"), load(tmp_path / "cut"))


# --- the step ----------------------------------------------------------------------------------


def test_a_warm_start_hands_every_row_its_own_offsets() -> None:
    config = small("robust")
    config = replace(config, settings={**config.settings, **WARM, "warm_start": 1.0})
    training = recipe.Training(digits(), config)
    assert training.offsets is not None
    assert not training.offsets.any()
    for _ in range(training.steps_per_epoch):
        training.advance()
    assert bool(training.offsets.flatten(1).any(1).all())
    handed, objective = [], training.objective

    def watched(*arguments: Any, offsets: torch.Tensor, **more: Any) -> Step:
        handed.append(offsets)
        return objective(*arguments, offsets=offsets, **more)

    training.objective = watched
    before = training.offsets.clone()
    training.advance()
    rows = training.order[: len(handed[0])]
    assert torch.equal(handed[0], before[rows].float())
    rest = training.order[len(handed[0]) :]
    assert torch.equal(training.offsets[rest], before[rest])
    assert not torch.equal(training.offsets[rows], before[rows])
    with pytest.raises(InputError, match="augment: expected no augmentation with warm_start"):
        replace(config, augment=True)
    assert recipe.Training(digits(), small("robust")).offsets is None


def test_the_offsets_of_warm_starts_move_with_their_images() -> None:
    """The search is a stand-in that leaves behind what it was handed plus the image: had one of the
    two moved without the other, offsets and images would not match any more."""
    config = small("robust")
    config = replace(config, settings={**config.settings, **WARM, "warm_start": 1.0}, shift=2)
    training = recipe.Training(digits(), config)
    seen = []

    def search(network: Any, x: torch.Tensor, *_: Any, offsets: torch.Tensor, **__: Any) -> Step:
        seen.append(x)
        loss = sum(p.sum() for p in network.parameters()) * 0.0
        return Step(loss, {}, offsets + x)

    training.objective = search
    for _ in range(2 * training.steps_per_epoch):
        training.advance()
    assert training.offsets is not None
    assert torch.equal(training.offsets.float(), 2 * training.images)
    assert not torch.equal(seen[-1], training.images[training.order[-len(seen[-1]) :]])
    with pytest.raises(InputError, match="shift: expected a number of pixels >= 0, got -1"):
        replace(config, shift=-1)


def test_the_offsets_of_warm_starts_bend_with_their_images(tmp_path: Path) -> None:
    """The stand-in leaves the image it saw: the next visit must be handed that image as this
    visit's map would have bent it, but for the pixels that nearest neighbours differ by."""
    config = small("robust")
    config = replace(config, settings={**config.settings, **WARM, "warm_start": 1.0})
    config = replace(config, bend=0.1, shift=1)
    smooth = torch.linspace(-1, 1, 8)
    image = torch.exp(-2 * (smooth[:, None] ** 2 + (smooth - 0.2) ** 2))
    data = digits()
    data = replace(data, images=image.expand(len(data), 1, 8, 8).contiguous())
    training = recipe.Training(data, config)
    errors, apart = [], []

    def search(network: Any, x: torch.Tensor, *_: Any, offsets: torch.Tensor, **__: Any) -> Step:
        middle = (slice(None), slice(None), slice(2, 6), slice(2, 6))
        errors.append(float((offsets - x)[middle].abs().mean()))
        apart.append(float((x - image)[middle].abs().mean()))
        return Step(sum(p.sum() for p in network.parameters()) * 0.0, {}, x)

    training.objective = search
    for _ in range(3 * training.steps_per_epoch):
        training.advance()
    later = slice(training.steps_per_epoch, None)
    assert max(errors[later]) < 0.08 < min(apart[later])
    again = recipe.Training(data, config)
    again.load(training.state())
    assert again.maps is not None
    assert training.maps is not None
    assert torch.equal(again.maps, training.maps)
    with pytest.raises(InputError, match=r"bend: expected 0 <= bend < 1, got 1\.0"):
        replace(config, bend=1.0)
    assert recipe.Training(data, replace(small("cross-entropy"), bend=0.1)).maps is None


def test_an_epoch_uses_every_row_once_in_even_batches() -> None:
    training = recipe.Training(digits(rows=50), small("cross-entropy"))
    assert training.steps_per_epoch == 3
    first, second = [], []
    for seen in (first, second):
        for step in range(3):
            training.step = step
            x, *_ = training.next_batch()
            assert len(x) in (16, 17)
            seen.append(x)
    a, b = torch.cat(first), torch.cat(second)
    assert not torch.equal(a, b)
    assert torch.equal(a.flatten(1).sum(1).sort()[0], b.flatten(1).sum(1).sort()[0])


def test_randomness_is_its_own() -> None:
    state = torch.get_rng_state()
    config = small("madry")
    a, b = recipe.Training(digits(), config), recipe.Training(digits(), config)
    assert a.advance() == b.advance()
    c = recipe.Training(digits(), replace(config, seed=4))
    assert not torch.equal(next(a.network.parameters()), next(c.network.parameters()))
    assert torch.equal(torch.get_rng_state(), state)


def rates(**settings: Any) -> list[float]:
    training = recipe.Training(
        digits(), replace(small("cross-entropy", steps=100), lr=1.0, **settings)
    )
    found = []
    for training.step in range(100):
        found.append(training.learning_rate())
    return found


def test_schedules_depend_on_the_step_alone() -> None:
    cosine = rates(schedule="cosine", lr_warmup=0.1)
    assert cosine[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert cosine[10] == 1
    assert cosine[55] == pytest.approx(0.5)
    assert 0 < cosine[99] < 1e-3
    halving = rates(schedule="halving", halve_at=(0.5, 0.75), lr_warmup=0.0)
    assert halving == [1.0] * 50 + [0.5] * 25 + [0.25] * 25
    cycle = rates(schedule="one-cycle", lr_warmup=0.4)
    assert cycle[0] == pytest.approx(1 / 25 + 24 / 25 / 40)
    assert cycle[39:41] == [1.0, 1.0]
    assert cycle[70] == pytest.approx(0.5)
    assert rates(schedule="constant", lr_warmup=0.0) == [1.0] * 100


@dataclass(frozen=True)
class Broken:
    """Not finite in the loss, or in the gradient alone."""

    where: str = "loss"

    def __call__(
        self, network: Any, x: Any, y: Any, *, generator: Any = None, progress: float = 1.0
    ) -> Step:
        logits = network(x)
        value = logits.sum() * (math.nan if self.where == "loss" else 1)
        if self.where == "gradient":
            value = value.detach() + ((logits - logits).sum()).sqrt()
        return Step(value, {"loss": value.detach()})


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_skipped_and_counted(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBJECTIVES, "broken", Broken)
    config = replace(small("cross-entropy", steps=100), objective="broken")
    training = recipe.Training(digits(), replace(config, settings={"where": where}))
    before = [parameter.clone() for parameter in training.network.parameters()]
    for _ in range(24):
        assert "objective_loss" in training.advance()  # the name "loss" is taken
    assert training.skipped_steps == 24
    assert len(training.guard.returns) == 4
    assert all(map(torch.equal, before, training.network.parameters()))
    with pytest.raises(RuntimeError, match=r"diverged at step 25: .* not finite in 5 steps"):
        training.advance()
    training.history.close(25, 7.0, 1.0, None)
    assert training.history.rows[0]["skipped"] == 25


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "nesterov"])
def test_optimizers(optimizer: str) -> None:
    """Fused and in channels-last order, they do what the plain ones do."""
    options = {"lr": 1e-2, "weight_decay": 0.1}
    config = replace(small("cross-entropy"), optimizer=optimizer, schedule="constant", **options)
    config = replace(config, lr_warmup=0.0, network="convnet-2b", ema=0.0)
    training = recipe.Training(digits(rows=16), config)
    network = build("convnet-2b", shape=(1, 8, 8))
    network.load_state_dict(training.network.state_dict())
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    more = {} if optimizer in kinds else {"momentum": 0.9, "nesterov": optimizer == "nesterov"}
    kind = kinds.get(optimizer, torch.optim.SGD)
    plain = kind(network.parameters(), **options, **more, foreach=False)
    for _ in range(3):
        training.advance()
        loss = torch.nn.functional.cross_entropy(
            network(training.images[training.order]), training.labels[training.order]
        )
        plain.zero_grad()
        loss.backward()
        plain.step()
    for ours, theirs in zip(training.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_the_longest_gradient_is_that_of_the_settings() -> None:
    config = replace(small("cross-entropy"), optimizer="sgd", schedule="constant", lr=0.5)
    config = replace(config, momentum=0.0, weight_decay=0.0, lr_warmup=0.0, clip_norm=0.01)
    training = recipe.Training(digits(), config)
    before = [parameter.detach().clone() for parameter in training.network.parameters()]
    assert training.advance()["gradient_norm"] > 0.02
    moves = zip(training.network.parameters(), before, strict=True)
    squares = sum(float((new.detach() - old).double().square().sum()) for new, old in moves)
    assert math.sqrt(squares) == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_both_decays_of_adam_are_those_of_the_settings() -> None:
    config = replace(small("cross-entropy"), optimizer="adamw", momentum=0.8, beta2=0.95)
    training = recipe.Training(digits(), config)
    assert [group["betas"] for group in training.optimizer.param_groups] == [(0.8, 0.95)]


def test_the_average_is_what_is_kept(tmp_path: Path) -> None:
    config = replace(small("cross-entropy", steps=4), lr=0.01)
    training = recipe.Training(digits(), config)
    mean = next(training.network.parameters()).detach().clone()
    for step in range(4):
        training.advance()
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * next(training.network.parameters()).detach()
    torch.testing.assert_close(next(training.result.parameters()), mean)
    recipe.train(digits(), digits("test", 20), tmp_path, config)
    kept = next(load_classifier(tmp_path / "checkpoint.pt").parameters())
    torch.testing.assert_close(kept, mean)
    assert not torch.equal(kept, next(training.network.parameters()))


def test_the_average_has_batch_norm_statistics() -> None:
    config = replace(small("cross-entropy"), network="resnet-18", batch=4)
    config = replace(config, options={"classes": 10, "shape": [1, 8, 8]})
    training = recipe.Training(digits(rows=8), config)
    training.advance()
    assert training.average is not None
    ours, mean = training.network.state_dict(), training.average.state_dict()
    torch.testing.assert_close(mean["bn1.running_mean"], 0.9 * ours["bn1.running_mean"])
    assert mean["bn1.num_batches_tracked"] == 1


def test_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    config = replace(small("cross-entropy", steps=3), held_out=0.2)
    training = recipe.Training(digits(), config)
    assert training.held_out is not None
    assert (len(training.held_out), len(training.labels)) == (12, 48)
    seen = {tuple(image.flatten().tolist()) for image in training.images}
    assert not seen & {tuple(image.flatten().tolist()) for image in training.held_out.images}
    metrics = recipe.train(digits(), digits("test", 20), tmp_path, config)
    assert metrics["rows"] == 48
    assert "held_out_accuracy" in metrics


def test_the_accuracy_on_the_way_is_that_of_the_held_out_rows(tmp_path: Path) -> None:
    config = replace(small("cross-entropy", steps=30), held_out=0.2, lr=0.01)
    test = digits()  # other labels than those trained on, so that the two accuracies differ
    test = Images(test.images, (test.labels + 1) % 10, test.name, test.classes)
    metrics = recipe.train(digits(), test, tmp_path, config)
    with (tmp_path / "history.csv").open() as stream:
        last = list(csv.DictReader(stream))[-1]
    assert abs(metrics["held_out_accuracy"] - metrics["clean_accuracy"]) > 0.05
    assert float(last["clean_accuracy"]) == pytest.approx(metrics["held_out_accuracy"])


def test_the_means_of_the_last_epoch_are_of_its_steps_alone(tmp_path: Path) -> None:
    # Three steps an epoch, a row of the table every two.
    config = replace(small("cross-entropy", steps=6), lr=0.01)
    metrics = recipe.train(digits(), digits("test", 20), tmp_path, config)
    with (tmp_path / "history.csv").open() as stream:
        loss = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(stream)}
    assert list(loss) == [2, 3, 4, 6]
    assert metrics["last_epoch"]["loss"] == pytest.approx((loss[4] + 2 * loss[6]) / 3, rel=1e-4)
    assert abs(loss[2] - loss[6]) > 0.05


def test_a_tie_is_no_hit() -> None:
    network = build("convnet-2a", shape=(1, 8, 8))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert accuracy(network, digits(), torch.device("cpu")) == 0


def test_history_means() -> None:
    history = History()
    for step, distance in ((1, math.nan), (2, 4.0), (3, 2.0)):
        history.add({"distance": distance, "a": step}, samples=5, seconds=0.5, skipped=False)
    history.close(3, 0.5, 2.0, None)
    history.add({"distance": math.nan, "a": 9.0}, samples=5, seconds=0.5, skipped=True)
    history.close(4, 1.0, 3.0, 0.75)
    history.close(4, 1.0, 3.0, 0.75)  # nothing new
    assert len(history.rows) == 2
    assert history.rows[0]["distance"] == 3
    assert history.rows[0]["samples_per_second"] == 10
    assert history.means(0) == {"distance": 3, "a": (3 * 2 + 9) / 4}
    assert history.means(3) == {"a": 9}


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe.PRESETS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_preset_can_be_used(name: str, objective: str) -> None:
    for shape, images in (((1, 28, 28), "mnist"), ((3, 32, 32), "cifar10"), ((1, 8, 8), "digits")):
        classes = 2 if objective == "svm" else 10
        data = Images(torch.empty(0, *shape), torch.empty(0).long(), images, classes)
        config = recipe.preset(objective, data, name)
        assert plain_config(config)["settings"] == config.settings
        assert config.options["shape"] == list(shape)
        assert config.options["classes"] == (1 if objective == "svm" else 10)


def test_names_of_settings_and_columns_do_not_meet() -> None:
    for table in recipe.PRESETS.values():
        for objective, images in table:
            assert objective in ("*", *OBJECTIVES)
            assert images in ("*", "mnist", "cifar10", "digits")
    for kind in OBJECTIVES.values():
        assert not set(kind.__dataclass_fields__) & set(TUNABLE)
    assert "loss" in RESERVED


def test_paper_presets_are_the_paper() -> None:
    mnist = Images(torch.empty(0, 1, 28, 28), torch.empty(0).long(), "mnist")
    config = recipe.preset("robust", mnist, "paper")
    assert (config.network, config.epochs, config.batch, config.lr) == (
        "convnet-4a",
        200,
        128,
        1e-3,
    )
    assert (config.optimizer, config.schedule, config.halve_at) == ("adam", "halving", (0.5, 0.75))
    assert (config.settings["eps_correct"], config.settings["eps_wrong"]) == (0.4, 0.5)
    assert (config.settings["iters"], config.settings["step"]) == (40, 0.01)
    madry = recipe.preset("madry", mnist, "paper")
    assert (madry.lr, madry.weight_decay, madry.settings["iters"]) == (1e-4, 1e-6, 40)
    cifar = Images(torch.empty(0, 3, 32, 32), torch.empty(0).long(), "cifar10")
    config = recipe.preset("robust", cifar, "paper")
    assert (config.network, config.lr, config.augment) == ("convnet-4b", 3e-4, True)
    assert (config.settings["warmup"], config.settings["lam_correct"]) == (0.25, 11)


def test_the_long_robust_training_shifts_and_shrinks_its_steps_and_no_other() -> None:
    def fast(name: str, side: int) -> tuple[int, float, int, float | None]:
        images = Images(torch.empty(0, 1, side, side), torch.empty(0).long(), name)
        config = recipe.preset("robust", images)
        own = config.settings
        return config.shift, config.epochs, own["iters"], own["step_last"]

    assert fast("mnist", 28) == (2, 26, 3, 0.02)
    assert fast("digits", 8) == (0, 60, 2, None)


def test_settings_reach_objective_and_training() -> None:
    settings = {
        "eps": 0.2,
        "iters": 3,
        "schedule": "halving",
        "halve_at": [0.5],
        "clip_norm": "inf",
    }
    config = recipe.preset("madry", digits(), settings=settings, lr=0.5, network="ConvNet_2B")
    assert (config.settings["eps"], config.settings["iters"]) == (0.2, 3)
    assert (config.schedule, config.halve_at, config.lr) == ("halving", (0.5,), 0.5)
    assert config.network == "convnet-2b"


BAD: dict[str, tuple[list[str], str]] = {
    "objective": (["mardy"], "objective: expected one of cross-entropy, .*, got 'mardy'"),
    "network": (["hinge", "--network", "vgg"], "network: name: expected one of .*convnet-4a"),
    "too small": (["hinge", "--network", "convnet-4a"], "network: shape: expected larger images"),
    "option": (["hinge", "--network-options", '{"depth": 3}'], "network: .*depth"),
    "options": (["hinge", "--network-options", "[1]"], "network-options: expected a JSON object"),
    "shape": (["hinge", "--network-options", '{"shape": 3}'], "network: "),
    "set": (["madry", "--set", "epsilon=1"], "set: expected a setting among eps, .*'epsilon'"),
    "no value": (["madry", "--set", "eps"], "set: expected NAME=VALUE, got 'eps'"),
    "word": (["madry", "--set", "eps=big"], "madry: eps: expected a number, got 'big'"),
    "whole": (["madry", "--set", "iters=2.5"], "madry: iters: expected a whole number, got 2.5"),
    "nan": (["madry", "--set", "eps=NaN"], "madry: eps: expected a number, got nan"),
    "huge": (["madry", "--set", "eps=1" + 400 * "0"], "madry: eps: expected a number"),
    "negative": (["madry", "--set", "eps=-1"], "madry: eps: expected a finite number >= 0"),
    "choice": (["robust", "--set", "distance=l7"], "robust: distance: expected one of"),
    "truth": (["hinge", "--set", "channels_last=3"], "train: channels_last: expected true or"),
    "schedule": (["hinge", "--set", "schedule=step"], "schedule: expected one of cosine"),
    "ema": (["hinge", "--set", "ema=1"], "ema: expected 0 <= ema < 1, got 1"),
    "halve": (["hinge", "--set", "halve_at=[2]"], "halve_at: expected shares from 0 to 1"),
    "preset": (["hinge", "--preset", "slow"], "preset: expected one of fast, paper, got 'slow'"),
    "lr": (["hinge", "--lr", "0"], "lr: expected a number > 0, got 0"),
    "lr nan": (["hinge", "--lr", "nan"], "lr: expected a number > 0, got nan"),
    "batch": (["hinge", "--batch", "0"], "batch: expected at least 1"),
    "steps": (["hinge", "--steps", "0"], "steps: expected at least 1"),
    "epochs": (["hinge", "--epochs", "-1"], "epochs: expected a number > 0, got -1"),
    "both": (["hinge", "--epochs", "1", "--steps", "1"], "not allowed with"),
    "seed": (["hinge", "--seed", "-1"], "seed: expected a number from 0"),
    "seed of rows": (
        ["hinge", "--seed", "-1", "--fraction", "0.5"],
        "seed: expected a number from 0",
    ),
    "device": (["hinge", "--device", "abacus"], "device: expected one of cpu"),
    "threads": (["hinge", "--threads", "0"], "threads: expected at least 1"),
    "data": (["hinge", "--data", "nowhere"], "nowhere: expected a folder with images"),
    "limit": (["hinge", "--limit", "0"], "limit: expected at least 1"),
    "one row": (["hinge", "--limit", "1"], "data: expected images of two or more classes"),
    "fraction": (["hinge", "--fraction", "2"], "fraction: expected 0 < S <= 1, got 2"),
    "classes": (["hinge", "--classes", "1"], "classes: expected 2 to 10, got 1"),
    "svm": (["svm"], "svm: expected images of 2 classes, .*--classes 2"),
    "labels": (["hinge", "--network-options", '{"classes": 3}'], "labels 0 ... 2 for a network"),
    "init": (["hinge", "--init", "nowhere.pt"], "nowhere.pt: expected"),
    "ten logits": (
        ["svm", "--classes", "2", "--network-options", '{"classes": 10}'],
        "svm: fn: expected a binary network",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_status_2(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[kind]
    limit = [] if "--limit" in arguments else ["--limit", "50"]
    out = tmp_path / "out"
    try:
        status = main(["train", *arguments, *limit, "--out", str(out)])
    except SystemExit as stop:  # argparse
        status = int(str(stop.code))
    captured = capfd.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err), captured.err
    assert not out.exists()


def test_bad_images_and_weights(tmp_path: Path) -> None:
    out, config, good = tmp_path / "out", small("cross-entropy"), digits()

    def refused(message: str, data: Images, **more: Any) -> None:
        with pytest.raises(InputError, match=message):
            recipe.train(data, digits("test", 20), out, config, **more)
        assert not out.exists()

    refused(r"data: expected values in \[0, 1\]", replace(good, images=good.images * 255))
    refused(r"data: expected values in \[0, 1\]", replace(good, images=good.images * math.nan))
    refused("data: expected labels 0 ... 9", replace(good, labels=good.labels + 1))
    refused("data: expected labels 0 ... 9", replace(good, labels=good.labels - 1))
    refused("data: expected int64 labels", replace(good, labels=good.labels.float()))
    refused("data: expected int64 labels", replace(good, labels=good.labels[1:]))
    refused("got one class alone", replace(good, labels=good.labels * 0))
    refused("data: expected float32 images", replace(good, images=good.images.double()))
    refused("expected images", replace(good, images=good.images[:, :, 1:]))
    refused("at least one image", replace(good, images=good.images[:0], labels=good.labels[:0]))
    refused("init: expected convnet-2a", good, init=build("convnet-2b", shape=(1, 8, 8)))
    network = build("convnet-2a", shape=(1, 8, 8))
    with torch.no_grad():
        next(network.parameters())[0] = math.nan
    refused(
        "init: expected finite weights, got NaN or inf in features.0.weight", good, init=network
    )


def test_folders_that_cannot_be_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    arguments = ["train", "hinge", "--limit", "30", "--steps", "1", "--out"]
    for out in (tmp_path / "file" / "below", Path("/proc/levelset")):
        assert main([*arguments, str(out)]) == 2
        assert capfd.readouterr().err.count("\n") == 1
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"kind": "something else", "settings": {}}')
    assert main([*arguments, str(other), "--resume"]) == 2
    assert "expected the config of a training, got another" in capfd.readouterr().err


def test_the_network_to_start_from_is_not_removed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe.train(digits(), digits("test"), tmp_path, small("hinge", steps=2))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    own = str(tmp_path / "checkpoint.pt")
    assert main(["train", "hinge", "--init", own, "--out", str(tmp_path), "--steps", "1"]) == 2
    message = f"init: {own} is where this run writes its own checkpoint.pt"
    assert message in capfd.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_checkpoints_that_cannot_be_gone_on_with(tmp_path: Path) -> None:
    config = small("cross-entropy", steps=2)
    recipe.train(digits(), digits("test", 20), tmp_path, config)
    (tmp_path / "metrics.json").unlink()

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            recipe.train(digits(), digits("test", 20), tmp_path, config, resume=True)

    whole = load(tmp_path)
    torch.save({**whole, "training": {"network": {}}}, tmp_path / "checkpoint.pt")
    refused("expected a checkpoint of this run")
    save_classifier(tmp_path / "checkpoint.pt", build("convnet-2a", shape=(1, 8, 8)))
    refused("got a classifier alone")
    (tmp_path / "checkpoint.pt").write_bytes(b"PK damaged")
    refused("cannot read it")


@pytest.mark.cuda
@pytest.mark.parametrize("objective", ["cross-entropy", "madry", "robust"])
def test_on_a_gpu(objective: str, tmp_path: Path) -> None:
    config = small(objective, steps=4)
    on_cpu = recipe.Training(digits(), config).advance()
    on_gpu = recipe.Training(digits(), config, "cuda").advance()
    assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], rel=1e-2, abs=1e-3)
    metrics = recipe.train(digits(), digits("test", 20), tmp_path, config, device="cuda")
    assert metrics["peak_device_memory_gb"] > 0
    assert load_classifier(tmp_path / "checkpoint.pt").config["network"] == "convnet-2a"
