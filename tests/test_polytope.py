"""Theorem 1 as a construction: ReLU networks whose zero level set is a given polytope's surface."""

import itertools

import numpy as np
import pytest
import torch
import trimesh
from torch import nn

import levelset_ext as ls
from levelset_ext.networks import from_mesh, from_polytope

ROUNDING = 2e-14  # for shapes of size about 1


def field(net, x):
    with torch.no_grad():
        return net(torch.as_tensor(np.asarray(x), dtype=torch.float64))[:, 0].numpy()


def inside_mesh(vertices, faces, x):
    """By the solid angle that the triangles span; nothing of it is shared with the network."""
    turns = np.zeros(len(x))
    for triangle in np.asarray(vertices)[faces]:
        a, b, c = (corner - x for corner in triangle)
        la, lb, lc = (np.linalg.norm(v, axis=1) for v in (a, b, c))
        top = (a * np.cross(b, c)).sum(1)
        turns += np.arctan2(
            top, la * lb * lc + (a * b).sum(1) * lc + (b * c).sum(1) * la + (c * a).sum(1) * lb
        )
    return turns / (2 * np.pi) > 0.5


def inside_polygon(vertices, edges, x):
    """By the number of edges that a ray to the right crosses."""
    odd = np.zeros(len(x), dtype=bool)
    for a, b in vertices[edges]:
        spans = (a[1] <= x[:, 1]) != (b[1] <= x[:, 1])
        with np.errstate(divide="ignore", invalid="ignore"):
            at = a[0] + (x[:, 1] - a[1]) / (b[1] - a[1]) * (b[0] - a[0])
        odd ^= spans & (at > x[:, 0])
    return odd


def loop(n):
    return np.stack([np.arange(n), (np.arange(n) + 1) % n], 1)


def bumpy():
    ball = trimesh.creation.icosphere(1)
    radius = np.random.default_rng(1).uniform(0.6, 1.3, len(ball.vertices))
    return trimesh.Trimesh(ball.vertices * radius[:, None], ball.faces, process=False)


MESHES = {
    "box": lambda: trimesh.creation.box(),
    "icosphere": lambda: trimesh.creation.icosphere(1),
    "tube": lambda: trimesh.creation.annulus(0.5, 1, 1, sections=9),
    "torus": lambda: trimesh.creation.torus(1, 0.4, major_sections=8, minor_sections=6),
    "bumpy": bumpy,
    "two": lambda: trimesh.util.concatenate(
        [trimesh.creation.box(), trimesh.creation.icosphere(1, 0.4).apply_translation([1.2, 0, 0])]
    ),
    "hollow": lambda: trimesh.util.concatenate(
        [trimesh.creation.box(), _flipped(trimesh.creation.icosphere(0, 0.3))]
    ),
}


def _flipped(mesh):
    return trimesh.Trimesh(mesh.vertices, mesh.faces[:, ::-1], process=False)


@pytest.mark.parametrize("name", MESHES)
def test_mesh_sign_zero_set_normals_and_newton(name):
    mesh = MESHES[name]()
    v, f = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    net = from_mesh(v, f)
    assert all(type(layer) in (nn.Linear, nn.ReLU) for layer in net)
    sizes = net.sizes
    assert sizes["parameters"] == sum(p.numel() for p in net.parameters()) < 20_000
    assert sizes["planes"] <= len(f)

    rng = np.random.default_rng(0)
    x = rng.uniform(v.min(0) - 0.2, v.max(0) + 0.2, (1500, 3))
    values = field(net, x)
    assert ((values < 0) == inside_mesh(v, f, x)).all()
    # |F| is at most the distance to the surface: F has slope 1, and is 0 there.
    weight = rng.dirichlet((2.0, 2.0, 2.0), (len(f), 3))
    on = np.einsum("fik,fkd->fid", weight, v[f]).reshape(-1, 3)
    normals = np.repeat(mesh.face_normals, 3, axis=0)
    assert np.abs(field(net, on)).max() <= ROUNDING
    assert np.abs(field(net, v)).max() <= ROUNDING
    nearest = np.sqrt(((x[:, None] - on) ** 2).sum(2)).min(1)
    assert (np.abs(values) <= nearest + ROUNDING).all()

    # Just off a face F is its plane, so one Newton step is the orthogonal projection (Lemma 1).
    points = torch.from_numpy(on)
    _, jacobian = ls.value_and_jacobian(net, points)
    assert np.abs(jacobian[:, 0].numpy() - normals).max() <= ROUNDING
    for side in (1e-4, -1e-4):
        r = ls.project(net, points + side * torch.from_numpy(normals), tol=ROUNDING)
        assert r.converged.all()
        assert r.iterations.max() == 1
        assert (r.points - points).abs().max() <= 2 * ROUNDING
    # The surface moves with the network: another last bias pushes it in along the normals.
    p = ls.sample_network(net, r, frozen=True)
    with torch.no_grad():
        net[-1].bias += 1e-3
        moved = ls.sample_network(net, r, frozen=True)
    torch.testing.assert_close(moved, p - 1e-3 * torch.from_numpy(normals), rtol=0, atol=1e-12)


