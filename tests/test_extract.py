"""Meshes of level sets whose shape is known."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
import trimesh

from levelset_ext.geometry.extract import Mesh, _case_table, _for_the_grid, extract_mesh
from levelset_ext.networks import MLP, ImplicitMLP

Field = Callable[[torch.Tensor], torch.Tensor]
BOX = ((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0))


def sphere(x: torch.Tensor, radius: float = 0.6) -> torch.Tensor:
    return x.norm(dim=1) - radius


def torus(x: torch.Tensor) -> torch.Tensor:
    ring = (x[:, 0] ** 2 + x[:, 1] ** 2).sqrt() - 0.5
    return (ring**2 + x[:, 2] ** 2).sqrt() - 0.2


def spheres(x: torch.Tensor) -> torch.Tensor:
    """A large one and one about two cells of a 128 grid across."""
    return torch.minimum((x - 0.3).norm(dim=1) - 0.4, (x + 0.613).norm(dim=1) - 0.017)


def sheet(x: torch.Tensor) -> torch.Tensor:
    """A plate 1/64 thick: at resolution 128 one cell, on the coarsest lattice half of one."""
    flat = (x[:, 2] - 0.0137).abs() - 1 / 128
    return torch.maximum(flat, x[:, :2].abs().amax(1) - 0.7)


def implicit() -> ImplicitMLP:
    net = ImplicitMLP(3, 1, 16, 2, activation="softplus", beta=100.0)
    return net.init_sphere_(0.6, torch.Generator().manual_seed(0))


class Net(torch.nn.Module):
    """A torus plus a small random wobble, with a mode and buffers that must not change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wobble = torch.nn.Sequential(
            torch.nn.Linear(3, 64),
            torch.nn.BatchNorm1d(64),
            torch.nn.Softplus(beta=100),
            torch.nn.Linear(64, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torus(x)[:, None] + 0.02 * self.wobble(x)


def as_trimesh(mesh: Mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


def check(mesh: Mesh, pieces: int = 1, euler: int = 2) -> trimesh.Trimesh:
    """Closed, consistently wound, outward, on the surface, no vertex unused or doubled."""
    solid = as_trimesh(mesh)
    assert solid.is_watertight
    assert solid.is_winding_consistent
    assert solid.volume > 0
    assert (solid.body_count, solid.euler_number) == (pieces, euler)
    assert len(np.unique(mesh.faces)) == len(mesh.vertices)
    assert len(np.unique(mesh.vertices, axis=0)) == len(mesh.vertices)
    assert np.allclose(np.linalg.norm(mesh.normals, axis=1), 1)
    assert mesh.vertices.dtype == np.float64
    assert mesh.faces.dtype == np.int64
    assert mesh.unrefined == 0
    assert mesh.residual <= mesh.tolerance
    return solid


@pytest.mark.parametrize("resolution", [2, 9, 50, 100, 128])
def test_sphere(resolution: int) -> None:
    mesh = extract_mesh(sphere, BOX, resolution=resolution)
    solid = check(mesh)
    radius = np.linalg.norm(mesh.vertices, axis=1)
    assert np.abs(radius - 0.6).max() <= mesh.tolerance
    assert np.allclose(mesh.normals, mesh.vertices / radius[:, None], atol=1e-6)
    assert ((solid.face_normals * mesh.normals[mesh.faces].mean(1)).sum(1) > 0).all()
    if resolution >= 50:
        assert solid.volume == pytest.approx(4 / 3 * np.pi * 0.6**3, rel=4e-3)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_torus_at_any_scale(scale: float) -> None:
    mesh = extract_mesh(lambda x: scale * torus(x), BOX, resolution=128)
    solid = check(mesh, euler=0)
    assert solid.volume == pytest.approx(2 * np.pi**2 * 0.5 * 0.2**2, rel=4e-3)
    assert mesh.bracketed == 0
    diagonal = np.linalg.norm(np.ptp(mesh.vertices, axis=0))
    assert mesh.tolerance == pytest.approx(1e-6 * diagonal * scale, rel=1e-3)
    exact = torus(torch.from_numpy(mesh.vertices)).abs().max()
    assert float(exact) <= 1e-6 * diagonal


def test_level_and_long_box() -> None:
    box = ((-0.9, -0.4, -0.6), (0.9, 0.55, 0.6))
    mesh = extract_mesh(sphere, box, resolution=90, level=-0.25)
    check(mesh)
    assert np.allclose(np.linalg.norm(mesh.vertices, axis=1), 0.35, atol=1e-6)
    assert mesh.cell == pytest.approx(1.8 / 90)


def test_small_parts_are_found() -> None:
    check(extract_mesh(spheres, BOX, resolution=128), pieces=2, euler=4)
    plate = check(extract_mesh(sheet, BOX, resolution=128))
    assert plate.volume == pytest.approx(1.4 * 1.4 / 64, rel=0.05)


@pytest.mark.parametrize("radius", [0.009, 0.012, 0.02])
def test_small_ball_of_a_field_that_is_no_distance(radius: float) -> None:
    """Squared distance: flat near the ball, far from it forty times as steep."""
    center = torch.tensor([0.31, -0.52, 0.17])

    def fn(x: torch.Tensor) -> torch.Tensor:
        return ((x - center.to(x)) ** 2).sum(1) - radius**2

    check(extract_mesh(fn, BOX, resolution=256))


def test_growth_completes_what_the_search_saw_in_part() -> None:
    """A tube the coarse lattice cannot see (its wall is a step) hangs on a ball that it can."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        axis = (x[:, 1] - 1 / 64) ** 2 + (x[:, 2] - 1 / 64) ** 2
        tube = torch.tanh(300 * (axis.sqrt() - 0.018)) + 2 * (x[:, 0].abs() - 0.95).clamp(min=0)
        return torch.minimum((x + 0.5).norm(dim=1) - 0.2, tube)

    def joined(x: torch.Tensor) -> torch.Tensor:
        ball = torch.tanh(300 * ((x - torch.tensor([0.5, 0.0, 0.0]).to(x)).norm(dim=1) - 0.2))
        return torch.minimum(fn(x), ball)

    solid = as_trimesh(extract_mesh(joined, BOX, resolution=256, refine=False))
    tube = max(solid.split(only_watertight=False), key=lambda part: part.extents[0])
    assert tube.extents[0] > 1.9
    edges = np.sort(tube.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    _, count = np.unique(edges, axis=0, return_counts=True)
    border = np.unique(edges, axis=0)[count == 1]
    assert (np.abs(tube.vertices[border][..., 0]) > 0.9).all()


def test_plane_ends_at_the_bounds() -> None:
    mesh = extract_mesh(lambda x: x[:, 0] + 0.3 * x[:, 1] - 0.1, BOX, resolution=64)
    solid = as_trimesh(mesh)
    assert not solid.is_watertight
    assert solid.is_winding_consistent
    assert (solid.body_count, solid.euler_number) == (1, 1)
    assert solid.area == pytest.approx(4 * np.sqrt(1.09), rel=1e-2)
    assert np.allclose(mesh.normals, np.array([1, 0.3, 0]) / np.sqrt(1.09))
    edges = np.sort(mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    unique, count = np.unique(edges, axis=0, return_counts=True)
    border = mesh.vertices[np.unique(unique[count == 1])]
    assert (np.abs(border[:, 1:]).max(1) > 1 - mesh.cell).all()


@pytest.mark.parametrize("seed", range(3))
def test_every_case_closes(seed: int) -> None:
    """Random signs meet all 256 cases and every pair of neighbours; a border holds them in."""
    noise = torch.randn(24, 24, 24, generator=torch.Generator().manual_seed(seed))
    noise = torch.nn.functional.pad(noise, [1] * 6, value=1.0)

    def fn(x: torch.Tensor) -> torch.Tensor:
        grid = torch.nn.functional.grid_sample(
            noise.to(x)[None, None], x[None, None, None], align_corners=True
        )
        return grid.reshape(-1)

    mesh = extract_mesh(fn, BOX, resolution=25)
    edges = mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    _, count = np.unique(np.sort(edges, axis=1), axis=0, return_counts=True)
    assert (count == 2).all()
    assert len(np.unique(edges, axis=0)) == len(edges)  # each edge once in each direction
    assert mesh.residual <= mesh.tolerance


def test_case_table() -> None:
    table, counts, edges = _case_table()
    assert table.shape == (256, 5, 3)
    assert (counts[0], counts[255], counts[1]) == (0, 0, 1)
    corner_sets = [frozenset((int(c), int(c) | 1 << int(a))) for c, a in edges]
    for case in range(256):
        inside = {c for c in range(8) if case >> c & 1}
        cut = {e for e, ends in enumerate(corner_sets) if len(ends & inside) == 1}
        assert set(table[case][table[case] >= 0]) == cut


def test_no_surface() -> None:
    mesh = extract_mesh(lambda x: x.norm(dim=1) + 1, BOX, resolution=32)
    assert mesh.empty
    assert mesh.vertices.shape == mesh.faces.shape == mesh.normals.shape == (0, 3)
    assert mesh.evaluations > 0


def test_without_refinement() -> None:
    rough = extract_mesh(torus, BOX, resolution=96, refine=False)
    fine = extract_mesh(torus, BOX, resolution=96)
    assert np.array_equal(rough.faces, fine.faces)
    assert rough.residual > rough.tolerance
    assert rough.unrefined > 0
    assert np.linalg.norm(rough.vertices - fine.vertices, axis=1).max() < rough.cell


def test_module_is_left_alone() -> None:
    net = Net()
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mesh = extract_mesh(net, BOX, resolution=96)
    check(mesh, euler=0)
    assert net.training
    assert all(p.grad is None and p.dtype == torch.float32 for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with torch.no_grad():
        exact = Net().eval().double()
        exact.load_state_dict(net.state_dict())
        value = exact(torch.from_numpy(mesh.vertices)).abs().max()
    assert float(value) <= mesh.tolerance


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_module_that_keeps_a_graph() -> None:
    """Weight normalisation of the older kind leaves a weight with its graph on the layer."""
    torch.manual_seed(0)
    layer = torch.nn.utils.weight_norm(torch.nn.Linear(3, 16))
    net = torch.nn.Sequential(layer, torch.nn.Tanh(), torch.nn.Linear(16, 1))
    net(torch.zeros(1, 3)).sum().backward()
    assert layer.weight.grad_fn is not None
    mesh = extract_mesh(net, BOX, resolution=32, level=net(torch.zeros(1, 3)).item())
    assert not mesh.empty
    assert mesh.residual <= mesh.tolerance


def test_deterministic_and_independent_of_the_batch() -> None:
    first, second = (extract_mesh(torus, BOX, resolution=44) for _ in range(2))
    other = extract_mesh(torus, BOX, resolution=44, batch=999)
    for field in ("vertices", "faces", "normals"):
        assert getattr(first, field).tobytes() == getattr(second, field).tobytes()
    assert np.array_equal(first.faces, other.faces)
    assert np.allclose(first.vertices, other.vertices, atol=1e-9)


def test_kinks_and_steps_fall_back_to_the_edge() -> None:
    """Newton jumps about on a cube's edges and on a step; every vertex stays in its own cell."""
    cube = extract_mesh(lambda x: x.abs().amax(1) - 0.513, BOX, resolution=64)
    assert check(cube).volume == pytest.approx((2 * 0.513) ** 3, rel=2e-2)

    def jump(x: torch.Tensor) -> torch.Tensor:
        return torch.where(sphere(x) < 0, -1.0, 1.0) + 0 * x.sum(1)

    step = extract_mesh(jump, BOX, resolution=32)
    assert as_trimesh(step).is_watertight
    assert step.unrefined == len(step.vertices)
    assert (np.abs(np.linalg.norm(step.vertices, axis=1) - 0.6) < 2 * step.cell).all()
    assert np.allclose(np.linalg.norm(step.normals, axis=1), 1)


@pytest.mark.parametrize("refine", [True, False])
def test_a_vertex_at_a_tip_without_a_gradient(refine: bool) -> None:
    def cone(x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(x[:, 0] ** 2 + x[:, 1] ** 2) + x[:, 2] - 0.5

    mesh = extract_mesh(cone, ([-1.0] * 3, [1.0] * 3), 32, refine=refine)
    assert np.isfinite(mesh.tolerance)
    if refine:
        assert mesh.unrefined <= 1


def test_float32_callable() -> None:
    weight = torch.tensor([[1.0], [0.0], [0.0]])
    mesh = extract_mesh(lambda x: x @ weight - 0.1, BOX, resolution=16)
    assert np.allclose(mesh.vertices[:, 0], 0.1, atol=1e-6)


def test_a_compiled_field_has_the_device_and_the_precision_of_its_network() -> None:
    net = implicit()
    for dtype in (torch.float32, torch.float64):  # a float64 copy has the last word on vertices
        net = net.to(dtype)
        mesh, same = (extract_mesh(fn, BOX, 24) for fn in (MLP.from_module(net), net))
        assert np.allclose(mesh.vertices, same.vertices, atol=1e-12)
    assert _for_the_grid(MLP.from_module(net.to("meta")))[1:] == (
        torch.device("meta"),
        torch.float64,
    )


def test_a_network_that_cannot_be_copied() -> None:
    net = implicit()
    expected = extract_mesh(net, BOX, 24)
    net.lock = threading.Lock()
    mesh = extract_mesh(net, BOX, 24)
    assert np.allclose(mesh.vertices, expected.vertices, atol=1e-5)


def test_a_network_that_ends_with_squeeze_and_a_batch_of_one_row() -> None:
    net = implicit()
    expected = extract_mesh(net, BOX, 12)
    nodes = 13**3
    mesh = extract_mesh(lambda x: net(x).squeeze(), BOX, 12, batch=nodes - 1)
    assert np.allclose(mesh.vertices, expected.vertices, atol=1e-5)


def test_infinities_are_far_away() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.norm(dim=1) > 0.8, torch.inf, sphere(x))

    assert as_trimesh(extract_mesh(fn, BOX, resolution=64)).is_watertight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bounds": ((0, 0), (1, 1))}, r"bounds: expected \(\(3,\), \(3,\)\)"),
        ({"bounds": ((0, 0, 0), (1, 0, 1))}, "bounds: expected finite lower < upper"),
        ({"bounds": ((0, 0, 0), (1, np.nan, 1))}, "bounds: expected finite"),
        ({"resolution": 0}, "resolution: expected at least 1, got 0"),
        ({"batch": 0}, "batch: expected at least 1"),
        ({"level": float("nan")}, "level: expected a finite"),
        ({"fn": lambda x: x}, r"fn: expected values \(\d+,\) or"),
        ({"fn": lambda x: sphere(x) * torch.nan}, "fn: expected numbers, got NaN at"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract_mesh(**{"fn": sphere, "bounds": BOX, "resolution": 8, **change})


_AT_512 = """
import json, resource, sys
import torch
from levelset_ext.geometry.extract import extract_mesh

torch.set_num_threads(1)
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def torus(x):
    ring = (x[:, 0] ** 2 + x[:, 1] ** 2).sqrt() - 0.5
    return (ring**2 + x[:, 2] ** 2).sqrt() - 0.2
mesh = extract_mesh(torus, ((-1.0,) * 3, (1.0,) * 3), resolution=512)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
exact = mesh.residual <= mesh.tolerance
json.dump([idle, peak, mesh.evaluations, len(mesh.faces), exact], sys.stdout)
"""


def test_memory_at_512() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _AT_512], capture_output=True, text=True, check=True
    )
    idle, peak, evaluations, faces, exact = json.loads(run.stdout)
    assert peak < 1.5e6  # KiB, torch and scipy included
    assert peak - idle < 1.0e6
    assert evaluations < 0.03 * 513**3
    assert faces > 500_000
    assert exact
