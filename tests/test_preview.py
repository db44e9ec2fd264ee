"""The picture: right size, same bytes, the shape where it should be and nothing missing inside."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import torch
import trimesh
from PIL import Image

from levelset_ext.geometry.preview import PANEL, render_preview

BALL = trimesh.creation.icosphere(subdivisions=4)
EMPTY = trimesh.Trimesh(np.zeros((0, 3)), np.zeros((0, 3), int))


def panels(path: Path) -> list[np.ndarray]:
    """Upper left, upper right, lower left, lower right, as floats."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(float)
    assert picture.shape == (2 * PANEL, 2 * PANEL, 3)
    upper, lower = picture[:PANEL], picture[PANEL:]
    return [upper[:, :PANEL], upper[:, PANEL:], lower[:, :PANEL], lower[:, PANEL:]]


def drawn(panel: np.ndarray) -> np.ndarray:
    """Pixels that are clearly not background; the caption's strip is left out."""
    mask = panel[..., 2] - panel[..., 0] > 12
    mask[:40] = False
    return mask


@pytest.fixture(scope="module")
def ball_png(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ball") / "preview.png"
    render_preview(path, np.asarray(BALL.vertices), BALL)
    return path


def test_ball(ball_png: Path) -> None:
    row, column = np.mgrid[:PANEL, :PANEL] + 0.5
    distance = np.hypot(row - PANEL / 2, column - PANEL / 2)
    for number, panel in enumerate(panels(ball_png)):
        mask = drawn(panel)
        rows, columns = np.nonzero(mask)
        assert abs(rows.mean() - PANEL / 2) < 6
        assert abs(columns.mean() - PANEL / 2) < 6
        if number % 2:  # the solid: a full disc, its shading smooth, no speckle inside
            radius = np.sqrt(mask.sum() / np.pi)
            assert radius == pytest.approx(0.84 * PANEL / 2, rel=0.03)
            inner = distance < radius - 6
            assert mask[inner].all()
            rough = np.abs(panel - scipy.ndimage.median_filter(panel, size=(3, 3, 1)))
            assert rough[inner].max() < 8
            assert panel[inner].std() > 10
    assert [p.name for p in ball_png.parent.iterdir()] == ["preview.png"]


def test_same_bytes_and_units_do_not_show(ball_png: Path, tmp_path: Path) -> None:
    again, third = tmp_path / "again.png", tmp_path / "moved.png"
    render_preview(again, np.asarray(BALL.vertices), BALL)
    assert again.read_bytes() == ball_png.read_bytes()
    moved = BALL.copy()
    moved.apply_scale(1e-3)
    moved.apply_translation([5, -7, 100])
    render_preview(third, np.asarray(moved.vertices), moved)
    for a, b in zip(panels(ball_png), panels(third), strict=True):
        assert np.abs(a - b).mean() < 1


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 50])
def test_little_to_draw(tmp_path: Path, count: int) -> None:
    path = tmp_path / "preview.png"
    render_preview(path, np.random.default_rng(0).standard_normal((count, 3)), EMPTY)
    assert not drawn(panels(path)[1]).any()
    assert drawn(panels(path)[0]).any() == (count > 0)


@pytest.mark.filterwarnings("ignore:(overflow|invalid):RuntimeWarning")
def test_one_point_far_out_and_points_without_extent(tmp_path: Path) -> None:
    path = tmp_path / "preview.png"
    far = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False)
    for cloud in (np.full((1, 3), 1e305), np.zeros((6, 3)), np.full((6, 3), 1e-310)):
        render_preview(path, cloud, far, lambda x: x[:, 2])
        assert drawn(panels(path)[0]).any()


def test_large_triangles_and_vertices_off_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "preview.png"
    corner = 50.0 * np.array([[-1, -1, 0.0], [1, -1, 0], [0, 1.5, 0]])
    wall = trimesh.Trimesh(corner, [[0, 1, 2]], process=False)
    cloud = np.random.default_rng(0).standard_normal((100, 3))
    render_preview(path, cloud, wall)
    assert drawn(panels(path)[1])[60:-60, 60:-60].all()


def test_many_triangles(tmp_path: Path) -> None:
    torus = trimesh.creation.torus(1.0, 0.4, major_sections=500, minor_sections=300)
    assert len(torus.faces) == 300_000
    render_preview(tmp_path / "preview.png", np.asarray(torus.vertices), torus)
    assert (tmp_path / "preview.png").stat().st_size > 10_000


def test_rays_draw_the_field_and_not_the_mesh(ball_png: Path, tmp_path: Path) -> None:
    """The right side is the level set: a coarse mesh of it gives a round, smooth ball."""
    evaluated: list[int] = []

    def ball(x: torch.Tensor) -> torch.Tensor:
        evaluated.append(len(x))
        return x.norm(dim=1) - 1

    coarse = trimesh.creation.icosphere(subdivisions=3)
    cloud = np.asarray(BALL.vertices)
    path, again = tmp_path / "rays.png", tmp_path / "again.png"
    render_preview(path, cloud, coarse, ball)
    assert sum(evaluated) < 12 * 2 * PANEL**2  # points, of 128 a ray without the mesh
    render_preview(again, cloud, coarse, ball)
    assert again.read_bytes() == path.read_bytes()
    by_mesh, by_rays = panels(ball_png), panels(path)
    for number in (0, 2):
        assert np.array_equal(by_mesh[number][40:], by_rays[number][40:])
    row, column = np.mgrid[:PANEL, :PANEL] + 0.5
    distance = np.hypot(row - PANEL / 2, column - PANEL / 2)
    radius = 0.84 * PANEL / 2
    for number in (1, 3):
        # 20 480 triangles are close enough to a ball to be compared with it.
        difference = np.abs(by_rays[number] - by_mesh[number])[40:].max(2)
        assert difference[distance[40:] < radius - 3].max() < 6
        assert difference[distance[40:] > radius + 1].max() <= 1
        mask = drawn(by_rays[number])
        assert mask[distance < radius - 2].all()


def test_a_field_without_a_mesh_is_not_drawn(tmp_path: Path) -> None:
    render_preview(tmp_path / "a.png", np.asarray(BALL.vertices), EMPTY, lambda x: x.sum(1))
    assert not drawn(panels(tmp_path / "a.png")[1]).any()


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cloud: expected \(n, 3\), got \(5, 2\)"):
        render_preview(tmp_path / "a.png", np.zeros((5, 2)), BALL)
    with pytest.raises(ValueError, match="cloud: expected finite positions, got NaN or infinity"):
        render_preview(tmp_path / "a.png", np.full((5, 3), np.nan), BALL)
    outside = SimpleNamespace(vertices=np.eye(3), faces=np.array([[0, 1, 3]]))
    with pytest.raises(ValueError, match=r"mesh: faces: expected indices below 3, .* got 0 to 3"):
        render_preview(tmp_path / "a.png", np.eye(3), outside)
    lost = SimpleNamespace(vertices=np.full((3, 3), np.inf), faces=np.array([[0, 1, 2]]))
    with pytest.raises(ValueError, match="mesh: expected finite positions"):
        render_preview(tmp_path / "a.png", np.eye(3), lost)
    with pytest.raises(FileNotFoundError):
        render_preview(tmp_path / "no" / "a.png", np.zeros((0, 3)), EMPTY)
    assert not list(tmp_path.iterdir())