def voxels(filled):
    """The surface of a set of unit cubes, two triangles for each face between full and empty."""
    padded = np.pad(filled, 1)
    names, faces = {}, []
    for cube in np.argwhere(padded):
        for axis, up in itertools.product(range(3), (0, 1)):
            other = cube.copy()
            other[axis] += 2 * up - 1
            if padded[tuple(other)]:
                continue
            quad = []
            for i, j in ((0, 0), (1, 0), (1, 1), (0, 1)):
                corner = cube - 1
                corner[axis] += up
                corner[(axis + 1) % 3] += i
                corner[(axis + 2) % 3] += j
                quad.append(names.setdefault(tuple(corner), len(names)))
            quad = quad if up else quad[::-1]
            faces += [quad[:3], [quad[0], *quad[2:]]]
    return np.array(list(names), dtype=float), np.array(faces)


@pytest.mark.parametrize(("seed", "rotate"), [(0, False), (1, True), (2, True)])
def test_every_sign_where_planes_meet(seed, rotate):
    """Random cubes, which also touch along edges and at corners: F is 0 at a corner, an edge or a
    face of the grid exactly if full and empty cubes meet there, though many planes pass through."""
    rng = np.random.default_rng(seed)
    filled = rng.random((3, 3, 3)) < 0.5
    v, f = voxels(filled)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0] if rotate else np.eye(3)
    turn[0] *= np.linalg.det(turn)
    net = from_mesh(v @ turn.T + 0.7, f)
    grid = np.stack(np.meshgrid(*[np.arange(7) / 2] * 3, indexing="ij"), -1).reshape(-1, 3)
    values = field(net, grid @ turn.T + 0.7)
    padded = np.pad(filled, 1)
    low, high = np.ceil(grid).astype(int), np.floor(grid).astype(int) + 1
    around = np.stack(
        [
            padded[tuple(np.where(np.array(side), high, low).T)]
            for side in itertools.product((0, 1), repeat=3)
        ],
        1,
    )
    full, empty = around.all(1), ~around.any(1)
    assert (values[full] < -0.49).all()
    assert (values[empty] > 0.49).all()
    assert np.abs(values[~full & ~empty]).max() <= ROUNDING


def comb():
    """Teeth whose tips and gaps lie on two common lines."""
    points = [(0.0, 0.0), (7.0, 0.0)]
    for k in range(3, -1, -1):
        points += [(2 * k + 1.0, 2.0), (2 * k + 0.0, 2.0)]
        points += [(2 * k + 0.0, 1.0), (2 * k - 1.0, 1.0)] if k else []
    return np.array(points)


def star(n=9):
    angle = np.arange(2 * n) * np.pi / n
    return (np.where(np.arange(2 * n) % 2, 0.4, 1.0) * np.stack([np.cos(angle), np.sin(angle)])).T


def spiral(n=24):
    angle = np.linspace(0, 5 * np.pi, n)
    outer = (0.3 + angle / 8) * np.stack([np.cos(angle), np.sin(angle)])
    inner = (0.2 + angle / 8) * np.stack([np.cos(angle), np.sin(angle)])
    return np.concatenate([outer.T, inner.T[::-1]])


@pytest.mark.parametrize("shape", [comb, star, spiral])
def test_polygons(shape):
    v = shape()
    edges = loop(len(v))
    if not inside_sign(v):
        v = v[::-1].copy()
    net = from_mesh(v, edges)
    x = np.random.default_rng(3).uniform(v.min(0) - 0.3, v.max(0) + 0.3, (4000, 2))
    assert ((field(net, x) < 0) == inside_polygon(v, edges, x)).all()
    share = np.random.default_rng(4).random((len(v), 20, 1))
    on = (v[edges[:, :1]] * share + v[edges[:, 1:]] * (1 - share)).reshape(-1, 2)
    assert np.abs(field(net, on)).max() <= 5 * ROUNDING
    assert np.abs(field(net, v)).max() <= 5 * ROUNDING


def inside_sign(v):
    w = np.roll(v, -1, axis=0)
    return (v[:, 0] * w[:, 1] - v[:, 1] * w[:, 0]).sum() > 0


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_convex_is_the_maximum_and_prunes(d):
    rng = np.random.default_rng(d)
    box = np.concatenate([np.eye(d), -np.eye(d)])
    offsets = np.full(2 * d, 0.5)
    cut = np.ones((1, d))  # touches a corner at most where its offset is d / 2
    n = np.concatenate([3 * box, box, cut, cut])
    o = np.concatenate([3 * offsets, offsets + 1e-9, [d / 2], [d / 2 + 0.1]])
    net = from_polytope(n, o)
    assert net.planes == 2 * d
    assert from_polytope(n, o, prune=False).planes == len(n)
    x = rng.uniform(-1, 1, (500, d))
    expected = (x @ box.T - offsets).max(1)
    np.testing.assert_allclose(field(net, x), expected, rtol=0, atol=1e-15)
    length = np.linalg.norm(n, axis=1)
    everything = (x @ (n / length[:, None]).T - o / length).max(1)
    np.testing.assert_allclose(
        field(from_polytope(n, o, prune=False), x), everything, rtol=0, atol=1e-15
    )
    assert ((everything < 0) == (expected < 0)).all()
    other = from_polytope(n, o, complement=True)
    np.testing.assert_allclose(field(other, x), -expected, rtol=0, atol=1e-15)
    if d > 1:
        sharp = from_polytope(np.concatenate([box, cut]), np.append(offsets, d / 2 - 0.1))
        assert sharp.planes == 2 * d + 1


