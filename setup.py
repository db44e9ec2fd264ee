"""Builds levelset_ext._C. Sources come from csrc/sources.txt and the version from VERSION, which
CMakeLists.txt reads too.

Environment
    CUDA_HOME, CUDA_PATH   folder of the CUDA toolkit
    NO_CUDA=1              build without CUDA kernels even if a toolkit is found
    FORCE_CUDA=1           fail if no toolkit is found
    TORCH_CUDA_ARCH_LIST   architectures, such as "9.0" or "8.0;9.0+PTX"
    MAX_JOBS               parallel compile jobs
    SANITIZE               sanitizers for the C++ code, see tools/sanitize.sh
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"levelset_ext: building needs torch >= 2.11 ({error}). "
        "Install it first and build with 'pip install --no-build-isolation .'"
    )

ROOT = Path(__file__).parent.resolve()
TARGET_TORCH = "0x020b000000000000"  # the stable ABI of 2.11: the binary loads on that and later


def enabled(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "off", "no", "false")


def sources(*floors: str) -> list[str]:
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    pairs = [line.split() for line in lines if line and not line.startswith("#")]
    return [path for floor, path in pairs if floor in floors]


def is_toolkit(folder: Path) -> bool:
    return (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime.h").exists()


def find_toolkit() -> Path | None:
    """The CUDA toolkit's folder. Whether a GPU is visible does not matter."""
    if enabled("NO_CUDA"):
        return None
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        if not is_toolkit(Path(named)):
            wanted = "a folder with bin/nvcc and include/cuda_runtime.h"
            sys.exit(f"CUDA_HOME: expected {wanted}, got {named}")
        return Path(named)
    candidates = []
    nvcc = shutil.which("nvcc")
    if nvcc:
        # The nvcc on PATH may be a wrapper outside the toolkit; the compiler itself knows its home.
        probe = subprocess.run(
            [nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True
        )
        top = re.search(r"^#\$ TOP=(.+)$", probe.stderr, flags=re.MULTILINE)
        if top:
            candidates.append(Path(top[1].strip()).resolve())
        candidates.append(Path(nvcc).resolve().parents[1])
    candidates.append(Path("/usr/local/cuda"))
    for folder in candidates:
        if is_toolkit(folder):
            return folder
    if enabled("FORCE_CUDA"):
        sys.exit("FORCE_CUDA=1: no CUDA toolkit found; set CUDA_HOME to its folder")
    return None


def toolkit_version(toolkit: Path) -> tuple[int, int]:
    text = subprocess.run(
        [toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True
    ).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


def compiler_version() -> str:
    compiler = os.environ.get("CXX", "c++")
    try:
        out = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
        return out.stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return compiler


def quoted(name: str, value: str) -> tuple[str, str]:
    return name, '"{}"'.format(value.replace('"', ""))


def extension() -> object:
    version = (ROOT / "VERSION").read_text().strip()
    toolkit = find_toolkit()
    macros = [
        ("TORCH_TARGET_VERSION", TARGET_TORCH),
        quoted("LEVELSET_VERSION", version),
        quoted("LEVELSET_COMPILER", compiler_version()),
        quoted("LEVELSET_TORCH_VERSION", torch.__version__),
    ]
    floors = ["cpu", "torch"]
    headers = sorted(
        str(path.relative_to(ROOT))
        for pattern in ("*.h", "*.cuh", "*.inc")
        for path in (ROOT / "csrc").rglob(pattern)
    )
    options: dict = {"include_dirs": [], "library_dirs": [], "libraries": [], "extra_link_args": []}
    cxx = ["-O3", "-std=c++20", "-Wall", "-fvisibility=hidden", "-g0"]
    nvcc = ["-O3", "-std=c++20", "-lineinfo", "--threads", "2"]
    if os.environ.get("SANITIZE"):
        chosen = f"-fsanitize={os.environ['SANITIZE']}"
        cxx += ["-O0", "-g1", chosen, "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        options["extra_link_args"] = [chosen]
    if toolkit is not None:
        major, minor = toolkit_version(toolkit)
        architectures = "8.0;9.0;10.0+PTX" if (major, minor) >= (12, 8) else "8.0;9.0+PTX"
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures  # torch takes an empty one for a list
        floors += ["cuda", "torch_cuda"]
        macros += [
            ("LEVELSET_WITH_CUDA", "1"),
            quoted("LEVELSET_CUDA_VERSION", f"{major}.{minor}"),
            quoted("LEVELSET_CUDA_ARCHITECTURES", architectures),
        ]
        # The static runtime lets one binary load where torch brings no CUDA libraries.
        cpp_extension.CUDA_HOME = str(toolkit)
        options["include_dirs"] = [str(toolkit / "include")]
        options["library_dirs"] = [str(toolkit / "lib64")]
        options["libraries"] = ["cudart_static", "dl", "rt", "pthread"]
        where = f"CUDA {major}.{minor} for {architectures}"
    else:
        where = "no CUDA toolkit"
    print(f"levelset_ext {version}: torch {torch.__version__}, {where}", file=sys.stderr)
    return cpp_extension.CppExtension(
        "levelset_ext._C",
        sources(*floors),
        define_macros=macros,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        depends=["VERSION", "csrc/sources.txt", *headers],
        **options,
    )


# The ninja of a virtual environment is beside its Python, which need not be on PATH.
os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")

setup(
    version=(ROOT / "VERSION").read_text().strip(),
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
