"""Random arguments for every op and public function, checked against float64.

    python tests/fuzz/fuzz_ops.py --cases 20000

Hypothesis draws shapes, strides, dtypes and kinds of contents, and shrinks what fails. Allowed are
a right answer, or a TypeError, ValueError or RuntimeError whose message names an argument.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
# ruff: noqa: E402 (the two folders above hold what is imported below)

import driver
import problems
import reference
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import levelset_ext as ls
from levelset_ext import margin as margins
from levelset_ext import ops
from levelset_ext.networks import MLP, compiled_fields
from levelset_ext.result import LevelSetResult, Status

FLOATS = (torch.float64, torch.float32)
DTYPES = [*FLOATS * 6, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
LAYOUTS = [*["plain"] * 5, "transposed", "sliced", "offset", "expanded", "zero"]
CONTENTS = [*["normal"] * 8, "tiny", "huge", "denormal", "zeros", "parallel", "nan", "inf", "mixed"]
SIZES = st.one_of(st.integers(0, 5), st.sampled_from([1, 2, 17, 40]))
OUTPUTS = st.one_of(st.integers(1, 3), st.integers(1, 3), st.integers(0, 10))
DIMENSIONS = st.one_of(*[st.integers(1, 6)] * 4, st.sampled_from([0, 31, 64, 300, 784, 5000]))
BENDS = st.sampled_from([*["none"] * 12, "short", "long", "more axes", "fewer axes", "swapped"])
SEEDS = st.integers(0, 2**31 - 1)


class Refused(Exception):
    """A typed error, as it should be."""


def make(shape: tuple[int, ...], kind: dict[str, Any], number: int) -> Tensor:
    """A tensor of the drawn dtype, contents, strides and (perhaps bent) shape."""
    shape = _bent(shape, kind["bend"])
    generator = torch.Generator().manual_seed((kind["seed"] + 7919 * number) % 2**31)
    layout = kind["layout"]
    stored = tuple(reversed(shape)) if layout == "transposed" else shape
    if layout == "sliced":
        stored = (*shape[:-1], 2 * shape[-1]) if shape else shape
    if layout == "offset":
        stored = (shape[0] + 1, *shape[1:]) if shape else shape
    if layout == "expanded":
        stored = (min(shape[0], 1), *shape[1:]) if shape else shape
    if layout == "zero":
        stored = tuple(min(s, 1) for s in shape)
    x = _contents(stored, kind["content"], generator, kind["dtype"])
    if layout == "transposed" and shape:
        return x.permute(*reversed(range(x.dim())))
    if layout == "sliced" and shape:
        return x[..., ::2]
    if layout == "offset" and shape:
        return x[1:]
    return x.expand(shape) if layout in ("expanded", "zero") else x


def _bent(shape: tuple[int, ...], bend: str) -> tuple[int, ...]:
    if bend == "short" and shape:
        return (*shape[:-1], max(shape[-1] - 1, 0))
    if bend == "long" and shape:
        return (shape[0] + 1, *shape[1:])
    if bend == "more axes":
        return (*shape, 1)
    if bend == "fewer axes":
        return shape[1:]
    return tuple(reversed(shape)) if bend == "swapped" else shape


def _contents(
    shape: tuple[int, ...], content: str, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.finfo(torch.float32)
    if content == "tiny":
        x = x * info.tiny * 1e3
    elif content == "huge":
        x = x * info.max / 1e3
    elif content == "denormal":
        x = x * info.tiny / 8
    elif content == "zeros":
        x = torch.zeros_like(x)
    elif content == "parallel" and x.dim() == 3 and x.shape[1]:
        x = x[:, :1] * torch.arange(1.0, x.shape[1] + 1, dtype=torch.float64)[None, :, None]
    elif content in ("nan", "inf", "mixed") and x.numel():
        odd = {"nan": [torch.nan], "inf": [torch.inf, -torch.inf]}.get(
            content, [torch.nan, torch.inf, 0.0, info.max, info.tiny / 4]
        )
        flat = x.flatten()
        for value in odd:
            at = torch.randint(flat.numel(), (1,), generator=generator)
            flat[at] = value
        x = flat.view(shape)
    if dtype.is_floating_point or dtype.is_complex:
        return x.to(dtype)
    return x.nan_to_num(0.0, 9.0, -9.0).clamp(-9, 9).to(dtype)


KIND = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from(LAYOUTS),
        "content": st.sampled_from(CONTENTS),
        "bend": BENDS,
        "seed": SEEDS,
    }
)
SAME_DTYPE = st.sampled_from([True] * 5 + [False])


def kinds(count: int) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Kinds of several tensors, mostly of one dtype and mostly with one bent at most."""

    def agree(drawn: tuple[list[dict[str, Any]], bool, int]) -> list[dict[str, Any]]:
        found, same, bent = drawn
        dtype = found[0]["dtype"]
        return [
            {
                **k,
                "dtype": dtype if same else k["dtype"],
                "bend": k["bend"] if i == bent else "none",
            }
            for i, k in enumerate(found)
        ]

    several = st.lists(KIND, min_size=count, max_size=count)
    return st.tuples(several, SAME_DTYPE, st.integers(0, count)).map(agree)


