"""Distances between meshes whose distance is known."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from levelset_ext.geometry.compare import _topology, compare_meshes

FEW = {"samples": 4000, "surface_samples": 4000, "dense_samples": 60_000}
BALL = trimesh.creation.icosphere(subdivisions=4)


def test_same_surface_is_at_the_floor() -> None:
    result = compare_meshes(BALL, BALL, **FEW)
    assert result["two_sided_ratio"] == pytest.approx(1.0, abs=0.03)
    assert result["two_sided_mean"] == pytest.approx(result["resampling_floor"], rel=0.03)
    assert result["point_to_surface"] == pytest.approx(result["point_to_surface_floor"], rel=0.05)
    assert result["normal_consistency"] > 0.99
    assert (result["components"], result["watertight"], result["genus"]) == (1, True, 0)
    assert result["euler_number"] == 2
    assert (result["vertices"], result["faces"]) == (len(BALL.vertices), len(BALL.faces))


def test_plates_a_known_distance_apart() -> None:
    """Two parallel squares: every nearest distance is the gap, up to the sampling."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=float)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    low = trimesh.Trimesh(corners, faces, process=False)
    high = trimesh.Trimesh(corners + np.array([0, 0, 0.5]), faces[:, ::-1], process=False)
    result = compare_meshes(high, low, **FEW)
    diagonal = np.sqrt(2)
    assert result["diagonal"] == pytest.approx(diagonal)
    assert result["chamfer_l2"] == pytest.approx(0.5, rel=1e-3)
    assert 0.5 < result["chamfer_l1"] < 0.52
    assert result["chamfer_l2_relative"] == pytest.approx(result["chamfer_l2"] / diagonal)
    assert result["chamfer_l1_relative"] == pytest.approx(result["chamfer_l1"] / diagonal)
    assert result["two_sided_mean"] == pytest.approx(0.5 / diagonal, rel=1e-3)
    assert result["point_to_surface"] == pytest.approx(0.5 / diagonal, rel=1e-3)
    assert result["hausdorff"] == pytest.approx(0.5 / diagonal, rel=1e-2)
    assert result["normal_consistency"] == pytest.approx(1.0)
    assert result["watertight"] is False
    assert result["genus"] is None


def test_spheres_of_two_radii() -> None:
    bigger = BALL.copy()
    bigger.apply_scale(1.1)
    result = compare_meshes(bigger, BALL, **FEW)
    assert result["point_to_surface"] * result["diagonal"] == pytest.approx(0.1, rel=0.02)
    assert result["hausdorff"] * result["diagonal"] == pytest.approx(0.1, rel=0.1)


def test_missing_half_shows_in_both_measures() -> None:
    half = BALL.submesh([np.flatnonzero(BALL.triangles_center[:, 2] > 0)], append=True)
    result = compare_meshes(half, BALL, **FEW)
    assert result["two_sided_ratio"] > 5
    assert result["hausdorff"] * result["diagonal"] == pytest.approx(np.sqrt(2), rel=0.05)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_units(scale: float) -> None:
    a, b = BALL.copy(), trimesh.creation.icosphere(subdivisions=3)
    plain = compare_meshes(a, b, **FEW)
    a.apply_scale(scale)
    b.apply_scale(scale)
    scaled = compare_meshes(a, b, **FEW)
    assert scaled["chamfer_l2"] == pytest.approx(plain["chamfer_l2"] * scale, rel=1e-6)
    assert scaled["two_sided_mean"] == pytest.approx(plain["two_sided_mean"], rel=1e-6)


def test_topology() -> None:
    torus = trimesh.creation.torus(1.0, 0.3)
    apart = trimesh.util.concatenate([torus, trimesh.creation.box().apply_translation([5, 0, 0])])
    result = compare_meshes(apart, torus, **FEW)
    assert (result["components"], result["euler_number"], result["genus"]) == (2, 2, 1)
    assert result["watertight"] is True
    # A vertex no face uses does not count as a component.
    loose = trimesh.Trimesh(
        np.concatenate([torus.vertices, [[9.0, 9.0, 9.0]]]), torus.faces, process=False
    )
    result = compare_meshes(loose, torus, **FEW)
    assert (result["components"], result["euler_number"], result["genus"]) == (1, 0, 1)


def test_the_genus_is_that_of_the_component_with_most_faces() -> None:
    ring = trimesh.creation.torus(2.0, 0.5)
    drop = trimesh.creation.icosphere(subdivisions=0)
    assert len(drop.faces) < len(ring.faces)
    for parts in ([drop, ring], [ring, drop]):
        both = trimesh.util.concatenate(parts)
        assert _topology(np.asarray(both.faces))["genus"] == 1


def test_seed() -> None:
    other = trimesh.creation.icosphere(subdivisions=3)
    first = compare_meshes(other, BALL, seed=3, **FEW)
    assert first == compare_meshes(other, BALL, seed=3, **FEW)
    assert first["chamfer_l2"] != compare_meshes(other, BALL, seed=4, **FEW)["chamfer_l2"]


def test_degenerate_faces_are_not_sampled() -> None:
    flat = trimesh.Trimesh(
        BALL.vertices, np.concatenate([BALL.faces, [[0, 0, 1]]]), process=False, validate=False
    )
    assert compare_meshes(flat, BALL, **FEW)["two_sided_ratio"] == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(("scale", "shift"), [(1000.0, 0.0), (0.1, 0.0), (1.0, 100.0)])
def test_meshes_in_other_units_are_refused_at_once(scale: float, shift: float) -> None:
    truth = trimesh.creation.icosphere(3)
    mesh = trimesh.Trimesh(truth.vertices * scale + shift, truth.faces)
    with pytest.raises(ValueError, match=r"mesh: expected the size and the place .* same units\?"):
        compare_meshes(mesh, truth)


def test_bad_arguments() -> None:
    empty = trimesh.Trimesh(np.zeros((0, 3)), np.zeros((0, 3), int))
    with pytest.raises(ValueError, match="mesh: expected a mesh with faces"):
        compare_meshes(empty, BALL)
    with pytest.raises(ValueError, match="truth: expected a mesh with area"):
        compare_meshes(BALL, trimesh.Trimesh(np.zeros((3, 3)), [[0, 1, 2]], process=False))
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        compare_meshes(BALL, BALL, samples=0)
