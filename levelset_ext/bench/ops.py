"""The raw ops: bytes moved against what a copy moves, beside the same formulas in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from levelset_ext import _C, ops
from levelset_ext.bench.limits import CopyRates
from levelset_ext.bench.timing import Competitor, Mismatch, Settings, compare

TOLERANCE = 1e-4  # relative, of the rows whose J is not close to singular
NEAR_COPY = 0.6  # of what a copy of as many bytes moves: what an op should reach where it is large
LARGE = 4e6  # bytes; below, a call's overhead is what is measured
_CHECKED = 2048  # rows

_RUNNING = _C.status_codes["RUNNING"]


# --- the formulas in torch ------------------------------------------------------------------------


def apply(jacobian: Tensor, residual: Tensor) -> Tensor:
    """J^T (J J^T)^-1 r for l = 1 and, by Cramer's rule, l = 2."""
    return (jacobian * solve(jacobian, residual)[:, :, None]).sum(1)


def adjoint(jacobian: Tensor, gradient: Tensor) -> Tensor:
    """(J J^T)^-1 J g."""
    return solve(jacobian, (jacobian * gradient[:, None]).sum(2))


def solve(jacobian: Tensor, r: Tensor) -> Tensor:
    """(J J^T)^-1 r, and 0 where the determinant is 0."""
    if jacobian.shape[1] == 1:
        squares = jacobian.square().sum(2)
        return torch.where(squares > 0, r / squares, 0.0)
    first, second = jacobian[:, 0], jacobian[:, 1]
    a, b, c = (first * first).sum(1), (first * second).sum(1), (second * second).sum(1)
    determinant = a * c - b * b
    solved = torch.stack([c * r[:, 0] - b * r[:, 1], a * r[:, 1] - b * r[:, 0]], 1)
    return torch.where(determinant[:, None] > 0, solved / determinant[:, None], 0.0)


def update(points: Tensor, values: Tensor, jacobian: Tensor, level: Tensor, tol: float) -> Tensor:
    """A Newton step of the rows that are not within tol."""
    residual = values - level
    running = (residual.abs() > tol).any(1, keepdim=True)
    return torch.where(running, points - apply(jacobian, residual), points)


def update_(points: Tensor, values: Tensor, jacobian: Tensor, level: Tensor, tol: float) -> Tensor:
    return points.copy_(update(points, values, jacobian, level, tol))


