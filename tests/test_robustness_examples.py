"""The experiments on robustness: their tables against the attacks themselves, going on, bad input.

One pair of tiny networks is trained on the digits for all of it.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import levelset_ext as ls
from levelset_ext.data.images import Images, load_images
from levelset_ext.margin import margin
from levelset_ext.networks import build
from levelset_ext.recipes.classifiers import load_classifier, save_classifier

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1] / "python_examples"))

import _robustness
import attack_strength
import convergence_share
import robust_ablation
import table1_robustness

TINY = ["--rows", "40", "--iters", "3", "--step", "0.05"]


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Table 1 with two networks of its own."""
    out = tmp_path_factory.mktemp("table1")
    arguments = [
        "--out", str(out), *TINY, "--methods", "standard,ours", "--train-rows", "500",
        "--epochs", "6", "--set", "standard.lr=0.01", "--repeats", "2", "--seed", "5",
    ]  # fmt: skip
    assert table1_robustness.main(arguments) == 0
    return out


def networks(trained: Path) -> dict[str, torch.nn.Module]:
    return {
        name: load_classifier(trained / "train" / name / "checkpoint.pt")
        for name in ("standard", "ours")
    }


def pairs(trained: Path) -> list[str]:
    folders = {name: trained / "train" / name for name in ("standard", "ours")}
    return [part for name, path in folders.items() for part in ("--checkpoint", f"{name}={path}")]


# --- Table 1 ---------------------------------------------------------------------------------


def test_table_1_is_what_the_attacks_say(trained: Path) -> None:
    data = load_images(None, "test", 40)
    found = networks(trained)
    rows = {row["network"]: row for row in table(trained / "table1.csv")}
    transfer = {
        (row["loss"], row["attacked"], row["source"]): row
        for row in table(trained / "transfer.csv")
    }
    assert list(rows) == ["standard", "ours"]
    assert len(transfer) == 8
    numbers: dict[str, Any] = {"eps": 0.15, "step": 0.05, "iters": 3}
    for name, other in (("standard", "ours"), ("ours", "standard")):
        worst = torch.ones(40, dtype=torch.bool)
        for loss in ("xent", "margin"):
            white, black = [], []
            for seed in (5, 6):
                evaluate = [found[name], data.images, data.labels]
                one = ls.attacks.evaluate(*evaluate, f"pgd-{loss}", seed=seed, **numbers)
                two = ls.attacks.evaluate(
                    *evaluate, f"transfer-{loss}", source=found[other], seed=seed, **numbers
                )
                white.append(100 * one.robust_accuracy)
                black.append(100 * two.robust_accuracy)
                worst &= ~one.success & ~two.success
            assert float(rows[name][loss]) == pytest.approx(sum(white) / 2, rel=1e-5)
            spread = abs(white[0] - white[1]) / 2**0.5
            assert float(rows[name][f"{loss}_std"]) == pytest.approx(spread, rel=1e-5)
            assert float(transfer[loss, name, name]["accuracy"]) == float(rows[name][loss])
            entry = transfer[loss, name, other]
            assert float(entry["accuracy"]) == pytest.approx(sum(black) / 2, rel=1e-5)
            assert entry["box"] == "black"
        many = ls.attacks.evaluate(*evaluate, "multi-targeted", seed=5, **numbers)
        assert float(rows[name]["multi_targeted"]) == pytest.approx(100 * many.robust_accuracy)
        assert float(rows[name]["clean"]) == pytest.approx(100 * many.clean_accuracy)
        worst &= ~many.success
        figure = float(rows[name]["worst"])
        assert figure == pytest.approx(100 * float(worst.double().mean()))
        seconds = json.loads((trained / "train" / name / "metrics.json").read_text())
        minutes = seconds["cpu_seconds"] / 60
        assert float(rows[name]["minutes"]) == pytest.approx(minutes, rel=1e-4)
        assert float(rows[name]["worst_per_minute"]) == pytest.approx(figure / minutes, rel=1e-4)
    text = (trained / "table1.md").read_text()
    assert "ublished" not in text  # nobody published anything on the digits
    for file in ("table1.json", "robustness.png", "transfer.png"):
        assert (trained / file).stat().st_size > 0


