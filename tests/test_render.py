"""Pictures by rays: the camera, what is seen, and the search near a mesh."""

import math

import numpy as np
import problems
import pytest
import torch
import trimesh

from levelset_ext.geometry import Camera, extract_mesh, render

F64 = torch.float64
UNIT = ((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0))


def see_sphere(camera, radius):
    """(height, width) bool: which rays meet a sphere around 0."""
    row, column = (index + 0.5 for index in np.mgrid[: camera.height, : camera.width])
    o, v = camera.rays(column.ravel(), row.ravel())
    near = np.linalg.norm(o - (o * v).sum(1, keepdims=True) * v, axis=1)
    return (near < radius).reshape(row.shape)


def test_camera():
    camera = Camera.look_at((0, 0, 2.0), width=40, height=20, fov=90)
    o, v = camera.rays(np.array([20.0, 20, 0]), np.array([10.0, 0, 10]))
    np.testing.assert_allclose(o, [[0, 0, 2.0]] * 3)
    s = math.sqrt(0.5)
    expected = [[0, 0, -1], [0, s, -s], [-2 / math.sqrt(5), 0, -1 / math.sqrt(5)]]
    np.testing.assert_allclose(v, expected, atol=1e-15)
    flat = Camera.look_at((0, 0, 2.0), width=4, height=4, fov=0, span=3.0)
    o, v = flat.rays(np.array([0.0, 4]), np.array([0.0, 4]))
    np.testing.assert_allclose(o, [[-1.5, 1.5, 2], [1.5, -1.5, 2]])
    np.testing.assert_allclose(v, [[0, 0, -1]] * 2)
    with pytest.raises(ValueError, match=r"^up: expected a direction across the view"):
        Camera.look_at((0, 2.0, 0))
    with pytest.raises(ValueError, match=r"^eye: expected another point than target"):
        Camera.look_at((0, 0, 0))


def test_render():
    camera = Camera.look_at((0, 0, 3.0), width=36, height=24, fov=40)
    sphere = problems.Sphere(0.7).float()
    options = {"background": (1.0, 1.0, 1.0), "color": (0.2, 0.4, 0.8)}
    image = render(sphere, camera, **options)
    assert image.shape == (24, 36, 3)
    assert image.dtype == np.uint8
    assert (image[0, 0] == 255).all()
    assert image[12, 18, 2] > image[12, 18, 0]
    assert image[9, 15].sum() > image[15, 21].sum()  # the light comes from the upper left
    # The outline is averaged: its pixels lie between the ball and the background.
    coarse = render(sphere, camera, supersample=1, **options)
    seen = (coarse != 255).any(2)
    assert np.array_equal(seen, see_sphere(camera, 0.7))
    assert (image != coarse).any(2).sum() > 20
    assert (image[10:14, 16:20] == coarse[10:14, 16:20]).all()
    # Cut open by a box, the inner side shows in its own colour.
    cut = render(
        sphere, camera, bounds=((-1, -1, -1), (1, 1, 0.2)), inner_color=(0.9, 0.1, 0.1), **options
    )
    assert cut[12, 18, 0] > cut[12, 18, 2]
    assert np.array_equal(render(sphere, camera, **options), image)
    with pytest.raises(ValueError, match=r"^supersample: expected an integer >= 1"):
        render(sphere, camera, supersample=0)
    with pytest.raises(ValueError, match=r"^color: expected numbers in \[0, 1\]"):
        render(sphere, camera, color=(2.0, 0, 0))


def test_bounds_may_be_open():
    """Cut by a plane alone it is the picture of a box with this face that holds the rest."""
    camera = Camera.look_at((0.5, 0, 3.0), width=24, height=24, fov=40)
    sphere = problems.Sphere(0.7).float()
    whole = render(sphere, camera, bounds=((-1, -1, -1), (1, 1, 0.2)))
    away = np.inf
    for bounds in (((-away,) * 3, (away, away, 0.2)), (None, (1, 1, 0.2))):
        image = render(sphere, camera, bounds=bounds)
        assert np.abs(image.astype(int) - whole).max() <= 2


