"""The experiments in python_examples/, each in a setting of a few seconds."""

from __future__ import annotations

import csv
import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from levelset_ext.networks import build
from levelset_ext.recipes.classifiers import save_classifier

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

FOLDER = Path(__file__).parent.parent / "python_examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports an example by name and gives its quick setting other values."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str, **quick: Any) -> ModuleType:
        module = importlib.import_module(name)
        if quick:
            monkeypatch.setattr(module, "QUICK", replace(module.QUICK, **quick))
        return module

    return load


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_figure1(example: Any, tmp_path: Path) -> None:
    figure1 = example("figure1_boundaries", epochs=200, copies=8, grid=281)
    assert figure1.main(["--out", str(tmp_path), "--quick"]) == 0
    rows = {(r["method"], r["norm"]): r for r in table(tmp_path / "margins.csv")}
    assert len(rows) == 8

    def smallest(method: str, norm: str) -> float:
        return float(rows[method, norm]["smallest_margin"])

    for norm in ("linf", "l2"):
        assert smallest(f"robust-{norm}", norm) > 1.2 * smallest("cross-entropy", norm)
        for method in figure1.PANELS:
            step = float(rows[method, norm]["grid_step"])
            assert smallest(method, norm) <= float(rows[method, norm]["largest_possible"]) + step
            if method != "geometric-svm":
                assert rows[method, norm]["wrong_points"] == "0"
    assert is_png(tmp_path / "boundaries.png")


def test_margins_of_a_known_boundary(example: Any) -> None:
    figure1 = example("figure1_boundaries")
    network = torch.nn.Linear(2, 2)
    with torch.no_grad():  # f_1 - f_0 = x + y - 0.5
        network.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        network.bias.copy_(torch.tensor([0.0, -0.5]))
    x = torch.tensor([[0.3, 0.4], [0.1, 0.1], [0.1, 0.1]])
    y = torch.tensor([1, 0, 1])
    found = figure1.margins_of(figure1.on_grid(network, 701), network, x, y)
    assert found["linf"] == pytest.approx([0.1, 0.15, -0.15], abs=1e-3)
    assert found["l2"] == pytest.approx([0.1414, 0.2121, -0.2121], abs=1e-3)


def test_newton_questions(example: Any, tmp_path: Path) -> None:
    quick = {"rows": 30, "train_rows": 300, "train_steps": 60, "rounds": 2, "descent_steps": 150}
    newton = example("newton_questions", **quick)
    assert newton.main(["--out", str(tmp_path), "--quick"]) == 0
    residuals = table(tmp_path / "residuals.csv")
    assert len(residuals) == 2 * 21
    for network in ("untrained", "trained"):
        some = [r for r in residuals if r["network"] == network]
        shares = [float(r["converged_share"]) for r in some]
        assert shares == sorted(shares)  # a row that is done stays where it is
        assert shares[-1] > 0.8
        assert float(some[-1]["q50"]) <= 1e-4 < float(some[0]["q50"])
    methods = {r["method"]: r for r in table(tmp_path / "methods.csv")}
    assert set(methods) == set(newton.COLORS)
    assert all(float(r["largest_residual"]) <= 1e-4 for r in methods.values())
    assert all(float(r["seconds"]) > 0 for r in methods.values())
    cost = {name: float(r["gradients_per_row"]) for name, r in methods.items()}
    assert cost["newton"] < cost["gradient descent"]
    assert float(methods["newton"]["values_per_row"]) == 0
    assert cost["false position"] == 1
    for name in ("residuals", "methods", "images"):
        assert is_png(tmp_path / f"{name}.png")


def test_distance_histogram(example: Any, tmp_path: Path) -> None:
    histogram = example("distance_histogram")
    out = tmp_path / "trained"
    arguments = ["--out", str(out), "--quick", "--rows", "60", "--steps", "16"]
    assert histogram.main(arguments) == 0
    assert [r["network"] for r in table(out / "summary.csv")] == ["cross-entropy", "robust"]
    rows = table(out / "distances.csv")
    assert len(rows) == 120
    own = table(out / "summary.csv")
    assert is_png(out / "distances.png")

    again = tmp_path / "again"
    files = [str(out / "cross-entropy.pt"), str(out / "robust.pt")]
    assert histogram.main(["--out", str(again), "--quick", "--rows", "60", *files]) == 0
    for before, after in zip(own, table(again / "summary.csv"), strict=True):
        assert before["median"] == after["median"]
        assert before["accuracy"] == after["accuracy"]


