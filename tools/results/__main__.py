"""The results page and what is on it.

    python -m tools.results list                      what there is, and what it costs
    python -m tools.results run [--mnist DIR] [--cifar DIR] [--scans DIR] [--only NAME] [--full]
    python -m tools.results page [--check]            docs/results.md from benchmarks/results

``run`` goes on where it was, leaves out what is there or lacks its data, goes on after a failure,
tells what failed and then ends with status 1. It writes the page too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.results import page, runner
from tools.results.registry import DATA, RESULTS, ROOT, find


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="what there is, and what it costs")
    one = commands.add_parser("run", help="what is missing")
    for name in DATA:
        one.add_argument(f"--{name.lower()}", type=Path, metavar="DIR", help="its files")
    one.add_argument("--only", action="append", default=[], metavar="NAME", help="this result")
    one.add_argument("--again", action="store_true", help="also what is there")
    one.add_argument("--work", type=Path, default=ROOT / "build/results", metavar="DIR")
    for some in (listing, one):
        some.add_argument("--full", action="store_true", help="the paper's setting, for a GPU")
    write = commands.add_parser("page", help="docs/results.md")
    write.add_argument("--check", action="store_true", help="write nothing; status 1 if it differs")
    args = parser.parse_args(argv)

    if args.command == "list":
        for result in RESULTS:
            if not args.full or result.full:
                print(_line(result, args.full))
        return 0
    if args.command == "page":
        return _page(args.check)
    try:
        wanted = [find(name) for name in args.only] or list(RESULTS)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    data = {}
    for name in DATA:
        folder = getattr(args, name.lower())
        if folder is not None:
            if not folder.is_dir():
                print(f"{name.lower()}: expected a folder, got {folder}", file=sys.stderr)
                return 2
            data[name] = folder.resolve()
    failed = runner.run_all(
        wanted, data, args.work.resolve(), full=args.full, again=args.again,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    _page(check=False)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _line(result: page.Result, full: bool) -> str:
    by_hand = not result.chosen(full)
    state = "collected by hand" if by_hand else runner.state_of(result, full)
    needs = " ".join(f"--{name.lower()}" for name in result.needs(full))
    minutes = result.full_minutes if full else result.minutes
    return f"{result.name:24} {minutes:6g} min  {state:24} {needs:16} {result.paper}"


def _page(check: bool) -> int:
    text, file = page.page(), ROOT / page.PAGE
    if check:
        same = file.exists() and file.read_text() == text
        print(f"{page.PAGE}: {'as generated' if same else 'differs from what would be generated'}")
        return 0 if same else 1
    file.write_text(text)
    print(f"{page.PAGE}: written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
