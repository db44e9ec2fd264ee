"""What the scripts here share: a setting that cannot be used is one line and exit status 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from levelset_ext.errors import InputError


def command(work: Callable[[], int | None]) -> int:
    """Runs a benchmark."""
    try:
        return work() or 0
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Refuses counts below 1; one that is None was left out."""
    for name in names:
        count = getattr(args, name)
        if count is not None and count < 1:
            raise InputError(f"{name.replace('_', '-')}: expected at least 1, got {count}")


def check_writable(name: str, path: Path) -> None:
    """Says so of a file that could not be written in the end, before there is anything to write."""
    target = path if path.exists() else path.parent
    if path.is_dir() or not target.exists() or not os.access(target, os.W_OK):
        raise InputError(f"{name}: expected a file that can be written, got {path}")
