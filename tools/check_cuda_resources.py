"""Registers, stack and spills of every CUDA kernel, for the architectures that are shipped.

Compiles the CUDA sources for sm_80, sm_90 and sm_100 with warnings as errors and reads what ptxas
reports. Fails if a kernel or a function that it calls spills; a stack frame alone is an array that
is indexed at run time, such as the factorisation for l > 2. Needs no GPU; without a CUDA toolkit it
says so and exits with 0.

    python tools/check_cuda_resources.py [--arch sm_90 ...] [--json FILE] [--markdown FILE] [--all]

With --log it compiles nothing and reads what a build with NVCC_APPEND_FLAGS="-Xptxas -v" printed.
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

# Bytes that a kernel may keep on the stack around calls. The fused kernel calls its phases, each of
# which has all registers, and so saves its two loop counters; the phases themselves may not spill.
AROUND_CALLS = {"mlp_newton_tiles": 24}
# Bytes, stores and loads, that those phases may spill all the same: a few addresses beside the 64
# sums and the halves of 3xTF32, on sm_80 and sm_100. With 512 columns a panel lasts for one step
# only, so what copies the next one lives beside what multiplies.
IN_CALLS = {f"W={width}, 3xTF32": 64 for width in (64, 128, 256)} | {"W=512, 3xTF32": 160}
PRODUCTS = {"1": "float32", "2": "3xTF32", "3": "bfloat16"}

MARKS = ("<!-- resources -->", "<!-- end of resources -->")
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home) / "bin" / "nvcc" if home else None
    return nvcc if nvcc is not None and nvcc.exists() else None


def sources(*floors: str) -> list[str]:
    """The compiled files of these floors of the house, see csrc/sources.txt."""
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    pairs = [line.split() for line in lines if line and not line.startswith("#")]
    return [path for floor, path in pairs if floor in floors]


def compile_one(nvcc: Path, source: str, architecture: str, folder: Path) -> str:
    """What the compiler says about one file for one architecture."""
    target = folder / f"{Path(source).stem}.{architecture}.cubin"
    command = [nvcc, *FLAGS, f"-arch={architecture}", "-cubin", str(ROOT / source), "-o", target]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{source} for {architecture} does not compile:\n{run.stderr}")
    return run.stderr


def kernels(report: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for block in re.split(r"(?=Compiling entry function)", report)[1:]:
        entry, stacks, used = ENTRY.search(block), STACK.findall(block), USED.search(block)
        if entry is None or not stacks or used is None:
            raise RuntimeError(f"ptxas reports in a form that is not understood:\n{block}")
        shared = SHARED.search(block)
        # The first is the kernel's own, the others are of the functions that it calls.
        own, *called = [[int(number) for number in numbers] for numbers in stacks]
        found.append(
            {
                "symbol": entry[1],
                "architecture": entry[2],
                "registers": int(used[1]),
                "stack": own[0],
                "spill_stores": own[1],
                "spill_loads": own[2],
                "spills_in_calls": sum(numbers[1] + numbers[2] for numbers in called),
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
    tiles = re.search(r"(mlp_\w+)<(\d+),.*?MlpProduct\)?(?:::\w+)?(\d)>", name)
    if rows:
        team, op, outputs, dtype = rows.groups()
        kernel.update(op=op.lower(), team=team, dtype=dtype, outputs=int(outputs) or "any")
    elif nearest:
        op, dtype, dimension = nearest.groups()
        kernel.update(op=op, team="-", dtype=dtype, outputs=f"d={dimension}" if dimension else "-")
    elif tiles:
        product = PRODUCTS[tiles[3]]
        kernel.update(op=tiles[1], team="block", dtype="float", outputs=f"W={tiles[2]}, {product}")
    else:
        other = re.search(r"(\w+)\(", name)
        kernel.update(op=other[1] if other else name, team="-", dtype="float", outputs="-")


def spills(kernel: dict[str, Any]) -> bool:
    own = max(kernel["spill_stores"], kernel["spill_loads"])
    allowed = IN_CALLS.get(kernel["outputs"], 0)
    return own > AROUND_CALLS.get(kernel["op"], 0) or kernel["spills_in_calls"] > allowed


def table(rows: list[dict[str, Any]], every: bool) -> list[list[str]]:
    """A line per op, team and l with the largest numbers over dtypes, or for every kernel."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["architecture"], row["op"], row["team"], str(row["outputs"]))
        groups.setdefault((*key, row["dtype"]) if every else (*key, "largest"), []).append(row)
    lines = []
    for key, group in sorted(groups.items()):
        spilled = max(r["spill_stores"] + r["spill_loads"] + r["spills_in_calls"] for r in group)
        numbers = [max(r[name] for r in group) for name in ("registers", "stack", "shared")]
        lines.append([*key[:4], *map(str, numbers), str(spilled), key[4]])
    return lines


