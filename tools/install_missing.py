"""Installs the pinned packages that this Python lacks.

A package that is there in another version is left alone: on a machine that brings its own torch,
its other packages fit that torch, and the wheel's metadata says what versions work.
"""

from __future__ import annotations

import compileall
import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path


def missing(lines: list[str]) -> list[str]:
    wanted = []
    for line in lines:
        requirement = line.split("#")[0].strip()
        if not requirement:
            continue
        try:
            importlib.metadata.version(requirement.split("==")[0])
        except importlib.metadata.PackageNotFoundError:
            wanted.append(requirement)
    return wanted


def main() -> None:
    lines = [line for name in sys.argv[1:] for line in Path(name).read_text().splitlines()]
    wanted = missing(lines)
    if not wanted:
        return
    print("installing " + " ".join(wanted), flush=True)
    options = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *wanted], check=True)
    # pip would compile them one after the other. Not doing it at all costs every process seconds
    # where Python may not write bytecode (PYTHONDONTWRITEBYTECODE).
    compileall.compile_dir(sysconfig.get_path("purelib"), quiet=2, workers=0)


if __name__ == "__main__":
    main()
