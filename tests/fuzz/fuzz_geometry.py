"""Random arguments for what is built on the ops: rays, curvature, samplings, integrals, curves,
meshes, pictures, clouds, margins and attacks.

    python tests/fuzz/fuzz_geometry.py --cases 20000

Drawn and judged as in fuzz_ops.py: a right answer, or a typed error that names an argument.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
# ruff: noqa: E402 (the two folders above hold what is imported below)

import driver
import numpy as np
import problems
import torch
from fuzz_ops import SEEDS, SIZES, Refused, Target, attempt, check, eps_of, kinds, make, work
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from levelset_ext import margin as margins
from levelset_ext.attacks import (
    advertorch_pgd,
    alarms,
    deepfool,
    evaluate,
    local_linearity,
    multi_targeted,
    pgd,
    random_start,
)
from levelset_ext.data import read_mesh, synthetic_scan, validate_cloud, write_mesh
from levelset_ext.geometry import (
    Camera,
    compare_meshes,
    coverage,
    curvature,
    curvature_penalty,
    estimate_coverage,
    extract_mesh,
    intersect_rays,
    level_set_integral,
    level_set_volume,
    ray_crossings,
    render,
    render_preview,
    sample_level_set,
    surface_area,
    trace_curve,
)
from levelset_ext.losses import fit_disks

_PEERS = ["advertorch"] if find_spec("advertorch") else []
LEVELS = st.sampled_from([0.0] * 4 + [0.2, -3.0, 1e30, float("nan"), float("inf")])
LENGTHS = st.sampled_from([None, None, 0.05, 1.0, 1e30, 0.0, -1.0, float("nan")])


def sane(x: Tensor, most: float = 1e3) -> bool:
    return x.dtype in (torch.float32, torch.float64) and bool(
        (torch.isfinite(x) & (x.abs() < most)).all()
    )


def ray_case(case: dict[str, Any]) -> None:
    n, d, k = case["n"], case["d"], case["kinds"]
    origins, directions = make((n, d), k[0], 0), make((n, d), k[1], 1)
    fn = problems.Sphere(0.7, d)
    options = {"near": case["near"], "far": case["far"], "lipschitz": case["lipschitz"]}
    if case["step"] is not None:
        # A march is as long as it is told: the shortest step that is drawn is a hundredth.
        far = case["far"] if case["far"] == case["far"] and case["far"] < 100 else 5.0
        options.update(step=case["step"], far=far)
    if case["box"]:
        options["box"] = (-1.0, 1.0)
    hits = attempt(intersect_rays, fn, origins, directions, case["level"], **options, also="points")
    found = attempt(ray_crossings, fn, origins, directions, case["level"], **options, also="points")
    check(len(hits) == len(origins), "rows")
    check(bool(torch.isnan(hits.points[~hits.mask]).all()), "a miss has a point")
    check(bool(torch.isinf(hits.t[~hits.mask]).all()), "a miss has a distance")
    check(bool((found.rows.diff() >= 0).all()), "crossings out of order")
    if not (sane(origins) and sane(directions) and abs(case["level"]) < 0.5):
        return
    # |o + t v - 0|^2 = r^2, in float64; rays that nearly touch may be seen or not.
    o = origins.double()
    v = directions.double() / torch.linalg.vector_norm(directions.double(), dim=1, keepdim=True)
    radius = 0.7 + case["level"]
    b, c = (o * v).sum(1), (o * o).sum(1) - radius**2
    passing = b * b - c
    size = 1 + o.abs().amax(1)
    rows = hits.mask & (passing > 0.05)
    for t in (-b - passing.clamp(min=0).sqrt(), -b + passing.clamp(min=0).sqrt()):
        rows &= (hits.t.double() - t).abs() > 2e3 * eps_of(origins.dtype) ** 0.5 * size
    check(not bool(rows.any()), f"hits off the sphere at {hits.t[rows].tolist()}")
    check(not bool((hits.mask & (passing < -0.05)).any()), "a hit where the ray passes by")


RAYS = st.fixed_dictionaries(
    {
        "n": SIZES,
        "d": st.integers(1, 5),
        "kinds": kinds(2),
        "level": LEVELS,
        "near": st.sampled_from([0.0, 0.0, 0.3, -1.0, float("nan")]),
        "far": st.sampled_from([4.0] * 4 + [0.1, 1e30, float("inf"), float("nan")]),
        "step": LENGTHS,
        "lipschitz": st.sampled_from([None, None, 1.0, 0.0, float("nan")]),
        "box": st.booleans(),
    }
)


def curvature_case(case: dict[str, Any]) -> None:
    n, d = case["n"], case["d"]
    x = make((n, d), case["kinds"][0], 0)
    fn = problems.Sphere(0.7, d)
    found = attempt(curvature, fn, x, also="points")
    check(
        found.mean.shape == (len(x),) and found.principal.shape == (len(x), x.shape[1] - 1),
        "shapes",
    )
    check(found.normals.shape == x.shape, "normals")
    rows = torch.isfinite(x).all(1)
    length = torch.linalg.vector_norm(x.double(), dim=1)
    rows &= (length > 1e-2) & (length < 1e2)
    if rows.any() and x.dtype in (torch.float32, torch.float64):
        apart = (found.mean[rows].double() * length[rows] - 1).abs()
        check(bool((apart < 1e4 * eps_of(x.dtype)).all()), f"mean curvature off by {apart.max()}")
    loss = attempt(curvature_penalty, fn, x, case["kind"], limit=case["limit"], also="points")
    check(loss.dim() == 0 and bool(loss >= 0), f"penalty {loss}")


CURVATURE = st.fixed_dictionaries(
    {
        "n": SIZES,
        "d": st.integers(1, 5),
        "kinds": kinds(1),
        "kind": st.sampled_from(["total", "mean", "gaussian", "another"]),
        "limit": st.sampled_from([None, None, 1.0, 1e30, 0.0, float("nan")]),
    }
)


def sampling_case(case: dict[str, Any]) -> None:
    n, d, k = case["n"], case["d"], case["kinds"]
    a, b = make((n, d), k[0], 0), make((case["m"], d), k[1], 1)
    fn = problems.Sphere(0.7, d)
    generator = torch.Generator().manual_seed(k[0]["seed"])
    if case["what"] == "coverage":
        found = attempt(coverage, a, b, also="x cloud query")
        if sane(a) and sane(b):
            check(0 <= found.gap <= found.hausdorff, f"{found}")
    elif case["what"] == "disks":
        disks = attempt(fit_disks, a, case["m"], 2)
        check(all(len(t) == len(a) for t in disks), "rows")
    elif case["what"] == "estimate":
        if case["low"]:
            a = a.nan_to_num(0.0, 0.0, 0.0).clamp(-2, 2) if a.is_floating_point() else a
        found = attempt(
            estimate_coverage, fn, a, case["level"], probes=2, reach=case["reach"],
            generator=generator, also="probe",
        )  # fmt: skip
        check(0 <= found.mean_gap <= found.largest_gap, f"{found}")
    else:
        box = (torch.full((d,), -1.0), torch.full((d,), case["high"]))
        found = attempt(
            sample_level_set, fn, n, box, case["level"], rounds=2, max_iters=5,
            generator=generator, also="points lower upper",
        )  # fmt: skip
        there = abs(case["level"]) < 0.5
        check(len(found) == n or (len(found) == 0 and not there), f"{len(found)} of {n}")
        check(bool(found.converged.all()), "a point off the level set")


SAMPLING = st.fixed_dictionaries(
    {
        "n": SIZES,
        "m": SIZES,
        "d": st.integers(1, 4),
        "kinds": kinds(2),
        "level": LEVELS,
        "high": st.sampled_from([1.0, 1.0, 0.0, -2.0, float("nan"), float("inf")]),
        "reach": st.sampled_from([3.0, 3.0, 0.5, 0.0, -1.0, 1e30, float("nan")]),
        "low": st.booleans(),
        "what": st.sampled_from(["coverage", "disks", "estimate", "sample"]),
    }
)


def integral_case(case: dict[str, Any]) -> None:
    d, level = case["d"], case["level"]
    fn = problems.Sphere(0.7, d)
    options = {"lines": case["lines"], "step": case["step"], "dim": d}
    options["generator"] = torch.Generator().manual_seed(case["seed"])
    bounds = (-1.0, case["high"])
    if case["what"] == "area":
        found = attempt(surface_area, fn, bounds, level, **options, also="points far box")
    elif case["what"] == "volume":
        found = attempt(level_set_volume, fn, bounds, level, **options, also="points far box")
    else:
        one = None if case["what"] == "none" else (lambda p: torch.ones(len(p), dtype=p.dtype))
        found = attempt(level_set_integral, fn, one, bounds, level, **options, also="points far")
    check(bool(found.value >= 0) and bool(found.standard_error >= 0), f"{found}")
    if case["high"] == 1.0 and abs(level) < 0.25 and case["step"] is None:
        # A ball in [-1, 1]^d, within six of the standard errors that so few lines can tell.
        radius, half = 0.7 + level, torch.tensor(d / 2.0)
        volume = float(torch.pi**half / torch.lgamma(half + 1).exp()) * radius**d
        exact = volume if case["what"] == "volume" else volume * d / radius
        off = abs(float(found.value) - exact)
        spread = max(float(found.standard_error), exact / case["lines"] ** 0.5)
        check(off < 6 * spread + 1e-3, f"{found} instead of {exact}")


INTEGRAL = st.fixed_dictionaries(
    {
        "d": st.integers(0, 4),
        "level": LEVELS,
        "high": st.sampled_from([1.0, 1.0, 1.0, 0.0, -2.0, float("nan"), float("inf")]),
        "lines": st.sampled_from([60, 60, 200, 1, 0, -2, 3]),
        "step": st.sampled_from([None, None, 0.05, 1.0, 0.0, -1.0, float("nan")]),
        "seed": SEEDS,
        "what": st.sampled_from(["area", "volume", "integral", "none"]),
    }
)


def curve_case(case: dict[str, Any]) -> None:
    seeds = make((min(case["n"], 5), 3), case["kinds"][0], 0)
    if seeds.dim() == 2 and seeds.shape[1] != 3:
        raise Refused  # by the field
    trace = attempt(
        trace_curve, problems.Circle(), seeds, case["level"], box=(-1.0, case["high"]),
        step=case["step"], max_points=200, also="points lower upper",
    )  # fmt: skip
    for part in trace:
        v = torch.from_numpy(part.vertices)
        check(bool(torch.isfinite(v).all()), "a vertex that is not finite")
        check(bool(((v >= -1 - 1e-6) & (v <= case["high"] + 1e-6)).all()), "outside the box")


CURVE = st.fixed_dictionaries(
    {
        "n": SIZES,
        "kinds": kinds(1),
        "level": st.sampled_from([0.0, 0.0, 0.2, 1e30, float("nan"), [0.1, 0.0], [0.0] * 3]),
        "high": st.sampled_from([1.0, 1.0, 0.0, -2.0, float("nan"), float("inf")]),
        "step": st.sampled_from([None, 0.3, 0.3, 1e30, 0.0, float("nan")]),
    }
)


def mesh_case(case: dict[str, Any]) -> None:
    corner = (case["high"],) * 3
    mesh = attempt(
        extract_mesh, problems.Sphere(0.7), ((-1.0,) * 3, corner), case["resolution"],
        case["level"], case["batch"], case["refine"], also="points",
    )  # fmt: skip
    v = torch.from_numpy(mesh.vertices)
    check(bool(torch.isfinite(v).all()), "a vertex that is not finite")
    if len(mesh.faces):
        check(mesh.faces.min() >= 0 and mesh.faces.max() < len(v), "a face without a vertex")
    if case["refine"] and len(v):
        apart = (torch.linalg.vector_norm(v, dim=1) - 0.7 - case["level"]).abs().max()
        check(bool(apart < 1e-5), f"a vertex off the sphere by {apart}")


MESH = st.fixed_dictionaries(
    {
        "resolution": st.sampled_from([8, 8, 5, 1, 0, -3]),
        "level": st.sampled_from([0.0, 0.0, 0.1, -3.0, 1e30, float("nan")]),
        "high": st.sampled_from([1.0, 1.0, 0.5, -2.0, float("nan"), float("inf")]),
        "batch": st.sampled_from([4096, 7, 0]),
        "refine": st.booleans(),
    }
)


def picture_case(case: dict[str, Any]) -> None:
    eye = tuple(case["eye"])
    camera = attempt(Camera.look_at, eye, (0.0, 0.0, 0.0), width=case["width"], height=6,
                     fov=case["fov"], also="target up span")  # fmt: skip
    found = attempt(
        render, problems.Sphere(0.7), camera, level=case["level"], bounds=case["bounds"],
        supersample=case["supersample"], step=case["step"], color=case["color"],
        also="points box far",
    )  # fmt: skip
    check(found.shape == (6, case["width"], 3) and found.dtype == np.uint8, f"{found.shape}")


PICTURE = st.fixed_dictionaries(
    {
        "eye": st.lists(
            st.sampled_from([2.0, 0.0, -3.0, 0.3, float("nan")]), min_size=3, max_size=3
        ),
        "width": st.sampled_from([7, 7, 1, 0, -2]),
        "fov": st.sampled_from([40.0, 40.0, 0.0, 180.0, float("nan")]),
        "level": st.sampled_from([0.0, 0.0, 0.1, -3.0, 1e30, float("nan")]),
        "bounds": st.sampled_from([None, (-1.0, 1.0), (1.0, -1.0), (0.0, float("inf")), (0.0,)]),
        "supersample": st.sampled_from([1, 1, 2, 0]),
        "step": st.sampled_from([None, 0.3, 0.0, -1.0, float("nan")]),
        "color": st.sampled_from([None, (0.1, 0.2, 0.3), (2.0, 0.0, 0.0), (0.1,), float("nan")]),
    }
)


def preview_case(case: dict[str, Any]) -> None:
    n, m, d, k = case["n"], case["m"], case["d"], case["kinds"]
    cloud, vertices = make((n, d), k[0], 0), make((m, 3), k[1], 1)
    cloud, vertices = (x.float() if x.dtype == torch.bfloat16 else x for x in (cloud, vertices))
    generator = torch.Generator().manual_seed(k[0]["seed"])
    high = m + 1 if case["faces"] == "outside" else max(m, 1)
    faces = torch.randint(0, high, (n, case["corners"]), generator=generator)
    mesh = SimpleNamespace(vertices=vertices.numpy(), faces=faces.numpy())
    if case["normals"]:
        mesh.normals = vertices.numpy()
    field = problems.Sphere(0.7) if case["field"] else None
    with tempfile.TemporaryDirectory(dir=driver.SCRATCH) as folder:
        file = Path(folder) / "preview.png"
        attempt(render_preview, file, cloud.numpy(), mesh, field, also="mesh vertices faces")
        check([p.name for p in Path(folder).iterdir()] == ["preview.png"], "another file")
        with Image.open(file) as picture:
            picture.load()
            check(picture.mode == "RGB" and min(picture.size) > 0, f"{picture}")


PREVIEW = st.fixed_dictionaries(
    {
        "n": SIZES,
        "m": SIZES,
        "d": st.sampled_from([3, 3, 3, 3, 2]),
        "kinds": kinds(2),
        "corners": st.sampled_from([3] * 6 + [4]),
        "faces": st.sampled_from(["inside"] * 4 + ["outside"]),
        "normals": st.booleans(),
        "field": st.booleans(),
    }
)


def cloud_case(case: dict[str, Any]) -> None:
    n, m, d, k = case["n"], case["m"], case["d"], case["kinds"]
    x = make((n, d), k[0], 0)
    points = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    if case["what"] == "validate":
        found = attempt(validate_cloud, points, case["minimum"], d)
        check(found.count == len(points) >= found.distinct > 1, f"{found}")
        check(0 <= found.rank <= d and len(found.extent) == d, f"{found}")
        return
    if case["what"] == "scan":
        scan = attempt(synthetic_scan, case["minimum"], k[0]["seed"] % 1000, case["noise"])
        check(scan.points.shape == (case["minimum"], 3), f"{scan.points.shape}")
        check(bool(np.isfinite(scan.points).all()), "a point that is not finite")
        return
    generator = torch.Generator().manual_seed(k[0]["seed"])
    high = n + 1 if case["faces"] == "outside" else max(n, 1)
    faces = torch.randint(0, high, (m, 3), generator=generator).numpy()
    if case["what"] == "compare":
        mesh = SimpleNamespace(vertices=points.astype(np.float64, copy=False), faces=faces)
        truth = SimpleNamespace(vertices=np.eye(3), faces=np.array([[0, 1, 2]]))
        found = attempt(
            compare_meshes, *((mesh, truth) if case["first"] else (truth, mesh)), 20, 0, 30, 50
        )
        check(found["chamfer_l1"] >= found["chamfer_l2"] >= 0, f"{found}")
        check(0 <= found["normal_consistency"] <= 1 + 1e-6, f"{found}")
        return
    with tempfile.TemporaryDirectory(dir=driver.SCRATCH) as folder:
        file = Path(folder) / "mesh.ply"
        attempt(write_mesh, file, points, faces, points if case["first"] else None)
        check([p.name for p in Path(folder).iterdir()] == ["mesh.ply"], "another file")
        again = attempt(read_mesh, file, also="vertices faces mesh")
        check(np.array_equal(again.faces, faces), "other faces")
        check(np.array_equal(again.vertices, points), "other vertices")


CLOUD = st.fixed_dictionaries(
    {
        "n": SIZES,
        "m": SIZES,
        "d": st.sampled_from([3, 3, 3, 2, 1]),
        "kinds": kinds(1),
        "minimum": st.sampled_from([1, 3, 20, 0, -1]),
        "noise": st.sampled_from([0.0, 0.01, -1.0, float("nan"), 1e30]),
        "faces": st.sampled_from(["inside"] * 4 + ["outside"]),
        "first": st.booleans(),
        "what": st.sampled_from(["validate", "scan", "compare", "write"]),
    }
)


def label_case(case: dict[str, Any]) -> None:
    n, classes, kind = case["n"], case["classes"], case["kinds"][0]
    logits = make((n, classes), kind, 0)
    generator = torch.Generator().manual_seed(kind["seed"])
    low = 0 if case["in range"] else -1
    labels = torch.randint(low, max(classes, 2) - low, (n,), generator=generator)
    said = attempt(margins.prediction, logits)
    rivals = attempt(margins.rival, logits, labels)
    F = logits[:, None] if logits.dim() == 1 else logits
    for row in range(len(F)):
        j = int(labels[row])
        if F.shape[1] == 1:
            check(int(said[row]) == int(F[row, 0] > 0), f"prediction of row {row}")
            check(int(rivals[row]) == int(j <= 0), f"rival of row {row}")
        elif not bool(F[row].isnan().any()):
            check(int(said[row]) == int(F[row].double().argmax()), f"prediction of row {row}")
            i = int(rivals[row])
            others = [float(F[row, c]) for c in range(F.shape[1]) if c != j]
            check(i != j and float(F[row, i]) == max(others), f"rival of row {row}")
    if F.shape[1] == 1:
        two = attempt(margins.two_logits, logits, also="logit")
        check(two.shape == (len(F), 2), f"{tuple(two.shape)}")
        sure = torch.isfinite(F[:, 0]) & (F[:, 0] / 2 != 0)
        check(
            torch.equal(margins.prediction(two)[sure], said[sure]), "two logits say another class"
        )
    elif logits.is_floating_point():
        # Against its rival the margin is the margin.
        against = margins.targeted_margin(logits, labels, rivals)
        usual = margins.margin(logits, labels)
        check(bool(((against == usual) | usual.isnan()).all()), "targeted margin")


LABELS = st.fixed_dictionaries(
    {
        "n": SIZES,
        "classes": st.integers(0, 5),
        "kinds": kinds(1),
        "in range": st.sampled_from([True] * 3 + [False]),
    }
)


def attack_case(case: dict[str, Any]) -> None:
    n, d, classes, what = case["n"], case["d"], case["classes"], case["what"]
    x = make((n, d), case["kinds"][0], 0)
    if case["in range"] and x.is_floating_point():
        x = x.nan_to_num(0.0, 1.0, 0.0).abs().clamp(0, 1)
    generator = torch.Generator().manual_seed(case["kinds"][0]["seed"])
    y = torch.randint(-1 if case["odd labels"] else 0, classes, (n,), generator=generator)
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    fn = problems.mlp(classes, d, 8, dtype)
    how = {k: case[k] for k in ("eps", "step", "iters", "norm")}
    also = "labels logits points"
    if what == "linearity":
        # As many steps as it is told; a step of no length is refused.
        found = attempt(local_linearity, fn, x, y, case["eps"], steps=case["iters"],
                        step=case["step"], also=also)  # fmt: skip
        check(found.gamma.shape == (len(x),) and found.delta.shape == x.shape, "shapes")
        check(not bool((found.gamma < 0).any()), f"gamma {found.gamma.tolist()}")
        return
    if what == "deepfool":
        fooled = attempt(deepfool, fn, x, y, norm=case["norm"], iters=case["iters"], also=also)
        found, bound = fooled.adversarial, None
        check(bool((fooled.iterations <= case["iters"]).all()), "too many iterations")
    elif what == "evaluate":
        told = attempt(evaluate, fn, x, y, case["attack"], **how, batch=case["batch"], also=also)
        found, bound = told.adversarial, case["eps"]
        if len(x):
            check(told.robust_accuracy <= told.clean_accuracy, "more robust than right")
        wrong = margins.margin(fn(found), y) <= 0 if len(x) else told.success
        check(not bool((told.success & told.correct & ~wrong).any()), "a success that is none")
        alarms(told)
    elif what == "advertorch":
        found, success = attempt(advertorch_pgd, fn, x, y, loss=case["objective"], **how, also=also)
        bound = case["eps"]
        wrong = margins.margin(fn(found), y) <= 0 if len(x) else success
        check(bool((success == wrong).all()), "a success that is none")
    else:
        call = partial(pgd, objective=case["objective"]) if what == "pgd" else multi_targeted
        found, bound = attempt(call, fn, x, y, **how, also=also).adversarial, case["eps"]
        start = attempt(random_start, x.shape[1:], range(len(x)), seed=3, restart=0,
                        norm=case["norm"], eps=case["eps"])  # fmt: skip
        check(start.shape == x.shape, "start")
    check(found.shape == x.shape and found.dtype == x.dtype, "shape or dtype")
    check(bool(((found >= 0) & (found <= 1)).all()), "outside [0, 1]")
    order = float("inf") if case["norm"] == "linf" else 2
    if found.numel() and bound is not None:
        moved = torch.linalg.vector_norm((found - x).flatten(1), order, dim=1).max()
        check(float(moved) <= bound * (1 + 1e-4) + 1e-6, f"moved by {moved}")


ATTACK = st.fixed_dictionaries(
    {
        "n": SIZES,
        "d": st.integers(1, 5),
        "classes": st.integers(2, 4),
        "kinds": kinds(1),
        "in range": st.sampled_from([True] * 4 + [False]),
        "odd labels": st.sampled_from([False] * 4 + [True]),
        "objective": st.sampled_from(["xent", "margin", "slm", "rescaled-xent", "another"]),
        "eps": st.sampled_from([0.1, 0.1, 0.0, 1e30, -1.0, float("nan")]),
        "step": st.sampled_from([0.05, 0.05, 0.0, 1e30, -1.0, float("nan")]),
        "iters": st.sampled_from([3, 3, 1, 0, -1]),
        "norm": st.sampled_from(["linf", "linf", "l2", "l1"]),
        "what": st.sampled_from(
            ["pgd", "pgd", "targeted", "deepfool", "evaluate", "linearity", *_PEERS]
        ),
        "attack": st.sampled_from(["pgd-margin", "pgd-xent-2", "pgd-margin,pgd-xent", "no attack"]),
        "batch": st.sampled_from([250, 3, 0]),
    }
)

TARGETS: dict[str, Target] = {
    "rays": (RAYS, ray_case, 1.0),
    "curvature": (CURVATURE, curvature_case, 1.0),
    "sampling": (SAMPLING, sampling_case, 1.0),
    "integrals": (INTEGRAL, integral_case, 1.0),
    "curve": (CURVE, curve_case, 0.5),
    "mesh": (MESH, mesh_case, 0.5),
    "pictures": (PICTURE, picture_case, 1.0),
    "previews": (PREVIEW, preview_case, 1.0),
    "clouds": (CLOUD, cloud_case, 1.0),
    "labels": (LABELS, label_case, 1.5),
    "attack": (ATTACK, attack_case, 1.5),
}


if __name__ == "__main__":
    sys.exit(driver.main(__file__, partial(work, TARGETS), list(TARGETS)))