HEAD = ["arch", "op", "team", "l", "registers", "stack", "shared", "spills", "dtype"]


def print_table(rows: list[dict[str, Any]], every: bool) -> None:
    layout = "{:7} {:16} {:7} {:15} {:>9} {:>6} {:>7} {:>6}  {}"
    for line in [HEAD, *table(rows, every)]:
        print(layout.format(*line))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table with the architectures side by side, as the documentation has it."""
    architectures = sorted({row["architecture"] for row in rows}, key=lambda name: int(name[3:]))
    columns: dict[tuple[str, ...], dict[str, str]] = {}
    for arch, op, team, outputs, registers, stack, shared, spilled, _ in table(rows, False):
        numbers = " / ".join((registers, stack, shared, spilled))
        columns.setdefault((op, team, outputs), {})[arch] = numbers
    lines = [
        "| kernel | team | l | " + " | ".join(architectures) + " |",
        "|---" * (3 + len(architectures)) + "|",
    ]
    for key, found in sorted(columns.items()):
        lines.append("| " + " | ".join([*key, *(found[a] for a in architectures)]) + " |")
    return "\n".join(lines) + "\n"


def compiled(architectures: list[str], jobs: int) -> list[dict[str, Any]] | None:
    """The kernels of all sources; None without a toolkit."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    tasks = [(s, a) for s in sources("cuda") for a in architectures]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        reports = pool.map(lambda t: compile_one(nvcc, t[0], t[1], Path(folder)), tasks)
        return [row for report in reports for row in kernels(report)]


def logged(log: Path) -> list[dict[str, Any]]:
    """The kernels that a build has compiled, which have to be of every file that has some."""
    rows = kernels(log.read_text())
    for source in sources("cuda"):
        # The kernels are in anonymous namespaces, which nvcc names after the file.
        if not any(f"_{Path(source).stem}_cu_" in row["symbol"] for row in rows):
            raise RuntimeError(f"{log}: no kernel of {source}; was it built with -Xptxas -v?")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    parser.add_argument(
        "--markdown", type=Path, help="put the table into this page, between its marks"
    )
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="sm_80 sm_90 sm_100")
    parser.add_argument("--log", type=Path, help="of a build, instead of compiling")
    parser.add_argument("--all", action="store_true", help="a line for every dtype")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    arguments = parser.parse_args()

    try:
        rows = logged(arguments.log) if arguments.log else compiled(arguments.arch, arguments.jobs)
    except RuntimeError as error:
        print(f"check_cuda_resources: {error}", file=sys.stderr)
        return 1
    if rows is None:
        print("check_cuda_resources: skipped, CUDA_HOME does not name a CUDA toolkit")
        return 0
    for row, name in zip(rows, demangle([row["symbol"] for row in rows]), strict=True):
        describe(row, name)

    print_table(rows, arguments.all)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.markdown:
        page = arguments.markdown.read_text()
        head, _, rest = page.partition(MARKS[0])
        _, _, tail = rest.partition(MARKS[1])
        text = f"{head}{MARKS[0]}\n\n{markdown(rows)}\n{MARKS[1]}{tail}"
        arguments.markdown.write_text(text)
    spilling = [r for r in rows if spills(r)]
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
