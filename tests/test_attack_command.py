"""``levelset-ext attack``: its files, its JSON, going on after an interruption, bad input."""

from __future__ import annotations

import csv
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import levelset_ext.recipes.attack as recipe
from levelset_ext.cli import main
from levelset_ext.data.images import load_images
from levelset_ext.networks import build
from levelset_ext.recipes.classifiers import load_classifier, save_classifier
from levelset_ext.recipes.run_folder import digest

FILES = ["adversarial.npz", "adversarial.png", "config.json", "examples.csv", "metrics.json"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    network = build("convnet-2a", shape=(1, 8, 8))
    with torch.no_grad():  # else it says the same of every image
        network.classifier[-1].bias -= network(torch.rand(100, 1, 8, 8)).mean(0)
    save_classifier(tmp_path / "net.pt", network)
    return str(tmp_path / "net.pt")


@pytest.fixture
def data(tmp_path: Path, checkpoint: str) -> str:
    """MNIST-like files of 8 x 8 images, labelled by the network itself but for the first two."""
    folder = tmp_path / "data"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    with torch.no_grad():
        logits = load_classifier(checkpoint)(torch.from_numpy(images).float()[:, None] / 255)
    labels = logits.argmax(1).numpy().astype(np.uint8)
    labels[:2] = (labels[:2] + 1) % 10
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / f"t10k-{name}-ubyte").write_bytes(head + array.tobytes())
    return str(folder)


def command(checkpoint: str, data: str, *more: str) -> list[str]:
    return [
        "attack", checkpoint, "--data", data, "--attack", "pgd-xent,pgd-margin-3", "--eps", "0.02",
        "--step", "0.01", "--iters", "4", "--batch", "6", *more,
    ]  # fmt: skip


