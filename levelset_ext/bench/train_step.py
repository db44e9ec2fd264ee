"""One step of Eq. 13 for a surface: projection, sample network, distances, backward, Adam."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

import levelset_ext as ls
from levelset_ext.bench import plain, published
from levelset_ext.bench.nearest import near, torus_cloud
from levelset_ext.bench.newton import MAX_ITERS, TOL, fc28
from levelset_ext.bench.timing import Competitor, Mismatch, Settings, compare
from levelset_ext.networks import MLP, ImplicitMLP

LAM = 1.0

# Relative error of the gradient against float64. Eq. 13 with p = 1 has a kink at every sample:
# where float32 puts one on the other side, a term changes its sign.
TOLERANCE = 2e-3


@dataclass(frozen=True)
class Problem:
    """Eq. 13 with T = {0} and general points: starts to project (n, 3), general points (m, 3) on
    their own levels, the cloud X and the batch of it for the second sum."""

    net: ImplicitMLP
    starts: Tensor
    general: Tensor
    cloud: Tensor
    batch: Tensor


Step = Callable[[], list[Tensor]]


def problem(settings: Settings) -> Problem:
    net = fc28(24, 3) if settings.scale == "tiny" else fc28()
    cloud = torus_cloud(settings.size(170_000, 40_000, 2_000))
    n = settings.size(2_500, 500, 64)
    random = torch.Generator().manual_seed(3)
    batch = cloud[torch.randint(len(cloud), (2 * n,), generator=random)]
    device = settings.device
    return Problem(
        net.to(device),
        near(cloud, n, seed=1).to(device),
        near(cloud, 2 * n, seed=2).to(device),
        cloud.to(device),
        batch.to(device),
    )


def in_steps(net: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Step:
    """A step that ends with Adam at the rate 0: all its work is done and the parameters are written
    to, but keep their values, so that every step is the same step."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)

    def run() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        loss(net).backward()
        optimizer.step()
        return [p.grad for p in net.parameters() if p.grad is not None]

    return run


def by_published(one: Problem) -> Step:
    """Both sample sets go through the published projection (the general points with no step), both
    through the sample network; distances come from the matrix of all pairs."""

    def loss(net: nn.Module) -> Tensor:
        terms = []
        for start, iterations in ((one.starts, MAX_ITERS), (one.general, 0)):
            level = start.new_zeros(len(start), 1)
            found = published.newton(net, start, level, iterations, TOL)
            points = published.sample_network(net, *found[:3])
            squares = published.squared_distance(points, one.cloud)
            distance = (squares.abs() + 1e-7).sqrt()
            terms.append((distance - found[1][:, 0].abs()).abs().mean())
        return terms[0] + terms[1] + LAM * net(one.batch).abs().mean()

    return in_steps(copy.deepcopy(one.net), loss)


def by_compaction(one: Problem, rows_of: Callable[..., plain.Found]) -> Step:
    """Clean torch: running rows only, no gradient of parameters before the loss, a k-d tree."""
    tree = cKDTree(one.cloud.cpu().numpy())
    workers = torch.get_num_threads()

    def loss(net: nn.Module) -> Tensor:
        evaluate = plain.by_autograd(_constant(net))
        projected = rows_of(evaluate, one.starts, one.starts.new_zeros(len(one.starts), 1))
        values, jacobian = evaluate(one.general)
        points = torch.cat([projected.points, one.general])
        slopes = torch.cat([projected.jacobian, jacobian])
        known = torch.cat([projected.values, values])
        again = net(points)
        moved = points - plain.step(slopes, again - again.detach())
        _, index = tree.query(points.cpu().numpy(), workers=workers)
        nearest = one.cloud[torch.as_tensor(np.asarray(index), device=points.device)]
        error = (torch.linalg.vector_norm(moved - nearest, dim=1) - _on_level(known)).abs()
        sizes = [len(one.starts), len(one.general)]
        first, second = error.split(sizes)
        return first.mean() + second.mean() + LAM * net(one.batch).abs().mean()

    return in_steps(copy.deepcopy(one.net), loss)


def _on_level(values: Tensor) -> Tensor:
    """|t|: 0 where a row has converged to it, and its own level elsewhere."""
    size = values[:, 0].abs()
    return torch.where(size <= TOL, 0.0, size)


def _constant(net: nn.Module) -> nn.Module:
    """A module over the same numbers that wants no gradient of them."""
    shared: Any = {id(p): nn.Parameter(p.detach(), False) for p in net.parameters()}
    return copy.deepcopy(net, shared)


def compacted(evaluate: plain.Evaluate, x: Tensor, level: Tensor) -> plain.Found:
    return plain.newton_compacted(evaluate, x, level, MAX_ITERS, TOL)


def ours(one: Problem, compiled: bool) -> Step:
    """The library: with the module, or with its compiled field, whose tape has the gradient."""
    net = copy.deepcopy(one.net)
    field: Any = MLP.from_module(net) if compiled else net

    def loss(_: nn.Module) -> Tensor:
        projected = ls.project(field, one.starts, 0.0, MAX_ITERS, TOL)
        general = ls.level_points(field, one.general)
        samples = [projected, general]
        return ls.losses.reconstruction(field, samples, one.cloud, one.batch, lam=LAM).total

    return in_steps(net, loss)


def reference(one: Problem) -> Tensor:
    """The gradient of the same loss in float64."""
    exact = Problem(
        copy.deepcopy(one.net).double(),
        one.starts.double(),
        one.general.double(),
        one.cloud.double(),
        one.batch.double(),
    )
    return flat(by_compaction(exact, compacted)())


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.detach().flatten().double() for g in gradients])


def run(settings: Settings, limits: dict[str, Any]) -> dict[str, Any]:
    one = problem(settings)
    title = f"Eq. 13, {len(one.starts)} + {len(one.general)} points, cloud of {len(one.cloud)}"
    expected = reference(one)

    def check(name: str, gradients: list[Tensor]) -> dict[str, Any]:
        got = flat(gradients)
        error = float((got - expected).norm() / expected.norm())
        if got.shape != expected.shape or not error <= TOLERANCE:
            raise Mismatch(
                f"{title}: {name}: relative error of the gradient {error:.2e}, allowed {TOLERANCE}"
            )
        return {"gradient_error": error}

    competitors = [
        Competitor(
            "ours", ours(one, True), "MLP.from_module(net): gradients from the last evaluation"
        ),
        Competitor("ours, module", ours(one, False), "net itself: one more forward for p(theta)"),
        Competitor(
            "published",
            by_published(one),
            "all rows, gradients of parameters thrown away, the matrix of all distances",
            rounds=2,
        ),
        Competitor(
            "compaction",
            by_compaction(one, compacted),
            "clean torch on the running rows, scipy's k-d tree built beforehand",
        ),
    ]
    if settings.device.type != "cpu":
        competitors.pop(0)
    table = compare(title, competitors, check, settings, ours=competitors[0].name)
    return {
        "cases": [
            {
                "rows": len(one.starts),
                "general_rows": len(one.general),
                "batch_rows": len(one.batch),
                "cloud": len(one.cloud),
                **table,
            }
        ]
    }