def test_distance_of_a_linear_classifier(example: Any) -> None:
    histogram = example("distance_histogram")
    data = histogram.load_images(None, "test", 20)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    signed, converged = histogram.distances(network, data, "l2")
    logits = network(data.images).detach()
    assert converged.all()
    assert torch.equal(signed > 0, logits.argmax(1) == data.labels)
    # Where the rival is the same at both ends, the distance is that to one plane.
    weight = network[1].weight.detach()
    for row in range(20):
        label = int(data.labels[row])
        others = [k for k in range(10) if k != label]
        lengths = [
            float((logits[row, label] - logits[row, k]).abs() / (weight[label] - weight[k]).norm())
            for k in others
        ]
        assert abs(float(signed[row])) >= min(lengths) - 1e-4


def test_figure2_and_resume(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure2 = example("figure2_fractions")
    arguments = [
        "--out", str(tmp_path), "--quick", "--fractions", "0.03", "--epochs", "6",
        "--test-rows", "40", "--candidates", "2",
    ]  # fmt: skip
    assert figure2.main(arguments) == 0
    rows = table(tmp_path / "accuracy.csv")
    assert [r["method"] for r in rows] == [
        "geometric-svm",
        "cross-entropy",
        "hinge",
        "geometric-svm minus cross-entropy",
        "geometric-svm minus hinge",
    ]
    for row in rows:
        assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])
    means = [float(r["mean"]) for r in rows]
    assert means[3] == pytest.approx(means[0] - means[1], abs=1e-5)
    assert len(table(tmp_path / "runs.csv")) == 3 * 2
    assert len(table(tmp_path / "tuning.csv")) == 3 * 2
    assert is_png(tmp_path / "accuracy.png")

    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}
    first = (tmp_path / "runs.csv").read_bytes()
    damaged = next((tmp_path / "parts").glob("run-hinge*"))
    damaged.write_bytes(b"damaged")
    assert figure2.main([*arguments, "--resume"]) == 0
    again = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}
    assert {name for name in kept if kept[name] != again[name]} == {damaged.name}
    assert (tmp_path / "runs.csv").read_bytes() == first
    capsys.readouterr()
    assert figure2.main([*arguments, "--resume", "--seeds", "3"]) == 2
    assert "got other seeds" in capsys.readouterr().err


