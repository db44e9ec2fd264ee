"""Whether the sources still compile with the oldest torch that is promised, and would load in it.

The stable ABI keeps a binary loading on later versions. It does not keep the sources from using
what only the headers at hand have, nor the headers of older versions from refusing what these
allow. So this fetches the headers of the oldest version that pyproject.toml allows, has the
compiler check the sources that include torch, and looks up there every symbol that the built module
takes from torch.

    python tools/check_oldest_torch.py [--headers FOLDER]

Where no CUDA toolkit is found (CUDA_HOME), the sources that need it are left out, and it says so.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from check_cuda_resources import ROOT, sources

# The smallest wheel there is: headers are the same on all platforms.
PLATFORM = ("--platform", "macosx_11_0_arm64", "--python-version", "3.11")
TEXTS = ("VERSION", "COMPILER", "TORCH_VERSION", "CUDA_VERSION", "CUDA_ARCHITECTURES")
SYMBOL = re.compile(r"\bU ((?:aoti_)?torch_\w+)")
HEADER = re.compile(r"torch/include/.*\.(h|hpp|inc)")


def promised() -> tuple[str, str]:
    """The version of pyproject.toml, and the stable ABI that setup.py asks for."""
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    target = re.search(r'TARGET_TORCH = "(0x[0-9a-f]+)"', (ROOT / "setup.py").read_text())
    if oldest is None or target is None:
        raise RuntimeError('expected "torch>=..." in pyproject.toml and TARGET_TORCH in setup.py')
    return oldest[1], target[1]


def fetch(version: str, folder: Path) -> Path:
    """The headers of a version of torch, in a folder of their own."""
    version += ".0" * (2 - version.count("."))
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        *PLATFORM, "--dest", folder, f"torch=={version}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("torch-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder, [name for name in file.namelist() if HEADER.fullmatch(name)])
    return folder / "torch" / "include"


def complaints(source: str, headers: Path, target: str, toolkit: Path | None) -> str:
    """What the compiler has to say against a file."""
    macros = [f'-DLEVELSET_{name}="x"' for name in TEXTS]
    macros += [f"-DTORCH_TARGET_VERSION={target}", "-DTORCH_EXTENSION_NAME=_C"]
    folders = [headers, headers / "torch/csrc/api/include", sysconfig.get_paths()["include"]]
    if toolkit is not None:
        macros.append("-DLEVELSET_WITH_CUDA=1")
        folders.append(toolkit / "include")
    command = [
        os.environ.get("CXX", "c++"), "-fsyntax-only", "-std=c++20", "-Wall", "-fvisibility=hidden",
        *macros, *(part for folder in folders for part in ("-isystem", str(folder))), source,
    ]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return f"{source}:\n{run.stderr}" if run.returncode != 0 else ""


def unknown_symbols(headers: Path) -> list[str]:
    """What the built module wants of torch's C interface and the headers do not declare."""
    modules = sorted((ROOT / "levelset_ext").glob("_C.*.so"))
    if not modules:
        return []
    command = ["nm", "-D", "--undefined-only", *map(str, modules)]
    wanted = SYMBOL.findall(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    if not wanted:
        raise RuntimeError(f"{modules[0]}: expected symbols of torch, found none")
    declared = "".join(p.read_text(errors="replace") for p in (headers / "torch").rglob("*.h"))
    words = set(re.findall(r"\w+", declared))
    return sorted({name for name in wanted if name not in words})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--headers", type=Path, help="torch/include of that version, if it is there"
    )
    arguments = parser.parse_args()
    version, target = promised()
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    toolkit = Path(home) if home and (Path(home) / "include" / "cuda_runtime.h").exists() else None
    with tempfile.TemporaryDirectory() as folder:
        headers = arguments.headers or fetch(version, Path(folder))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(
                lambda source: complaints(source, headers, target, toolkit),
                sources("torch", *([] if toolkit is None else ["torch_cuda"])),
            )
            failed = [text for text in found if text]
        unknown = unknown_symbols(headers)
    for text in failed:
        print(text, file=sys.stderr)
    if unknown:
        print(f"torch {version} has no {', '.join(unknown)}", file=sys.stderr)
    if not failed and not unknown:
        without = "" if toolkit is not None else "; without those for CUDA, as there is no toolkit"
        print(f"the sources compile with torch {version}, which has all their symbols{without}")
    return 1 if failed or unknown else 0


if __name__ == "__main__":
    sys.exit(main())
