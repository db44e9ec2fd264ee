"""Moving one vertex of an extracted mesh to a target by changing the network's parameters.

    python python_examples/move_vertex.py --out DIR [--quick] [--resume]

The mesh is the zero level set of an MLP that starts as a sphere. Its vertices are points of the
level set, and ``sample_network`` makes them functions p(theta) of the parameters. Descended is

    |p_k(theta) - target|^2 + weight x mean over j of w_j |p_j(theta) - p_j(theta_0)|^2,

k the vertex, the target above it along its normal, w_j from 0 near k to 1 away from it, over
vertices that are drawn anew each step. After each step the points in use are projected again.

steps.csv: distances by step. vertex.json: where everything went, measured on the mesh extracted at
the end. vertex.png: rays before and after, and the distance to the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _shared import (
    BLUE,
    ORANGE,
    RED,
    Run,
    arguments,
    command,
    pyplot,
    save_picture,
    write_table,
)
from fit_depth import sphere
from scipy.spatial import cKDTree
from torch import Tensor, nn

import levelset_ext as ls
from levelset_ext.geometry import Camera, Mesh, extract_mesh, intersect_rays, render
from levelset_ext.recipes.files import write_json

DTYPE = torch.float64
BOX = ((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0))
RADIUS, RISE, WIDTH, WEIGHT = 0.5, 0.2, 0.15, 10.0
LR = 1e-3


def move(seed: int, steps: int, resolution: int) -> dict[str, Any]:
    net = sphere(RADIUS, seed, width=64)
    mesh = extract_mesh(net, BOX, resolution)
    vertices = torch.from_numpy(mesh.vertices)
    # The vertex that looks most to the upper right of the picture.
    k = int((mesh.normals @ np.array([0.5, 0.6, 0.62])).argmax())
    target = vertices[k] + RISE * torch.from_numpy(mesh.normals[k])
    stay = 1 - torch.exp(-(vertices - vertices[k]).square().sum(1) / (2 * WIDTH**2))
    views = [picture(net, mesh)]

    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), LR, betas=(0.9, 0.99))
    vertex = vertices[k : k + 1]
    rows = []
    for step in range(steps + 1):
        # From small steps to small steps: the first must not shake what is to stay.
        share = (step + 1) / (steps + 1)
        optimizer.param_groups[0]["lr"] = LR * min(1.0, 5 * share) * (1.01 - share)
        some = torch.randint(len(vertices), (256,), generator=random)
        found = ls.project(net, torch.cat([vertex, vertices[some]]), tol=1e-9)
        p = ls.sample_network(net, found)
        away = (p[0] - target).square().sum()
        kept = (stay[some, None] * (p[1:] - vertices[some]).square()).sum(1).mean()
        vertex = found.points[:1]
        rows.append(
            {"step": step, "to_target": away.item() ** 0.5, "others_moved": kept.item() ** 0.5}
        )
        optimizer.zero_grad()
        (away + WEIGHT * kept).backward()
        optimizer.step()

    after = extract_mesh(net, BOX, resolution)
    far = stay.numpy() > 0.95
    away_from = cKDTree(after.vertices).query(mesh.vertices)[0]
    moved = ls.project(net, vertices, tol=1e-9).points - vertices
    return {
        "rows": rows,
        "views": [*views, picture(net, after)],
        "marks": torch.stack([vertices[k], target, vertex[0]]),
        "facts": {
            "vertices": len(vertices),
            "vertex": k,
            "rise": RISE,
            "first_distance": rows[0]["to_target"],
            "last_distance": rows[-1]["to_target"],
            "mesh_to_target": float(cKDTree(after.vertices).query(target.numpy())[0]),
            "edge_length": float(mesh.cell),
            "others_moved_mean": float(moved.norm(dim=1)[torch.from_numpy(far)].mean()),
            "others_moved_most": float(moved.norm(dim=1)[torch.from_numpy(far)].max()),
            "others_to_new_mesh_most": float(away_from[far].max()),
            "off_the_ray": off_the_ray(net, vertices[k], target),
        },
    }


def off_the_ray(net: nn.Module, vertex: Tensor, target: Tensor) -> float:
    """Distance from the target to the level set along the way that the vertex was to go."""
    with torch.no_grad():
        back = vertex - target
        hits = intersect_rays(net, (target - back)[None], back, far=4 * RISE, tol=1e-10)
    return float((hits.points[0] - target).norm())


def camera(size: int = 360) -> Camera:
    return Camera.look_at((0.0, 0.35, 2.4), width=size, height=size, fov=36)


def picture(net: nn.Module, mesh: Mesh) -> Tensor:
    return torch.from_numpy(render(net, camera(), guide=mesh))


def on_picture(points: Tensor) -> np.ndarray:
    """Columns and rows (n, 2)."""
    eye = camera()
    shape = (points.numpy() - eye.eye) @ np.stack([eye.right, eye.up, eye.back], 1)
    scale = eye.height / (2 * np.tan(np.radians(eye.fov) / 2)) / -shape[:, 2]
    return np.stack([eye.width / 2 + scale * shape[:, 0], eye.height / 2 - scale * shape[:, 1]], 1)


def draw(found: dict[str, Any], path: Any) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    start, target, end = on_picture(found["marks"])
    for axis, view, at, title in zip(
        axes, found["views"], (start, end), ("before", "after"), strict=False
    ):
        axis.imshow(view.numpy())
        axis.plot(*target, "x", color=RED, ms=9, mew=2, label="target")
        axis.plot(*at, "o", color=ORANGE, ms=5, label="vertex")
        axis.set_title(title)
        axis.axis("off")
        axis.legend(loc="lower left")
    rows = found["rows"]
    for name, color in (("to_target", RED), ("others_moved", BLUE)):
        label = "vertex to target" if name == "to_target" else "others, root mean square"
        axes[2].semilogy(
            [r["step"] for r in rows[1:]], [r[name] for r in rows[1:]], color=color, label=label
        )
    axes[2].set_xlabel("step")
    axes[2].set_title("distance")
    axes[2].legend()
    save_picture(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    steps, resolution = (60, 24) if args.quick else (400, 64)
    settings = {"seed": args.seed, "steps": steps, "resolution": resolution}
    run = Run(args.out, "move-vertex", settings, 1, args.resume)
    found = run.unit("vertex", lambda: move(args.seed, steps, resolution))
    write_table(args.out / "steps.csv", found["rows"])
    write_json(args.out / "vertex.json", found["facts"])
    draw(found, args.out / "vertex.png")


if __name__ == "__main__":
    raise SystemExit(command(main))