def test_pairs_share_everything_but_the_loss(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    figure2 = example("figure2_fractions")
    generator = torch.Generator().manual_seed(0)
    data = figure2.Rows(torch.rand(12, 1, 8, 8, generator=generator), torch.arange(12) % 2)
    seen: dict[str, list[torch.Tensor]] = {}
    setting = replace(figure2.DIGITS, epochs=2, batch=4, warm=0.0)

    def record(method: str, network: Any, batch: Any, lam: float, setting: Any) -> torch.Tensor:
        first = torch.cat([p.detach().flatten() for p in network.parameters()])
        seen.setdefault(method, []).extend([batch.x.clone(), first])
        return 0 * network(batch.x).sum()

    monkeypatch.setattr(figure2, "loss_of", record)
    for method in figure2.COLORS:
        figure2.train(method, data, 3, 0.1, 0.1, replace(setting, weight_decay=0.0))
    first, *others = seen.values()
    assert len(first) == 2 * 2 * 3
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_large_fractions_have_fewer_epochs(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    figure2 = example("figure2_fractions")
    data = figure2.Rows(torch.rand(12, 1, 8, 8), torch.arange(12) % 2)
    steps: list[int] = []

    def counted(method: str, network: Any, batch: Any, lam: float, setting: Any) -> torch.Tensor:
        steps[-1] += 1
        return 0 * network(batch.x).sum()

    monkeypatch.setattr(figure2, "loss_of", counted)
    setting = replace(figure2.DIGITS, epochs=6, batch=4)
    for most, expected in ((None, 18), (100, 18), (11, 9), (1, 3)):
        steps.append(0)
        figure2.train("hinge", data, 3, 0.1, 0.1, replace(setting, most_steps=most))
        assert steps[-1] == expected


def test_interval(example: Any) -> None:
    mean, half = example("figure2_fractions").interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert half == pytest.approx(3.182446 * 1.290994 / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("figure1_boundaries", ["--sets", "0"], "sets: expected at least 1"),
        ("newton_questions", ["--label", "12"], "label: expected 0 to 9, got 12"),
        ("newton_questions", ["--data", "nowhere"], "nowhere: expected a folder"),
        ("distance_histogram", ["nowhere.pt"], "nowhere.pt"),
        ("distance_histogram", ["--norm", "l7"], "norm: expected one of l2, linf"),
        ("figure2_fractions", ["--fractions", "0.1,x"], "fractions: expected numbers"),
        ("figure2_fractions", ["--most-steps", "0"], "most-steps: expected at least 1, got 0"),
        ("figure2_fractions", ["--device", "abacus"], "device: expected one of cpu"),
        ("figure2_fractions", ["--network", "nosuch"], "network: name: expected one of"),
        ("figure2_fractions", ["--trial-seeds", "-1"], "trial-seeds: expected at least 0, got -1"),
        ("figure2_fractions", ["--candidates", "9"], "candidates: expected 1 to 4, got 9"),
        (
            "figure2_fractions",
            ["--fractions", "0.9995", "--candidates", "2"],
            "fractions: expected some training images outside",
        ),
        ("distance_histogram", ["--network", "nosuch"], "network: name: expected one of"),
        ("distance_histogram", ["--eps", "-1"], "eps: expected a number > 0, got -1"),
        ("figure1_boundaries", ["--seed", "-1"], "seed: expected a number >= 0, got -1"),
        ("figure3_curves", ["--seed", "-1"], "seed: expected a number >= 0, got -1"),
    ],
)
def test_bad_input(
    example: Any,
    name: str,
    more: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = example(name)
    assert module.main(["--out", str(tmp_path / "out"), "--quick", *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_checkpoint_of_other_images(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_classifier(tmp_path / "net.pt", build("convnet-2a"))
    histogram = example("distance_histogram")
    out = ["--out", str(tmp_path / "out"), "--rows", "5"]
    assert histogram.main([*out, str(tmp_path / "net.pt")]) == 2
    assert "expected images (n, 1, 28, 28)" in capsys.readouterr().err


def test_another_network_in_the_same_file_is_not_gone_on_with(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "net.pt", ["--out", str(tmp_path / "out"), "--quick", "--rows", "5"]
    histogram = example("distance_histogram")
    save_classifier(file, build("convnet-2a", 10, (1, 8, 8)))
    assert histogram.main([*out, str(file)]) == 0
    moved = tmp_path / "moved.pt"
    file.rename(moved)
    assert histogram.main([*out, "--resume", str(moved)]) == 0
    save_classifier(moved, build("convnet-2a", 10, (1, 8, 8)))
    capsys.readouterr()
    assert histogram.main([*out, "--resume", str(moved)]) == 2
    assert "got other checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["newton_questions", "figure2_fractions"])
def test_settings_hold_what_is_in_the_files(
    example: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, seen = example(name), []

    def stop(out: Path, name: str, settings: Any, *more: Any) -> None:
        seen.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "Run", stop)
    words = ["--out", str(tmp_path), "--quick"]
    file, load = tmp_path / "net.pt", module.load_images
    if name == "newton_questions":
        words += ["--checkpoint", str(file)]
    for turn in range(3):
        if turn != 1:
            torch.manual_seed(turn)
            save_classifier(file, build("convnet-2a", 10, (1, 8, 8)))
        if turn == 1:  # other images in the same place
            monkeypatch.setattr(
                module, "load_images", lambda *a: replace(load(*a), images=1 - load(*a).images)
            )
        else:
            monkeypatch.setattr(module, "load_images", load)
        assert module.main(words) == 130
    first, images, network = seen
    assert first["data"] != images["data"]
    assert first["data"] == network["data"]
    if name == "newton_questions":
        assert first["checkpoint"] == images["checkpoint"] != network["checkpoint"]
