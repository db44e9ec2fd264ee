"""Times the ops on a GPU, each checked against float64 first, and writes CSV and JSON.

python benchmarks/gpu_ops.py --out FOLDER      rows.csv nearest.csv newton.csv gpu_ops.json
python benchmarks/gpu_ops.py --drive           every kernel once, for compute-sanitizer
python benchmarks/gpu_ops.py --fault           a read out of bounds, which it has to find
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import json
import math
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import torch

import levelset_ext as ls
from levelset_ext.bench import plain
from levelset_ext.networks import MLP, ImplicitMLP, compiled_fields
from levelset_ext.samplers import CapturedProjection

raw = torch.ops.levelset_ext
TEAMS = {"thread": 1, "warp": 2, "block": 3}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
COLUMNS = [2, 3, 8, 16, 32, 64, 128, 256, 784, 3072, 8192, 16384, 65536]
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-10, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def milliseconds(call: Callable[[], Any], repeats: int = 50) -> dict[str, float]:
    """Median and spread over CUDA events, after a warm-up. The cache is overwritten in between."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    for _ in range(5):
        call()
    begin = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    end = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    for i in range(repeats):
        flush.zero_()
        begin[i].record()
        call()
        end[i].record()
    torch.cuda.synchronize()
    times = sorted(b.elapsed_time(e) for b, e in zip(begin, end, strict=True))
    return {
        "median_ms": times[repeats // 2],
        "p10_ms": times[repeats // 10],
        "p90_ms": times[repeats * 9 // 10],
    }


FAILURES: list[str] = []


def failed(what: str) -> None:
    """Notes a failure and goes on: the tables to come are worth having."""
    print(f"gpu_ops: FAILED: {what}", file=sys.stderr)
    FAILURES.append(what)


def check(what: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    error = float((got.double() - expected).norm() / expected.norm())
    if not error <= tolerance:
        failed(f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}")
    return error


def copy_bandwidth() -> float:
    """GB/s of a device copy, reads and writes counted: what a kernel bound by memory can reach."""
    x = torch.empty(256 << 20, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / milliseconds(lambda: y.copy_(x), 20)["median_ms"] / 1e6


def row_calls(
    jacobian: torch.Tensor,
    residual: torch.Tensor,
    points: torch.Tensor,
    level: torch.Tensor,
    team: int,
) -> dict[str, Callable[[], torch.Tensor]]:
    step = (None, None, None, 0.0, math.inf, team)
    return {
        "apply": lambda: raw.pinv_apply(jacobian, residual, team)[0],
        "adjoint": lambda: raw.pinv_adjoint(jacobian, points, team)[0],
        "update": lambda: raw.newton_update(points, residual, jacobian, level, *step)[0],
    }


def bench_rows(copy: float) -> Iterator[dict[str, Any]]:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for l in (1, 2, 4):  # noqa: E741
            for d in COLUMNS:
                if d < l or (dtype != torch.float32 and d not in (3, 784, 16384)):
                    continue
                n = max(256, min(1 << 20, (1 << 26) // (l * d)))
                jacobian = torch.randn(n, l, d, device="cuda").to(dtype)
                residual = torch.randn(n, l, device="cuda").to(dtype)
                points = torch.randn(n, d, device="cuda").to(dtype)
                level = torch.zeros(1, l, dtype=dtype, device="cuda")
                # A few rows in float64; rows close to singular are left out of the comparison.
                some = slice(0, 256)
                exact = jacobian[some].double()
                inverse = exact.mT @ torch.linalg.inv(exact @ exact.mT)
                tame = inverse.flatten(1).norm(dim=1) * exact.flatten(1).norm(dim=1) < 50
                y = (inverse @ residual[some].double()[:, :, None])[:, :, 0]
                s = (inverse.mT @ points[some].double()[:, :, None])[:, :, 0]
                number = jacobian.element_size()
                sizes = {
                    "apply": l * d + l + d,
                    "adjoint": l * d + d + l,
                    "update": l * d + l + 2 * d,
                }
                for name, team in TEAMS.items():
                    if l > 2 and name != "warp":
                        continue  # there the warp is the only team
                    calls = row_calls(jacobian, residual, points, level, team)
                    expected = {"apply": y, "adjoint": s, "update": points[some].double() - y}
                    for op, call in calls.items():
                        what = f"{op} {dtype} l={l} d={d} {name}"
                        error = check(
                            what, call()[some][tame], expected[op][tame], TOLERANCE[dtype]
                        )
                        # A thread that walks a long row takes long; fewer repeats tell as much.
                        time = milliseconds(call, 20)
                        gigabytes = n * (sizes[op] * number + 1) / 1e9
                        rate = gigabytes / time["median_ms"] * 1e3
                        yield {
                            "op": op,
                            "dtype": str(dtype).removeprefix("torch."),
                            "l": l,
                            "d": d,
                            "n": n,
                            "team": name,
                            **time,
                            "GB_per_s": rate,
                            "share_of_copy": rate / copy,
                            "relative_error": error,
                        }


def bench_nearest() -> Iterator[dict[str, Any]]:
    for dtype in (torch.float32, torch.float64):
        for n, m in ((10_000, 170_000), (1_000, 170_000), (100_000, 170_000)):
            x = torch.randn(n, 3, device="cuda").to(dtype)
            cloud = torch.randn(m, 3, device="cuda").to(dtype)
            distance = raw.nearest(x, cloud)[0]
            difference = torch.cdist(
                x[:64].double(), cloud.double(), compute_mode="donot_use_mm_for_euclid_dist"
            )
            error = check("nearest", distance[:64], difference.min(1).values, 1e-5)
            time = milliseconds(lambda: raw.nearest(x, cloud), 20)  # noqa: B023
            yield {
                "dtype": str(dtype).removeprefix("torch."),
                "n": n,
                "m": m,
                "d": 3,
                **time,
                "billion_pairs_per_s": n * m / time["median_ms"] / 1e6,
                "relative_error": error,
            }


NETWORKS: dict[str, Callable[[], ImplicitMLP]] = {
    "64 x 3": lambda: ImplicitMLP(3, 1, 64, 3, activation="softplus", beta=30.0),
    "128 x 4": lambda: ImplicitMLP(3, 1, 128, 4, activation="softplus", beta=30.0),
    "256 x 4": lambda: ImplicitMLP(3, 1, 256, 4, activation="relu"),
    "509 x 8, input at every layer": lambda: ImplicitMLP(3, 1, 509, 8, skip=True),
}
ITERATIONS, TOL = 10, 1e-4
BEGAN, COMPILE_WITHIN = monotonic(), 60.0  # seconds


def bench_newton() -> Iterator[dict[str, Any]]:
    """The fused loop against the generic one, its graph, and torch.compile; TF32 is off."""
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        net = make().init_sphere_(0.6).cuda().requires_grad_(False)
        wide = copy.deepcopy(net).cpu().double()
        layers = [m.weight for m in net.modules() if isinstance(m, torch.nn.Linear)]
        # Forward and backward of one row: two products with every matrix.
        work = 4 * sum(w.numel() for w in layers)
        for n in (1_000, 10_000, 100_000):
            x = (2.2 * torch.rand(n, 3) - 1.1).cuda()
            level = torch.zeros(n, 1, device="cuda")
            some = slice(0, 2000)

            def ours(net: Any = net, x: Any = x, automatic: bool = True) -> ls.LevelSetResult:
                with compiled_fields(automatic), torch.no_grad():
                    return ls.project(net, x, 0.0, ITERATIONS, TOL)

            if not MLP.from_module(net).takes(x):
                failed(f"{name}: the fused kernel does not take it")
            fields = {
                "fused, float32": MLP.from_module(net),
                "fused, 3xTF32": MLP.from_module(net),
                "fused, mixed": MLP.from_module(net, mixed=True),
            }
            for number, field in enumerate(list(fields.values())[:2], 1):
                field._product = number
            for who, field in fields.items():
                with field.packed() as pack:
                    coarse = len(pack.tensors[1])
                if coarse == 0 and who == "fused, mixed":
                    failed(f"{name}: no coarse weights for {who}")

            def by(field: MLP, x: Any = x) -> ls.LevelSetResult:
                return ls.project(field, x, 0.0, ITERATIONS, TOL)

            calls: dict[str, Callable[[], Any]] = {
                "fused": ours,
                **{who: functools.partial(by, field) for who, field in fields.items()},
                "generic": lambda: ours(automatic=False),
            }
            with compiled_fields(False):
                captured = CapturedProjection(net, x, max_iters=ITERATIONS, tol=TOL)
            if captured.reason is None:
                calls["generic, graph"] = lambda: captured(x)  # noqa: B023
            else:
                print(f"gpu_ops: {name}: {captured.reason}", file=sys.stderr)
            # Compiling takes longer than all else, and there may be a limit to how long this runs.
            if n == 10_000 and monotonic() - BEGAN < COMPILE_WITHIN:
                compiled = torch.compile(plain.by_vjp(net))
                calls["torch.compile"] = lambda: plain.newton_all_rows(
                    compiled,  # noqa: B023
                    x,  # noqa: B023
                    level,  # noqa: B023
                    ITERATIONS,
                    TOL,
                )
            reference = ours(wide, x[some].cpu().double())
            for who, call in calls.items():
                try:
                    found = call()
                except Exception as error:
                    what = f"{name}: {who}: {error!s:.200}"
                    if who == "torch.compile":  # a compiler that is not complete on this machine
                        print(f"gpu_ops: {what}", file=sys.stderr)
                    else:
                        failed(what)
                    continue
                # A rounding at a kink sends a row another way: a share, and the residuals of all.
                # In mixed precision a first step of three digits may send any number.
                most = 1.0 if who == "fused, mixed" else 0.02
                apart = (found.points[some].cpu().double() - reference.points).norm(dim=1) > 1e-2
                elsewhere = float((apart & reference.converged).double().mean())
                claimed = (found.values - level).abs()[some, 0] <= TOL
                exact = wide(found.points[some].cpu().double()).abs()[claimed.cpu()]
                worst = float(exact.max()) if len(exact) else 0.0
                if elsewhere > most or worst > 2 * TOL or not bool(claimed.any()):
                    failed(f"{name}, {n} rows: {who}: {elsewhere:.1%} elsewhere, |F| = {worst:.1e}")
                time = milliseconds(call, 10)
                entry: dict[str, Any] = {"network": name, "n": n, "who": who, **time}
                entry["converged"] = int((found.values - level).abs().le(TOL).sum())
                entry["elsewhere"] = elsewhere
                evaluations = int(ours().iterations.sum()) + n
                entry["TFLOP_per_s"] = evaluations * work / time["median_ms"] / 1e9
                yield entry


def drive_bracket() -> None:
    """The bracket update by every team, with rows that end early and one that turns NaN."""
    n = 19
    for dtype in DTYPES:
        for d in (3, 300):
            for team in (0, *TEAMS.values()):
                start, end = torch.zeros(n, d), torch.randn(n, d)
                end[2, 1], end[4] = math.nan, 0.0
                start, end = start.to(dtype).cuda(), end.to(dtype).cuda()
                points, state = start.clone(), ls.ops.bracket_state(n, "cuda")
                status = torch.ones(n, dtype=torch.int8, device="cuda")
                level = torch.full((1, 1), 0.3, dtype=dtype, device="cuda")

                def values(x: torch.Tensor) -> torch.Tensor:
                    return x.square().mean(1, keepdim=True)

                both = torch.cat([values(start), values(end)], 1)
                for k in range(4):
                    raw.bracket_update_(
                        points, status, state, start, end, values(points) if k else both, level,
                        None, 1e-3, 4, k == 3, team,
                    )  # fmt: skip


def drive_fused() -> None:
    """The fused kernel on every tile, with rows that end at different iterations and bad rows."""
    for width, depth, l in ((20, 2, 1), (100, 2, 2), (200, 2, 1), (300, 2, 1)):  # noqa: E741
        for activation in ("relu", "softplus"):
            net = ImplicitMLP(3, l, width, depth, activation=activation, skip=True).cuda()
            field = MLP.from_module(net)
            x = torch.randn(400, 3).cuda()
            if not field.takes(x):
                sys.exit(f"gpu_ops: the fused kernel does not take {width} x {depth}")
            x[7] = math.nan
            with torch.no_grad():
                for field._product in (1, 2):
                    ls.project(field, x, 0.01, 3, max_step=0.5, box=(-2.0, 2.0))
                    field.values(x)
                mixed = MLP.from_module(net, mixed=True)
                ls.project(mixed, x, 0.01, 3, max_step=0.5, box=(-2.0, 2.0))
    # More rows than places on the device: what is done makes room while others run.
    field = MLP.from_module(ImplicitMLP(3, 1, 300, 1, activation="relu").cuda())
    with torch.no_grad():
        for field._product in (1, 2):
            ls.project(field, torch.randn(9000, 3).cuda(), 0.01, 2, tol=0.05)


def drive() -> None:
    """Every kernel once on small inputs with bad rows among them."""
    for dtype in DTYPES:
        for l, d in ((1, 3), (2, 3), (3, 5), (1, 300), (2, 300), (8, 40)):  # noqa: E741
            for team in (0, *TEAMS.values()):
                n = 19
                jacobian = torch.randn(n, l, d).to(dtype).cuda()
                residual = torch.randn(n, l).to(dtype).cuda()
                points = torch.randn(n, d).to(dtype).cuda()
                jacobian[2], jacobian[4] = math.nan, 0.0
                raw.pinv_apply(jacobian, residual, team)
                raw.pinv_adjoint(jacobian, points, team)
                level = torch.zeros(n, l, dtype=dtype, device="cuda")
                box = torch.ones(d, dtype=dtype, device="cuda")
                raw.newton_update(
                    points, residual, jacobian, level, None, -box, box, 1e-3, 0.5, team
                )
                status = torch.ones(n, dtype=torch.int8, device="cuda")
                index = torch.arange(n, device="cuda").flip(0).contiguous()
                raw.newton_update_(
                    points, status, residual, jacobian, level, index, None, None, 0.0, 0.5, team
                )
    for dtype in (torch.float32, torch.float64):
        for n, m, d in ((300, 5000, 3), (5, 600, 2), (40, 30, 5)):
            raw.nearest(torch.randn(n, d).to(dtype).cuda(), torch.randn(m, d).to(dtype).cuda())
        start, end = torch.zeros(50, 3).to(dtype).cuda(), torch.randn(50, 3).to(dtype).cuda()
        ls.false_position(lambda p: p.square().sum(1) - 0.3, start, end)
    drive_bracket()
    drive_fused()
    torch.cuda.synchronize()
    print("every kernel ran")


def drive_fault() -> None:
    """A kernel of ours that reads beyond its memory: whether the sanitizer looks at them at all."""
    jacobian = torch.ones(5000, 1, 3, device="cuda")
    residual = torch.ones(5000, 1, device="cuda")
    jacobian.untyped_storage().resize_(16)
    raw.pinv_apply(jacobian, residual, 1)
    torch.cuda.synchronize()


def environment(copy: float) -> dict[str, Any]:
    device = torch.cuda.get_device_properties(0)
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,power.limit",
        "--format=csv,noheader",
    ]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        **ls.build_info(),
        "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "driver_clock_power": driver,
        "python": platform.python_version(),
        "copy_GB_per_s": copy,
    }


def write(path: Path, table: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        for row in table:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def switch_points(table: list[dict[str, Any]]) -> list[str]:
    """The fastest team for every op, l and d in float32: what choose_team should pick."""
    lines = []
    keys = sorted({(r["op"], r["l"], r["d"]) for r in table if r["dtype"] == "float32"})
    for op, l, d in keys:  # noqa: E741
        rows = [r for r in table if (r["op"], r["l"], r["d"], r["dtype"]) == (op, l, d, "float32")]
        rows.sort(key=lambda r: r["median_ms"])
        times = "  ".join(f"{r['team']} {r['median_ms']:.4f}" for r in rows)
        lines.append(f"{op:8} l={l} d={d:<6} {times}  ms, {rows[0]['share_of_copy']:.0%} of copy")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--drive", action="store_true")
    parser.add_argument("--fault", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_ops: no CUDA device is visible to torch", file=sys.stderr)
        return 3
    torch.manual_seed(0)
    if arguments.drive or arguments.fault:
        drive_fault() if arguments.fault else drive()
        return 0
    bandwidth = copy_bandwidth()
    arguments.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"environment": environment(bandwidth)}
    # The most wanted first, each written at once: what is cut short has been worth its time.
    for name, bench in (
        ("newton", bench_newton),
        ("nearest", bench_nearest),
        ("rows", lambda: bench_rows(bandwidth)),
    ):
        result[name] = []
        try:
            for row in bench():
                result[name].append(row)
                write(arguments.out / f"{name}.csv", result[name])
        except Exception as error:
            traceback.print_exc()
            failed(f"{name}: {error!s:.200}")
        (arguments.out / "gpu_ops.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(switch_points(result["rows"])))
    for row in result["nearest"]:
        print(f"nearest {row['dtype']} {row['n']} x {row['m']}: {row['median_ms']:.3f} ms")
    for row in result["newton"]:
        print(f"{row['network']}, {row['n']} rows, {row['who']}: {row['median_ms']:.3f} ms")
    print(f"device copy: {bandwidth:.0f} GB/s")
    print("\n".join(f"FAILED: {what}" for what in FAILURES))
    return 1 if FAILURES else 0


if __name__ == "__main__":
    sys.exit(main())
