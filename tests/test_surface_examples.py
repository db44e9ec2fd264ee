"""The surfaces of Table 2 and the iso-levels of Figure A2: on shapes whose distance is known."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor, nn

from levelset_ext.errors import InputError
from levelset_ext.networks import from_mesh
from levelset_ext.recipes.reconstruct import PRESETS, Cloud, preset

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1] / "python_examples"))

import _surfaces
import close_ups
import figure_a2_levels
import surface_ablation
import surface_table
from _surfaces import Budget

BOX = np.array([0.7, 0.5, 0.3])  # half sides


def noisy_sphere(radius: float, count: int = 3000, noise: float = 0.004) -> Tensor:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, generator=random)
    x /= torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return radius * x + noise * torch.randn(count, 3, generator=random)


def torus(major: float = 0.6, minor: float = 0.25) -> trimesh.Trimesh:
    return trimesh.creation.torus(major, minor, major_sections=64, minor_sections=32)


def radial_error(surface: _surfaces.Surface, radius: float) -> float:
    """Mean distance of the faces' centres from a sphere, weighted by area, over the radius."""
    mesh = trimesh.Trimesh(surface.vertices, surface.faces, process=False)
    off = np.abs(np.linalg.norm(mesh.triangles_center, axis=1) - radius)
    return float((off * mesh.area_faces).sum() / mesh.area) / radius