def test_json_and_files(
    checkpoint: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(checkpoint, data, "--out", str(out))) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert printed == json.loads((out / "metrics.json").read_text())
    assert "row 20/20" in captured.err
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert printed["rows"] == 20
    assert printed["clean_accuracy"] == 0.9
    assert [a["name"] for a in printed["attacks"]] == ["pgd-xent", "pgd-margin-3"]
    assert [a["iters"] for a in printed["attacks"]] == [4, 3]
    assert printed["attacks"][0]["attacked"] == 18
    assert printed["robust_accuracy"] == printed["attacks"][1]["robust_accuracy_after"]
    assert isinstance(printed["alarms"], list)

    with (out / "examples.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["outcome"] for row in rows[:2]] == ["wrong before"] * 2
    standing = sum(row["outcome"] == "stands" for row in rows)
    assert standing == round(20 * printed["robust_accuracy"])
    assert 0 < standing < 18
    stored = np.load(out / "adversarial.npz")
    assert stored["adversarial"].shape == (20, 1, 8, 8)
    assert int((~stored["success"]).sum()) == standing


def test_each_so_many_th_image(
    checkpoint: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, some = tmp_path / "whole", tmp_path / "some"
    assert main(command(checkpoint, data, "--out", str(whole))) == 0
    capsys.readouterr()
    assert main(command(checkpoint, data, "--out", str(some), "--every", "3")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["rows"], printed["every"]) == (7, 3)
    assert json.loads((some / "config.json").read_text())["every"] == 3
    tables = []
    for folder in (whole, some):
        with (folder / "examples.csv").open() as stream:
            tables.append(list(csv.DictReader(stream)))
    assert [int(row["row"]) for row in tables[1]] == list(range(0, 20, 3))
    images = {folder: np.load(folder / "adversarial.npz") for folder in (whole, some)}
    assert images[some]["rows"].tolist() == list(range(0, 20, 3))
    # The random starts are those of the rows in the split.
    assert np.allclose(images[some]["adversarial"], images[whole]["adversarial"][::3], atol=1e-6)
    for row in tables[1]:
        same = tables[0][int(row["row"])]
        for name in ("label", "outcome", "broken_by", "step", "prediction"):
            assert row[name] == same[name], name
        assert float(row["clean_margin"]) == pytest.approx(float(same["clean_margin"]), abs=1e-6)


def test_goes_on_where_it_was_interrupted(
    checkpoint: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(checkpoint, data, "--out", str(whole))) == 0

    evaluate, calls = recipe.evaluate, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["rows"][0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(recipe, "evaluate", interrupted)
    assert main(command(checkpoint, data, "--out", str(cut))) == 130
    assert not (cut / "metrics.json").exists()
    (cut / "parts" / "000001.npz").write_bytes(b"damaged")
    assert main(command(checkpoint, data, "--out", str(cut), "--resume")) == 0
    assert calls == [0, 6, 12, 6, 12, 18]  # the first batch is read, the damaged one is redone
    for name in ("config.json", "examples.csv", "adversarial.npz"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    kept = {p.name: p.stat().st_mtime_ns for p in cut.iterdir()}
    assert main(command(checkpoint, data, "--out", str(cut), "--resume")) == 0
    assert kept == {p.name: p.stat().st_mtime_ns for p in cut.iterdir()}
    assert len(calls) == 6


def test_linearity_in_metrics_and_rows_resumed(
    checkpoint: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    measure, calls = recipe.local_linearity, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["rows"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(recipe, "local_linearity", interrupted)
    monkeypatch.setattr(recipe, "_LINEARITY_STEPS", 4)
    arguments = command(checkpoint, data, "--out", str(out), "--linearity")
    assert main(arguments) == 130
    (out / "parts" / "linearity-000000.npy").write_bytes(b"damaged")
    assert main([*arguments, "--resume"]) == 0
    # Only rows that are attacked, by their numbers in the data; what is there is not done again.
    batches = [[2, 3, 4, 5], [*range(6, 12)], [*range(12, 18)], [18, 19]]
    assert calls == [*batches[:3], batches[0], *batches[2:]]

    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "metrics.json").read_text())
    found = printed["local_linearity"]
    with (out / "examples.csv").open() as stream:
        gamma = [row["gamma"] for row in csv.DictReader(stream)]
    assert gamma[:2] == ["", ""]
    images = load_images(data, "test")
    expected = measure(
        load_classifier(checkpoint), images.images[2:], images.labels[2:], 0.02, steps=4,
        rows=range(2, 20),
    )  # fmt: skip
    values = torch.tensor([float(value) for value in gamma[2:]])
    torch.testing.assert_close(values, expected.gamma, rtol=1e-4, atol=1e-6)
    assert found["rows"] == 18
    assert found["mean"] == pytest.approx(expected.mean, rel=1e-4)
    assert found["median"] == pytest.approx(float(expected.gamma.median()), rel=1e-4)
    assert found["max"] == pytest.approx(expected.max, rel=1e-4)

    assert main(command(checkpoint, data)) == 0
    assert "local_linearity" not in json.loads(capsys.readouterr().out)


def test_resume_refuses_another_run(
    checkpoint: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(command(checkpoint, data, "--out", out)) == 0
    assert main(command(checkpoint, data, "--out", out, "--resume", "--seed", "3")) == 2
    assert "got other seed" in capsys.readouterr().err
    save_classifier(checkpoint, build("convnet-2a", shape=(1, 8, 8)))
    assert main(command(checkpoint, data, "--out", out, "--resume")) == 2
    assert "got other model" in capsys.readouterr().err
    assert main(command(checkpoint, data, "--out", str(tmp_path / "new"), "--resume")) == 0


def test_any_factory_black_box_and_digits(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    network = build("convnet-2a", shape=(1, 8, 8))
    torch.save(network.state_dict(), tmp_path / "w.pt")
    arguments = [
        "attack", "--model", "levelset_ext.networks:build", "--weights", str(tmp_path / "w.pt"),
        "--model-options", '{"name": "convnet-2a", "shape": [1, 8, 8]}', "--limit", "40",
        "--source", checkpoint, "--attack", "transfer-xent,pgd-margin", "--iters", "2", "--each",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == 40
    assert printed["settings"]["eps"] == 0.15  # by the images
    alone = [a["robust_accuracy_alone"] for a in printed["attacks"]]
    assert printed["robust_accuracy"] <= min(alone)
    assert all(a["attacked"] == round(40 * printed["clean_accuracy"]) for a in printed["attacks"])


def test_strength_is_by_the_images_where_nothing_is_said() -> None:
    nothing = {"eps": None, "step": None, "iters": None}
    assert recipe.strength("cifar10", **nothing) == {"eps": 0.031, "step": 0.003, "iters": 20}
    assert recipe.strength("mnist", **nothing) == {"eps": 0.3, "step": 0.01, "iters": 40}
    assert recipe.strength("digits", **nothing | {"eps": 0.0})["eps"] == 0.0


def test_binary_checkpoint_with_merged_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    path = str(tmp_path / "binary.pt")
    save_classifier(path, build("convnet-2a", 1, (1, 8, 8)))
    assert main(["attack", path, "--merge-labels", "2", "--limit", "30", "--iters", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["binary"] is True


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--attack", "fgsm"], "attack: expected one of"),
        (["--attack", "transfer"], "source: expected a network"),
        (["--eps", "-1"], "eps: expected a finite number >= 0, got -1"),
        (["--eps", "nan"], "eps: expected a finite number"),
        (["--eps", "x"], "argument --eps: invalid float"),
        (["--batch", "0"], "batch: expected at least 1"),
        (["--restarts", "0"], "restarts: expected at least 1"),
        (["--limit", "0"], "limit: expected at least 1"),
        (["--norm", "l7"], "norm: expected one of linf, l2"),
        (["--linearity", "--norm", "l2"], "linearity: expected the norm linf"),
        (["--device", "abacus"], "device: expected one of cpu"),
        (["--split", "all"], "split: expected one of"),
        (["--data", "nowhere"], "nowhere: expected a folder with images"),
        (["--model", "a:b"], "expected CHECKPOINT or --model, got both"),
        (["--source", "nowhere.pt"], "nowhere.pt"),
        (["--resume"], "resume: expected --out"),
        (["--merge-labels", "11"], "merge-labels: expected 1 to 10"),
    ],
)
def test_bad_input(
    checkpoint: str,
    data: str,
    more: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = [] if more == ["--resume"] else ["--out", str(tmp_path / "out")]
    try:
        status = main(command(checkpoint, data, *out, *more))
    except SystemExit as stop:
        status = int(str(stop.code))
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)
    assert not (tmp_path / "out").exists()


def test_weights_and_options_belong_to_a_factory(
    checkpoint: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (["--weights", "w.pt"], "weights: expected it with --model alone, got w.pt"),
        (["--model-options", "{bad"], "model-options: expected it with --model alone"),
        (["--source-weights", "w.pt"], "source: expected --source or --source-model, got neither"),
        (
            ["--source", checkpoint, "--source-weights", "w.pt"],
            "source-weights: expected it with --source-model alone",
        ),
    ):
        assert main(command(checkpoint, data, "--out", str(tmp_path / "out"), *words)) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_networks_of_one_factory_have_their_own_weights(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_network.py").write_text(
        "from levelset_ext.networks import build\n"
        "def make(): return build('convnet-2a', 10, (1, 8, 8))\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("weights.pt", "others.pt"):
        torch.save(build("convnet-2a", 10, (1, 8, 8)).state_dict(), name)
    make = "own_network:make"
    words = ["attack", "--data", data, "--attack", "transfer-xent-1", "--eps", "0.1"]
    words += ["--model", make, "--weights", "weights.pt", "--source-model", make]
    for name, alike in (("weights.pt", True), ("others.pt", False)):
        assert main([*words, "--source-weights", name, "--out", name[:-3]]) == 0
        config = json.loads((tmp_path / name[:-3] / "config.json").read_text())
        assert (config["source"] == config["model"]) == alike


def test_a_network_of_other_images_is_named(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(7, 10))"
    (tmp_path / "other_network.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert main(["attack", "--data", data, "--model", "other_network:make"]) == 2
    message = "model: expected a network of images (1, 8, 8) in torch.float32, got from its forward"
    assert message in capsys.readouterr().err


def test_a_factory_without_weights_is_noted(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw_network.py").write_text(
        "from levelset_ext.networks import build\n"
        "def make(): return build('convnet-2a', 10, (1, 8, 8))\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.save(build("convnet-2a", 10, (1, 8, 8)).state_dict(), "w.pt")
    words = ["attack", "--data", data, "--model", "raw_network:make", "--attack", "pgd-xent-1"]
    note = "note: --model without --weights: attacks the network as raw_network:make returns it\n"
    for more, noted in (([], True), (["--weights", "w.pt"], False)):
        assert main([*words, *more]) == 0
        assert (note in capsys.readouterr().err) == noted


def test_a_run_of_other_options_is_not_gone_on_with(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scaled_network.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Scaled(nn.Module):\n"
        "    def __init__(self, scale):\n"
        "        super().__init__()\n"
        "        self.scale, self.last = scale, nn.Linear(64, 10)\n"
        "        torch.nn.init.eye_(self.last.weight)\n"
        "    def forward(self, x): return self.last(self.scale * x.flatten(1))\n"
        "    def get_extra_state(self): return {'note': 'no tensor'}\n"
        "    def set_extra_state(self, state): pass\n"
        "def make(scale):\n"
        "    torch.manual_seed(0)\n"
        "    return Scaled(scale)\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["attack", "--data", data, "--model", "scaled_network:make", "--attack", "pgd-xent-1"]
    words += ["--out", "run", "--resume", "--model-options"]
    assert main([*words, '{"scale": 1}']) == 0
    assert main([*words, '{"scale": 1}']) == 0
    assert "this run is finished" in capsys.readouterr().err
    assert main([*words, '{"scale": -1}']) == 2
    message = "expected the run of the same network, data and settings to resume, got other model"
    assert message in capsys.readouterr().err


def test_the_digest_of_double_precision_tells_all_digits_apart() -> None:
    one = torch.ones(3, dtype=torch.float64)
    assert digest(one) == digest(one.clone())
    assert digest(one) != digest(one + 1e-12)
    # What folders of earlier runs have in them.
    known = "5d372bbeef8d5cf6954e6a8745995383ed879b076a6dcc8fa6ee8f367cb1a4ef"
    assert digest(one.float(), torch.arange(3)) == known


def test_linearity_of_a_batch_without_a_correct_row(
    checkpoint: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "viewed_network.py").write_text(
        "from torch import nn\n"
        "class Viewed(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.last = nn.Linear(64, 10)\n"
        "    def forward(self, x): return self.last(x.view(x.size(0), -1))\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["attack", "--data", data, "--model", "viewed_network:Viewed", "--attack", "pgd-xent-1"]
    assert main([*words, "--batch", "1", "--linearity"]) == 0


def test_a_folder_of_another_kind_stays(
    checkpoint: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "parts").mkdir(parents=True)
    (out / "config.json").write_text('{"kind": "levelset_ext train 1", "settings": {}}')
    assert main(command(checkpoint, data, "--out", str(out))) == 2
    assert "parts, config.json would be replaced and is not of an attack" in capsys.readouterr().err
    assert (out / "parts").is_dir()


def test_bad_networks_and_data(
    checkpoint: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def refused(*arguments: str) -> str:
        assert main(["attack", *arguments, "--data", data, "--out", str(out)]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "model: expected CHECKPOINT or --model, got neither" in refused()
    assert "model-options: expected a JSON object" in refused(
        "--model", "a:b", "--model-options", "["
    )
    network = build("convnet-2a", shape=(1, 8, 8))
    with torch.no_grad():
        network.classifier[1].weight[0, 0] = float("nan")
    save_classifier(checkpoint, network)
    assert "expected finite weights, got NaN or inf in classifier.1.weight" in refused(checkpoint)
    save_classifier(checkpoint, build("convnet-2a"))
    assert "x: expected images (n, 1, 28, 28), got shape (1, 1, 8, 8)" in refused(checkpoint)
    save_classifier(checkpoint, build("convnet-2a", 3, (1, 8, 8)))
    assert "y: expected values in 0 ... 2 for 3 classes" in refused(checkpoint)
