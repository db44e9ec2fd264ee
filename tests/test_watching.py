"""Who watches a training: what the sinks keep, and that a training does not depend on them."""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from levelset_ext.cli import main
from levelset_ext.data.images import Images
from levelset_ext.errors import InputError
from levelset_ext.recipes import curve, history, progress, reconstruct
from levelset_ext.recipes.observers import Moment, Observer, Observers, Run, chosen_observers

SMALL = replace(
    reconstruct.preset("fast", steps=30, seed=3),
    width=24,
    hidden_layers=2,
    projected=48,
    general=48,
    cloud_points=48,
    pool=200,
    resolution=24,
    checkpoint_every=7,
    learning_rate=6e-3,
)


def cloud() -> reconstruct.Cloud:
    x = np.random.default_rng(0).standard_normal((600, 3))
    return reconstruct.Cloud(2 * x / np.linalg.norm(x, axis=1, keepdims=True), "sphere")


class Recorder(Observer):
    """Everything that a training says."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.moments: list[Moment] = []
        self.pictures: dict[str, Path] = {}
        self.closed = 0

    def begin(self, run: Run) -> None:
        self.run = run

    def due(self, step: int, *, last: bool, saved: bool) -> bool:
        return step % 4 == 0 or last

    def see(self, moment: Moment) -> None:
        self.moments.append(moment)

    def done(self, pictures: Any, metrics: Any) -> None:
        self.pictures = dict(pictures)
        assert metrics["steps"] == 30
        assert not (pictures["preview"].parent / "metrics.json").exists()

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="module", autouse=True)
def small_previews() -> Any:
    """Previews are drawn by rays for seconds, and are tested elsewhere."""

    def draw(path: Path, cloud: np.ndarray, *_: Any) -> None:
        Image.fromarray(np.full((5, 7, 3), len(cloud) % 256, np.uint8)).save(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct, "render_preview", draw)
        yield


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    out, recorder = tmp_path_factory.mktemp("whole"), Recorder()
    torch.set_num_threads(1)
    with Observers([recorder]) as observers:
        reconstruct.reconstruct(cloud(), out, SMALL, observers=observers)
    return out, recorder


def test_an_observer_sees_the_steps_it_asked_for(whole_run: tuple[Path, Recorder]) -> None:
    out, recorder = whole_run
    assert recorder.run is not None
    assert (recorder.run.out, recorder.run.steps, recorder.run.first) == (out, 30, 0)
    assert recorder.run.rate == (144, "points")
    assert [m.step for m in recorder.moments] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert [m.saved for m in recorder.moments] == [False] * 6 + [True, True]  # 28, and the last
    assert [m.last for m in recorder.moments] == [False] * 7 + [True]
    last, metrics = recorder.moments[-1], json.loads((out / "metrics.json").read_text())
    for name in ("loss", "loss_cloud", "loss_projected", "loss_other_levels", "converged_share"):
        assert last.figures[name] == metrics[name]
    assert recorder.pictures == {"preview": out / "preview.png"}
    assert recorder.closed == 1


def test_a_history_and_its_picture(whole_run: tuple[Path, Recorder]) -> None:
    out, recorder = whole_run
    rows = history.read_history(out / "history.csv")
    assert [row["step"] for row in rows] == list(range(1, 31))  # a short run has every step
    for moment in recorder.moments:
        row = rows[moment.step - 1]
        for name, value in moment.figures.items():
            assert row[name] == pytest.approx(value, rel=1e-6)
    pytest.importorskip("matplotlib")
    image = np.asarray(Image.open(out / "history.png").convert("RGB"))
    colours = {tuple(c) for c in image.reshape(-1, 3).tolist()}
    assert (0x2F, 0x6D, 0xB3) in colours  # the first curve
    assert (0xE0, 0x8A, 0x1E) in colours  # and the third


class Stop(Exception):
    pass


class Stopper(Observer):
    """Ends a training after a step, as a kill does."""

    vital = True

    def due(self, step: int, *, last: bool, saved: bool) -> bool:
        return step == 17

    def see(self, moment: Moment) -> None:
        raise Stop


def test_a_history_goes_on_with_the_run(tmp_path: Path, whole_run: tuple[Path, Recorder]) -> None:
    with pytest.raises(Stop):
        reconstruct.reconstruct(cloud(), tmp_path, SMALL, observers=[Stopper()])
    assert len(history.read_history(tmp_path / "history.csv")) == 14  # of the last checkpoint
    reconstruct.reconstruct(cloud(), tmp_path, SMALL, resume=True)

    def without_seconds(out: Path) -> list[dict[str, str]]:
        with (out / "history.csv").open() as stream:
            return [{**row, "seconds": ""} for row in csv.DictReader(stream)]

    assert without_seconds(tmp_path) == without_seconds(whole_run[0])
    seconds = [row["seconds"] for row in history.read_history(tmp_path / "history.csv")]
    assert seconds == sorted(seconds)


def test_a_sink_that_fails_is_taken_out_unless_it_is_vital() -> None:
    class Broken(Recorder):
        closed = False

        def see(self, moment: Moment) -> None:
            raise OSError("no room")

        def close(self) -> None:
            self.closed = True
            raise OSError("again")

    class Unsure(Broken):
        def due(self, step: int, *, last: bool, saved: bool) -> bool:
            raise ValueError("when?")

    said: list[str] = []
    broken, whole = Broken(), Recorder()
    watch = Observers([broken, whole], said.append)
    watch.after_step(4, lambda: ({"loss": 1.0}, "note"))
    assert said == ["Broken: switched off (OSError: no room)"]
    assert watch.sinks == [whole]
    assert whole.moments == [Moment(4, {"loss": 1.0}, "note")]
    asked: list[int] = []
    watch.after_step(5, lambda: (asked.append(5) or {}, ""))  # type: ignore[func-returns-value]
    assert not asked  # nobody wanted it, so it was not worked out
    assert broken.closed
    unsure = Unsure()
    watch = Observers([unsure, whole], said.append)
    watch.after_step(6, lambda: ({}, ""))
    assert watch.sinks == [whole]
    assert unsure.closed
    broken.vital = True
    with pytest.raises(OSError, match="no room"):
        Observers([broken]).after_step(8, lambda: ({}, ""))


def test_speeds_are_said_in_few_digits() -> None:
    said = {
        12.84: "12.8/s", 140.2: "140/s", 33_412.0: "33 k/s", 2.4e7: "24 M/s", 0.025: "1 in 40 s",
        0.0: "0.0/s",
    }  # fmt: skip
    assert {speed: progress.per_second(speed) for speed in said} == said
    assert progress.per_second(33_412.0, "points") == "33 k points/s"


# --- TensorBoard ----------------------------------------------------------------------------


def test_tensorboard_has_curves_picture_and_settings(
    tmp_path: Path, whole_run: tuple[Path, Recorder]
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from levelset_ext.recipes.tensorboard import FOLDER, TensorBoard

    with Observers([TensorBoard()]) as observers:
        reconstruct.reconstruct(cloud(), tmp_path, SMALL, observers=observers)
    events = EventAccumulator(str(tmp_path / FOLDER))
    events.Reload()
    moments = {m.step: m.figures for m in whole_run[1].moments}
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert sorted(losses) == list(range(1, 31))
    for step, figures in moments.items():
        assert losses[step] == pytest.approx(figures["loss"], rel=1e-6)
    with Image.open(tmp_path / "preview.png") as image:
        (shown,) = events.Images("preview")
        assert (shown.width, shown.height) == image.size
    assert "result/converged_share" in events.Tags()["scalars"]
    assert "_hparams_/session_start_info" in events.summary_metadata
    # And the training took no notice.
    assert (tmp_path / "mesh.ply").read_bytes() == (whole_run[0] / "mesh.ply").read_bytes()
    reconstruct.reconstruct(cloud(), tmp_path, SMALL)
    assert not (tmp_path / FOLDER).exists()  # of the run that was replaced


def test_tensorboard_shows_one_attempt_of_a_run_killed_before_its_first_checkpoint(
    tmp_path: Path,
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from levelset_ext.recipes.tensorboard import FOLDER, TensorBoard

    for loss, steps in ((1.0, 5), (2.0, 3)):
        board = TensorBoard()
        board.begin(Run(tmp_path, steps=5, first=0, settings={}, training=None))
        for step in range(1, steps + 1):
            board.see(Moment(step, {"loss": loss}))
        board.close()
        time.sleep(1.1)  # the files are told apart by the second they were made in
    events = EventAccumulator(str(tmp_path / FOLDER))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 2.0),
        (2, 2.0),
        (3, 2.0),
    ]


@pytest.mark.parametrize(
    ("option", "package", "extra"),
    [
        (["--log", "tensorboard"], "torch.utils.tensorboard", "levelset_ext[tensorboard]"),
        (["--viewer"], "viser", "levelset_ext[viewer]"),
    ],
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    option: list[str],
    package: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "out"
    assert main(["curve", "--out", str(out), "--steps", "1", *option]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert extra in error
    assert not out.exists()


def test_an_address_that_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["reconstruct", "--out", str(tmp_path / "x"), "--viewer", "scan.ply"]) == 2
    assert "expected PORT or HOST:PORT, got 'scan.ply'" in capfd.readouterr().err
    assert main(["curve", "--out", str(tmp_path / "x"), "--viewer=70000"]) == 2
    assert not (tmp_path / "x").exists()


def test_a_host_that_is_not_here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("viser")
    out = tmp_path / "x"
    assert main(["curve", "--out", str(out), "--viewer", "192.0.2.1:8080"]) == 2
    assert "viewer: expected an address to listen on" in capfd.readouterr().err
    assert not out.exists()


# --- the page, without a browser --------------------------------------------------------------


@pytest.fixture
def viewer() -> Any:
    pytest.importorskip("viser")
    from levelset_ext.recipes.viewer import Viewer

    said: list[str] = []
    made = Viewer("127.0.0.1", 0, said.append)
    made.said = said  # type: ignore[attr-defined]
    yield made
    made.close()


def test_watching_does_not_change_the_result(
    viewer: Any,
    tmp_path: Path,
    whole_run: tuple[Path, Recorder],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Bit for bit: the mesh, the weights, and every state of the training."""
    reconstruct.reconstruct(cloud(), tmp_path, SMALL, observers=[viewer])
    assert (tmp_path / "mesh.ply").read_bytes() == (whole_run[0] / "mesh.ply").read_bytes()
    seen, alone = (
        torch.load(folder / "checkpoint.pt", weights_only=True)["training"]
        for folder in (tmp_path, whole_run[0])
    )
    assert seen["counters"] == alone["counters"]
    assert torch.equal(seen["generator"], alone["generator"])
    for name, weight in seen["network"].items():
        assert torch.equal(weight, alone["network"][name])
    assert viewer.said[0] == f"watch at http://127.0.0.1:{viewer.server.get_port()}"
    assert capfd.readouterr().out == ""  # stdout is for results

    # What the page shows at the end.
    mesh = viewer.nodes["surface0"]
    radius = np.linalg.norm(mesh.vertices, axis=1)
    assert 0.8 < radius.mean() < 1.0  # the sphere, in the units of the training
    assert mesh.faces.max() == len(mesh.vertices) - 1
    assert viewer.nodes["scan"].points.shape == (600, 3)
    assert viewer.nodes["samples"].points.shape == (700, 3)
    steps, loss, *_ = viewer.plot.data
    assert steps.tolist() == list(range(1, 31))
    assert loss[-1] == pytest.approx(whole_run[1].moments[-1].figures["loss"])
    assert "step 30 of 30" in viewer.status.content
    assert viewer.bar.value == 100
    viewer.show["surface"].value = False
    viewer._dress()
    assert not mesh.visible
    assert viewer.nodes["scan"].visible


