"""``levelset-ext bench``: reads the options, runs what was asked for, writes the files."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from levelset_ext.errors import InputError

WHAT = ("ops", "newton", "false-position", "train-step", "nearest")


def add_bench_command(commands: Any) -> None:
    one = commands.add_parser(
        "bench",
        help="how fast it is, against other ways to do the same",
        description="Checks every competitor's result, then times all of them in turns: a table on "
        "stdout, and with --out JSON, CSV and pictures. Status 1 if a result is wrong.",
    )
    one.add_argument("what", choices=(*WHAT, "all"), metavar="WHAT", help=", ".join((*WHAT, "all")))
    one.add_argument("--quick", action="store_true", help="smaller, no torch.compile, no growth")
    one.add_argument("--threads", type=int, help="of torch, which takes all cores if left out")
    one.add_argument("--repeats", type=int, help="rounds; 5, or 3 with --quick")
    one.add_argument("--out", metavar="DIR", help="write WHAT.json, WHAT.csv and WHAT.png there")
    one.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    one.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> None:
    from levelset_ext.bench.timing import Settings
    from levelset_ext.recipes.devices import parse_device
    from levelset_ext.recipes.files import prepare_folder

    device = parse_device(args.device)
    repeats = (3 if args.quick else 5) if args.repeats is None else args.repeats
    for name, number in (("repeats", repeats), ("threads", args.threads)):
        if number is not None and number < 1:
            raise InputError(f"{name}: expected at least 1, got {number}")
    settings = Settings("quick" if args.quick else "full", repeats, device)
    out = None if args.out is None else prepare_folder(Path(args.out))
    before = torch.get_num_threads()
    try:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        bench(WHAT if args.what == "all" else (args.what,), settings, out)
    finally:
        torch.set_num_threads(before)


def runners() -> dict[str, Callable[..., dict[str, Any]]]:
    from levelset_ext.bench import false_position, nearest, newton, ops, train_step

    return {
        "ops": ops.run,
        "newton": newton.run,
        "false-position": false_position.run,
        "train-step": train_step.run,
        "nearest": nearest.run,
    }


def bench(what: tuple[str, ...], settings: Any, out: Path | None) -> dict[str, dict[str, Any]]:
    """Runs some of :data:`WHAT` and prints their tables.

    Returns:
        For each of them what is in its JSON file: environment, limits of the machine, cases.

    Raises:
        Mismatch: a competitor's result is wrong. What was finished before is written already.
    """
    from levelset_ext.bench import limits, tables
    from levelset_ext.recipes.progress import say

    known = runners()
    say("limits of the machine")
    measured = limits.machine_limits(settings)
    for line in tables.limit_lines(measured):
        print(line)
    results = {}
    for name in what:
        began = time.monotonic()
        found = known[name](settings, measured)
        result = {"environment": limits.environment(settings), "limits": measured, **found}
        result["bench_seconds"] = time.monotonic() - began
        results[name] = result
        print("\n".join(tables.lines(name, result)), flush=True)
        if out is not None:
            files = tables.write(out, name, result)
            say(f"{name}: {result['bench_seconds']:.0f} s; wrote {', '.join(files)} to {out}")
    return results
