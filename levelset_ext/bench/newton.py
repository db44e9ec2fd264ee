"""Newton projection (Eq. 4): the compiled loop against everything PyTorch offers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import levelset_ext as ls
from levelset_ext import _C
from levelset_ext.bench import plain, published
from levelset_ext.bench.limits import matrix_rate
from levelset_ext.bench.plain import Found
from levelset_ext.bench.timing import Competitor, Mismatch, Settings, compare, fastest
from levelset_ext.networks import ImplicitMLP, compiled_fields, fc1

MAX_ITERS, TOL = 20, 1e-5

# A float32 rounding at a kink sends a start of a ReLU network elsewhere than float64 does; so many
# rows in a hundred may end at another point of the level set than the reference.
ELSEWHERE = 0.02
CLOSE = 1e-3  # a length, in the units of the points
# bfloat16 has three digits: a row's first step ends a little aside of where float32 would, and so
# does its answer, which is on the level set to the same tolerance. Only that is asked of it.
ASIDE = ("ours, mixed",)


@dataclass(frozen=True)
class Problem:
    """Project x (n, d) to F = level (n, l)."""

    name: str
    net: ImplicitMLP
    x: Tensor
    level: Tensor


class Reference:
    """Float64 Newton on some of the rows, and what float32 rounds of F."""

    def __init__(self, problem: Problem, rows: int) -> None:
        self.problem = problem
        n = len(problem.x)
        self.some = torch.arange(0, n, max(1, n // rows), device=problem.x.device)
        self.net = copy.deepcopy(problem.net).double().requires_grad_(False)
        x, level = problem.x[self.some].double(), problem.level[self.some].double()
        found = plain.newton_compacted(plain.by_autograd(self.net), x, level, MAX_ITERS, TOL)
        self.points = found.points
        self.converged = self._residual(found.values, level) <= TOL
        with torch.no_grad():
            single = problem.net(found.points.float()).double()
            self.rounding = float((single - self.net(found.points.float().double())).abs().max())

    @staticmethod
    def _residual(values: Tensor, level: Tensor) -> Tensor:
        return (values - level).abs().amax(1)

    @torch.no_grad()
    def check(self, name: str, found: Found) -> dict[str, Any]:
        """What it says has converged is on the level set in float64, as many rows have converged as
        in float64, and they have got to the same places."""
        level = self.problem.level
        finite = torch.isfinite(found.values).all(1)
        claimed = finite & (self._residual(found.values, level) <= TOL)
        allowed = TOL + 4 * self.rounding
        exact = self.net(found.points[self.some].double())
        residual = self._residual(exact, level[self.some].double())[claimed[self.some]]
        worst = float(residual.max()) if len(residual) else 0.0
        if not worst <= allowed:
            raise Mismatch(
                f"{self.problem.name}: {name}: |F - c| = {worst:.2e} in float64 at a row that it "
                f"calls converged, allowed {allowed:.2e}"
            )
        lost = float((self.converged & ~claimed[self.some]).double().mean())
        there = found.points[self.some].double() - self.points
        far = torch.linalg.vector_norm(there, dim=1) > CLOSE
        elsewhere = float((far & self.converged).double().mean())
        if lost > ELSEWHERE or (elsewhere > ELSEWHERE and name not in ASIDE):
            raise Mismatch(
                f"{self.problem.name}: {name}: {lost:.1%} of the rows did not converge that do in "
                f"float64, {elsewhere:.1%} are elsewhere; allowed {ELSEWHERE:.0%}"
            )
        return {
            "converged": int(claimed.sum()),
            "worst_residual_float64": worst,
            "elsewhere": elsewhere,
            "row_evaluations": found.rows / len(level),
        }


def ours(problem: Problem, automatic: bool) -> Callable[[], Found]:
    """``project(net, x)`` as anyone calls it; ``automatic=False`` keeps it from recognising the
    network, which is what a network that it does not recognise gets."""

    def run() -> Found:
        with compiled_fields(automatic), torch.no_grad():
            r = ls.project(problem.net, problem.x, problem.level, MAX_ITERS, TOL)
        return Found(r.points, r.values, r.jacobian, int(r.iterations.sum()) + len(r))

    return run


def ours_mixed(problem: Problem) -> Callable[[], Found]:
    """The compiled loop whose first evaluation of a row multiplies bfloat16 numbers."""
    field = ls.networks.MLP.from_module(problem.net, mixed=True)

    def run() -> Found:
        with torch.no_grad():
            r = ls.project(field, problem.x, problem.level, MAX_ITERS, TOL)
        return Found(r.points, r.values, r.jacobian, int(r.iterations.sum()) + len(r))

    return run


def competitors(problem: Problem, names: Sequence[str]) -> list[Competitor]:
    x, level = problem.x, problem.level
    theirs = copy.deepcopy(problem.net).requires_grad_(True)
    frozen = copy.deepcopy(problem.net).requires_grad_(False)

    def by_published() -> Found:
        points, values, jacobian, count = published.newton(theirs, x, level, MAX_ITERS, TOL)
        return Found(points, values, jacobian, count * len(x))

    def all_rows(evaluate: plain.Evaluate, step: Any = plain.step) -> Callable[[], Found]:
        return lambda: plain.newton_all_rows(evaluate, x, level, MAX_ITERS, TOL, step)

    def compacted(evaluate: plain.Evaluate) -> Callable[[], Found]:
        return lambda: plain.newton_compacted(evaluate, x, level, MAX_ITERS, TOL)

    known: dict[str, Callable[[], Competitor]] = {
        "ours": lambda: Competitor(
            "ours", ours(problem, True), "project(net, x): the compiled loop"
        ),
        "ours, mixed": lambda: Competitor(
            "ours, mixed",
            ours_mixed(problem),
            "MLP.from_module(net, mixed=True): first evaluations in bfloat16, the last in float32",
        ),
        "ours, any network": lambda: Competitor(
            "ours, any network",
            ours(problem, False),
            "project(net, x), the network not recognised: autograd, running rows, compiled update",
        ),
        "published": lambda: Competitor(
            "published",
            by_published,
            "all rows until the worst is done; backward to x and to all parameters",
        ),
        "eager": lambda: Competitor(
            "eager",
            all_rows(plain.by_autograd(frozen)),
            "all rows until the worst is done; autograd.grad in x alone",
        ),
        "torch.compile": lambda: Competitor(
            "torch.compile",
            all_rows(torch.compile(plain.by_vjp(frozen), dynamic=True)),
            "eager, with F and D_xF compiled by inductor",
            may_fail=True,
        ),
        "torch.func": lambda: Competitor(
            "torch.func",
            all_rows(plain.by_jacrev(frozen), plain.step_by_pinv),
            "all rows; vmap(jacrev) and torch.linalg.pinv",
        ),
        "compaction": lambda: Competitor(
            "compaction",
            compacted(plain.by_autograd(frozen)),
            "eager on the rows that are not done",
        ),
        "compaction, oneDNN": lambda: Competitor(
            "compaction, oneDNN",
            compacted(plain.PackedEvaluate(frozen, len(x))),
            "the same, packed linear layers with ReLU fused, backward by hand: the best of PyTorch",
            may_fail=True,
        ),
    }
    if x.device.type != "cpu":
        known.pop("compaction, oneDNN")
    if x.device.type != "cpu" or _C.mlp_mixed is None:
        known.pop("ours, mixed")
    return [known[name]() for name in names if name in known]


EVERYONE = (
    "ours", "ours, mixed", "ours, any network", "published", "eager", "torch.compile", "torch.func",
    "compaction", "compaction, oneDNN",
)  # fmt: skip
ONE_WITHOUT = ("ours", "published", "eager", "compaction", "compaction, oneDNN")
LARGE = ("ours", "ours, mixed", "published", "compaction, oneDNN")


def problem(
    name: str, net: ImplicitMLP, n: int, settings: Settings, unreachable: bool = False
) -> Problem:
    """Starts uniform in [-1.1, 1.1]^d, level 0. ``unreachable`` gives the first row a level below
    the least value of the network: it never converges, and the others do not know."""
    random = torch.Generator().manual_seed(1)
    x = (2.2 * torch.rand(n, net.dim, generator=random) - 1.1).to(settings.device)
    level = torch.zeros(n, net.outputs, device=settings.device)
    if unreachable:
        level[0] = -5.0
    return Problem(name, net.to(settings.device), x, level)


def start(net: ImplicitMLP) -> ImplicitMLP:
    """The authors' start with a fixed seed; F grows from -1 like a distance and has every level
    above -1."""
    return net.init_paper_(torch.Generator().manual_seed(0))


def fc28(width: int = 509, depth: int = 8) -> ImplicitMLP:
    """FC-2-8, as the published timings had it: eight hidden layers of 509 fed [h, x]."""
    return start(ImplicitMLP(3, 1, width, depth, activation="relu", skip=True))


def products(net: ImplicitMLP) -> float:
    """FLOP of F and D_xF at one row: every weight once forward, once per output backward."""
    weights = sum(p.numel() for p in net.parameters() if p.dim() == 2)
    return 2.0 * weights * (1 + net.outputs)


def solve(
    one: Problem,
    settings: Settings,
    names: Sequence[str],
    limits: dict[str, Any] | None = None,
    slow: int | None = None,
) -> dict[str, Any]:
    """One case: all competitors, and ours as a share of what the machine's products allow.

    slow: rounds of those that evaluate all rows until the worst is done.
    """
    reference = Reference(one, settings.size(1024, 512, 32))
    if not settings.compiles:
        names = [name for name in names if name != "torch.compile"]
    everyone = [
        replace(c, rounds=slow) if slow is not None and c.name in ("published", "eager") else c
        for c in competitors(one, names)
    ]
    table = compare(one.name, everyone, reference.check, settings)
    table |= {
        "rows": len(one.x),
        "dimension": one.net.dim,
        "width": one.net.last.in_features,
        "hidden_layers": len(one.net.hidden),
        "rounding_of_F": reference.rounding,
    }
    mine = table["competitors"]["ours"]
    flop = mine["row_evaluations"] * len(one.x) * products(one.net)
    table["ours_gflops"] = flop / mine["seconds"]["median"] / 1e9
    if limits is not None:
        table["ours_share_of_matrix_rate"] = 1e9 * table["ours_gflops"] / matrix_rate(limits)
    return table


def run(settings: Settings, limits: dict[str, Any]) -> dict[str, Any]:
    """All cases, and the growth curves at the full scale."""
    small = settings.scale == "tiny"
    net = fc28(24, 3) if small else fc28()
    n = settings.size(5000, 1000, 64)
    fewer = Settings(settings.scale, min(settings.repeats, 3), settings.device)
    cases = [solve(problem(f"FC-2-8, {n} rows", net, n, settings), settings, EVERYONE, limits)]
    shallow = start(ImplicitMLP(3, 1, 32, 2, activation="relu") if small else fc1())
    cases.append(
        solve(problem(f"FC-1, {n} rows", shallow, n, settings), settings, EVERYONE, limits)
    )
    one = problem(f"FC-2-8, {n} rows, one without a root", net, n, settings, unreachable=True)
    cases.append(solve(one, fewer, ONE_WITHOUT, limits, slow=1))
    if settings.scale == "full":
        one = problem("FC-2-8, 20000 rows", net, 20_000, settings)
        cases.append(solve(one, fewer, LARGE, limits, slow=1))
        one = problem("FC-1, 20000 rows", shallow, 20_000, settings)
        cases.append(solve(one, fewer, LARGE, limits, slow=1))
    return {
        "cases": cases,
        "growth": growth(fewer) if settings.scale == "full" else [],
        "packing_seconds": packing(net, settings),
    }


def packing(net: ImplicitMLP, settings: Settings) -> float | None:
    """What the compiled loop pays when the parameters have changed, once per training step."""
    if settings.device.type != "cpu":
        return None
    field = ls.networks.MLP.from_module(net)

    def pack() -> None:
        with torch.no_grad():
            net.last.bias.add_(0.0)
        with field.packed():
            pass

    return fastest(pack, settings.device)


BASE = {"rows": 2000, "dimension": 3, "width": 256, "depth": 4}
GROWTH: dict[str, tuple[int, ...]] = {
    "rows": (100, 500, 2000, 8000),
    "dimension": (2, 3, 8, 32, 128),
    "width": (32, 64, 128, 256, 512),
    "depth": (1, 2, 4, 8),
}


def growth(settings: Settings, axes: dict[str, tuple[int, ...]] | None = None) -> list[Any]:
    """Seconds against one size at a time, the others as in ``BASE``; and against threads."""
    names = ("ours", "published", "compaction", "compaction, oneDNN")
    axes = GROWTH if axes is None else axes
    curves = []

    def point(axis: str, value: int, sizes: dict[str, int]) -> dict[str, Any]:
        net = start(
            ImplicitMLP(sizes["dimension"], 1, sizes["width"], sizes["depth"], activation="relu")
        )
        one = problem(f"{axis} = {value}", net, sizes["rows"], settings)
        return {"axis": axis, "value": value, **solve(one, settings, names)}

    for axis, values in axes.items():
        curves += [point(axis, value, {**BASE, axis: value}) for value in values]
    threads = torch.get_num_threads()
    if settings.device.type == "cpu" and threads > 1:
        try:
            for count in sorted({1, 2, threads // 2, threads}):
                torch.set_num_threads(count)
                curves.append(point("threads", count, BASE))
        finally:
            torch.set_num_threads(threads)
    return curves