class BoxDistance(nn.Module):
    """The signed distance to the box [-BOX, BOX], times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        q = x.abs() - torch.from_numpy(BOX).to(x.dtype)
        outside = q.clamp_min(0).square().sum(1).clamp_min(1e-300).sqrt()
        inside = q.amax(1).clamp_max(0)
        return self.factor * torch.where((q > 0).any(1), outside, inside)


def box_surface() -> figure_a2_levels.Surface:
    box = trimesh.creation.box(2 * BOX)
    return figure_a2_levels.Surface(box.vertices, box.faces, 20_000)


# --- the methods -----------------------------------------------------------------------------


def test_chamfer_is_the_mean_over_all_pairs() -> None:
    random = torch.Generator().manual_seed(0)
    made = torch.randn(40, 3, generator=random, dtype=torch.float64, requires_grad=True)
    cloud = torch.randn(90, 3, generator=random, dtype=torch.float64)
    rows = cloud[:50]
    square = torch.cdist(made, cloud).square().amin(1).mean()
    square = square + torch.cdist(rows, made).square().amin(1).mean()
    (expected,) = torch.autograd.grad(square, made)
    loss = _surfaces.chamfer(made, rows, cloud)
    (gradient,) = torch.autograd.grad(loss, made)
    torch.testing.assert_close(loss, square)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("kind", "bound"), [("sphere", 0.02), ("patch", 0.06), ("patches", 0.03)])
def test_atlasnet_covers_a_sphere(kind: str, bound: float) -> None:
    cloud = noisy_sphere(0.8)
    made = _surfaces.atlasnet(
        cloud, kind, Budget(steps=150), widths=(64, 32), points=500, rate=5e-3, vertices=4000
    )
    assert made.steps == 150
    assert radial_error(made, 0.8) < bound
    away, _ = _surfaces.ops.nearest_distance(cloud.double(), torch.from_numpy(made.vertices))
    assert float(away.mean()) < 2.5 * bound  # the other way: nothing is left uncovered
    mesh = trimesh.Trimesh(made.vertices, made.faces, process=False)
    assert mesh.body_count == _surfaces.ATLAS_KINDS[kind][0]
    assert mesh.is_watertight == (kind == "sphere")
    if kind == "sphere":
        assert mesh.volume > 0


def test_igr_finds_a_sphere_far_from_its_start() -> None:
    made = _surfaces.igr(
        noisy_sphere(0.85), Budget(steps=200), width=32, hidden_layers=3, points=256, resolution=32
    )
    assert radial_error(made, 0.85) < 0.015  # it starts with radius 0.64
    mesh = trimesh.Trimesh(made.vertices, made.faces, process=False)
    assert mesh.is_watertight
    assert mesh.body_count == 1


def test_poisson_makes_a_torus() -> None:
    pytest.importorskip("pymeshlab")
    truth = torus()
    points = trimesh.sample.sample_surface(truth, 8000, seed=0)[0]
    made = _surfaces.poisson(points, depth=6)
    mesh = trimesh.Trimesh(made.vertices, made.faces, process=False)
    off = np.hypot(np.hypot(*mesh.vertices[:, :2].T) - 0.6, mesh.vertices[:, 2]) - 0.25
    assert np.abs(off).mean() < 0.003
    assert np.abs(off).max() < 0.02
    assert mesh.is_watertight
    assert mesh.euler_number == 0
    assert mesh.volume == pytest.approx(truth.volume, rel=0.03)


def test_poisson_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymeshlab", None)
    with pytest.raises(InputError, match="expected pymeshlab"):
        _surfaces.poisson(np.zeros((10, 3)))


def test_ours_leaves_a_run_that_can_be_read(tmp_path: Path) -> None:
    cloud = noisy_sphere(0.85)
    raw = Cloud(cloud.double().numpy(), "sphere")
    made = _surfaces.ours(cloud, Budget(steps=40), resolution=48, keep=(tmp_path / "run", raw))
    assert made.steps == 40
    assert radial_error(made, 0.85) < 0.03
    read = figure_a2_levels.read_run(tmp_path / "run")
    assert read["step"] == 40
    assert read["digest"] == raw.digest
    network = figure_a2_levels.network_of(figure_a2_levels.config_from(read["settings"]))
    network.load_state_dict(read["network"])
    values = network(torch.from_numpy(made.vertices).float())
    assert float(values.detach().abs().max()) < 1e-4


def test_ours_stretches_its_schedules_to_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks at every look, the learning rate and lambda end where they must."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(_surfaces.time, "process_time", lambda: float(next(ticks)))
    seen = []

    class Recorded(_surfaces.Training):
        def advance(self):  # type: ignore[no-untyped-def]
            seen.append((self.learning_rate(), self.lam()))
            return super().advance()

    monkeypatch.setattr(_surfaces, "Training", Recorded)
    made = _surfaces.ours(noisy_sphere(0.8, 500), Budget(30), resolution=24)
    assert made.steps == len(seen) >= 25
    # It rises within the second warm-up, which lasts so many steps whatever the time, and falls.
    fast = PRESETS["fast"]
    highest = max(rate for rate, _ in seen)
    assert highest > 0.1 * fast.learning_rate * min(1, len(seen) / max(1, fast.warmup_steps))
    assert seen[-1][0] < 0.03 * highest
    assert seen[0][1] == 1.0
    assert seen[-1][1] > 4.5
    assert made.seconds >= 30


def test_a_budget_is_of_one_kind() -> None:
    assert [Budget(steps=4).share(k) for k in (0, 1, 4)] == [0.0, 0.25, 1.0]
    assert Budget(1e-9).share(0) > 1
    for seconds, steps in ((None, None), (1.0, 1), (0.0, None), (None, 0), (float("nan"), None)):
        with pytest.raises(ValueError, match="budget: expected"):
            Budget(seconds, steps)


# --- the table -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one scan: a torus, in other units than the normalised ones."""
    folder = tmp_path_factory.mktemp("scans")
    (folder / "truth").mkdir()
    truth = torus()
    truth.apply_scale(30.0)
    truth.apply_translation([5.0, -2.0, 9.0])
    truth.export(folder / "truth" / "ring.ply")
    points = trimesh.sample.sample_surface(truth, 4000, seed=0)[0]
    trimesh.PointCloud(points).export(folder / "ring.ply")
    return folder


