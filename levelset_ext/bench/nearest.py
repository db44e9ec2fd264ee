"""d(x, X), the distance to a point cloud: the op's k-d tree against the matrix of all pairs."""

from __future__ import annotations

from typing import Any

import torch
from scipy.spatial import cKDTree
from torch import Tensor

from levelset_ext import ops
from levelset_ext.bench import published
from levelset_ext.bench.timing import Competitor, Mismatch, Settings, compare


def torus_cloud(n: int, seed: int = 0) -> Tensor:
    """n points (n, 3) of a torus with noise, like a raw scan."""
    random = torch.Generator().manual_seed(seed)
    u, v = 2 * torch.pi * torch.rand(2, n, generator=random)
    ring = 0.6 + 0.25 * v.cos()
    points = torch.stack([ring * u.cos(), ring * u.sin(), 0.25 * v.sin()], 1)
    return points + 5e-4 * torch.randn(n, 3, generator=random)


def near(cloud: Tensor, n: int, seed: int = 1) -> Tensor:
    """Queries as training has them: four in five around the cloud, the others anywhere."""
    random = torch.Generator().manual_seed(seed)
    around = cloud[torch.randint(len(cloud), (n * 4 // 5,), generator=random)]
    around = around + 0.1 * torch.randn(around.shape, generator=random)
    return torch.cat([around, 2.2 * torch.rand(n - len(around), 3, generator=random) - 1.1])


def run(settings: Settings, limits: dict[str, Any]) -> dict[str, Any]:
    n, m = settings.size(10_000, 2_000, 200), settings.size(170_000, 40_000, 1_000)
    cloud = torus_cloud(m).to(settings.device)
    x = near(cloud.cpu(), n).to(settings.device)
    tree = cKDTree(cloud.cpu().numpy())
    workers = torch.get_num_threads()
    reference = torch.as_tensor(tree.query(x.cpu().numpy())[0])
    versions = [cloud.clone() for _ in range(6)]  # more than the op keeps trees for
    for number, one in enumerate(versions):
        one[0, 0] += 1e-6 * number
    turn = 0

    def new_cloud() -> Tensor:
        """A cloud it has not seen: the tree is built in the call."""
        nonlocal turn
        turn += 1
        return ops.nearest_distance(x, versions[turn % len(versions)])[0]

    def query(one: cKDTree) -> Tensor:
        return torch.as_tensor(one.query(x.cpu().numpy(), workers=workers)[0])

    def by_cdist() -> Tensor:
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cat([torch.cdist(p, cloud, compute_mode=exact).min(1)[0] for p in x.split(64)])

    def check(name: str, distance: Tensor) -> dict[str, Any]:
        error = float((distance.double().cpu() - reference.double()).abs().max())
        # The matrix of |x|^2 + |y|^2 - 2 x.y loses half of the digits where the distance is small.
        allowed = 2e-3 if name == "published" else 1e-5
        if not error <= allowed:
            raise Mismatch(f"nearest: {name}: distance off by {error:.2e}, allowed {allowed:.0e}")
        return {"worst_error": error}

    competitors = [
        Competitor(
            "ours",
            lambda: ops.nearest_distance(x, cloud)[0],
            "ops.nearest_distance(x, X), X known from the call before",
        ),
        Competitor("ours, new cloud", new_cloud, "the same with an X it has not seen"),
        Competitor("scipy", lambda: query(tree), "cKDTree, built beforehand"),
        Competitor(
            "scipy, new cloud",
            lambda: query(cKDTree(cloud.cpu().numpy())),
            "cKDTree, build included",
        ),
        Competitor("cdist", by_cdist, "torch.cdist and min, 64 rows at a time", rounds=1),
        Competitor(
            "published",
            lambda: published.squared_distance(x, cloud).clamp_min(0).sqrt(),
            "|x|^2 + |y|^2 - 2 x.y of all pairs, 512 rows at a time",
            rounds=1,
        ),
    ]
    table = compare(f"{n} x {m} points", competitors, check, settings)
    return {"cases": [{"rows": n, "cloud": m, **table}]}
