"""Builds the source distribution and, from it alone, a wheel; installs that into a new environment
and uses and tests it there.

    python tools/build_wheel.py                # dist/*.tar.gz, dist/cpu/*.whl or dist/cu130/*.whl
    python tools/build_wheel.py --check FILE   # only the last steps, of a wheel that is there

CUDA kernels are in if setup.py finds a toolkit; CUDA_HOME, NO_CUDA=1, FORCE_CUDA=1 and
TORCH_CUDA_ARCH_LIST decide as they do there. The wheel's tags are those of this Python and platform
(cp311-cp311-linux_x86_64): pybind11 needs Python's full ABI, so each Python has a wheel of its own.
Of torch only the stable C interface is used, so one wheel serves every torch from 2.11 on; that is
checked here on the symbols. Nothing is downloaded: the new environment borrows the packages of the
Python that runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
# What belongs to the repository and to nobody who builds from the source distribution.
ONLY_IN_GIT = re.compile(r"\.(ci|github)/|\.gitignore$|\.clang-format$")
# C++ names of torch (namespaces c10, at, torch) as the linker sees them; they change with versions.
TORCH_CXX = re.compile(r"\b_Z(?:NK?|T[VIS]N)(?:3c10|2at|5torch)\d\w*")

OP_TESTS = ("test_ops.py", "test_ops_out.py", "test_bracket_op.py")

USE = """
import json, sys
import torch
import levelset_ext as ls

assert ls.__file__.startswith(sys.prefix), ls.__file__
net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
found = ls.project(net, 2 * torch.rand(64, 2) - 1)
p = ls.sample_network(net, found)
p.square().sum().backward()
assert net[0].weight.grad.isfinite().all() and torch.equal(p, found.points)
cloud = torch.rand(50, 3)
assert torch.equal(ls.ops.nearest_distance(cloud, cloud)[1], torch.arange(50))
print(json.dumps(ls.build_info()))
"""


class Refused(Exception):
    """What is wrong with a distribution, in one line."""


def run(command: list[str], **options: object) -> str:
    """Standard output of a command; its last lines and an error if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise Refused(f"{' '.join(map(str, command[:6]))}: status {done.returncode}\n{tail}")
    return str(done.stdout)