@pytest.mark.parametrize("finished", [False, True])
def test_the_page_stays_for_its_readers_after_a_finished_run(
    finished: bool, viewer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        reconstruct.reconstruct(cloud(), tmp_path, SMALL, observers=[viewer, Stopper()])
    asked: list[int] = []

    def clients() -> dict[int, str]:  # somebody looks for a while
        asked.append(len(asked))
        return {0: "a page"} if len(asked) < 10 else {}

    monkeypatch.setattr(viewer.server, "get_clients", clients)
    monkeypatch.setattr(viewer, "_finished", finished)
    viewer.close()
    assert viewer.server is None
    assert finished == ("the page stays until it is closed" in viewer.said[-1])
    assert finished == (len(asked) >= 10)


def test_samples_walk_to_the_level_set_and_lines_are_on_theirs() -> None:
    pytest.importorskip("viser")
    from levelset_ext.recipes.viewer import LEVEL_STEP, Slice, iso_lines, sample_paths

    class Sphere(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.radius = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.norm(dim=1) - self.radius

    sphere, box = Sphere(), (np.full(3, -1.0), np.full(3, 1.0))
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    paths, far, converged = sample_paths(sphere, 0.7 * x / x.norm(dim=1, keepdim=True), box)
    distance = np.abs(np.linalg.norm(paths, axis=2) - 0.7)
    assert distance[0].mean() > 0.05
    assert distance[-1].max() < 1e-4
    assert converged == 1
    np.testing.assert_allclose(far, distance / distance[0].max(), atol=1e-12)

    lines, colours, zero = iso_lines(sphere, box, Slice(axis=1, place=0.6))
    assert np.allclose(zero[..., 1], 0.2)
    assert np.allclose(lines[..., 1], 0.2)
    assert np.abs(np.linalg.norm(zero, axis=2) - 0.7).max() < 1e-3
    value = np.linalg.norm(lines, axis=2) - 0.7
    level = np.round(value / LEVEL_STEP)
    assert np.abs(value - level * LEVEL_STEP).max() < 5e-3  # kinks of |x| near the axis aside
    assert set(np.unique(level)) >= {-4, -1, 1, 4}
    blue, red = colours[..., 2] > colours[..., 0], colours[..., 0] > colours[..., 2]
    assert (blue == (level < 0)).all()
    assert (red == (level > 0)).all()


@pytest.mark.parametrize("dimension", [2, 3])
def test_a_curve_on_the_page(dimension: int, viewer: Any, tmp_path: Path) -> None:
    angle = np.linspace(0, 2 * math.pi, 120, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle), 0 * angle], 1)[:, :dimension]
    points = curve.CurvePoints(circle, "circle")
    config = replace(curve.curve_preset("fast", steps=20), start_steps=60, trace_seeds=50, width=32)
    curve.reconstruct_curve(points, tmp_path, config, observers=[viewer])
    assert np.ptp(viewer.nodes["scan"].points[:, 2].astype(float)) < 1e-3
    samples = viewer.nodes["samples"].points.astype(float)
    radius = np.linalg.norm(viewer.nodes["scan"].points.astype(float), axis=1).mean()
    assert np.median(np.abs(np.linalg.norm(samples, axis=1) - radius)) < 0.1
    if dimension == 2:
        assert not any(name.startswith("surface") for name in viewer.nodes)
        zero = viewer.nodes["zero"].points.reshape(-1, 3)
        assert np.median(np.abs(np.linalg.norm(zero, axis=1) - radius)) < 0.1
    else:
        assert {"surface0", "surface1"} <= set(viewer.nodes)  # they meet in the curve