def bracket(at: Tensor, start: Tensor, end: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """The first pass of a root search, from F at both ends (n, 2): the next point, and which rows
    go on."""
    residual = at.abs()
    running = (residual > tol).all(1) & (at[:, 0] * at[:, 1] < 0)
    s = at[:, 0] / (at[:, 0] - at[:, 1])
    s = torch.where(running, s, torch.where(residual[:, 0] <= residual[:, 1], 0.0, 1.0))
    return start + s[:, None] * (end - start), running


# --- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """moved: bytes that have to be read or written, each number once."""

    op: str
    n: int
    l: int  # noqa: E741
    d: int
    moved: float
    competitors: list[Competitor]
    check: Callable[[str, Any], dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.op}, n = {self.n}, l = {self.l}, d = {self.d}"


_compiled: dict[tuple[str, int], Callable[..., Any]] = {}


def compiled(name: str, outputs: int, formula: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once for every l; n and d stay open."""
    key = (name, outputs)
    if key not in _compiled:
        _compiled[key] = torch.compile(formula, dynamic=True)
    return _compiled[key]


def cases(settings: Settings) -> Iterator[Case]:
    rows = {
        "full": (1_000, 10_000, 100_000, 1_000_000),
        "quick": (1_000, 100_000),
        "tiny": (50,),
    }[settings.scale]
    for d in (2, 3, 784) if settings.scale != "tiny" else (5,):
        for l in (1, 2):  # noqa: E741
            for n in rows:
                if n * l * d <= 4e7:
                    yield from matrix_cases(n, l, d, settings)
                    if l == 1:
                        yield bracket_case(n, d, settings)


def matrix_cases(n: int, l: int, d: int, settings: Settings) -> Iterator[Case]:  # noqa: E741
    random = torch.Generator().manual_seed(n + l + d)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(settings.device)

    jacobian, values, points = normal(n, l, d), normal(n, l), normal(n, d)
    level = torch.zeros(1, l).to(settings.device)
    some = slice(0, _CHECKED)
    exact = jacobian[some].double()
    inverse = torch.linalg.pinv(exact)
    # Rows whose condition is large lose digits by any formula in float32; they are not compared.
    tame = inverse.flatten(1).norm(dim=1) * exact.flatten(1).norm(dim=1) < 20
    applied = (inverse @ values[some].double()[:, :, None])[:, :, 0]
    adjoined = (inverse.mT @ points[some].double()[:, :, None])[:, :, 0]
    before = points[some].double()

    def check(expected: Tensor, op: str) -> Callable[[str, Any], dict[str, Any]]:
        def compared(name: str, got: Tensor) -> dict[str, Any]:
            difference = (got[some].double() - expected)[tame].norm()
            error = float(difference / expected[tame].norm())
            if not error <= TOLERANCE:
                raise Mismatch(
                    f"{op}, n = {n}, l = {l}, d = {d}: {name}: relative error {error:.2e}, "
                    f"allowed {TOLERANCE:.0e}"
                )
            return {"worst_error": error}

        return compared

    def rivals(
        op: str,
        own: Callable[[], Any],
        own_out: Callable[[], Any] | None,
        formula: Callable[..., Any],
        *args: Any,
    ) -> list[Competitor]:
        found = [Competitor("ours", own), Competitor("eager", lambda: formula(*args))]
        if own_out is not None:
            found.append(Competitor("ours, out=", own_out, "writes to memory that it is given"))
        if settings.compiles:
            fast = compiled(op, l, formula)
            found.append(Competitor("torch.compile", lambda: fast(*args), may_fail=True))
        return found

    matrix = 4.0 * n * l * d
    room = torch.empty_like(points)

    def newton(out: Tensor | None = None) -> Tensor:
        return ops.newton_update(points, values, jacobian, level, tol=1e-6, out=out)[0]

    yield Case(
        "pinv_apply", n, l, d, matrix + 4.0 * n * (l + d),
        rivals(
            "apply",
            lambda: ops.pinv_apply(jacobian, values),
            lambda: ops.pinv_apply(jacobian, values, out=room),
            apply, jacobian, values,
        ),
        check(applied, "pinv_apply"),
    )  # fmt: skip
    yield Case(
        "pinv_adjoint", n, l, d, matrix + 4.0 * n * (l + d),
        rivals(
            "adjoint", lambda: ops.pinv_adjoint(jacobian, points), None,
            adjoint, jacobian, points,
        ),
        check(adjoined, "pinv_adjoint"),
    )  # fmt: skip
    yield Case(
        "newton_update", n, l, d, matrix + 4.0 * n * (l + 2 * d),
        rivals(
            "update", newton, lambda: newton(room),
            update, points, values, jacobian, level, 1e-6,
        ),
        check(before - applied, "newton_update"),
    )  # fmt: skip
    # In place: every second call takes the step back, so points stay where they are.
    status = torch.full((n,), _RUNNING, dtype=torch.int8, device=settings.device)

    def in_place(step: Callable[[Tensor, Tensor], Any]) -> Callable[[], Tensor]:
        own_points, signed, turn = points.clone(), (values, -values), 0

        def run() -> Tensor:
            nonlocal turn
            step(own_points, signed[turn % 2])
            turn += 1
            return own_points

        return run

    def in_place_check(name: str, got: Tensor) -> dict[str, Any]:
        return check(before - applied, "newton_update_")(name, got)

    formula = compiled("update_", l, update_) if settings.compiles else update_
    competitors = [
        Competitor(
            "ours",
            in_place(lambda p, f: ops.newton_update_(p, status, f, jacobian, level, tol=1e-6)),
        ),
        Competitor("eager", in_place(lambda p, f: update_(p, f, jacobian, level, 1e-6))),
    ]
    if settings.compiles:
        competitors.append(
            Competitor(
                "torch.compile",
                in_place(lambda p, f: formula(p, f, jacobian, level, 1e-6)),
                may_fail=True,
            )
        )
    yield Case(
        "newton_update_", n, l, d, matrix + 4.0 * n * (l + 2 * d), competitors, in_place_check
    )


def bracket_case(n: int, d: int, settings: Settings) -> Case:
    """The first pass of a search: it reads no state, so every call does the same."""
    random = torch.Generator().manual_seed(n + d)
    start = torch.randn(n, d, generator=random).to(settings.device)
    end = torch.randn(n, d, generator=random).to(settings.device)
    at = torch.rand(n, 2, generator=random).to(settings.device) + 0.5
    at[:, 1] *= -1.0
    points = torch.empty_like(start)
    status = torch.full((n,), _RUNNING, dtype=torch.int8, device=settings.device)
    state = ops.bracket_state(n, settings.device)

    def own() -> Tensor:
        ops.bracket_update_(points, status, state, start, end, at, 0.0, tol=1e-6)
        return points

    some = slice(0, _CHECKED)
    expected = bracket(at[some].double(), start[some].double(), end[some].double(), 1e-6)[0]

    def check(name: str, got: Tensor) -> dict[str, Any]:
        error = float((got[some].double() - expected).norm() / expected.norm())
        if not error <= TOLERANCE:
            raise Mismatch(
                f"bracket_update_, n = {n}, d = {d}: {name}: relative error {error:.2e}, allowed "
                f"{TOLERANCE:.0e}"
            )
        return {"worst_error": error}

    competitors = [
        Competitor("ours", own),
        Competitor("eager", lambda: bracket(at, start, end, 1e-6)[0]),
    ]
    if settings.compiles:
        fast = compiled("bracket", 1, bracket)
        competitors.append(
            Competitor("torch.compile", lambda: fast(at, start, end, 1e-6)[0], may_fail=True)
        )
    size = n * (4.0 * (3 * d + 2) + 1)  # without the state, which is ours alone
    return Case("bracket_update_", n, 1, d, size, competitors, check)


def run(settings: Settings, limits: dict[str, Any]) -> dict[str, Any]:
    copies = CopyRates(settings)
    found = []
    # Their calls are short: without the memory of a call, which costs more than the call.
    for case in cases(settings):
        table = compare(case.name, case.competitors, case.check, settings, memory=False)
        limit = copies.rate(case.moved)
        for entry in table["competitors"].values():
            rate = case.moved / entry["seconds"]["median"]
            entry["gb_per_s"] = rate / 1e9
            entry["share_of_copy"] = rate / limit
            entry["near_copy"] = rate >= NEAR_COPY * limit
        found.append(
            {
                "op": case.op,
                "rows": case.n,
                "outputs": case.l,
                "dimension": case.d,
                "bytes": case.moved,
                "copy_gb_per_s": limit / 1e9,
                **table,
            }
        )
    return {"cases": found, "geometric_mean_ratio": means(found), "near_copy": near_copies(found)}


def near_copies(found: list[dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """For every op and competitor: in how many of its cases of at least :data:`LARGE` bytes it
    reaches :data:`NEAR_COPY` of a copy, and of how many."""
    counts: dict[str, dict[str, list[int]]] = {}
    for table in found:
        if table["bytes"] < LARGE:
            continue
        for name, entry in table["competitors"].items():
            count = counts.setdefault(table["op"], {}).setdefault(name, [0, 0])
            count[0] += int(entry["near_copy"])
            count[1] += 1
    return counts


def means(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For every op and competitor the geometric mean of its ratio to ours over all sizes."""
    collected: dict[str, dict[str, list[float]]] = {}
    for table in found:
        for name, entry in table["competitors"].items():
            if name != table["ours"]:
                ratios = collected.setdefault(table["op"], {}).setdefault(name, [])
                ratios.append(math.log(entry["ratio"]["median"]))
    return {
        op: {name: math.exp(sum(r) / len(r)) for name, r in by_name.items()}
        for op, by_name in collected.items()
    }
