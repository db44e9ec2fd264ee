"""The curve command: bad input, resumption after a kill, and what a run leaves behind."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from scipy.spatial import cKDTree

from levelset_ext.cli import main
from levelset_ext.data.curves import synthetic_curve
from levelset_ext.data.meshes import read_ply
from levelset_ext.errors import InputError
from levelset_ext.geometry import trace_curve
from levelset_ext.networks import ImplicitMLP
from levelset_ext.recipes import curve as recipe
from levelset_ext.recipes.curve_start import (
    clusters,
    polygon_field,
    short_tour,
    start_polygons,
)
from levelset_ext.recipes.files import write_json

SMALL = replace(
    recipe.curve_preset("fast", steps=60, seed=3),
    width=32,
    start_steps=150,
    projected=64,
    general=32,
    cloud_points=64,
    checkpoint_every=7,
    trace_seeds=200,
    trace_step=0.05,
)


def bent_circle(n: int = 200, seed: int = 0) -> recipe.CurvePoints:
    """Points of a closed curve of space, 6 across, with hardly any noise."""
    random = np.random.default_rng(seed)
    t = random.uniform(0, 2 * np.pi, n)
    x = np.stack([3 * np.cos(t), 3 * np.sin(t), 0.4 * np.cos(2 * t)], 1)
    x += 0.005 * random.standard_normal(x.shape)
    return recipe.CurvePoints(x + np.array([100.0, 0.0, -7.0]), "bent circle")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    recipe.reconstruct_curve(bent_circle(), out, SMALL)
    return out


def bad_inputs(folder: Path) -> dict[str, list[str]]:
    """Arguments after ``curve`` for each kind of bad input, without --out."""
    good = folder / "good.npy"
    cloud = bent_circle().points
    np.save(good, cloud)

    def file(name: str, content: bytes) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    def array(name: str, points: object) -> str:
        np.save(folder / name, np.asarray(points), allow_pickle=True)
        return str(folder / name)

    nan, infinite = cloud.copy(), cloud.copy()
    nan[7, 1], infinite[9, 2] = np.nan, np.inf
    trimesh.PointCloud(cloud).export(folder / "whole.ply")
    ply = (folder / "whole.ply").read_bytes()
    return {
        "missing file": [str(folder / "nothing.ply")],
        "a folder": [str(folder)],
        "text file": [file("text.ply", b"these are words, not points\n")],
        "unknown extension": [file("points.docx", b"1 2 3\n")],
        "empty file": [file("empty.xyz", b"")],
        "too few points": [array("few.npy", cloud[:19])],
        "NaN": [array("nan.npy", nan)],
        "infinity": [array("inf.npy", infinite)],
        "all points equal": [array("equal.npy", np.ones((500, 3)))],
        "four dimensions": [array("four.npy", np.random.default_rng(0).random((50, 4)))],
        "one dimension": [array("one.npy", cloud[:, :1])],
        "huge": [array("huge.npy", cloud * 1e160)],
        "truncated PLY": [file("cut.ply", ply[: len(ply) // 2])],
        "pickled NPY": [array("pickled.npy", np.array([{"a": 1}] * 200, dtype=object))],
        "not a file": ["/dev/null"],
        "unknown preset": [str(good), "--preset", "finest"],
        "device not there": [str(good), "--device", "cuda:97"],
        "no steps": [str(good), "--steps", "0"],
        "negative seed": [str(good), "--seed", "-1"],
        "huge seed": [str(good), "--seed", str(10**23)],
        "steps no number": [str(good), "--steps", "many"],
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
    "too few points",
    "NaN",
    "infinity",
    "all points equal",
    "four dimensions",
    "one dimension",
    "huge",
    "truncated PLY",
    "pickled NPY",
    "not a file",
    "unknown preset",
    "device not there",
    "no steps",
    "negative seed",
    "huge seed",
    "steps no number",
)


def test_every_kind_is_listed(bad: dict[str, list[str]]) -> None:
    assert set(bad) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_one_line_and_status_2(
    kind: str, bad: dict[str, list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    try:
        status = main(["curve", *bad[kind], "--out", str(out)])
    except SystemExit as stop:  # argparse
        status = stop.code
    captured = capfd.readouterr()
    assert status == 2
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    assert "Traceback" not in captured.err
    assert not out.exists()


def read_curve(path: Path) -> tuple[np.ndarray, np.ndarray]:
    elements = read_ply(path)
    vertex, edge = elements["vertex"], elements["edge"]
    vertices = np.stack([np.asarray(vertex[axis]) for axis in "xyz"], 1)
    return vertices, np.stack([np.asarray(edge[name]) for name in ("vertex1", "vertex2")], 1)


def test_a_run_leaves_whole_files_in_input_units(whole_run: Path) -> None:
    names = {path.name for path in whole_run.iterdir()}
    assert names - {"history.png"} == {  # which needs matplotlib
        "history.csv",
        "curve.ply", "metrics.json", "preview.png", "checkpoint.pt", "config.json"
    }  # fmt: skip
    metrics = json.loads((whole_run / "metrics.json").read_text())
    assert (metrics["components"], metrics["closed"]) == (1, True)
    assert metrics["steps"] == SMALL.steps
    assert metrics["cloud_to_curve"] < 0.3
    assert metrics["residual"] < 1e-6
    vertices, edges = read_curve(whole_run / "curve.ply")
    assert len(vertices) == metrics["vertices"]
    # In order, and closed: every vertex is joined to the next, the last to the first.
    count = np.arange(len(vertices))
    assert (edges == np.stack([count, np.roll(count, -1)], 1)).all()
    lengths = np.linalg.norm(vertices[edges[:, 1]] - vertices[edges[:, 0]], axis=1)
    assert lengths.sum() == pytest.approx(metrics["length"], rel=1e-9)
    assert lengths.max() <= metrics["length"] / 1000
    assert np.abs(vertices.mean(0) - [100, 0, -7]).max() < 0.5
    assert np.ptp(vertices, axis=0)[:2] == pytest.approx([6, 6], abs=0.8)
    with Image.open(whole_run / "preview.png") as picture:
        assert picture.size[0] > 400


def test_same_seed_same_curve_and_finished_runs_stay(whole_run: Path, tmp_path: Path) -> None:
    recipe.reconstruct_curve(bent_circle(), tmp_path, SMALL)
    for name in ("curve.ply", "preview.png"):
        assert (tmp_path / name).read_bytes() == (whole_run / name).read_bytes()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    recipe.reconstruct_curve(bent_circle(), tmp_path, SMALL, resume=True)
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert before == after


def test_resume_refuses_another_run(whole_run: Path) -> None:
    with pytest.raises(InputError, match="other seed"):
        recipe.reconstruct_curve(bent_circle(), whole_run, replace(SMALL, seed=4), resume=True)
    with pytest.raises(InputError, match="got one of"):
        recipe.reconstruct_curve(bent_circle(seed=1), whole_run, SMALL, resume=True)


def test_points_of_the_plane(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    t = random.uniform(0, 2 * np.pi, 250)
    r = 2 + 0.6 * np.cos(5 * t)  # a flower, which is not convex
    flower = np.stack([5 + r * np.cos(t), r * np.sin(t)], 1)
    np.savetxt(tmp_path / "plane.xyz", flower + 0.01 * random.standard_normal(flower.shape))
    cloud = recipe.load_curve_points(str(tmp_path / "plane.xyz"), 0)
    metrics = recipe.reconstruct_curve(
        cloud, tmp_path / "out", replace(SMALL, steps=60, start_steps=400)
    )
    assert metrics["dimension"] == 2
    assert (metrics["components"], metrics["closed"]) == (1, True)
    assert metrics["cloud_to_curve"] < 0.05
    vertices, _ = read_curve(tmp_path / "out" / "curve.ply")
    assert (vertices[:, 2] == 0).all()
    x = vertices[:, :2] - [5, 0]
    angle = np.arctan2(x[:, 1], x[:, 0])
    assert np.abs(np.linalg.norm(x, axis=1) - 2 - 0.6 * np.cos(5 * angle)).max() < 0.3


def linked_circles(noise: float = 0.01, n: int = 300) -> np.ndarray:
    """Two circles of radius 1, each through the other's centre."""
    random = np.random.default_rng(2)
    s, t = random.uniform(0, 2 * np.pi, (2, n // 2))
    one = np.stack([np.cos(s), np.sin(s), 0 * s], 1)
    two = np.stack([1 + np.cos(t), 0 * t, np.sin(t)], 1)
    both = np.concatenate([one, two])
    return both + noise * random.standard_normal(both.shape)


def test_linked_circles_stay_two(tmp_path: Path) -> None:
    config = replace(SMALL, steps=40, start_steps=400)
    cloud = recipe.CurvePoints(linked_circles(), "linked circles")
    metrics = recipe.reconstruct_curve(cloud, tmp_path, config)
    assert (metrics["components"], metrics["closed"]) == (2, True)
    assert metrics["cloud_to_curve"] < 0.04
    for curve in metrics["curves"]:
        assert curve["nearest_for"] == 150
        assert curve["length"] == pytest.approx(2 * np.pi, rel=0.05)
        assert curve["longest_edge"] <= curve["length"] / 1000
    vertices, edges = read_curve(tmp_path / "curve.ply")
    loops = trimesh.graph.connected_components(edges, min_len=1)
    assert sorted(map(len, loops)) == sorted(curve["vertices"] for curve in metrics["curves"])
    # They are linked: one goes through the other's disc once, whichever is which.
    ring = vertices[np.sort(loops[0])]
    other = vertices[np.sort(loops[1])]
    field = polygon_field(other[::5], [ring[::5]])
    phase = np.unwrap(np.arctan2(field[:, 1], field[:, 0]))
    closing = np.angle(np.exp(1j * (phase[0] - phase[-1])))
    assert abs(phase[-1] - phase[0] + closing) == pytest.approx(2 * np.pi, abs=1e-6)


def test_a_network_of_too_many_outputs_has_no_curve() -> None:
    with pytest.raises(ValueError, match="expected l = d - 1 = 2 outputs"):
        trace_curve(ImplicitMLP(3, 3, 8, 2), torch.rand(5, 3), box=(-1, 1))


def test_presets_stretch_and_survive_their_config_file(tmp_path: Path) -> None:
    for name in recipe.CURVE_PRESETS:
        config = recipe.curve_preset(name)
        assert config.min_slope == 0  # of l = 1 only
        write_json(tmp_path / "config.json", asdict(config))
        text = (tmp_path / "config.json").read_text()
        assert "Infinity" not in text
        assert "NaN" not in text
    paper = recipe.curve_preset("paper")
    assert (paper.width, paper.hidden_layers, paper.activation) == (512, 3, "relu")
    assert paper.general == 0  # T = {0}
    assert (paper.newton_iters, paper.projected_noise) == (10, ((0.1, 1.0),))
    assert recipe.curve_preset("paper", steps=500).halve_at == (50, 150, 350)
    training = recipe.CurveTraining(torch.rand(30, 3), replace(SMALL, start="random"))
    projected, general, _ = training.samples()
    assert projected[0].values.shape == (64, 2)
    assert general.values.shape == (32, 2)
    assert bool(torch.isfinite(training.advance().total))
    assert training.skipped_steps == 0


def loop_edges(n: int) -> np.ndarray:
    return np.stack([np.arange(n), np.roll(np.arange(n), -1)], 1)


def test_the_start_is_a_closed_curve_near_the_points() -> None:
    made = synthetic_curve(seed=2)
    cloud = torch.from_numpy(made.points / 2).float()
    config = replace(SMALL, start_steps=400, width=64, steps=900)
    training = recipe.CurveTraining(cloud, config)
    training.advance()
    (curve,) = recipe.trace_network(training, config)
    assert curve.closed
    away = recipe.distance_to_line(cloud.numpy(), curve.vertices, curve.edges)
    assert away.mean() < 0.06
    assert away.max() < 0.2
    # One turn round: it goes along the true curve, and only forwards or only backwards.
    at = cKDTree(made.truth / 2).query(curve.resample(0.05).vertices)[1]
    turn = np.diff(np.append(at, at[0]))
    turn = (turn + 10_000) % 20_000 - 10_000
    assert abs(turn.sum()) == 20_000


def test_field_of_a_circle() -> None:
    t = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    circle = np.stack([np.cos(t), np.sin(t), 0 * t], 1)
    z = np.array([-3.0, -0.5, 0.2, 1.7])
    field = polygon_field(np.stack([0 * z, 0 * z, z], 1), [circle])
    assert np.linalg.norm(field, axis=1) == pytest.approx(np.sqrt(1 + z * z), rel=1e-5)
    # Half the solid angle of a disc seen from its axis, up to whole turns and the side.
    half = np.sign(z) * np.pi * (1 - np.abs(z) / np.sqrt(1 + z * z))
    phase = np.arctan2(field[:, 1], field[:, 0])
    off = min((np.angle(np.exp(1j * (phase - s * half))) for s in (1, -1)), key=lambda x: x @ x)
    assert off == pytest.approx(0, abs=1e-5)


def winding(loop: np.ndarray, polygons: list[np.ndarray]) -> int:
    field = polygon_field(loop, polygons)
    phase = np.arctan2(field[:, 1], field[:, 0])
    turns = np.angle(np.exp(1j * np.diff(phase, append=phase[:1]))).sum() / (2 * np.pi)
    assert turns == pytest.approx(round(turns), abs=1e-6)
    return abs(round(turns))


def test_phase_turns_once_round_every_edge_of_a_polygon() -> None:
    # Knotted, so its fan of triangles cuts through itself.
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    knot = np.stack(
        [
            (2 + np.cos(3 * t)) * np.cos(2 * t),
            (2 + np.cos(3 * t)) * np.sin(2 * t),
            np.sin(3 * t),
        ],
        1,
    )
    s = np.linspace(0, 2 * np.pi, 400, endpoint=False)[:, None]
    for a, b in zip(knot, np.roll(knot, -1, 0), strict=True):
        _, u, v = np.linalg.svd((b - a)[None])[2]
        assert winding((a + b) / 2 + 0.05 * (np.cos(s) * u + np.sin(s) * v), [knot]) == 1
    far = np.array([9.0, 0, 0]) + np.concatenate([np.cos(s), np.sin(s), 0 * s], 1)
    assert winding(far, [knot]) == 0
    x = np.random.default_rng(0).normal(0, 2, (500, 3))
    away = recipe.distance_to_line(x, *_dense(knot))
    assert np.linalg.norm(polygon_field(x, [knot]), axis=1) == pytest.approx(away, abs=1e-3)


def _dense(polygon: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    share = np.linspace(0, 1, 200, endpoint=False)[:, None, None]
    fine = polygon + share * (np.roll(polygon, -1, 0) - polygon)
    fine = fine.transpose(1, 0, 2).reshape(-1, polygon.shape[1])
    return fine, loop_edges(len(fine))


def test_field_in_the_plane_is_signed() -> None:
    square = np.array([[0.0, 0], [2, 0], [2, 2], [0, 2]])
    hole = 0.75 + square / 4
    x = np.array([[1.0, 1.0], [0.5, 1.0], [3.0, 1.0], [-1.0, -1.0], [1.9, 0.3]])
    found = polygon_field(x, [square, hole])[:, 0]
    assert found == pytest.approx([0.25, -0.25, 1.0, np.sqrt(2), -0.1])


def test_tours_and_clusters() -> None:
    random = np.random.default_rng(0)
    t = np.arange(40) * 2 * np.pi / 40
    ring = np.stack([np.cos(t), np.sin(t), 0.3 * np.sin(2 * t)], 1)
    tour = short_tour(ring[random.permutation(40)])
    length = np.linalg.norm(np.roll(tour, -1, 0) - tour, axis=1).sum()
    assert length == pytest.approx(np.linalg.norm(np.roll(ring, -1, 0) - ring, axis=1).sum())
    assert [len(part) for part in clusters(linked_circles())] == [150, 150]
    stray = np.concatenate([linked_circles(), [[40.0, 0, 0]]])
    assert [len(part) for part in clusters(stray)] == [150, 150]
    assert len(start_polygons(linked_circles())) == 2
    # Two arcs of one circle with two holes: one curve. An arc alone: closed by one edge.
    u = np.concatenate([np.linspace(0.5, 2.6, 90), np.linspace(3.6, 5.8, 90)])
    arcs = np.stack([np.cos(u), np.sin(u), 0 * u], 1)
    assert len(clusters(arcs)) == 2
    for part in (arcs, arcs[:90]):
        (polygon,) = start_polygons(part)
        turn = np.diff(np.unwrap(np.arctan2(polygon[:, 1], polygon[:, 0])))
        assert (np.sign(turn) == np.sign(turn[0])).sum() >= len(turn) - 1
    # Few points, doubled ones, and all on a line.
    line = np.repeat(np.linspace(0, 1, 10), 3)[:, None] * np.ones(3)
    assert np.isfinite(np.concatenate(start_polygons(line))).all()
    assert np.isfinite(polygon_field(line, start_polygons(line))).all()


def test_the_synthetic_points() -> None:
    made = synthetic_curve(seed=1)
    again = synthetic_curve(seed=1)
    assert (made.points == again.points).all()
    assert (synthetic_curve(seed=2).points != made.points).any()
    assert made.points.shape == (300, 3)
    loop = loop_edges(len(made.truth))
    away = recipe.distance_to_line(made.points, made.truth, loop)
    # Two of three coordinates of the noise are across the curve: sigma sqrt(pi / 2) on average.
    assert away.mean() == pytest.approx(0.01 * np.sqrt(np.pi / 2), rel=0.1)
    exact = synthetic_curve(seed=1, noise=0.0).points
    gaps = np.sort(np.linalg.norm(exact[:, None] - exact[None], axis=2), 1)[:, 1]
    assert gaps.max() < 3.1 * gaps.min()  # farthest points are evenly spread
    part = synthetic_curve(seed=1, missing=0.25)
    assert (part.truth == made.truth).all()
    nearest = cKDTree(part.truth).query(part.points)[1]
    assert nearest.min() >= part.missing - 100
    assert part.missing == 5000
    with pytest.raises(ValueError, match="missing < 1"):
        synthetic_curve(missing=1.0)


def test_against_truth_leaves_out_what_was_missing() -> None:
    t = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    circle = np.stack([np.cos(t), np.sin(t)], 1)
    half = (circle[200:] * 1.1, np.stack([np.arange(199), np.arange(1, 200)], 1))
    found = recipe.against_truth([half], circle, missing=200)
    assert found["length"] == pytest.approx(2 * np.pi, rel=1e-3)
    assert found["curve_to_truth"] == pytest.approx(0.1, rel=1e-3)
    assert found["truth_to_curve"] == pytest.approx(0.1, rel=0.01)
    assert found["hausdorff"] == pytest.approx(np.sqrt(1 + 1.1**2), rel=0.01)
    assert recipe.against_truth([half], circle)["truth_to_curve"] > 0.3


def test_distance_to_a_line_is_to_its_edges() -> None:
    line = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    edges = np.array([[0, 1], [1, 2]])
    points = np.array([[0.5, 0.2], [-3.0, 4.0], [1.25, 0.5], [1.0, 1.0]])
    assert recipe.distance_to_line(points, line, edges) == pytest.approx([0.2, 5.0, 0.25, 0.0])