# What torch says of a dtype that it does not know, or of points that a network does not take.
_TORCHS_OWN = (
    "dtype|same type|converted to|not implemented|not support|mat1|m1 and m2|batch2|size of tensor|"
    "shapes"
)


def attempt(function: Callable[..., Any], *args: Any, also: str = "", **kwargs: Any) -> Any:
    """The call's value; Refused where it raised a typed error that names an argument."""
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        names = [*inspect.signature(function).parameters, *also.split()]
        named = re.search(rf"\b({'|'.join(names)})\b", str(error))
        if not named and not (_foreign(args) and re.search(_TORCHS_OWN, str(error))):
            what = f"{function.__name__} names no argument: {type(error).__name__}: {error}"
            raise AssertionError(what) from error
        raise Refused from error


def _foreign(args: tuple[Any, ...]) -> bool:
    """Whether torch itself may be the one to refuse: it calls a network, or a dtype is no float."""
    return any(
        isinstance(a, nn.Module | MLP) or (isinstance(a, Tensor) and a.dtype not in FLOATS)
        for a in args
    )


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def check(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


# --- pinv_apply, pinv_adjoint ---------------------------------------------------------------------


def judged(jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that a float64 reference can speak of, the length of every row of J, and the smallest
    part of a row that is orthogonal to those before it."""
    J = jacobian.double()
    info = torch.finfo(jacobian.dtype)
    lengths = torch.linalg.vector_norm(J, dim=2)
    fair = torch.isfinite(J).all(2).all(1)
    fair &= ((lengths > info.tiny**0.5 * 10) & (lengths < info.max**0.5 / 10)).all(1)
    unit = torch.where(fair[:, None, None], J / lengths.clamp(min=1e-300)[:, :, None], 0.0)
    unit = unit.nan_to_num(0.0, 0.0, 0.0)
    if J.shape[1] > J.shape[2]:
        return fair, lengths, torch.zeros(len(J), dtype=torch.float64)
    pivots = torch.linalg.qr(unit.mT)[1].diagonal(dim1=1, dim2=2).abs().amin(1)
    return fair, lengths, pivots


def pinv_case(case: dict[str, Any]) -> None:
    n, l, d = case["n"], case["l"], case["d"]  # noqa: E741
    adjoint = case["adjoint"]
    jacobian = make((n, l, d), case["kinds"][0], 0)
    vector = make((n, d if adjoint else l), case["kinds"][1], 1)
    function = ops.pinv_adjoint if adjoint else ops.pinv_apply
    found, status = attempt(function, jacobian, vector, return_status=True)
    dtype = torch.promote_types(jacobian.dtype, vector.dtype)
    check(found.dtype == dtype in FLOATS, f"dtype {found.dtype} of {dtype}")
    check(jacobian.dim() == 3 and vector.dim() == 2, "took a wrong number of axes")
    n, l, d = jacobian.shape  # noqa: E741
    check(1 <= l <= 8, f"took l = {l}")
    check(tuple(found.shape) == (n, l if adjoint else d), f"shape {tuple(found.shape)}")
    check(tuple(status.shape) == (n,) and status.dtype == torch.int8, "status")
    if n == 0:
        return
    allowed = torch.tensor([Status.CONVERGED, Status.RANK_DEFICIENT, Status.NON_FINITE])
    check(bool(torch.isin(status, allowed).all()), f"statuses {status.tolist()}")
    good = status == Status.CONVERGED
    check(bool((found[~good] == 0).all()), "a row without full rank is not 0")
    J, v = jacobian.to(dtype), vector.to(dtype)
    check(not bool((good & ~torch.isfinite(J).all(2).all(1)).any()), "NaN in J was not noticed")
    if d == 0:
        check(not bool(good.any()), "no dimension, and yet of full rank")
        return
    fair, lengths, pivots = judged(J)
    tau = ops.rank_tolerance(dtype)
    wrong = fair & (pivots > 4 * tau) & (status == Status.RANK_DEFICIENT)
    check(not bool(wrong.any()), f"of full rank, pivots {pivots[wrong].tolist()}")
    wrong = fair & (pivots < tau / 4) & good
    check(not bool(wrong.any()), f"not of full rank, pivots {pivots[wrong].tolist()}")
    clear = fair & good & (pivots > 1e-2) & torch.isfinite(v).all(1)
    if not clear.any():
        return
    J, v, lengths = J[clear].double(), v[clear].double(), lengths[clear]
    unit = J / lengths[:, :, None]
    pivot = torch.linalg.svdvals(unit).amin(1)  # at most the smallest pivot
    if adjoint:
        scaled, size = reference.pinv_adjoint(unit, v), torch.linalg.vector_norm(v, dim=1)
        got = found[clear].double() * lengths
    else:
        asked = v / lengths
        scaled, size = reference.pinv_apply(unit, asked), torch.linalg.vector_norm(asked, dim=1)
        got = found[clear].double()
    info = torch.finfo(dtype)
    bound = 64 * info.eps * (d + 8) ** 0.5 * size / pivot**2 + 16 * info.tiny * (
        1 + lengths.amax(1)
    )
    error = torch.linalg.vector_norm(got - scaled, dim=1)
    fits = (size / pivot < info.max / 100) & (
        scaled.abs().amax(1) / lengths.amin(1) < info.max / 100
    )
    fits &= v.abs().amax(1) < info.max**0.5
    wrong = fits & ~(error <= bound)
    check(not bool(wrong.any()), f"error {error[wrong].tolist()} above {bound[wrong].tolist()}")


PINV = st.fixed_dictionaries(
    {"n": SIZES, "l": OUTPUTS, "d": DIMENSIONS, "kinds": kinds(2), "adjoint": st.booleans()}
)


# --- newton_update, in place and not --------------------------------------------------------------


def newton_case(case: dict[str, Any]) -> None:
    n, l, d, k = case["n"], case["l"], case["d"], case["kinds"]  # noqa: E741
    points, values = make((n, d), k[0], 0), make((n, l), k[1], 1)
    jacobian = make((n, l, d), k[2], 2)
    level: Any = {
        "zero": lambda: 0.0,
        "number": lambda: 0.25,
        "huge": lambda: 1e30,
        "nan": lambda: float("nan"),
        "rows": lambda: make((n, l), k[3], 3),
        "outputs": lambda: make((l,), k[3], 3),
    }[case["level"]]()
    box: dict[str, Any] = {}
    if case["box"] != "none":
        k[3] = {**k[3], "dtype": k[3]["dtype"] if k[3]["dtype"] in FLOATS else torch.float32}
        box["lower"] = make((d,), k[3], 4) - (0.0 if case["box"] == "crossed" else 1.0)
        box["upper"] = box["lower"] if case["box"] == "one point" else make((d,), k[3], 5) + 1
    options = {"tol": case["tol"], "max_step": case["max_step"], **box}
    status = None
    if case["status"] != "none":
        generator = torch.Generator().manual_seed(k[0]["seed"])
        status = torch.randint(0, 8 if case["status"] == "any" else 2, (n,), generator=generator)
        status = status.to(torch.int8)
    moved, after = attempt(
        ops.newton_update, points, values, jacobian, level, status=status, **options
    )
    dtype = moved.dtype
    check(dtype in FLOATS and moved.shape == points.shape, f"{dtype}, {tuple(moved.shape)}")
    running = torch.ones(len(points), dtype=torch.bool) if status is None else status == 1
    p = points.to(dtype)
    check(problems.same_bits(moved[~running], p[~running]), "a row that does not run has moved")
    if status is not None:
        check(torch.equal(after[~running], status[~running]), "the status of such a row changed")
    done = after == Status.CONVERGED
    c = ops.level_rows(level, len(p), values.shape[1], p).expand(values.shape)
    residual = (values.to(dtype) - c).abs().amax(1)
    sure = running & torch.isfinite(residual)
    near = sure & (residual <= options["tol"])
    finite = torch.isfinite(p).all(1) & torch.isfinite(jacobian.to(dtype)).all(2).all(1)
    check(bool(done[near & finite].all()), "a row within tol did not converge")
    check(not bool((done & sure & (residual > options["tol"])).any()), "converged outside tol")
    still = running & (after != Status.RUNNING) & (after != Status.STALLED)
    # A row that is NON_FINITE may stand where it landed, as at infinity.
    still &= after != Status.NON_FINITE
    check(problems.same_bits(moved[still], p[still]), "a row that is done has moved")
    check(
        bool(torch.isfinite(moved[running & (after == Status.RUNNING)]).all()), "moved to no place"
    )
    _against_eq_4(moved, after, p, values.to(dtype), jacobian.to(dtype), c, running, options)
    # In place, the same to the bit; the contiguous copies are its own.
    there = p.clone(memory_format=torch.contiguous_format)
    mark = torch.ones(len(p), dtype=torch.int8) if status is None else status.clone()
    ops.newton_update_(there, mark, values.to(dtype), jacobian.to(dtype), level, **options)
    check(problems.same_bits(there, moved) and torch.equal(mark, after), "in place differs")


def _against_eq_4(
    moved: Tensor, after: Tensor, p: Tensor, F: Tensor, J: Tensor, c: Tensor, running: Tensor,
    options: dict[str, Any],
) -> None:  # fmt: skip
    lower, upper = options.get("lower"), options.get("upper")
    fair, lengths, pivots = judged(J) if J.shape[2] else (running & False,) * 3
    rows = running & (after == Status.RUNNING) & fair
    if not rows.any():
        return
    rows &= (pivots > 1e-2) & (p.abs().amax(1) < 1e6) & (F.abs().amax(1) < 1e15)
    rows &= c.abs().amax(1) < 1e15
    if lower is not None and upper is not None:
        rows &= bool(torch.isfinite(lower).all() and torch.isfinite(upper).all())
        rows &= bool((lower <= upper).all())
    if not rows.any():
        return
    F, J, c, p64 = F[rows].double(), J[rows].double(), c[rows].double(), p[rows].double()
    # Rows of J as long as one, so that the reference's normal equations keep their digits.
    long = lengths[rows]
    least = torch.linalg.svdvals(J / long[:, :, None]).amin(1)
    expected = reference.newton_update(
        p64, (F - c) / long, J / long[:, :, None], 0.0,
        None if lower is None else lower.to(p.dtype).double(),
        None if upper is None else upper.to(p.dtype).double(), options["max_step"],
    )  # fmt: skip
    size = torch.linalg.vector_norm((F - c) / long, dim=1) / least**2
    bound = 64 * eps_of(p.dtype) * (p.shape[1] + 8) ** 0.5 * (size + p64.abs().amax(1))
    bound = bound + 64 * eps_of(p.dtype) * (F.abs() / long).amax(1) / least**2
    bound = bound + 16 * torch.finfo(p.dtype).tiny
    error = (moved[rows].double() - expected).abs().amax(1)
    wrong = (error > bound) & (bound < 1e30)
    check(not bool(wrong.any()), f"error {error[wrong].tolist()} above {bound[wrong].tolist()}")


NEWTON = st.fixed_dictionaries(
    {
        "n": SIZES,
        "l": OUTPUTS,
        "d": DIMENSIONS,
        "kinds": kinds(4),
        "level": st.sampled_from(["zero"] * 4 + ["number", "huge", "nan", "rows", "outputs"]),
        "box": st.sampled_from(["none"] * 4 + ["wide", "crossed", "one point"]),
        "tol": st.sampled_from([0.0, 1e-5, 0.5, 1e300]),
        "max_step": st.sampled_from([float("inf"), 0.5, 1e-30, 1e30]),
        "status": st.sampled_from(["none", "none", "running or not", "any"]),
    }
)


def alias_case(case: dict[str, Any]) -> None:
    """In place, with any index list: the answer of copies, or a refusal. Where arguments share
    memory with the points the answer is not specified, but there is one."""
    n, d = case["n"], case["d"]
    generator = torch.Generator().manual_seed(case["seed"])
    base = torch.randn(4 * (n + 1) * (d + 1), generator=generator, dtype=case["dtype"])
    points = base[: n * d].view(n, d)
    shift = case["shift"] % (n * d + 1)
    jacobian = base[shift : shift + n * d].view(n, 1, d)
    values = base[shift : shift + n].view(n, 1)
    level = base[: n * 1].view(n, 1) if case["level"] else 0.0
    lower = base[shift : shift + d].clone() if case["box"] else None  # the box may not be shared
    if not case["alias"]:
        jacobian, values = jacobian.clone(), values.clone()
    status = torch.ones(n, dtype=torch.int8)
    index = None
    if case["index"] != "none":
        high = n + 2 if case["index"] == "outside" else n
        low = -2 if case["index"] == "outside" else 0
        rows = torch.randint(low, max(high, low + 1), (case["m"],), generator=generator)
        index = torch.unique(rows) if case["index"] == "distinct" else rows
        index = index[:n]
        values, jacobian = values[: len(index)], jacobian[: len(index)]
        if len(index) and n == 0:
            return
    copies = [None if t is None else t.clone() for t in (values, jacobian, lower)]
    level_copy = level.clone() if isinstance(level, Tensor) else level
    p, s = points.clone(), status.clone()
    repeats = index is not None and len(torch.unique(index)) < len(index)
    attempt(
        ops.newton_update_, p, s, copies[0], copies[1], level_copy, index=index, lower=copies[2]
    )
    attempt(ops.newton_update_, points, status, values, jacobian, level, index=index, lower=lower)
    check(bool(((status >= 0) & (status <= 6)).all()), f"status {status.tolist()}")
    if repeats or case["alias"] or case["level"]:
        return
    check(problems.same_bits(points, p), "another answer than that of copies")
    check(torch.equal(status, s), "another status than that of copies")


ALIAS = st.fixed_dictionaries(
    {
        "n": st.integers(0, 6),
        "d": st.integers(1, 5),
        "m": st.integers(0, 8),
        "seed": SEEDS,
        "dtype": st.sampled_from(FLOATS),
        "shift": st.integers(0, 40),
        "alias": st.booleans(),
        "level": st.booleans(),
        "box": st.booleans(),
        "index": st.sampled_from(["none", "none", "distinct", "repeats", "outside"]),
    }
)


# --- bracket_update_ ------------------------------------------------------------------------------


def bracket_case(case: dict[str, Any]) -> None:
    n, d, k = case["n"], case["d"], case["kinds"]
    points = make((n, d), {**k[0], "layout": "plain"}, 0)
    start, end = make((n, d), k[1], 1), make((n, d), k[2], 2)
    values = make((n, 2), k[3], 3)
    status = torch.ones(max(points.shape[0], 0) if points.dim() else 0, dtype=torch.int8)
    bracket = ops.bracket_state(len(status))
    for step in range(4):
        attempt(
            ops.bracket_update_, points, status, bracket, start, end, values, case["level"],
            tol=case["tol"], variant=case["variant"], last=step == 3,
        )  # fmt: skip
        values = make((n, 1), {**k[3], "bend": "none"}, 4 + step)
        check(bool(((status >= 0) & (status <= 6)).all()), f"status {status.tolist()}")
    check(not bool((status == Status.RUNNING).any()), "the last pass leaves a row running")
    if start.is_complex() or end.is_complex():
        return
    start, end = start.to(points.dtype), end.to(points.dtype)
    low, high = torch.minimum(start, end), torch.maximum(start, end)
    sure = torch.isfinite(points).all(1) & torch.isfinite(low).all(1) & torch.isfinite(high).all(1)
    slack = 4 * eps_of(points.dtype) * torch.maximum(low.abs(), high.abs())
    # At the ends themselves up to rounding, as s runs from 0 to 1.
    inside = ((points >= low - slack) & (points <= high + slack)).all(1)
    check(bool(inside[sure].all()), "a point off its segment")


BRACKET = st.fixed_dictionaries(
    {
        "n": SIZES,
        "d": DIMENSIONS,
        "kinds": kinds(4),
        "level": st.sampled_from([0.0, 0.0, 0.3, 1e30, float("nan"), float("inf")]),
        "tol": st.sampled_from([0.0, 1e-5, 1e300]),
        "variant": st.sampled_from(
            ["regula_falsi", "bisection", "illinois", "chandrupatla", "anderson_bjorck"]
        ),
    }
)


# --- nearest_distance -----------------------------------------------------------------------------


def nearest_case(case: dict[str, Any]) -> None:
    x, cloud = make((case["n"], case["d"]), case["kinds"][0], 0), None
    cloud = make((case["m"], case["d"]), case["kinds"][1], 1)
    distance, index = attempt(ops.nearest_distance, x, cloud, also="query")
    check(distance.shape == index.shape == x.shape[:1], "shapes")
    check(bool(((index >= 0) & (index < len(cloud))).all()), "an index outside the cloud")
    a, b = x.to(distance.dtype).double(), cloud.to(distance.dtype).double()
    rows = torch.isfinite(a).all(1)
    points = b[torch.isfinite(b).all(1)]
    check(bool(torch.isnan(distance[torch.isnan(a).any(1)]).all()), "NaN has a distance")
    if not rows.any() or not len(points):
        check(
            not bool(torch.isfinite(distance[rows]).any()) or x.shape[1] == 0, "no point, and yet"
        )
        return
    expected, _ = reference.nearest_distance(a[rows], points)
    # Distances whose squares leave the range of the dtype are infinite, which is documented.
    fits = (expected < torch.finfo(distance.dtype).max ** 0.5 / 2) & (expected >= 0)
    apart = (distance[rows].double() - expected).abs()
    bound = 8 * eps_of(distance.dtype) * (expected + a[rows].abs().amax(1)) + 1e-300
    bound = bound + torch.finfo(distance.dtype).tiny ** 0.5
    wrong = fits & ~(apart <= bound)
    check(not bool(wrong.any()), f"distance {distance[rows][wrong].tolist()}, {expected[wrong]}")


NEAREST = st.fixed_dictionaries({"n": SIZES, "m": SIZES, "d": st.integers(1, 6), "kinds": kinds(2)})


# --- samplers, the sample network and the losses --------------------------------------------------


def field_of(case: dict[str, Any], d: int) -> tuple[nn.Module, int]:
    l = case["l"]  # noqa: E741
    generator_seed = case["kinds"][0]["seed"] % 1000
    if case["field"] == "affine":
        return problems.Affine(l, d, generator_seed), l
    if case["field"] == "sphere":
        return problems.Sphere(0.7, d), 1
    if case["field"] == "quadric":
        return problems.Quadric(0.7), 1
    dtype = case["kinds"][0]["dtype"]
    return problems.mlp(l, d, 8, dtype if dtype in FLOATS else torch.float32, generator_seed), l


def project_case(case: dict[str, Any]) -> None:
    n, d, kind = case["n"], case["d"], case["kinds"][0]
    x = make((n, d), kind, 0)
    if x.dim() > 1 and 0 in x.shape[1:]:
        return  # points without coordinates
    fn, l = field_of(case, x.shape[1] if x.dim() == 2 else d)  # noqa: E741
    box = (-1.0, 1.0) if case["box"] else None
    with compiled_fields(case["compiled"]):
        r = attempt(
            ls.project, fn, x, case["level"], case["max_iters"], case["tol"], case["method"],
            max_step=case["max_step"], box=box, also="points",
        )  # fmt: skip
    check(r.points.shape == x.shape and r.points.dtype == x.dtype, "shape or dtype")
    if x.dim() != 2:
        return
    check(tuple(r.values.shape) == (len(x), l), f"values {tuple(r.values.shape)}")
    check(tuple(r.jacobian.shape) == (len(x), l, *x.shape[1:]), "jacobian")
    check(
        bool((r.iterations >= 0).all() and (r.iterations <= case["max_iters"]).all()), "iterations"
    )
    if not len(x):
        return
    check(bool(((r.residual <= case["tol"]) | ~r.converged).all()), "converged outside tol")
    check(not bool((r.status == Status.RUNNING).any()), "left running")
    check(not bool((r.status == Status.NOT_BRACKETED).any()), "NOT_BRACKETED of project")
    unfinished = r.status == Status.MAX_ITERATIONS
    check(not bool((unfinished & (r.residual <= case["tol"])).any()), "within tol, not converged")
    if box is not None:
        moved = (r.iterations > 0) & torch.isfinite(r.points).flatten(1).all(1)
        check(bool((r.points[moved].abs() <= 1).all()), "outside the box")
    good = r.converged & torch.isfinite(r.points).flatten(1).all(1)
    good &= r.points.flatten(1).abs().amax(1) < 1e6
    if good.any():
        with torch.no_grad():
            exact = fn.double()(r.points[good].double()).reshape(-1, l)
        size = 1 + exact.abs() + r.points[good].double().abs().amax(1, keepdim=True) ** 2
        apart = (exact - r.values[good].double()).abs()
        bound = 1e4 * eps_of(x.dtype) * size * max(d, 1) ** 0.5
        check(bool((apart <= bound).all()), f"values are not F: {apart.amax()} > {bound.amax()}")
    if case["field"] in ("affine", "sphere") and r.points.requires_grad:
        raise AssertionError("the result has a graph")


PROJECT = st.fixed_dictionaries(
    {
        "n": SIZES,
        "l": st.integers(1, 4),
        "d": st.one_of(st.integers(1, 5), st.just(40)),
        "kinds": kinds(1),
        "field": st.sampled_from(["affine", "sphere", "quadric", "mlp", "mlp"]),
        "level": st.sampled_from([0.0, 0.0, 0.2, -1e6, 1e30, float("nan")]),
        "max_iters": st.sampled_from([0, 1, 3, 10]),
        "tol": st.sampled_from([0.0, 1e-5, 0.1]),
        "method": st.sampled_from(["newton"] * 6 + ["gradient_descent", "lbfgs"]),
        "max_step": st.sampled_from([float("inf"), 0.3]),
        "box": st.booleans(),
        "compiled": st.booleans(),
    }
)


def segment_case(case: dict[str, Any]) -> None:
    n, d, k = case["n"], case["d"], case["kinds"]
    start, end = make((n, d), k[0], 0), make((n, d), k[1], 1)
    fn, _ = field_of({**case, "l": 1}, start.shape[1] if start.dim() == 2 else d)
    r = attempt(
        ls.false_position, fn, start, end, case["level"], case["max_iters"], case["tol"],
        case["variant"], also="points",
    )  # fmt: skip
    check(r.points.shape == start.shape and len(r) == len(start), "shape")
    if not len(r):
        return
    check(bool(((r.residual <= case["tol"]) | ~r.converged).all()), "converged outside tol")
    check(not bool((r.status == Status.RUNNING).any()), "left running")


SEGMENT = st.fixed_dictionaries(
    {
        "n": SIZES,
        "d": st.integers(1, 5),
        "kinds": kinds(2),
        "field": st.sampled_from(["affine", "sphere", "quadric", "mlp"]),
        "level": st.sampled_from([0.0, 0.0, 0.2, 1e30, float("nan")]),
        "max_iters": st.sampled_from([0, 1, 5, 40]),
        "tol": st.sampled_from([0.0, 1e-5, 0.1]),
        "variant": st.sampled_from(
            ["regula_falsi", "bisection", "illinois", "chandrupatla", "anderson_bjorck"]
        ),
    }
)


def theta_case(case: dict[str, Any]) -> None:
    """p(theta) at any results: the points to the bit, and the gradient of Eq. 8 on hyperplanes."""
    n, d, l = case["n"], case["d"], case["l"]  # noqa: E741
    kind = {**case["kinds"][0], "bend": "none"}
    x = make((n, d), kind, 0)
    fn = problems.Affine(l, d, kind["seed"] % 1000)
    if x.dtype in FLOATS:
        fn = fn.to(x.dtype)
    r = attempt(ls.level_points if case["at"] else ls.project, fn, x, also="points jacobian")
    p = attempt(ls.sample_network, fn, r, frozen=case["frozen"], also="points")
    if case["frozen"]:  # Eq. 9 itself: F is evaluated again, in a batch of another size
        scale = 1 + (x.double().abs().nan_to_num(0, 0, 0).amax() if len(x) else 0)
        near = 64 * torch.finfo(r.points.dtype).eps * scale
        same = torch.isclose(p.detach(), r.points, rtol=0, atol=float(near), equal_nan=True)
        check(bool(same.all()), "p(theta) is not p, to rounding")
    else:
        check(problems.same_bits(p.detach(), r.points), "p(theta) is not p")
    (gradient,) = torch.autograd.grad(p.nan_to_num(0.0, 0.0, 0.0).sum(), fn.b)
    check(bool(torch.isfinite(gradient).all()), f"gradient {gradient.tolist()}")
    A = fn.A.detach()
    pivots = judged(A[None])[2]
    sane = x.abs().amax() < 1e3 if x.numel() else torch.tensor(True)
    if bool(pivots[0] > 1e-2) and bool(sane) and l <= d:
        whole = torch.linalg.pinv(A.double()).sum(0)  # d p / d b = -A^+
        expected = -whole * int(r.usable.sum())
        bound = 1e4 * eps_of(x.dtype) * (1 + n) * (1 + whole.abs().amax()) / pivots[0] ** 2
        check(
            bool(((gradient.double() - expected).abs() <= bound).all()),
            f"gradient {gradient.tolist()}, expected {expected.tolist()}",
        )
    half = r[torch.arange(len(r)) % 2 == 0]
    joined = LevelSetResult.cat([half, r])
    check(len(joined) == len(half) + len(r) and sum(joined.counts().values()) == len(joined), "cat")


THETA = st.fixed_dictionaries(
    {
        "n": SIZES,
        "l": st.integers(1, 4),
        "d": st.integers(1, 6),
        "kinds": kinds(1),
        "frozen": st.booleans(),
        "at": st.booleans(),
    }
)


def loss_case(case: dict[str, Any]) -> None:
    n, k = case["n"], case["kinds"]
    x = make((n, 3), k[0], 0)
    dtype = x.dtype if x.dtype in FLOATS else torch.float64
    generator = torch.Generator().manual_seed(k[0]["seed"])
    classes = 1 if case["loss"] != "robust" else case["classes"]
    fn = problems.mlp(max(classes, 1), 3, 8, dtype, k[0]["seed"] % 100)
    y = torch.randint(0, max(classes, 2), (n,), generator=generator)
    if case["labels"] == "wrong":
        y = y + 5
    elif case["labels"] == "floats":
        y = y.double()
    if case["loss"] == "svm":
        loss = attempt(ls.losses.geometric_svm, fn, x, y, max_iters=3, also="points").total
    elif case["loss"] == "robust":
        s = attempt(ls.find_boundary, fn, x, y, iters=5, step=0.2, box=None, also="points labels")
        check(bool((s.rows.diff() > 0).all()) and len(s) == len(s.correct), "rows")
        check(bool((s.result.residual < 0.1).all()), "kept a point far from the boundary")
        loss = attempt(ls.losses.robust, fn, x, y, s).total
    else:
        r = attempt(ls.project, fn, x, max_iters=3, also="points")
        cloud = make((case["m"], 3), k[1], 1)
        loss = attempt(ls.losses.reconstruction, fn, r, cloud, also="query points").total
    check(loss.dim() == 0 and loss.requires_grad, "no scalar to call backward on")
    gradients = torch.autograd.grad(loss, list(fn.parameters()))
    if bool(torch.isfinite(x).all()) and bool(x.abs().amax() < 1e3 if n else True):
        clean = case["loss"] != "reconstruction" or bool(torch.isfinite(cloud.double()).all())
        if clean and bool(torch.isfinite(loss)):
            check(all(bool(torch.isfinite(g).all()) for g in gradients), "gradient not finite")


LOSS = st.fixed_dictionaries(
    {
        "n": SIZES,
        "m": SIZES,
        "classes": st.integers(1, 4),
        "kinds": kinds(2),
        "loss": st.sampled_from(["svm", "robust", "reconstruction"]),
        "labels": st.sampled_from(["right"] * 6 + ["wrong", "floats"]),
    }
)


def margin_case(case: dict[str, Any]) -> None:
    n, classes, k = case["n"], case["classes"], case["kinds"]
    logits = make((n, classes), k[0], 0)
    generator = torch.Generator().manual_seed(k[0]["seed"])
    labels = torch.randint(-1, classes + 1, (n,), generator=generator)
    if case["in range"]:
        labels = labels.clamp(0, max(classes - 1, 1))
    found = attempt(margins.margin, logits, labels)
    F = logits[:, None] if logits.dim() == 1 else logits
    for row in range(len(found)):
        j = int(labels[row])
        if F.shape[1] == 1:
            expected = F[row, 0] if j > 0 else -F[row, 0]
        else:
            expected = F[row, j] - torch.cat([F[row, :j], F[row, j + 1 :]]).max()
        check(bool(torch.equal(found[row], expected)) or bool(expected.isnan()), f"row {row}")


MARGIN = st.fixed_dictionaries(
    {"n": SIZES, "classes": st.integers(0, 5), "kinds": kinds(1), "in range": st.booleans()}
)


# --- compiled perceptrons -------------------------------------------------------------------------

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": lambda: nn.Softplus(7.0),
    "tanh": nn.Tanh,
}


def chain_case(case: dict[str, Any]) -> None:
    d, kind = case["d"], case["kinds"][0]
    torch.manual_seed(kind["seed"])
    widths = [d, *case["widths"]]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=case["bias"]), _ACTIVATIONS[case["activation"]]()]
    dtype = kind["dtype"] if kind["dtype"] in FLOATS else torch.float32
    net = nn.Sequential(*layers, nn.Linear(widths[-1], case["l"])).to(dtype)
    x = make((case["n"], d), kind, 0)
    field = MLP.from_module(net)
    F, J = attempt(ls.value_and_jacobian, field, x)
    with compiled_fields(False):
        exact = [t.to(F.dtype) for t in ls.value_and_jacobian(net.double(), x.double())]
    net.to(dtype)
    check(tuple(J.shape) == (len(x), case["l"], d), "jacobian")
    rows = torch.isfinite(x).all(1) & (x.abs().amax(1) < 1e4)
    for found, expected in zip((F, J), exact, strict=True):
        if rows.any():
            size = 1 + expected[rows].abs().amax() + float(x[rows].abs().amax())
            # A kink of ReLU within rounding of the point has either slope.
            apart = (found[rows] - expected[rows]).abs()
            smooth = case["activation"] != "relu" or found is F
            bound = 2e4 * eps_of(F.dtype) * size
            check(not smooth or bool((apart <= bound).all()), f"{apart.amax()} above {bound}")
    if case["step"]:
        with torch.no_grad():
            for p in net.parameters():
                p.data = p.data + 0.1
        again, _ = attempt(ls.value_and_jacobian, field, x)
        with torch.no_grad():
            now = net(x)
        if rows.any():
            size = 1 + now[rows].abs().amax() + float(x[rows].abs().amax())
            check(
                bool(((again[rows] - now[rows]).abs() <= 2e4 * eps_of(F.dtype) * size).all()),
                "stale parameters",
            )


CHAIN = st.fixed_dictionaries(
    {
        "n": SIZES,
        "d": st.integers(1, 6),
        "l": st.integers(1, 4),
        "widths": st.lists(st.one_of(st.integers(1, 9), st.sampled_from([16, 33])), max_size=4).map(
            lambda widths: widths or [3]
        ),
        "activation": st.sampled_from(sorted(_ACTIVATIONS)),
        "bias": st.booleans(),
        "kinds": kinds(1).map(lambda found: [{**found[0], "bend": "none"}]),
        "step": st.booleans(),
    }
)

# What is drawn, what is checked, share of the cases.
Target = tuple[st.SearchStrategy[Any], Callable[[dict[str, Any]], None], float]
TARGETS: dict[str, Target] = {
    "pinv": (PINV, pinv_case, 1.8),
    "newton": (NEWTON, newton_case, 1.8),
    "alias": (ALIAS, alias_case, 1.5),
    "bracket": (BRACKET, bracket_case, 1.2),
    "nearest": (NEAREST, nearest_case, 1.2),
    "project": (PROJECT, project_case, 0.7),
    "segments": (SEGMENT, segment_case, 0.6),
    "theta": (THETA, theta_case, 0.6),
    "losses": (LOSS, loss_case, 0.5),
    "margin": (MARGIN, margin_case, 0.6),
    "chains": (CHAIN, chain_case, 0.5),
}


def work(
    targets: dict[str, Target], job: driver.Job, journal: driver.Journal
) -> tuple[int, int, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    strategy, body, share = targets[job.target]
    counts = {"done": 0, "accepted": 0}
    failures: list[dict[str, Any]] = []
    cases = max(1, round(job.cases * share))
    wrong: dict[str, Any] = {}

    def one(case: dict[str, Any]) -> None:
        counts["done"] += 1
        journal.note(job.first + counts["done"], repr(case))
        try:
            body(case)
            counts["accepted"] += 1
        except Refused:
            pass
        except BaseException as error:
            wrong.clear()
            wrong.update(case=repr(case), what=f"{type(error).__name__}: {error}"[:500])
            raise

    round_number = 0
    while counts["done"] < cases and len(failures) < 3:
        left = cases - counts["done"]
        test = settings(
            max_examples=left,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )(seed(job.seed + round_number)(given(strategy)(one)))
        before = counts["done"]
        try:
            test()
        except BaseException:
            failures.append({"target": job.target, **wrong})
        round_number += 1
        if counts["done"] == before:
            break
    return counts["done"], counts["accepted"], failures


if __name__ == "__main__":
    sys.exit(driver.main(__file__, partial(work, TARGETS), list(TARGETS)))
