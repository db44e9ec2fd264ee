"""Taking faces off meshes whose lids and pieces are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from levelset_ext.cli import main
from levelset_ext.data.meshes import read_mesh, write_mesh
from levelset_ext.geometry import trim_mesh

BALL = trimesh.creation.icosphere(subdivisions=4)


def bowl_points(height: float = 0.3) -> np.ndarray:
    """Points of the unit sphere below a height."""
    points = trimesh.sample.sample_surface(BALL, 20_000, seed=0)[0]
    return points[points[:, 2] < height]


def two_balls(scale: float = 0.1) -> trimesh.Trimesh:
    small = trimesh.creation.icosphere(subdivisions=2)
    small.apply_scale(scale)
    small.apply_translation([3, 0, 0])
    return trimesh.util.concatenate([small, BALL])


def test_a_lid_goes_and_the_rest_stays() -> None:
    points, distance = bowl_points(), 0.2
    left = trim_mesh(BALL, points, distance)
    # By hand, each vertex to all points.
    gaps = np.linalg.norm(BALL.vertices[:, None] - points[None, ::7], axis=2).min(1)
    assert (gaps[left.index] < distance + 0.15).all()  # a corner of its own may be far
    far = (BALL.vertices[BALL.faces][:, :, 2] > 0.3 + distance).all(1)
    assert left.far == len(BALL.faces) - len(left.faces)
    assert far.sum() <= left.far < far.sum() + 0.1 * len(BALL.faces)
    surface = trimesh.Trimesh(left.vertices, left.faces, process=False)
    assert (surface.is_watertight, surface.body_count) == (False, 1)
    assert surface.euler_number == 1  # a disk
    # The cap of a sphere: area 2 pi (1 + height).
    top = surface.vertices[:, 2].max()
    assert 0.3 < top < 0.3 + distance + 0.07
    assert surface.area == pytest.approx(2 * math.pi * (1 + top), rel=0.05)
    assert np.array_equal(left.vertices, BALL.vertices[left.index])


def test_exact_on_a_strip() -> None:
    """Vertices at x = 0, 1, ..., points at x = 0: a face goes when all its corners are too far."""
    x = np.repeat(np.arange(6.0), 2)
    vertices = np.stack([x, np.tile([0.0, 1.0], 6), np.zeros(12)], 1)
    faces = np.array([[2 * k, 2 * k + 2, 2 * k + 1] for k in range(5)])  # corners at k, k + 1, k
    strip = trimesh.Trimesh(vertices, faces, process=False)
    points = np.array([[0.0, 0, 0], [0, 1, 0]])
    for distance, kept in ((0.5, 1), (1.0, 2), (2.5, 3), (4.0, 5), (math.inf, 5)):
        assert len(trim_mesh(strip, points, distance).faces) == kept, distance
    assert trim_mesh(strip, points, 2.0).index.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert len(trim_mesh(strip, points + 100, 1.0).faces) == 0
    assert trim_mesh(strip).vertices.shape == (11, 3)  # the last vertex has no face


def test_small_pieces_go_by_their_area() -> None:
    both = two_balls()
    share = 0.01 / 1.01
    for smallest, pieces, faces in (
        (0.0, 0, len(both.faces)),
        (0.9 * share, 0, len(both.faces)),
        (1.1 * share, 1, len(BALL.faces)),
        (1.0, 1, len(BALL.faces)),
    ):
        left = trim_mesh(both, smallest=smallest)
        assert (left.pieces, len(left.faces), left.far) == (pieces, faces, 0), smallest
    assert trimesh.Trimesh(left.vertices, left.faces, process=False).is_watertight
    twins = trimesh.util.concatenate([BALL, BALL.copy().apply_translation([3, 0, 0])])
    assert trim_mesh(twins, smallest=1.0).pieces == 1  # the largest stays, whatever its share


def test_vertices_that_are_not_finite() -> None:
    both = two_balls()
    vertices = np.array(both.vertices)
    vertices[3, 1] = math.nan
    broken = trimesh.Trimesh(vertices, both.faces, process=False)
    for given in ({"smallest": 0.001}, {"points": bowl_points(), "distance": 0.1}):
        with pytest.raises(ValueError, match=r"^mesh: expected finite vertices, .* in 1 of 2724"):
            trim_mesh(broken, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"distance": 0.0}, "distance: expected a number > 0, got 0.0"),
        ({"distance": math.nan}, "distance: expected a number > 0, got nan"),
        ({"smallest": 1.5}, r"smallest: expected a share in \[0, 1\], got 1.5"),
        ({"distance": 1.0}, r"points: expected \(n, 3\) with n >= 1 .*, got none"),
        ({"distance": 1.0, "points": np.zeros((4, 2))}, r"points: expected .*got shape \(4, 2\)"),
        ({"distance": 1.0, "points": np.zeros((0, 3))}, r"points: expected .*got shape \(0, 3\)"),
        ({"distance": 1.0, "points": [[0, 0, math.inf]]}, "points: expected finite numbers"),
    ],
)
def test_bad_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        trim_mesh(BALL, **given)


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str, Path]:
    both = two_balls()
    write_mesh(tmp_path / "mesh.ply", both.vertices, both.faces)
    np.save(tmp_path / "scan.npy", bowl_points())
    return str(tmp_path / "mesh.ply"), str(tmp_path / "scan.npy"), tmp_path / "open.ply"


def test_command(files: tuple[str, str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    mesh, scan, out = files
    assert main(["trim", mesh, scan, "--out", str(out), "--distance", "0.05"]) == 0
    told = json.loads(capsys.readouterr().out)
    left = read_mesh(out)
    # A share of the diagonal of the scan's box.
    low, high = bowl_points().min(0), bowl_points().max(0)
    expected = trim_mesh(two_balls(), bowl_points(), 0.05 * float(np.linalg.norm(high - low)))
    assert np.array_equal(left.vertices, expected.vertices)
    assert np.array_equal(left.faces, expected.faces)
    assert told["distance"] == pytest.approx(0.05 * np.linalg.norm(high - low))
    assert (told["faces"], told["far"]) == (len(left.faces), expected.far)

    assert main(["trim", mesh, "--out", str(out), "--smallest", "0.05"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["pieces"], told["far"], told["faces"]) == (1, 0, len(BALL.faces))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MESH"], "distance, smallest: expected one of them or both, got neither"),
        (["MESH", "SCAN", "--smallest", "0.1"], "distance: expected one for the scan"),
        (["MESH", "--distance", "0.1"], "scan: expected one for --distance, got none"),
        (["MESH", "SCAN", "--distance", "0"], "distance: expected a share > 0, got 0.0"),
        (["MESH", "SCAN", "--distance", "nan"], "distance: expected a share > 0, got nan"),
        (["MESH", "SCAN", "--distance", "inf"], "distance: expected a share > 0, got inf"),
        (["MESH", "--smallest", "-1"], "smallest: expected a share in [0, 1], got -1.0"),
        (["MESH", "ONE", "--distance", "0.01"], "expected points in different places, got one"),
        (["MESH", "MISSING", "--distance", "1"], "no such file"),
        (["MISSING", "SCAN", "--distance", "1"], "no such file"),
        (["MESH", "FAR", "--distance", "0.01"], "got none; is it in the same units?"),
    ],
)
def test_bad_commands(
    files: tuple[str, str, Path],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    mesh, scan, out = files
    far = out.parent / "far.npy"
    np.save(far, bowl_points() + 100)
    one = out.parent / "one.npy"
    np.save(one, np.ones((3, 3)))
    names = {"MESH": mesh, "SCAN": scan, "MISSING": str(out.parent / "none.ply")}
    names |= {"FAR": str(far), "ONE": str(one)}
    words = [names.get(word, word) for word in arguments]
    assert main(["trim", *words, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("levelset-ext trim: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_the_folder_is_made(files: tuple[str, str, Path]) -> None:
    mesh, _, out = files
    inner = out.parent / "new" / "inner" / "open.ply"
    assert main(["trim", mesh, "--smallest", "0.001", "--out", str(inner)]) == 0
    assert inner.is_file()
    assert main(["trim", mesh, "--smallest", "0.001", "--out", str(inner / "open.ply")]) == 2


@pytest.mark.parametrize("name", ["open.obj", "open", ".", "scan.ply"])
def test_bad_places_to_write(
    files: tuple[str, str, Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    mesh, _, out = files
    scan = out.parent / "scan.ply"
    trimesh.PointCloud(bowl_points()).export(scan)
    before = scan.read_bytes()
    place = str(out.parent / name)
    assert main(["trim", mesh, str(scan), "--distance", "0.1", "--out", place]) == 2
    error = capsys.readouterr().err
    assert error.startswith("levelset-ext trim: out: expected ")
    assert error.count("\n") == 1
    assert scan.read_bytes() == before