def build_sdist(out: Path, root: Path = ROOT) -> Path:
    """Writes ``out/levelset_ext-VERSION.tar.gz``. Setuptools would also take what an earlier file
    list names, so the list is made in an empty folder."""
    with tempfile.TemporaryDirectory() as empty:
        run(
            [
                *(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", empty),
                *("sdist", "--formats=gztar", "--dist-dir", str(out.resolve())),
            ],
            cwd=root,
            env={**os.environ, "NO_CUDA": "1"},  # no kernel is compiled: do not ask for a toolkit
        )
    version = (root / "VERSION").read_text().strip()
    return out / f"levelset_ext-{version}.tar.gz"


def left_out(sdist: Path, root: Path = ROOT) -> list[str]:
    """Files under version control that a build, a test run or a reader would miss."""
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    tracked = run(["git", "ls-files"], cwd=root).splitlines()
    there = [name for name in tracked if (root / name).exists()]
    return [name for name in there if name not in names and not ONLY_IN_GIT.match(name)]


def build_wheel(source: Path, out: Path) -> Path:
    """A wheel from an unpacked source distribution, with the packages of this Python."""
    run(
        [
            *(*PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-index"),
            *("--wheel-dir", str(out), str(source)),
        ]
    )
    return next(out.glob("levelset_ext-*.whl"))


def inspect(wheel: Path) -> dict[str, object]:
    """What a wheel holds.

    Returns:
        tag; size_mb; module (name of the compiled module); glibc (the least version it needs, ""
        without nm).

    Raises:
        Refused: no compiled module, more than one, one for another Python, files that do not
            belong there, or a dependence on torch's C++ interface.
    """
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        modules = [name for name in names if name.endswith((".so", ".pyd"))]
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        if modules != [f"levelset_ext/_C{suffix}"]:
            raise Refused(f"{wheel.name}: expected levelset_ext/_C{suffix}, got {modules}")
        tops = {name.split("/")[0] for name in names}
        if not all(top == "levelset_ext" or top.endswith(".dist-info") for top in tops):
            raise Refused(f"{wheel.name}: expected levelset_ext alone, got {sorted(tops)}")
        for typed in ("levelset_ext/py.typed", "levelset_ext/_C.pyi"):
            if typed not in names:
                raise Refused(f"{wheel.name}: {typed} is missing")
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        needs = re.findall(r"^Requires-Dist: (torch\S*)$", archive.read(metadata).decode(), re.M)
        if needs != ["torch>=2.11"]:
            raise Refused(f"{wheel.name}: expected to need torch>=2.11, got {needs}")
        symbols = undefined_symbols(Path(archive.extract(modules[0], folder)))
    versions = [tuple(map(int, v.split("."))) for v in re.findall(r"@GLIBC_([\d.]+)", symbols)]
    return {
        "tag": "-".join(wheel.stem.split("-")[-3:]),
        "size_mb": round(wheel.stat().st_size / 1e6, 1),
        "module": modules[0],
        "glibc": ".".join(map(str, max(versions))) if versions else "",
    }


def undefined_symbols(module: Path) -> str:
    """What the dynamic linker has to find for a module, one name a line; "" without nm.

    Raises:
        Refused: names of torch's C++ interface are among them.
    """
    nm = shutil.which("nm")
    symbols = run([nm, "-D", "--undefined-only", str(module)]) if nm else ""
    unstable = sorted(set(TORCH_CXX.findall(symbols)))
    if unstable:
        raise Refused(f"{module.name}: needs C++ names of one torch version: {unstable[:5]}")
    return symbols


def install_and_use(wheel: Path, folder: Path) -> dict[str, object]:
    """Installs a wheel into a new environment in ``folder`` and runs a few lines and the command
    there. Packages other than levelset_ext are this Python's, by a path file.

    Returns:
        ``build_info()`` of the installed package.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = str(folder / "bin" / "python")
    borrowed = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    run([*PIP, "--python", python, "install", "--no-deps", "--no-index", str(wheel.resolve())])
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    found = json.loads(run([python, "-c", USE], cwd=folder, env=env))
    told = json.loads(run([str(folder / "bin" / "levelset-ext"), "info"], cwd=folder, env=env))
    if told["version"] != found["version"]:
        raise Refused(f"info: expected version {found['version']}, got {told['version']}")
    return dict(found)


def test_ops(folder: Path) -> str:
    """Runs the op tests of this checkout against the package of the environment in ``folder``.

    Returns:
        The last line of pytest.
    """
    files = [str(ROOT / "tests" / name) for name in OP_TESTS]
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts="]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    python = str(folder / "bin" / "python")
    # That the tests see this package and not the checkout's is part of the run.
    where = "import levelset_ext, sys; assert levelset_ext.__file__.startswith(sys.prefix); "
    code = where + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    said = run([python, "-c", code, *options, *files], cwd=folder, env=env)
    return said.strip().splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="DIR")
    parser.add_argument("--check", type=Path, metavar="WHEEL", help="only look at and use a wheel")
    args = parser.parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    try:
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            wheel = args.check
            if wheel is None:
                args.out.mkdir(parents=True, exist_ok=True)
                sdist = build_sdist(args.out)
                missing = left_out(sdist) if (ROOT / ".git").exists() else []
                if missing:
                    raise Refused(f"{sdist.name}: MANIFEST.in leaves out {', '.join(missing)}")
                say(f"{sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB")
                with tarfile.open(sdist) as archive:
                    archive.extractall(work, filter="data")
                wheel = build_wheel(work / sdist.name.removesuffix(".tar.gz"), work)
            facts = inspect(wheel)
            say(f"{wheel.name}: {facts['size_mb']} MB, needs glibc >= {facts['glibc'] or '?'}")
            built = install_and_use(wheel, work / "env")
            cuda = built["cuda_toolkit"] if built["cuda"] else None
            kind = "CPU" if cuda is None else f"CPU and CUDA {cuda}"
            say(f"installed and used with torch {built['torch']}: {kind}")
            if (ROOT / "tests").is_dir():
                say(f"op tests against it: {test_ops(work / 'env')}")
            if args.check is None:
                flavour = "cpu" if cuda is None else "cu" + str(cuda).replace(".", "")
                (args.out / flavour).mkdir(exist_ok=True)
                say("wrote " + str(shutil.move(wheel, args.out / flavour / wheel.name)))
    except Refused as error:
        print(f"build_wheel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