def test_unbounded():
    x = np.random.default_rng(0).normal(size=(500, 3)) * 100
    half = from_polytope([[0, 0, 2.0]], [1.0])
    assert len(half) == 1
    np.testing.assert_allclose(field(half, x), x[:, 2] - 0.5, atol=1e-13)
    slab = from_polytope([[0, 1.0, 0], [0, -1.0, 0]], [1.0, 2.0])
    np.testing.assert_allclose(field(slab, x), np.maximum(x[:, 1] - 1, -x[:, 1] - 2), atol=1e-13)
    wedge = from_polytope([[1.0, 1, 0], [-1.0, 1, 0]], [0.0, 0.0])
    distance = (np.abs(x[:, 0]) + x[:, 1]) / np.sqrt(2)
    np.testing.assert_allclose(field(wedge, x), distance, atol=1e-13)
    reflex = from_polytope([[1.0, 1, 0], [-1.0, 1, 0]], [0.0, 0.0], complement=True)
    np.testing.assert_allclose(field(reflex, x), -distance, atol=1e-13)
    # Projected from anywhere above a face, and from inside: exactly the nearest point.
    r = ls.project(slab, torch.from_numpy(x), tol=1e-12)
    assert r.converged.all()
    assert r.iterations.max() == 1
    np.testing.assert_allclose(
        r.points[:, 1].numpy(), np.where(x[:, 1] > -0.5, 1.0, -2.0), atol=1e-12
    )


def test_dtype_tensors_and_far_from_the_origin():
    mesh = MESHES["torus"]()
    v = torch.tensor(np.asarray(mesh.vertices), dtype=torch.float32)
    net = from_mesh(v, torch.from_numpy(np.asarray(mesh.faces)), dtype=torch.float32)
    assert net[0].weight.dtype == torch.float32
    with torch.no_grad():
        assert net(v).abs().max() < 1e-5
    far = np.asarray(mesh.vertices) + np.array([1000.0, -2000.0, 500.0])
    net = from_mesh(far, mesh.faces)
    assert np.abs(field(net, far)).max() < 1e-10
    x = np.random.default_rng(0).uniform(far.min(0), far.max(0), (500, 3))
    assert ((field(net, x) < 0) == inside_mesh(far, mesh.faces, x)).all()


def test_unusable_input_is_refused():
    box = trimesh.creation.box()
    v, f = np.asarray(box.vertices), np.asarray(box.faces)
    with pytest.raises(ValueError, match=r"^faces: expected a watertight surface, got 3 open edge"):
        from_mesh(v, f[1:])
    with pytest.raises(ValueError, match=r"^faces: expected one winding throughout"):
        from_mesh(v, np.concatenate([f[:1, ::-1], f[1:]]))
    with pytest.raises(ValueError, match=r"^faces: expected normals that point outward"):
        from_mesh(v, f[:, ::-1])
    flat = v.copy()
    flat[f[3, 0]] = (flat[f[3, 1]] + flat[f[3, 2]]) / 2
    with pytest.raises(ValueError, match=r"degenerate, the first is face \d+"):
        from_mesh(flat, f)
    crossing = np.array([[0, 0], [1, 1.0], [2, 0], [3, 1], [3, 0], [2, 1], [1, 0], [0, 1.5]])
    with pytest.raises(ValueError, match=r"^faces: expected"):
        from_mesh(crossing, loop(8))
    with pytest.raises(ValueError, match=r"^max_parameters: the network of this surface has"):
        from_mesh(v, f, max_parameters=50)
    with pytest.raises(ValueError, match=r"^faces: expected indices in \[0, 8\)"):
        from_mesh(v, f + 1)
    with pytest.raises(ValueError, match=r"^vertices: expected \(v, 2\) or \(v, 3\)"):
        from_mesh(np.zeros((4, 4)), f)
    with pytest.raises(ValueError, match=r"^faces: expected integers"):
        from_mesh(v, f.astype(float))
    with pytest.raises(ValueError, match=r"^offsets: expected a polytope with interior points"):
        from_polytope([[1.0, 0], [-1.0, 0]], [-1.0, 0.5])
    with pytest.raises(ValueError, match=r"^normals: expected lengths > 0, got 0 in row 1"):
        from_polytope([[1.0, 0], [0, 0]], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"^offsets: expected \(k,\) = \(2,\)"):
        from_polytope([[1.0, 0], [0, 1]], [1.0])
