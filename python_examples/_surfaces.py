"""Other ways from one raw point cloud to a surface, for comparison: AtlasNet, IGR, Poisson.

All take points in the unit box of ``Normalization`` and return a mesh there. What is trained may
use the same time: a :class:`Budget`, whose share that is spent drives the learning rate, so that a
slow machine trains less, and does not stop in the middle of a schedule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from scipy.spatial import cKDTree
from torch import Tensor, nn

from levelset_ext import ops
from levelset_ext.errors import InputError
from levelset_ext.geometry import extract_mesh
from levelset_ext.networks import ImplicitMLP
from levelset_ext.recipes.files import prepare_folder, read_json, save_checkpoint, write_json
from levelset_ext.recipes.reconstruct import KIND, Cloud, Training, preset

MARGIN = 0.25  # of the box around the cloud that implicit surfaces are looked for in
ATLAS_KINDS = {"sphere": (1, 3), "patch": (1, 2), "patches": (25, 2)}  # maps, dimension of each


class Budget:
    """How long something may train: seconds of one core (CPU time, so that another process on the
    same machine costs nothing), or a number of steps, which makes results reproducible."""

    def __init__(self, seconds: float | None = None, steps: int | None = None) -> None:
        if (seconds is None) == (steps is None):
            raise ValueError(f"budget: expected seconds or steps, got {seconds} and {steps}")
        if not (steps if seconds is None else seconds) > 0:  # type: ignore[operator]
            raise ValueError(f"budget: expected a number > 0, got {seconds or steps}")
        self.seconds, self.steps = seconds, steps
        self.began = time.process_time()

    def start(self) -> None:
        """Time counts from here on."""
        self.began = time.process_time()

    def spent(self) -> float:
        """Seconds of CPU time so far."""
        return time.process_time() - self.began

    def share(self, step: int) -> float:
        """How much of it is used after ``step`` steps; the end is at 1."""
        return step / self.steps if self.steps else self.spent() / float(self.seconds or 1)


@dataclass(frozen=True)
class Surface:
    """A mesh, and what it took: steps, and seconds of CPU time for training and for the mesh."""

    vertices: np.ndarray  # (v, 3) float64
    faces: np.ndarray  # (f, 3) int64
    steps: int
    seconds: float
    mesh_seconds: float


def cosine_rate(first: float, share: float, warmup: float = 0.0) -> float:
    """A learning rate that grows linearly over ``warmup`` and falls to a hundredth."""
    if share < warmup:
        return first * max(share, 1e-3) / warmup
    turn = min((share - warmup) / (1 - warmup), 1.0)
    return first * (0.01 + 0.99 * (1 + math.cos(math.pi * turn)) / 2)


# --- this project ---


def run_header(folder: Path) -> dict[str, Any]:
    """The kind, cloud, digest and settings in a folder of ``levelset-ext reconstruct``."""
    header = read_json(folder / "config.json")
    if not isinstance(header, dict) or header.get("kind") != KIND:
        raise InputError(f"{folder}: expected a folder of levelset-ext reconstruct, got another")
    return header


def check_cloud(folder: Path, header: dict[str, Any], cloud: Cloud) -> None:
    """Says in one line that the run in a folder is not of this cloud."""
    if header["digest"] != cloud.digest:
        raise InputError(f"scan: expected the cloud of {folder}, got another ({cloud.name})")


def ours(
    cloud: Tensor,
    budget: Budget,
    *,
    resolution: int = 256,
    seed: int = 0,
    keep: tuple[Path, Cloud] | None = None,
) -> Surface:
    """Eq. 13 with the preset "fast", its schedules and its pool cut to the budget.

    Args:
        cloud: (N, 3) float32 in the unit box.
        budget: of the training.
        resolution: of the grid the surface is extracted with.
        seed: of every random choice.
        keep: a folder that the network is left in as ``levelset-ext reconstruct`` does, and the
            cloud in input units that this is a run for.
    """
    budget.start()
    config = preset("fast", budget.steps, seed)
    # The preset's pool is made for 300 s; its nearest points would take a large part of less.
    part = budget.steps / 6000 if budget.steps else float(budget.seconds or 1) / 300
    config = replace(config, pool=max(1000, round(config.pool * min(part, 1.0))))
    training = Training(cloud, config)
    while (share := budget.share(training.step)) < 1:
        if budget.steps is None:
            # The schedules read step / steps; this makes that the share of the time.
            steps = max(training.step + 1, round(training.step / share))
            training.config = replace(training.config, steps=steps, lam_steps=steps)
        training.advance()
    if keep is not None:
        folder, raw = prepare_folder(keep[0]), keep[1]
        settings = asdict(training.config)
        header = {"kind": KIND, "cloud": raw.name, "digest": raw.digest, "settings": settings}
        write_json(folder / "config.json", header)
        state = {"seconds": budget.spent(), "settings": settings, "training": training.state()}
        save_checkpoint(folder / "checkpoint.pt", {"kind": KIND, **state})
    return implicit_surface(training.network, cloud, resolution, training.step, budget)


def implicit_surface(
    network: nn.Module, cloud: Tensor, resolution: int, steps: int, budget: Budget
) -> Surface:
    """{F = 0} in the box of the cloud widened by MARGIN."""
    trained = budget.spent()
    low, high = (cloud.amin(0) - MARGIN).double(), (cloud.amax(0) + MARGIN).double()
    mesh = extract_mesh(network, (low.numpy(), high.numpy()), resolution=resolution)
    return Surface(mesh.vertices, mesh.faces, steps, trained, budget.spent() - trained)


# --- AtlasNet ---


class Atlas(nn.Module):
    """Maps from simple domains to space, one multilayer perceptron each: the decoder of AtlasNet.

    With a single cloud there is nothing to encode: a latent vector would be a bias of the first
    layer, which is there anyhow. The published layers of 1024, 512 and 256 units with batch
    normalisation are `widths` here, without it; the hyperbolic tangent at the end is kept.

    Args:
        kind: "sphere" (one map of the unit sphere), "patch" (one of the unit square), "patches"
            (25 of it).
        widths: units of the hidden layers.
        generator: for the starting parameters.
    """

    def __init__(
        self,
        kind: str,
        widths: Sequence[int] = (256, 128, 64),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if kind not in ATLAS_KINDS:
            raise ValueError(f"kind: expected one of {', '.join(ATLAS_KINDS)}, got {kind!r}")
        self.maps, self.dim = ATLAS_KINDS[kind]
        sizes = (self.dim, *widths, 3)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise(sizes):
            # He's distribution. The first biases spread the kinks over the domain; the last are 0.
            gain = 1.0 if o == 3 else 2.0
            weight = torch.randn(self.maps, i, o, generator=generator) * math.sqrt(gain / i)
            bias = torch.zeros(self.maps, 1, o)
            if i == self.dim:
                bias.uniform_(-1, 1, generator=generator)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        """(maps, n, dim), in the unit square or on the unit sphere -> (maps, n, 3)."""
        if self.dim == 2:
            x = 2 * x - 1
        last = len(self.weights) - 1
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = torch.tanh(x) if k == last else torch.relu(x)
        return x

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Random points of the domains, (maps, count / maps, dim)."""
        shape = (self.maps, max(1, count // self.maps), self.dim)
        if self.dim == 2:
            return torch.rand(shape, generator=generator)
        x = torch.randn(shape, generator=generator)
        return x / torch.linalg.vector_norm(x, dim=2, keepdim=True)

    def template(self, vertices: int) -> tuple[Tensor, np.ndarray]:
        """About so many vertices (maps, n, dim) of the domains in all, and faces (f, 3) of one."""
        if self.dim == 3:
            level = max(1, round(math.log(max(vertices, 12) / 10, 4)))
            ball = trimesh.creation.icosphere(level)
            return torch.from_numpy(ball.vertices).float()[None], np.asarray(ball.faces, np.int64)
        side = max(2, round(math.sqrt(vertices / self.maps)))
        axis = torch.linspace(0, 1, side)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(1, -1, 2)
        corner = (np.arange(side - 1)[:, None] * side + np.arange(side - 1)).reshape(-1)
        a, b, c, d = corner, corner + side, corner + side + 1, corner + 1
        faces = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
        return grid.expand(self.maps, -1, -1), faces


def chamfer(made: Tensor, rows: Tensor, cloud: Tensor) -> Tensor:
    """Mean squared distance from points to their nearest of the cloud, plus that from rows of the
    cloud to their nearest of the points. Pairs are searched first; the gradient is that of the
    distances between them."""
    _, to_cloud = ops.nearest_distance(made.detach(), cloud)
    _, to_made = ops.nearest_distance(rows, made.detach())
    forth = (made - cloud[to_cloud]).square().sum(1).mean()
    return forth + (rows - made[to_made]).square().sum(1).mean()


def atlasnet(
    cloud: Tensor,
    kind: str,
    budget: Budget,
    *,
    widths: Sequence[int] = (256, 128, 64),
    points: int = 2500,
    rate: float = 2e-3,
    vertices: int = 40_000,
    seed: int = 0,
) -> Surface:
    """AtlasNet trained on one cloud by the squared symmetric Chamfer distance.

    Args:
        cloud: (N, 3) float32 in the unit box.
        kind: see :class:`Atlas`.
        budget: of the training.
        widths: units of the hidden layers.
        points: of a step, on both sides (AtlasNet: 2500). Points of the maps are compared with the
            whole cloud, which is as cheap and less noisy than a part of it.
        rate: first learning rate of Adam.
        vertices: of the mesh, about.
        seed: of every random choice.
    """
    budget.start()
    random = torch.Generator().manual_seed(seed)
    atlas = Atlas(kind, widths, random)
    optimizer = torch.optim.Adam(atlas.parameters(), rate, fused=True)
    step = 0
    while (share := budget.share(step)) < 1:
        optimizer.param_groups[0]["lr"] = cosine_rate(rate, share)
        made = atlas(atlas.sample(points, random)).reshape(-1, 3)
        rows = cloud[torch.randint(len(cloud), (points,), generator=random)]
        loss = chamfer(made, rows, cloud)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
    trained = budget.spent()
    with torch.no_grad():
        domain, faces = atlas.template(vertices)
        made = atlas(domain).double()
    every = np.concatenate([faces + k * made.shape[1] for k in range(atlas.maps)])
    surface = made.reshape(-1, 3).numpy()
    if kind == "sphere" and trimesh.Trimesh(surface, every, process=False).volume < 0:
        every = every[:, ::-1]
    return Surface(surface, every, step, trained, budget.spent() - trained)


# --- IGR ---


def igr(
    cloud: Tensor,
    budget: Budget,
    *,
    width: int = 128,
    hidden_layers: int = 5,
    points: int = 1024,
    rate: float = 3e-3,
    eikonal: float = 0.1,
    resolution: int = 256,
    seed: int = 0,
) -> Surface:
    """Implicit geometric regularisation: mean |F| over the cloud + eikonal x mean (|D F| - 1)^2.

    The second mean is over points near the cloud (Gaussian, as wide as the distance to the 50th
    neighbour) and an eighth as many in the box. No normals. The network has the size of this
    project's preset "fast" (IGR: 8 layers of 512), softplus with beta 100, the point fed to every
    layer, and starts as the distance to a sphere.

    Args:
        cloud: (N, 3) float32 in the unit box.
        budget: of the training.
        width, hidden_layers: of the network.
        points: of the cloud in a step, and as many near it.
        rate: first learning rate of Adam.
        eikonal: weight of the second term.
        resolution: of the grid the surface is extracted with.
        seed: of every random choice.
    """
    budget.start()
    random = torch.Generator().manual_seed(seed)
    network = ImplicitMLP(
        3, 1, width, hidden_layers, activation="softplus", beta=100.0, skip=True
    ).init_sphere_(0.64, random)
    spread = cKDTree(cloud.numpy()).query(cloud.numpy(), k=[min(51, len(cloud))])[0]
    sigma = torch.from_numpy(spread).float()  # (N, 1)
    low, high = cloud.amin(0) - MARGIN, cloud.amax(0) + MARGIN
    optimizer = torch.optim.Adam(network.parameters(), rate, fused=True)
    step = 0
    while (share := budget.share(step)) < 1:
        optimizer.param_groups[0]["lr"] = cosine_rate(rate, share, 0.05)
        rows = torch.randint(len(cloud), (points,), generator=random)
        on = cloud[rows]
        near = on + sigma[rows] * torch.randn(points, 3, generator=random)
        far = low + (high - low) * torch.rand(points // 8, 3, generator=random)
        around = torch.cat([near, far]).requires_grad_()
        (slope,) = torch.autograd.grad(network(around).sum(), around, create_graph=True)
        uneven = (torch.linalg.vector_norm(slope, dim=1) - 1).square().mean()
        loss = network(on).abs().mean() + eikonal * uneven
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
    return implicit_surface(network, cloud, resolution, step, budget)


# --- screened Poisson ---


def pymeshlab() -> Any:
    """The package, which is needed for Poisson alone."""
    try:
        import pymeshlab as package
    except ImportError:
        raise InputError("Poisson: expected pymeshlab (pip install pymeshlab)") from None
    return package


def poisson(points: np.ndarray, *, neighbours: int = 16, depth: int = 8) -> Surface:
    """Screened Poisson reconstruction with normals that are estimated from the points.

    Normals come from the planes through the nearest neighbours; MeshLab makes them consistent along
    a spanning tree of the neighbourhoods, which can go wrong across thin or unseen parts. Here all
    are turned over when the points farthest out say so.

    Args:
        points: (n, 3).
        neighbours: k of the planes.
        depth: of the octree.

    Raises:
        InputError: pymeshlab is not installed.
    """
    package = pymeshlab()
    cloud = np.asarray(points, dtype=np.float64)
    began = time.process_time()
    scene = package.MeshSet(verbose=False)
    scene.add_mesh(package.Mesh(vertex_matrix=cloud))
    scene.compute_normal_for_point_clouds(k=neighbours, smoothiter=0, flipflag=False)
    normals = scene.current_mesh().vertex_normal_matrix()
    direction = trimesh.creation.icosphere(2).vertices
    outmost = (cloud @ direction.T).argmax(0)
    if (normals[outmost] * direction).sum() < 0:
        flipped = package.Mesh(vertex_matrix=cloud, v_normals_matrix=-normals)
        scene = package.MeshSet(verbose=False)
        scene.add_mesh(flipped)
    estimated = time.process_time() - began
    scene.generate_surface_reconstruction_screened_poisson(depth=depth, threads=1)
    mesh = scene.current_mesh()
    spent = time.process_time() - began
    return Surface(
        np.asarray(mesh.vertex_matrix(), np.float64),
        np.asarray(mesh.face_matrix(), np.int64),
        0,
        estimated,
        spent - estimated,
    )
