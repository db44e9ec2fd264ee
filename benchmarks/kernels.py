"""The CPU kernels without torch, on one thread: time a row, and bytes against a copy.

    make bench-kernels
    python benchmarks/kernels.py --program build/cmake/benchmarks/cpp/kernels [--out FILE]
        [--min-time SECONDS] [--filter REGEX]

Runs the Google Benchmark program of benchmarks/cpp and prints a line for each benchmark:
processor time, time a row, GB/s, and the share of what a copy of about that size moves. With --out
the same goes to a JSON file, with what it depends on: processor, compiler, vector instructions.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from levelset_ext.bench.limits import environment
from levelset_ext.bench.timing import Settings


def parts(name: str) -> dict[str, Any]:
    """op and numbers of a benchmark's name, such as newton_update/n:2000/l:1/d:3."""
    op, *rest = name.split("/")
    return {"op": op, **{key: int(value) for key, value in (one.split(":") for one in rest)}}


def run(program: Path, min_time: float, only: str) -> list[dict[str, Any]]:
    """A dictionary for each benchmark that the filter lets through; copies always."""
    asked = [
        str(program), "--benchmark_format=json", f"--benchmark_min_time={min_time}",
        f"--benchmark_filter=copy|{only}",
    ]  # fmt: skip
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    rows = []
    copies: dict[int, float] = {}
    for one in json.loads(done.stdout)["benchmarks"]:
        row = parts(one["name"])
        row["seconds"] = one["cpu_time"] * 1e-9
        row["gb_per_s"] = one["bytes_per_second"] * 1e-9
        moved = row["bytes"] = one["bytes_per_second"] * row["seconds"]
        if row["op"] == "copy":
            copies[int(moved)] = row["gb_per_s"]
        else:
            row["ns_per_row"] = row["seconds"] / row["n"] * 1e9
            nearest = min(copies, key=lambda size: abs(math.log(size / moved)))
            row["share_of_copy"] = row["gb_per_s"] / copies[nearest]
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    if row["op"] == "copy":
        return f"{'copy':15} {row['bytes'] / 1e6:8.1f} MB {row['gb_per_s']:30.1f} GB/s"
    return (
        f"{row['op']:15} n {row['n']:<7} l {row['l']} d {row['d']:<4} {row['ns_per_row']:8.1f} ns "
        f"a row {row['gb_per_s']:6.1f} GB/s, {row['share_of_copy']:4.0%} of a copy"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--program", type=Path, default=Path("build/cmake/benchmarks/cpp/kernels"))
    parser.add_argument("--out", type=Path, help="write the figures here too")
    parser.add_argument("--min-time", type=float, default=0.2, help="seconds of each benchmark")
    parser.add_argument("--filter", default=".", help="regular expression: which benchmarks")
    args = parser.parse_args()
    if not os.access(args.program, os.X_OK):
        parser.error(f"--program: no program {args.program}; make bench-kernels builds it")
    rows = run(args.program, args.min_time, args.filter)
    print("\n".join(map(line, rows)))
    if args.out is not None:
        import torch

        where = environment(Settings("full", 1, torch.device("cpu"))) | {"threads": 1}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"environment": where, "min_time": args.min_time, "kernels": rows}
        args.out.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