# --- the page, in a browser ---------------------------------------------------------------------


def chromium() -> Any:
    playwright = pytest.importorskip("playwright.sync_api")
    import shutil

    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("Chromium is not there")
    return playwright, program


@pytest.mark.slow
def test_the_page_in_a_browser(viewer: Any, tmp_path: Path) -> None:
    """Chromium gets the scene, asks for nothing from elsewhere, and its ticks reach the server."""
    playwright, program = chromium()
    training = reconstruct.Training(torch.from_numpy(cloud().points).float() * 0.45, SMALL)
    viewer.begin(Run(tmp_path, 30, 0, {}, training))
    viewer.see(Moment(30, {"loss": 0.5, "loss_cloud": 0.1}))
    viewer._idle.wait()
    outside: list[str] = []
    flags = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--disable-quic",
             "--enable-unsafe-swiftshader", "--disable-background-networking"]  # fmt: skip
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, headless=True, args=flags)
        page = browser.new_page(viewport={"width": 640, "height": 420})
        page.set_default_timeout(120_000)
        home = f"http://127.0.0.1:{viewer.server.get_port()}"
        own = (home, home.replace("http", "ws"), "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(own) else outside.append(r.url))
        page.goto(home)
        page.get_by_text("step 30 of 30").wait_for()
        page.locator("canvas").first.wait_for()
        page.get_by_text("iso-levels").first.wait_for()
        assert viewer.server.get_clients()
        page.get_by_role("checkbox").first.evaluate("box => box.click()")
        for _ in range(600):
            if not viewer.nodes["scan"].visible:
                break
            page.wait_for_timeout(100)
        assert not viewer.nodes["scan"].visible
        browser.close()
    assert not outside


# --- other pictures -----------------------------------------------------------------------------


def test_the_sheet_of_an_attack(tmp_path: Path) -> None:
    from levelset_ext.attacks import evaluate
    from levelset_ext.recipes.attack_picture import draw_attacks

    random = torch.Generator().manual_seed(0)
    x = torch.rand(40, 1, 4, 4, generator=random)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    with torch.no_grad():
        y = model(x).argmax(1)
    data = Images(x, y, "noise", 3)
    found = evaluate(model, x, y, "pgd-margin", eps=0.05, step=0.02, iters=5)
    broken = int((found.broken_by >= 0).sum())
    assert 0 < broken < 40
    assert draw_attacks(tmp_path / "sheet.png", data, found)
    image = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    row = int(torch.nonzero(found.broken_by >= 0)[0])
    corner = (8, 132)  # of the first image: its upper left pixel is a square of 24
    for line, value in ((0, x[row]), (2, found.adversarial[row])):
        shown = image[corner[0] + line * 104 + 12, corner[1] + 12]
        assert np.abs(shown - 255 * float(value[0, 0, 0])).max() <= 1
    change = float((found.adversarial[row] - x[row])[0, 0, 0])
    shown = image[corner[0] + 104 + 12, corner[1] + 12]
    assert np.sign(int(shown[0]) - 127.5) == np.sign(change)
    wrong = replace(found, broken_by=torch.full((40,), -2))
    assert not draw_attacks(tmp_path / "none.png", data, wrong)


def test_options_make_their_sinks() -> None:
    import argparse

    assert list(chosen_observers(argparse.Namespace(log=None, viewer=None))) == []
    with pytest.raises(InputError, match="viewer: expected PORT"):
        chosen_observers(argparse.Namespace(log=None, viewer="here"))
