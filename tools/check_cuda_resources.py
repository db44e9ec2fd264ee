"""Registers, stack and spills of every CUDA kernel, for the architectures that are shipped.

Compiles the CUDA sources for sm_80, sm_90 and sm_100 with warnings as errors and reads what ptxas
reports. Fails if a kernel spills; a stack frame alone is an array that is indexed at run time, such
as the factorisation for l > 2. Needs no GPU; without a CUDA toolkit it says so and exits with 0.

    python tools/check_cuda_resources.py [--json FILE] [--all] [--jobs N]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
FLAGS = ["-O3", "-std=c++20", "--Werror", "all-warnings", "-Xptxas", "-v"]

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home) / "bin" / "nvcc" if home else None
    return nvcc if nvcc is not None and nvcc.exists() else None


def cuda_sources() -> list[str]:
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    pairs = [line.split() for line in lines if line and not line.startswith("#")]
    return [path for floor, path in pairs if floor == "cuda"]


def compile_one(nvcc: Path, source: str, architecture: str, folder: Path) -> str:
    """What the compiler says about one file for one architecture."""
    target = folder / f"{Path(source).stem}.{architecture}.cubin"
    command = [nvcc, *FLAGS, f"-arch={architecture}", "-cubin", str(ROOT / source), "-o", target]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{source} for {architecture} does not compile:\n{run.stderr}")
    return run.stderr


def kernels(report: str, architecture: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for block in re.split(r"(?=Compiling entry function)", report)[1:]:
        entry, stack, used = ENTRY.search(block), STACK.search(block), USED.search(block)
        if entry is None or stack is None or used is None:
            raise RuntimeError(f"ptxas reports in a form that is not understood:\n{block}")
        shared = SHARED.search(block)
        found.append(
            {
                "symbol": entry[1],
                "architecture": architecture,
                "registers": int(used[1]),
                "stack": int(stack[1]),
                "spill_stores": int(stack[2]),
                "spill_loads": int(stack[3]),
                "shared": int(shared[1]) if shared else 0,
            }
        )
    return found


def demangle(symbols: list[str]) -> list[str]:
    try:
        out = subprocess.run(
            ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
        )
    except OSError:
        sys.exit("check_cuda_resources: c++filt (binutils) is needed to read the kernels' names")
    return out.stdout.splitlines()


def describe(kernel: dict[str, Any], name: str) -> None:
    """Adds op, team, dtype and l, read off the kernel's C++ name."""
    rows = re.search(r"(\w+)_per_row<.*?(\w+)Op, \w+, (\d+), [\w:]+, (\w+)>", name)
    nearest = re.search(r"(nearest_\w+)<(\w+)(?:, (\d+))?>", name)
    if rows:
        team, op, outputs, dtype = rows.groups()
        kernel.update(op=op.lower(), team=team, dtype=dtype, outputs=int(outputs) or "any")
    elif nearest:
        op, dtype, dimension = nearest.groups()
        kernel.update(op=op, team="-", dtype=dtype, outputs=f"d={dimension}" if dimension else "-")
    else:
        other = re.search(r"(\w+)<(.*)>", name)
        op, dtype = other.groups() if other else (name, "-")
        kernel.update(op=op, team="-", dtype=dtype, outputs="-")


def print_table(rows: list[dict[str, Any]], every: bool) -> None:
    """One line per op, team and l with the largest numbers over dtypes, or every kernel."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["architecture"], row["op"], row["team"], str(row["outputs"]))
        groups.setdefault((*key, row["dtype"]) if every else key, []).append(row)
    layout = "{:7} {:16} {:7} {:5} {:>9} {:>6} {:>6}  {}"
    print(layout.format("arch", "op", "team", "l", "registers", "stack", "spills", "dtype"))
    for key, group in sorted(groups.items(), key=lambda item: [str(part) for part in item[0]]):
        spills = max(r["spill_stores"] + r["spill_loads"] for r in group)
        registers, stack = max(r["registers"] for r in group), max(r["stack"] for r in group)
        dtype = key[4] if every else "largest"
        print(layout.format(*key[:4], registers, stack, spills, dtype))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    parser.add_argument("--all", action="store_true", help="a line for every dtype")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    arguments = parser.parse_args()

    nvcc = find_nvcc()
    if nvcc is None:
        print("check_cuda_resources: skipped, CUDA_HOME does not name a CUDA toolkit")
        return 0
    tasks = [(s, a) for s in cuda_sources() for a in ARCHITECTURES]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        reports = pool.map(lambda t: compile_one(nvcc, t[0], t[1], Path(folder)), tasks)
        try:
            for (_, architecture), report in zip(tasks, reports, strict=True):
                rows += kernels(report, architecture)
        except RuntimeError as error:
            print(f"check_cuda_resources: {error}", file=sys.stderr)
            return 1
    for row, name in zip(rows, demangle([row["symbol"] for row in rows]), strict=True):
        describe(row, name)

    print_table(rows, arguments.all)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    spilling = [r for r in rows if r["spill_stores"] + r["spill_loads"]]
    for row in spilling:
        print(
            f"check_cuda_resources: {row['op']} (team {row['team']}, l {row['outputs']}, "
            f"{row['dtype']}) spills on {row['architecture']}",
            file=sys.stderr,
        )
    print(f"{len(rows)} kernels, {len(spilling)} that spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
