"""The reconstruct command: bad input, resumption after a kill, and what a run leaves behind."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from levelset_ext import losses
from levelset_ext.cli import main
from levelset_ext.errors import InputError
from levelset_ext.recipes import reconstruct as recipe
from levelset_ext.recipes.files import load_checkpoint, save_checkpoint, write_json

SMALL = replace(
    recipe.preset("fast", steps=40, seed=3),
    width=32,
    hidden_layers=3,
    projected=64,
    general=64,
    cloud_points=64,
    pool=500,
    resolution=40,
    checkpoint_every=7,
    learning_rate=6e-3,  # of a run this short
    warmup_steps=0,
)


def small_cloud(seed: int = 0) -> recipe.Cloud:
    random = np.random.default_rng(seed)
    x = random.standard_normal((2000, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return recipe.Cloud(x * [3.0, 2.0, 2.0] + [100.0, 0.0, -7.0], "ellipsoid")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    recipe.reconstruct(small_cloud(), out, SMALL)
    return out


def bad_inputs(folder: Path) -> dict[str, list[str]]:
    """Arguments after ``reconstruct`` for each kind of bad input, without --out."""
    good = folder / "good.npy"
    np.save(good, small_cloud().points)

    def file(name: str, content: bytes) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    def array(name: str, points: object) -> str:
        np.save(folder / name, np.asarray(points), allow_pickle=True)
        return str(folder / name)

    cloud = small_cloud().points
    nan, infinite = cloud.copy(), cloud.copy()
    nan[7, 1], infinite[9, 2] = np.nan, np.inf
    trimesh.PointCloud(cloud).export(folder / "whole.ply")
    ply = (folder / "whole.ply").read_bytes()
    header = b"ply\nformat ascii 1.0\nelement vertex 0\nproperty float x\nproperty float y\n"
    return {
        "missing file": [str(folder / "nothing.ply")],
        "a folder": [str(folder)],
        "text file": [file("text.ply", b"these are words, not points\n")],
        "unknown extension": [file("points.docx", b"1 2 3\n")],
        "empty file": [file("empty.xyz", b"")],
        "empty cloud": [file("none.ply", header + b"property float z\nend_header\n")],
        "fewer than 100 points": [array("few.npy", cloud[:99])],
        "NaN": [array("nan.npy", nan)],
        "infinity": [array("inf.npy", infinite)],
        "all points equal": [array("equal.npy", np.ones((500, 3)))],
        "on a line": [array("line.npy", np.arange(500)[:, None] * [1.0, 2.0, 3.0])],
        "coplanar": [array("plane.npy", cloud * [1.0, 1.0, 0.0])],
        "2-D data": [array("flat.npy", cloud[:, :2])],
        "truncated PLY": [file("cut.ply", ply[: len(ply) // 2])],
        "pickled NPY": [array("pickled.npy", np.array([{"a": 1}] * 200, dtype=object))],
        "not a file": ["/dev/null"],
        "unknown preset": [str(good), "--preset", "finest"],
        "device not there": [str(good), "--device", "cuda:97"],
        "no device": [str(good), "--device", "abacus"],
        "no steps": [str(good), "--steps", "0"],
        "levels no numbers": [str(good), "--levels", "0,a"],
        "p below 1": [str(good), "--p", "0.5"],
        "negative lambda": [str(good), "--lam", "-1", "5"],
        "negative seed": [str(good), "--seed", "-1"],
        "huge seed": [str(good), "--seed", str(10**23)],
        "steps no number": [str(good), "--steps", "many"],
        "no resolution": [str(good), "--resolution", "0"],
    }


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return bad_inputs(tmp_path_factory.mktemp("bad"))


KINDS = (
    "missing file",
    "a folder",
    "text file",
    "unknown extension",
    "empty file",
    "empty cloud",
    "fewer than 100 points",
    "NaN",
    "infinity",
    "all points equal",
    "on a line",
    "coplanar",
    "2-D data",
    "truncated PLY",
    "pickled NPY",
    "not a file",
    "unknown preset",
    "device not there",
    "no device",
    "no steps",
    "levels no numbers",
    "p below 1",
    "negative lambda",
    "negative seed",
    "huge seed",
    "steps no number",
    "no resolution",
)


def test_every_kind_is_listed(bad: dict[str, list[str]]) -> None:
    assert set(bad) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_one_line_and_status_2(
    kind: str, bad: dict[str, list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    try:
        status = main(["reconstruct", *bad[kind], "--out", str(out)])
    except SystemExit as stop:  # argparse
        status = stop.code
    captured = capfd.readouterr()
    assert status == 2
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    assert "Traceback" not in captured.err
    assert not out.exists()


@pytest.mark.parametrize("out", ["file/below", "/proc/levelset"])
def test_folder_that_cannot_be_written(
    out: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    np.save(tmp_path / "good.npy", small_cloud().points)
    target = Path(out) if out.startswith("/") else tmp_path / out
    assert main(["reconstruct", str(tmp_path / "good.npy"), "--out", str(target)]) == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1


def test_a_run_leaves_whole_files_in_input_units(whole_run: Path) -> None:
    names = {path.name for path in whole_run.iterdir()}
    assert names - {"history.png"} == {  # which needs matplotlib
        "history.csv",
        "mesh.ply", "metrics.json", "preview.png", "checkpoint.pt", "config.json"
    }  # fmt: skip
    mesh = trimesh.load(whole_run / "mesh.ply")
    assert mesh.is_watertight
    np.testing.assert_allclose(mesh.bounds, [[97, -2, -9], [103, 2, -5]], atol=0.6)
    metrics = json.loads((whole_run / "metrics.json").read_text())
    assert metrics["steps"] == SMALL.steps
    assert 0.5 < metrics["converged_share"] <= 1
    assert metrics["cloud_to_mesh"] < 0.05
    assert 0 < metrics["sign_change_share"] < 1  # after so few steps it misses many points
    assert metrics["extraction"]["residual"] <= metrics["extraction"]["tolerance"]


def test_where_f_has_one_sign_is_counted() -> None:
    cloud = np.random.default_rng(0).normal(size=(400, 3))
    cloud /= np.linalg.norm(cloud, axis=1, keepdims=True)
    training = recipe.Training(torch.from_numpy(cloud).float(), SMALL)

    class Sphere(torch.nn.Module):
        """F is the distance of a unit sphere, without its sign where x > ``folded``."""

        def __init__(self, folded: float) -> None:
            super().__init__()
            self.folded = folded

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            signed = x.norm(dim=1, keepdim=True) - 1
            return torch.where(x[:, :1] > self.folded, signed.abs(), signed)

    # Disks of points so far apart lie as much as 0.02 below the sphere that they were taken from.
    disks = losses.Disks(training.cloud, training.cloud, torch.ones(400))
    training.network = Sphere(2.0)
    assert training.sign_change_share(disks) == 1
    training.network = Sphere(0.0)
    assert training.sign_change_share(disks) == pytest.approx((cloud[:, 0] < 0).mean())
    assert training.sign_change_share(disks, 3) == pytest.approx((cloud[::3, 0] < 0).mean())


def test_same_seed_same_mesh_and_finished_runs_stay(whole_run: Path, tmp_path: Path) -> None:
    recipe.reconstruct(small_cloud(), tmp_path, SMALL)
    assert (tmp_path / "mesh.ply").read_bytes() == (whole_run / "mesh.ply").read_bytes()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    recipe.reconstruct(small_cloud(), tmp_path, SMALL, resume=True)
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert before == after


def test_resume_refuses_another_run(whole_run: Path) -> None:
    with pytest.raises(InputError, match="other seed"):
        recipe.reconstruct(small_cloud(), whole_run, replace(SMALL, seed=4), resume=True)
    with pytest.raises(InputError, match="got one of"):
        recipe.reconstruct(small_cloud(seed=1), whole_run, SMALL, resume=True)


def test_killed_between_the_last_step_and_the_results(whole_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole_run, out)
    (out / "metrics.json").unlink()
    (out / "mesh.ply").unlink()
    again = recipe.reconstruct(small_cloud(), out, SMALL, resume=True)
    before = json.loads((whole_run / "metrics.json").read_text())
    losses = [name for name in before if name.startswith("loss")]
    assert len(losses) == 4
    assert {name: again[name] for name in losses} == {name: before[name] for name in losses}
    assert (out / "mesh.ply").read_bytes() == (whole_run / "mesh.ply").read_bytes()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no checkpoint at all"])
def test_damaged_checkpoint_is_a_clear_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="checkpoint"):
        load_checkpoint(path, recipe.KIND)


def test_foreign_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", {"kind": "something else"})
    with pytest.raises(InputError, match="another file"):
        load_checkpoint(tmp_path / "a.pt", recipe.KIND)


def test_a_checkpoint_without_its_entries_is_a_clear_error(tmp_path: Path) -> None:
    config = {"kind": recipe.KIND, "cloud": "ellipsoid", "digest": small_cloud().digest}
    write_json(tmp_path / "config.json", {**config, "settings": asdict(SMALL)})
    save_checkpoint(tmp_path / "checkpoint.pt", {"kind": recipe.KIND})
    with pytest.raises(InputError, match=r"checkpoint\.pt: expected a checkpoint of this run"):
        recipe.reconstruct(small_cloud(), tmp_path, SMALL, resume=True)


@pytest.mark.parametrize("name", ["mesh.ply", "tensorboard/scan.npy"])
def test_a_scan_where_the_run_would_write_is_kept(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = tmp_path / name
    scan.parent.mkdir(exist_ok=True)
    scan.write_bytes(b"mine")
    assert main(["reconstruct", str(scan), "--out", str(tmp_path)]) == 2
    own = name.split("/")[0]
    assert f"scan: {scan} is where this run writes its own {own}" in capsys.readouterr().err
    assert main(["curve", str(tmp_path / "curve.ply"), "--out", str(tmp_path)]) == 2
    assert scan.read_bytes() == b"mine"


def test_files_that_no_reconstruction_has_made_are_kept(tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_text("mine")
    for there in ("history.csv", "history.csv, config.json"):
        message = f"{there} would be replaced and is not of a reconstruction"
        with pytest.raises(InputError, match=message):
            recipe.reconstruct(small_cloud(), tmp_path, SMALL)
        (tmp_path / "config.json").write_text("{}")
    assert (tmp_path / "history.csv").read_text() == "mine"


def test_the_figures_of_a_step_add_up(tmp_path: Path) -> None:
    config = replace(SMALL, steps=6, lam_first=0.0, lam_last=4.0, lam_steps=6)
    recipe.reconstruct(small_cloud(), tmp_path, config)
    with (tmp_path / "history.csv").open() as stream:
        last = list(csv.DictReader(stream))[-1]
    parts = [float(last[f"loss_{name}"]) for name in ("projected", "other_levels", "cloud")]
    assert float(last["lam"]) == pytest.approx(4.0 * (5 / 6) ** config.lam_power)
    assert float(last["loss"]) == pytest.approx(
        parts[0] + parts[1] + float(last["lam"]) * parts[2], rel=1e-4
    )


def test_non_finite_step_is_skipped_and_counted() -> None:
    cloud = torch.from_numpy(small_cloud().points - [100.0, 0.0, -7.0]).float() / 3
    training = recipe.Training(cloud, SMALL)
    with torch.no_grad():
        next(training.network.parameters()).fill_(float("nan"))
    before = [parameter.clone() for parameter in training.network.parameters()]
    training.advance()
    assert training.skipped_steps == 1
    for parameter, old in zip(training.network.parameters(), before, strict=True):
        assert torch.equal(parameter.nan_to_num(7.0), old.nan_to_num(7.0))


def test_paper_preset_is_the_supplementary_and_schedules_stretch() -> None:
    config = recipe.preset("paper")
    assert (config.width, config.hidden_layers, config.skip) == (509, 7, True)
    assert config.newton_iters == 10
    training = recipe.Training(torch.zeros(10, 3), replace(config, width=8, hidden_layers=2))
    rates, lams = [], []
    for step in (0, 5_000, 15_000, 35_000):
        training.step = step
        rates.append(training.learning_rate())
        lams.append(training.lam())
    assert rates == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4])
    assert lams == pytest.approx([1.0, 3.0, 5.0, 5.0])
    assert recipe.preset("paper", steps=500).halve_at == (50, 150, 350)
    assert recipe.preset("paper", steps=500).lam_steps == 100


def test_a_second_warm_up_holds_however_short_the_first_is() -> None:
    config = replace(SMALL, steps=100_000, warmup=0.0, warmup_steps=10, learning_rate=1.0)
    training = recipe.Training(torch.rand(50, 3), config)
    rates = []
    for step in (0, 4, 9, 10):
        training.step = step
        rates.append(training.learning_rate())
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0], rel=1e-6)


def test_disks_stand_for_the_cloud_where_asked() -> None:
    cloud = torch.from_numpy(small_cloud().points - [100.0, 0.0, -7.0]).float() / 3
    with_disks, without = (
        recipe.Training(cloud, replace(SMALL, distance=distance))
        for distance in ("disks", "points")
    )
    assert without.disks is None
    assert with_disks.disks is not None
    gap = (with_disks.disks.centers - cloud).norm(dim=1)
    assert 0 < float(gap.mean()) < 0.02
    a, b = with_disks.advance(), without.advance()
    assert float(a.total.detach()) != float(b.total.detach())


def test_settings_of_the_loss_reach_it() -> None:
    config = recipe.preset("fast", levels=(0.0, 0.05), p=1.5, lam=(2.0, 3.0))
    training = recipe.Training(
        torch.rand(500, 3), replace(config, width=16, projected=20, general=10, pool=50)
    )
    projected, general, nearest = training.samples()
    assert [float(result.level[0]) for result in projected] == pytest.approx([0.0, 0.05])
    assert [len(result) for result in (*projected, general)] == [10, 10, 10]
    assert nearest is not None
    assert training.lam() == 2.0
    assert training.advance().levels.shape == (3,)


def test_resolution_reaches_the_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def seen(cloud: object, out: Path, config: recipe.ReconstructConfig, **_: object) -> None:
        raise Seen(config.resolution)

    monkeypatch.setattr(recipe, "load_cloud", lambda *_: small_cloud())
    monkeypatch.setattr(recipe, "reconstruct", seen)
    with pytest.raises(Seen, match="77"):
        main(["reconstruct", "--out", str(tmp_path), "--resolution", "77"])
    assert recipe.preset("fast").resolution == 256


@pytest.mark.parametrize("size", [200, 2000])
def test_outliers_are_told_and_stay(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Training(Exception):
        pass

    def train(make: object, points: np.ndarray, *rest: object) -> None:
        raise Training(len(points))

    monkeypatch.setattr(recipe, "train_in_folder", train)
    points, said = small_cloud().points[:size], []
    for cloud in (points, np.vstack([points, [[150.0, 0.0, 0.0]]])):
        with pytest.raises(Training, match=str(len(cloud))):
            recipe.reconstruct(recipe.Cloud(cloud, "a"), tmp_path, SMALL, say=said.append)
    assert len(said) == 1
    assert f"made large by 1 of {size + 1} points; remove outliers" in said[0]


def test_every_preset_survives_its_config_file(tmp_path: Path) -> None:
    for name in recipe.PRESETS:
        config = recipe.preset(name)
        write_json(tmp_path / "config.json", asdict(config))
        text = (tmp_path / "config.json").read_text()
        assert "Infinity" not in text
        assert "NaN" not in text
        assert recipe.config_from(json.loads(text)) == config


def test_compare_and_info_print_json(
    whole_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mesh = str(whole_run / "mesh.ply")
    assert main(["compare", mesh, mesh, "--samples", "2000"]) == 0
    assert json.loads(capfd.readouterr().out)["two_sided_ratio"] == pytest.approx(1.0, abs=0.1)
    assert main(["info"]) == 0
    assert json.loads(capfd.readouterr().out)["version"]
    (tmp_path / "points.ply").write_bytes(b"junk")
    assert main(["compare", str(tmp_path / "points.ply"), mesh]) == 2
    assert main(["compare", mesh, mesh, "--samples", "0"]) == 2
    assert main(["compare", mesh, mesh, "--seed", "-1"]) == 2