def test_table_of_one_scan(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(scans), "--out", str(tmp_path), "--quick", "--steps", "12"]
    command += ["--methods", "sphere,igr"]
    surface_table.main(command)
    rows = json.loads((tmp_path / "surface_table.json").read_text())["scans"]["ring"]
    assert list(rows) == ["igr", "sphere"]  # JSON sorts
    assert rows["sphere"]["euler_number"] == 2
    assert rows["sphere"]["watertight"]
    for row in rows.values():
        assert 0 < row["resampling_floor"] < row["chamfer_l2_relative"] < 0.1
        assert row["chamfer_l2_relative"] < row["chamfer_l1_relative"]
        assert row["steps"] == 12
    table = (tmp_path / "surface_table.md").read_text()
    assert table in capsys.readouterr().out
    line = next(line for line in table.splitlines() if "AtlasNet, 1 sphere" in line)
    assert f"{1e3 * rows['sphere']['point_to_surface']:.2f}" in line
    assert (tmp_path / "surface_table.png").read_bytes()[:4] == b"\x89PNG"

    def never(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(surface_table, "one_method", never)
    surface_table.main([*command, "--resume"])
    assert (tmp_path / "surface_table.md").read_text() == table
    full = {"ring": {"compare": rows["sphere"], "steps": 6000, "wall_seconds": 171.0}}
    (tmp_path / "full.json").write_text(json.dumps({"scans": full}))
    surface_table.main([*command, "--resume", "--fast-results", str(tmp_path / "full.json")])
    cited = (tmp_path / "surface_table.md").read_text()
    (new,) = set(cited.splitlines()) - set(table.splitlines())
    assert new.startswith("| ring | ours, full preset |")
    assert "| 6000 | 171 s" in new
    with pytest.raises(InputError, match="same settings to resume, got other steps"):
        surface_table.main([*command, "--resume", "--steps", "13"])


def test_open_truth_is_compared_without_lids(tmp_path: Path) -> None:
    """Half a torus; a closed surface around it has to cross where there are no points."""
    (tmp_path / "truth").mkdir()
    truth = torus()
    truth = truth.submesh([np.flatnonzero(truth.triangles_center[:, 0] > 0)], append=True)
    truth.export(tmp_path / "truth" / "half.ply")
    points = trimesh.sample.sample_surface(truth, 3000, seed=0)[0]
    trimesh.PointCloud(points).export(tmp_path / "half.ply")
    out = tmp_path / "out"
    command = [str(tmp_path), "--out", str(out), "--quick", "--steps", "30", "--methods", "sphere"]
    surface_table.main(command)
    row = json.loads((out / "surface_table.json").read_text())["scans"]["half"]["sphere"]
    assert row["watertight"]
    assert not row["trimmed"]["watertight"]
    assert row["trimmed"]["faces"] < row["faces"]
    assert set(row["trimmed"]) < set(row)
    assert row["trimmed"]["point_to_surface"] < row["point_to_surface"]
    table = (out / "surface_table.md").read_text()
    assert f"{1e3 * row['trimmed']['point_to_surface']:.2f}" in table
    assert "AtlasNet, 1 sphere, trimmed" in table


def test_a_mesh_of_which_nothing_is_left() -> None:
    scan = surface_table.scan_of("ring", Cloud(torus().vertices, "ring"), torus())
    far = torch.full((3, 3), 5.0) + torch.eye(3)
    found = {"vertices": far, "faces": torch.tensor([[0, 1, 2]]), "compare": None}
    found |= {"steps": 1, "training_seconds": 1.0, "mesh_seconds": 1.0}
    trimmed = surface_table.without_lids("sphere", scan, found, surface_table.Setting())
    assert trimmed == {"compare": None}
    row = surface_table.figures({**found, "trimmed": trimmed})
    assert row["trimmed"] == {}
    assert "no surface" in surface_table.table_row("ring", "sphere", row["trimmed"], ["", "", ""])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--methods", ""], "methods: expected some of ours, .* got none"),
        (["--methods", "sphere,magic"], "methods: expected .* got magic"),
        (["--scans", "bunny"], "scans: expected some of ring, got bunny"),
        (["--seconds", "0"], "seconds: expected"),
        (["--steps", "0"], "steps: expected"),
        (["--steps", "5", "--seconds", "2"], "expected one of them"),
    ],
)
def test_table_refuses(scans: Path, tmp_path: Path, extra: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        surface_table.main(
            [str(scans), "--out", str(tmp_path / "out"), "--methods", "sphere", *extra]
        )


def test_scans_are_looked_for_before_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pymeshlab", None)
    for script in (surface_table, close_ups):
        with pytest.raises(InputError, match="expected a folder with scans"):
            script.main([str(tmp_path / "missing"), "--out", str(tmp_path / "out")])
        with pytest.raises(InputError, match="scans: expected a folder SCANS to choose from"):
            script.main(["--scans", "nosuch", "--out", str(tmp_path / "out"), "--quick"])


def test_table_refuses_a_folder_without_scans(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none"):
        surface_table.main([str(tmp_path), "--out", str(tmp_path), "--methods", "sphere"])


# --- Figure A2 -------------------------------------------------------------------------------


def test_distance_and_side_of_a_box() -> None:
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, (500, 3))
    signed = box_surface().signed(x)
    expected = BoxDistance()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(signed, expected, atol=1e-9)
    assert (signed < 0).sum() > 20


def test_side_of_a_surface_with_a_hole() -> None:
    ball = trimesh.creation.icosphere(3, 0.5)
    open_ball = figure_a2_levels.Surface(ball.vertices, np.delete(ball.faces, [0, 5, 9], 0), 2000)
    assert open_ball.inside(
        np.array([[0.0, 0, 0], [0.4, 0, 0], [0.6, 0, 0], [2.0, 1, 0]])
    ).tolist() == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_deviation_of_an_exact_distance(factor: float) -> None:
    amount = figure_a2_levels.Amount(200, 100)
    found = figure_a2_levels.measure(BoxDistance(factor), box_surface(), amount)
    for row in found["bands"]:
        assert row["signs_agree"] == 1.0
        assert row["ratio_10"] == pytest.approx(factor, rel=1e-6)
        assert row["ratio_90"] == pytest.approx(factor, rel=1e-6)
        assert row["deviation_mean"] >= (factor - 1) * row["from"]
        assert row["deviation_mean"] <= (factor - 1) * row["to"] + 1e-9
        assert row["slope_50"] == pytest.approx(factor, rel=1e-6)
    assert len(found["values"]) == 200 * len(found["bands"])
    for row in found["spacing"]:
        assert row["points"] >= 95
        assert row["distance_mean"] == pytest.approx(row["level"] / factor, abs=1e-5)
        assert row["distance_90"] - row["distance_10"] < 1e-4


def test_signs_of_a_polytope_network_agree() -> None:
    """Exact on the faces and in sign, but no distance at the edges: the ratio must show that."""
    box = trimesh.creation.box(2 * BOX)
    network = from_mesh(box.vertices, box.faces)
    found = figure_a2_levels.measure(network, box_surface(), figure_a2_levels.Amount(200, 50))
    assert all(row["signs_agree"] == 1.0 for row in found["bands"])
    expected = (found["points"].abs() - torch.from_numpy(BOX)).amax(1)
    torch.testing.assert_close(found["values"], expected)
    ratio = (expected / found["distance"])[-200:].abs()
    assert float(ratio.min()) < 0.9
    row = found["bands"][-1]
    assert row["ratio_10"] == pytest.approx(float(torch.quantile(ratio, 0.1)))
    off = (expected.abs() - found["distance"].abs())[-200:].abs()
    assert row["deviation_mean"] == pytest.approx(float(off.mean()))


def test_figure_a2_of_a_run(scans: Path, tmp_path: Path) -> None:
    file = str(scans / "ring.ply")
    raw = surface_table.load_cloud(file, 0)
    unit = surface_table.scan_of("ring", raw, torus()).cloud
    _surfaces.ours(unit, Budget(steps=100), resolution=24, keep=(tmp_path / "run", raw))
    command = ["--out", str(tmp_path / "out"), "--quick", "--run", str(tmp_path / "run")]
    with pytest.raises(InputError, match="truth: expected"):
        figure_a2_levels.main(command)
    command += ["--truth", str(scans / "truth" / "ring.ply")]
    with pytest.raises(InputError, match="got another"):
        figure_a2_levels.main([*command, "--scan", str(scans / "truth" / "ring.ply")])
    figure_a2_levels.main([*command, "--axis", "z"])
    summary = json.loads((tmp_path / "out" / "figure_a2.json").read_text())
    assert summary["steps"] == 100
    assert summary["correlation"] > 0.9
    with (tmp_path / "out" / "figure_a2_bands.csv").open() as stream:
        bands = list(csv.DictReader(stream))
    assert len(bands) == len(figure_a2_levels.BANDS) - 1
    assert 0.7 < float(bands[-1]["ratio_50"]) < 1.3
    assert float(bands[-1]["signs_agree"]) > 0.95
    assert (tmp_path / "out" / "figure_a2_levels.png").read_bytes()[:4] == b"\x89PNG"


def test_close_ups_look_at_what_is_thin_and_what_is_bent() -> None:
    plate = trimesh.creation.box((1.0, 1.0, 0.02)).subdivide().subdivide()
    ball = trimesh.creation.icosphere(4, 0.5)
    ball.apply_translation((3.0, 0.0, 0.0))
    truth = trimesh.util.concatenate([plate, ball])
    first, _, crease = close_ups.places(truth, np.random.default_rng(0))
    assert (first.kind, crease.kind) == ("thin", "crease")
    assert abs(first.center[0]) <= 0.5  # on the plate, not on the ball
    assert np.abs(crease.center[:2]).max() > 0.4  # near its border


def test_close_ups_measure_a_known_gap() -> None:
    truth, mesh = trimesh.creation.icosphere(5, 1.0), trimesh.creation.icosphere(5, 1.02)
    diagonal = float(np.linalg.norm(truth.extents))
    place = close_ups.Place("thin", np.array([0.0, 0.0, 1.0]), close_ups.RADIUS * diagonal)
    found = close_ups.distances(mesh, truth, place, 0)
    for name in ("truth_to_mesh", "mesh_to_truth"):
        assert found[name] == pytest.approx(0.02 / diagonal, rel=0.02)
    far = mesh.copy()
    far.apply_translation((0.0, 0.0, 9.0))
    assert close_ups.distances(far, truth, place, 0)["truth_to_mesh"] is None


def test_close_ups_refuse_a_run_of_another_cloud(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    raw, other = (Cloud(random.normal(size=(300, 3)), "cloud") for _ in range(2))
    config = preset("fast", 1, 0)
    header = {"kind": _surfaces.KIND, "cloud": "cloud", "digest": other.digest}
    (tmp_path / "config.json").write_text(json.dumps({**header, "settings": {}}))
    (tmp_path / "metrics.json").write_text("{}")
    torus().export(tmp_path / "mesh.ply")
    with pytest.raises(InputError, match="expected the cloud of"):
        close_ups.ours(surface_table.scan_of("a", raw, torus()), tmp_path, config, False)
    mesh = close_ups.ours(surface_table.scan_of("b", other, torus()), tmp_path, config, False)
    assert len(mesh.faces) == len(torus().faces)
    with pytest.raises(InputError, match="got other"):  # its own folder, other settings
        close_ups.ours(surface_table.scan_of("b", other, torus()), tmp_path, config, True)


# --- the ablation ----------------------------------------------------------------------------


def test_ablation_pairs_scans_and_seeds(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(scans), "--out", str(tmp_path), "--quick", "--steps", "4"]
    words += ["--variants", "no waves,p = 1"]
    assert surface_ablation.main(words) == 0
    with (tmp_path / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert [(run["variant"], run["seed"]) for run in runs] == [
        (name, seed) for seed in "01" for name in ("ours", "no waves", "p = 1")
    ]
    with (tmp_path / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    distance = {(run["variant"], run["seed"]): float(run["point_to_surface"]) for run in runs}
    assert len(set(distance.values())) == 6
    for row in rows:
        own = [distance[row["variant"], seed] for seed in "01"]
        ours = [distance["ours", seed] for seed in "01"]
        assert float(row["point_to_surface"]) == pytest.approx(sum(own) / 2, rel=1e-4)
        more = [100 * (a / b - 1) for a, b in zip(own, ours, strict=True)]
        assert float(row["further"]) == pytest.approx(sum(more) / 2, rel=1e-3, abs=1e-6)
        assert (row["runs"], row["scans"], row["steps"]) == ("2", "ring", "4")
    assert (tmp_path / "ablation.png").read_bytes()[:4] == b"\x89PNG"

    def never(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(surface_ablation, "measured", never)
    assert surface_ablation.main([*words, "--resume"]) == 0
    capsys.readouterr()
    assert surface_ablation.main([*words, "--variants", "more waves"]) != 0
    assert "variants: expected some of ours, no waves" in capsys.readouterr().err
    assert surface_ablation.main([*words, "--steps", "0"]) != 0
    assert "steps: expected at least 1, got 0" in capsys.readouterr().err
    assert surface_ablation.main([*words, "--scans", "sofa"]) != 0
    assert "scans: expected some of ring, got sofa" in capsys.readouterr().err


def test_every_variant_of_the_ablation_trains() -> None:
    """One step each: the names in VARIANTS are settings, and their values are understood."""
    for name in surface_ablation.VARIANTS:
        config = surface_ablation.config_of(name, 2, 0, True)
        training = surface_ablation.Training(noisy_sphere(0.8, 500), config)
        assert bool(torch.isfinite(training.advance().total))
    assert surface_ablation.config_of("ours", 2, 0, False) == preset("fast", 2)


def test_a_run_without_a_surface_counts_as_torn() -> None:
    run = {"normal_consistency": 0.9, "cpu_seconds": 1.0, "genus": 0, "scan": "ring", "steps": 4}
    runs = [
        {**run, "variant": "ours", "point_to_surface": 1.0, "components": 1},
        {**run, "variant": "p = 1", "point_to_surface": float("nan"), "components": float("nan")},
    ]
    rows = surface_ablation.summary(runs, ["ours", "p = 1"])
    assert [row["torn"] for row in rows] == [0, 1]
    assert not np.isfinite(rows[1]["further"])