def test_table_1_of_checkpoints_goes_on_where_it_was_interrupted(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    examples, calls = table1_robustness.examples, []

    def interrupted(network: Any, data: Any, loss: str, attack: Any, seed: int) -> Any:
        calls.append((network.name, loss, seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return examples(network, data, loss, attack, seed)

    monkeypatch.setattr(table1_robustness, "examples", interrupted)
    arguments = [
        "--out", str(tmp_path), *TINY, "--methods", "none", *pairs(trained), "--repeats", "2",
        "--seed", "5", "--resume",
    ]  # fmt: skip
    assert table1_robustness.main(arguments) == 130
    assert not (tmp_path / "table1.csv").exists()
    assert table1_robustness.main(arguments) == 0
    assert len(calls) == len(set(calls)) + 1 == 9  # one was begun twice
    assert (tmp_path / "transfer.csv").read_bytes() == (trained / "transfer.csv").read_bytes()
    for row, other in zip(
        table(tmp_path / "table1.csv"), table(trained / "table1.csv"), strict=True
    ):
        # A checkpoint is written a moment before the training ends.
        assert float(row.pop("minutes")) == pytest.approx(float(other.pop("minutes")), rel=0.5)
        del row["worst_per_minute"], other["worst_per_minute"]
        assert row == other
    assert table1_robustness.main([*arguments, "--eps", "0.1"]) == 2
    assert "got other attack" in capsys.readouterr().err
    assert len(calls) == 9


def test_published_figures_stand_beside_networks_of_their_kind() -> None:
    images = Images(torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.int64), "mnist")

    def row(name: str, network: str) -> str:
        made = _robustness.Network(name, build(network, shape=(1, 28, 28)), "", None)
        return table1_robustness.published_row(made, images)

    assert row("madry", "convnet-4a") == "99.35 / 96.04 / 96.11 (Madry (0.3))"
    assert row("ours", "convnet-4a") == "99.35 / 99.23 / 97.35 (Ours (0.4))"
    assert row("ours", "convnet-2a") == ""
    assert row("trades-1", "convnet-4a") == ""
    assert row("mma", "convnet-4a") == ""
    lines = "\n".join(table1_robustness.published_tables(("cifar10", "convnet-4b")))
    assert "not measured here" in lines
    assert "| Ours | 68.43 | 56.71 | 54.47 | 38.45 |" in lines


def test_one_trades_network_per_weight() -> None:
    data = load_images(None, "train", 50)
    args = argparse.Namespace(
        methods="trades,large-margin", trades_betas="3,1", quick=False, network=None, epochs=None,
        set=["trades.iters=2", "trades.lr=0.5", "large-margin.gamma=0.7"],
    )  # fmt: skip
    attack = _robustness.ATTACKS["digits"]
    made = table1_robustness.plans(data, table1_robustness.Setting(), args, attack)
    assert list(made) == ["trades-1", "trades-3", "large-margin"]
    assert [made[f"trades-{beta}"].settings["beta"] for beta in (1, 3)] == [1, 3]
    for name in ("trades-1", "trades-3"):
        assert made[name].settings["iters"] == 2
        assert made[name].settings["eps"] == 0.15
        assert made[name].lr == 0.5
    assert made["large-margin"].settings["gamma"] == 0.7
    assert made["large-margin"].settings["norm"] == "linf"


# --- attack strength -------------------------------------------------------------------------


def test_strength_is_what_the_attacks_say(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing, calls = attack_strength.standing, []

    def interrupted(*args: Any) -> Any:
        calls.append(args[2:])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return standing(*args)

    monkeypatch.setattr(attack_strength, "standing", interrupted)
    arguments = [
        "--out", str(tmp_path), *TINY, str(trained / "train" / "ours"), "--resume",
        "--steps-list", "1,6", "--eps-list", "0,0.15,1", "--restarts-list", "3,1,2",
    ]  # fmt: skip
    assert attack_strength.main(arguments) == 130
    assert attack_strength.main(arguments) == 0
    assert len(calls) == 10 + 2  # the unit of two that was interrupted was begun again
    rows = {(row["sweep"], row["value"]): row for row in table(tmp_path / "strength.csv")}
    assert list(rows) == [
        ("steps", "1"), ("steps", "6"), ("eps", "0"), ("eps", "0.15"), ("eps", "1"),
        ("restarts", "1"), ("restarts", "2"), ("restarts", "3"),
    ]  # fmt: skip
    assert {row["network"] for row in rows.values()} == {"ours"}

    data = load_images(None, "test", 40)
    network = networks(trained)["ours"]

    def expected(kind: str, **numbers: Any) -> float:
        found = ls.attacks.evaluate(network, data.images, data.labels, kind, **numbers)
        return 100 * found.robust_accuracy

    for loss in ("xent", "margin"):
        # One step instead of three is three times as long.
        one = expected(f"pgd-{loss}", eps=0.15, step=0.15, iters=1)
        assert float(rows["steps", "1"][loss]) == pytest.approx(one)
        six = expected(f"pgd-{loss}", eps=0.15, step=0.05, iters=6)
        assert float(rows["steps", "6"][loss]) == pytest.approx(six)
        twice = expected(f"pgd-{loss}", eps=0.15, step=0.05, iters=3, restarts=2)
        assert float(rows["restarts", "2"][loss]) == pytest.approx(twice)
        assert rows["restarts", "1"][loss] == rows["eps", "0.15"][loss]
    both = expected("pgd-xent,pgd-margin", eps=0.15, step=0.05, iters=3)
    assert float(rows["eps", "0.15"]["worst"]) == pytest.approx(both)
    with torch.no_grad():
        clean = (margin(network(data.images), data.labels) > 0).double().mean()
    assert float(rows["eps", "0"]["worst"]) == pytest.approx(100 * float(clean))
    assert float(rows["eps", "1"]["worst"]) == 0
    gamma = ls.attacks.local_linearity(network, data.images, data.labels, 0.15).gamma
    assert float(rows["eps", "0.15"]["gamma_max"]) == pytest.approx(float(gamma.max()), rel=1e-4)
    assert float(rows["eps", "0.15"]["gamma_mean"]) == pytest.approx(float(gamma.mean()), rel=1e-4)
    assert float(rows["eps", "0"]["gamma_max"]) == 0
    summary = table(tmp_path / "summary.csv")[0]
    assert float(summary["at_largest_eps"]) == 0
    assert (tmp_path / "strength.png").stat().st_size > 0


# --- ablation --------------------------------------------------------------------------------


def test_ablation_pairs_seeds_and_measures_what_the_attacks_say(tmp_path: Path) -> None:
    words = ["--out", str(tmp_path), *TINY, "--variants", "without Eq. 12,Madry", "--epochs", "3"]
    assert robust_ablation.main([*words, "--seeds", "2", "--quick"]) == 0
    runs = table(tmp_path / "runs.csv")
    for file in tmp_path.glob("*.csv"):
        file.rename(tmp_path / f"{file.name}.first")
    shutil.rmtree(tmp_path / "train" / "2-1")  # kept units need no training
    assert robust_ablation.main([*words, "--seeds", "2", "--quick", "--resume"]) == 0
    for file in tmp_path.glob("*.csv"):
        assert file.read_bytes() == (tmp_path / f"{file.name}.first").read_bytes()
    assert [(run["variant"], run["seed"]) for run in runs] == [
        (name, seed) for seed in "01" for name in ("ours", "without Eq. 12", "Madry")
    ]
    data = load_images(None, "test", 40)
    net = load_classifier(tmp_path / "train" / "1-1" / "checkpoint.pt")
    found = ls.attacks.evaluate(
        net, data.images, data.labels, "pgd-margin", eps=0.15, step=0.05, iters=3, seed=1
    )
    assert float(runs[4]["pgd"]) == pytest.approx(100 * found.robust_accuracy)
    assert float(runs[4]["clean"]) == pytest.approx(100 * found.clean_accuracy)
    rows = {row["variant"]: row for row in table(tmp_path / "ablation.csv")}
    for measure in robust_ablation.MEASURES:
        # Student's t with one degree of freedom.
        steps = [float(runs[3 * k + 2][measure]) - float(runs[3 * k][measure]) for k in range(2)]
        assert float(rows["Madry"][f"{measure}_difference"]) == pytest.approx(sum(steps) / 2)
        half = 12.7062 * abs(steps[0] - steps[1]) / 2
        assert float(rows["Madry"][f"{measure}_half"]) == pytest.approx(half, rel=1e-4)
    plain = json.loads((tmp_path / "train" / "1-0" / "config.json").read_text())["settings"]
    assert plain["settings"]["lam_correct"] == plain["settings"]["lam_wrong"] == 0


def test_variants_change_one_thing_of_what_the_preset_has() -> None:
    data = load_images(None, "train")
    usual = robust_ablation.config_of(data, "ours", 0, None, False)
    larger = robust_ablation.config_of(data, "eps a third larger", 0, None, False)
    assert larger.settings["eps_correct"] == pytest.approx(4 / 3 * usual.settings["eps_correct"])
    assert robust_ablation.config_of(data, "half the learning rate", 0, None, False).lr == (
        0.5 * usual.lr
    )
    variants = [
        robust_ablation.config_of(data, name, 3, 7.0, False) for name in robust_ablation.VARIANTS
    ]
    assert all((config.seed, config.epochs) == (3, 7.0) for config in variants)
    assert all(a != b for k, a in enumerate(variants) for b in variants[:k])


def test_an_unknown_variant_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert robust_ablation.main(["--out", str(tmp_path), "--variants", "magic"]) == 2
    assert "variants: expected some of ours, without Eq. 12" in capsys.readouterr().err


def test_masked_gradients_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    def row(sweep: str, value: float, xent: float, worst: float) -> dict[str, Any]:
        return {
            "network": "n", "sweep": sweep, "value": value, "xent": xent, "margin": worst,
            "worst": worst,
        }  # fmt: skip

    rows = [
        row("steps", 10, 90, 80), row("steps", 200, 80, 50), row("restarts", 1, 90, 80),
        row("eps", 0, 99, 99), row("eps", 0.3, 40, 30), row("eps", 0.8, 70, 30),
    ]  # fmt: skip
    summary = attack_strength.summary_of(rows)
    assert summary["most_steps_take"] == 30
    assert summary["rise_xent"] == 30
    attack_strength.warn(summary)
    said = capsys.readouterr().err
    assert "30.0 % stand eps 0.8" in said
    assert "PGD on xent rises by 30.0 points" in said


# --- convergence -----------------------------------------------------------------------------


def test_newton_share_projects_every_row_to_its_own_label(trained: Path) -> None:
    data = load_images(None, "test", 30)
    network = networks(trained)["standard"]
    share = convergence_share.newton_share(network, data, 2, 1e-3)
    converged = 0
    for x, y in zip(data.images, data.labels, strict=True):
        found = ls.project(
            lambda p, y=y: margin(network(p), y.expand(len(p)), check=False), x[None], 0.0, 2, 1e-3
        )
        converged += int(found.converged.sum())
    assert 0 < share["newton"] < 1
    assert share["newton"] == pytest.approx(converged / 30)


def test_a_training_is_looked_at_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--rows", "20", "--records", "4", "--epochs", "1", "--set", "batch=200"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert convergence_share.main(["--out", str(whole), *more]) == 0
    rows = table(whole / "shares.csv")
    assert [row["step"] for row in rows] == ["0", "1", "4", "8"]
    assert (whole / "shares.png").stat().st_size > 0

    measure, calls = convergence_share.newton_share, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(convergence_share, "newton_share", interrupted)
    assert convergence_share.main(["--out", str(cut), *more]) == 130
    assert convergence_share.main(["--out", str(cut), *more, "--resume"]) == 0
    assert len(calls) == 5
    assert (cut / "shares.csv").read_bytes() == (whole / "shares.csv").read_bytes()


def test_the_history_of_runs(trained: Path, tmp_path: Path, capsys: Any) -> None:
    run = trained / "train" / "ours"
    assert convergence_share.main([str(run), "--out", str(tmp_path), "--rows", "30"]) == 0
    rows, history = table(tmp_path / "history.csv"), table(run / "history.csv")
    assert [row["crossed"] for row in rows] == [f"{float(row['crossed']):.6g}" for row in history]
    for row in rows:
        both = float(row["crossed"]) * float(row["converged"])
        assert float(row["both"]) == pytest.approx(both if both == both else 0, rel=1e-4)
    newton = table(tmp_path / "newton.csv")
    assert [row["run"] for row in newton] == ["ours"]
    other = tmp_path / "other" / "ours"
    shutil.copytree(run, other)
    words = [str(other), "--out", str(tmp_path), "--rows", "30", "--resume"]
    assert convergence_share.main(words) == 0  # the same network, elsewhere
    shutil.copy(trained / "train" / "standard" / "checkpoint.pt", other / "checkpoint.pt")
    assert convergence_share.main(words) == 2
    assert "got other networks" in capsys.readouterr().err
    assert 0 <= float(newton[0]["newton"]) <= 1
    assert (tmp_path / "history.png").stat().st_size > 0


@pytest.mark.parametrize("count", [1, 2, 7])
def test_what_is_written_on_transfer_png_is_within_it(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    monkeypatch.setattr(
        table1_robustness, "save_picture", lambda figure, path: shown.append(figure)
    )
    names = ["large-margin", *"abcdef"][:count]
    networks = [_robustness.Network(name, torch.nn.Identity(), "", None) for name in names]
    rows = [
        {"loss": loss, "accuracy": 50.0} for loss in _robustness.LOSSES for _ in range(count**2)
    ]
    table1_robustness.draw_transfer(networks, rows, tmp_path / "transfer.png")
    (figure,) = shown
    figure.canvas.draw()
    for axes in figure.axes:
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            box = text.get_window_extent()
            assert not text.get_text() or (box.y0 >= 0 and box.y1 <= figure.bbox.y1)


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "more", "message"),
    [
        (table1_robustness, ["--methods", "magic"], "methods: expected some of standard"),
        (table1_robustness, ["--methods", "none"], "expected a method or a checkpoint"),
        (table1_robustness, ["--checkpoint", "x"], "checkpoint: expected NAME=PATH"),
        (table1_robustness, ["--checkpoint", "a/b=x"], "checkpoint: expected NAME=PATH"),
        (table1_robustness, ["--checkpoint", "x=nowhere.pt"], "nowhere.pt"),
        (table1_robustness, ["--trades-betas", "1;3"], "trades-betas: expected numbers"),
        (table1_robustness, ["--methods", "madry", "--trades-betas", "1"], "expected trades"),
        (table1_robustness, ["--set", "madry.magic=1"], "got 'magic'"),
        (table1_robustness, ["--set", "lr=1"], "set: expected METHOD.NAME=VALUE"),
        (table1_robustness, ["--repeats", "0"], "repeats: expected at least 1"),
        (table1_robustness, ["--preset", "best"], "preset: expected one of"),
        (table1_robustness, ["--eps", "nan"], "eps: expected a length"),
        (attack_strength, ["nowhere.pt"], "nowhere.pt"),
        (attack_strength, ["--eps-list", "0,2"], "eps-list: expected numbers from 0 to 1"),
        (attack_strength, ["--steps-list", "a"], "steps-list: expected numbers"),
        (attack_strength, ["--restarts-list", "0"], "restarts-list: expected numbers from 1"),
        (attack_strength, ["--rows", "0"], "limit: expected at least 1"),
        (attack_strength, ["--iters", "0"], "iters: expected at least 1"),
        (convergence_share, ["nowhere"], "expected the history of a training"),
        (convergence_share, ["--records", "1"], "records: expected at least 2"),
        (convergence_share, ["--tol", "0"], "tol: expected a number > 0"),
        (convergence_share, ["--objective", "magic"], "objective: expected one of"),
        (convergence_share, ["--classes", "2", "--objective", "svm"], "a logit per class"),
        (convergence_share, ["--device", "abacus"], "device: expected one of"),
    ],
)
def test_bad_input(
    script: Any, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--out", str(tmp_path / "out"), *more]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_classifier(tmp_path / "large.pt", build("convnet-2a"))
    out = str(tmp_path / "out")
    arguments = ["--out", out, "--checkpoint", f"x={tmp_path / 'large.pt'}", "--methods", "none"]
    assert table1_robustness.main(arguments) == 2
    assert "x: x: expected images (n, 1, 28, 28)" in capsys.readouterr().err
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "history.csv").write_text("step,loss\n1,2\n")
    assert convergence_share.main(["--out", out, str(folder)]) == 2
    assert "expected the columns step, epoch, crossed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