def test_dimensions_that_do_not_fit():
    camera = Camera.look_at((0, 0, 3.0), width=4, height=4)
    with pytest.raises(TypeError, match=r"^camera: expected a Camera, got tuple"):
        render(problems.Sphere(), (0, 0, 3.0))
    with pytest.raises(ValueError, match=r"^eye: expected 3 finite numbers"):
        Camera.look_at((0.0, 3.0))
    with pytest.raises(RuntimeError, match=r"x3 and 2x"):
        render(problems.mlp(d=2), camera)
    with pytest.raises(ValueError, match=r"^fn: expected one output"):
        render(problems.Affine(2), camera, bounds=UNIT)
    with pytest.raises(ValueError, match=r"^bounds: expected lower as a scalar or \(3,\), got"):
        render(problems.Sphere(), camera, bounds=((-1, -1), (1, 1)))


# --- near a mesh ----------------------------------------------------------------------------------


def lumps(x):
    """Two balls, one partly before the other, and a ring around them."""
    first = (x - x.new_tensor([0.15, 0.1, 0.3])).norm(dim=1) - 0.3
    second = (x - x.new_tensor([-0.1, -0.1, -0.2])).norm(dim=1) - 0.35
    ring = ((x[:, :2].norm(dim=1) - 0.75) ** 2 + x[:, 2] ** 2).sqrt() - 0.1
    return torch.minimum(torch.minimum(first, second), ring)


@pytest.mark.parametrize("fov", [0, 40])
@pytest.mark.parametrize("supersample", [1, 2])
def test_near_a_mesh_the_same_picture_from_fewer_points(fov, supersample):
    mesh = extract_mesh(lumps, UNIT, 40)
    options = {"width": 64, "height": 48, "fov": fov, "span": 2.0 if fov == 0 else None}
    camera = Camera.look_at((0.6, 0.8, 2.6), **options)
    shared = {"supersample": supersample, "tol": 1e-4}
    whole, near = problems.RowCounter(lumps), problems.RowCounter(lumps)
    plain = render(whole, camera, bounds=UNIT, **shared)
    guided = render(near, camera, guide=mesh, **shared)
    assert np.array_equal(guided, render(lumps, camera, guide=mesh, **shared))
    off = np.abs(plain.astype(int) - guided).max(2)
    assert off.max() <= 3
    assert near.rows < 0.2 * whole.rows


def test_the_network_is_drawn_and_not_its_mesh():
    """The mesh of another sphere, an edge's length away: what F is zero on is drawn."""
    coarse = trimesh.creation.icosphere(subdivisions=2, radius=0.66)
    camera = Camera.look_at((0, 0, 3.0), width=40, height=40, fov=35)
    options = {"supersample": 1, "tol": 1e-6, "background": (1, 1, 1)}
    fn = problems.Sphere(0.7).float()
    exact, drawn = render(fn, camera, **options), render(fn, camera, guide=coarse, **options)
    inner = see_sphere(camera, 0.66)
    assert np.abs(exact[inner].astype(int) - drawn[inner]).max() <= 1
    assert ((drawn != 255).any(2) <= see_sphere(camera, 0.7)).all()


def test_a_mesh_of_nothing_and_one_around_the_eye():
    camera = Camera.look_at((0, 0, 3.0), width=8, height=8)
    empty = trimesh.Trimesh(np.zeros((0, 3)), np.zeros((0, 3), int))
    image = render(problems.Sphere(), camera, guide=empty, background=(1, 1, 1))
    assert (image == 255).all()
    behind = trimesh.creation.icosphere(subdivisions=2, radius=0.7)
    away = Camera.look_at((0, 0, -2.0), (0, 0, -3.0), width=8, height=8, fov=0, span=2.0)
    image = render(problems.Sphere(), away, guide=behind, background=(1, 1, 1))
    assert (image == 255).all()
    inside = Camera.look_at((0, 0, 0.1), (0, 0, -3.0), width=24, height=24, fov=0, span=2.0)
    pictures = [render(problems.Sphere(), inside, guide=mesh) for mesh in (None, behind)]
    assert (pictures[0] == pictures[1]).all(2).mean() > 0.9  # but for the outline
    around = trimesh.creation.icosphere(subdivisions=1, radius=5.0)
    with pytest.raises(ValueError, match=r"^guide: expected a mesh in front of the eye"):
        render(problems.Sphere(), camera, guide=around)
