"""Loads the compiled module, or says in one line why it cannot."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sysconfig
from pathlib import Path
from typing import Any

_OLDEST_TORCH = (2, 11)

try:
    import torch
except ImportError as error:  # pragma: no cover - cannot happen in a test run
    raise ImportError("levelset_ext needs torch >= 2.11, which is not installed") from error


def check_torch(version: str) -> None:
    """Raises ImportError if this torch is older than the ABI the module is built for."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers < _OLDEST_TORCH:
        raise ImportError(f"levelset_ext needs torch >= 2.11, found {version}")


check_torch(torch.__version__)


def explain(error: ImportError, folder: Path) -> str:
    """One line on why the compiled module in the package's folder could not be imported."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    again = "in a checkout run 'make' or 'python setup.py build_ext --inplace'"
    there = sorted(p.name for p in folder.glob("_C.*") if p.suffix in (".so", ".pyd"))
    if not there:
        return f"levelset_ext: the compiled module _C is not built; {again}"
    if f"_C{suffix}" not in there:
        return (
            f"levelset_ext: the compiled module _C is built for another Python: expected "
            f"_C{suffix} for Python {platform.python_version()}, got {', '.join(there)}; install "
            f"the wheel of this Python, or {again}"
        )
    cause = " ".join(str(error).split())
    return (
        f"levelset_ext: the compiled module _C does not load with torch {torch.__version__} "
        f"({cause}); build it again: {again}"
    )


try:
    from levelset_ext import _C
except ImportError as error:
    raise ImportError(explain(error, Path(__file__).parent)) from error


def build_info() -> dict[str, Any]:
    """What is inside this installation.

    Returns:
        version; torch (in use) and torch_headers (built against); compiler; cuda (whether CUDA
        kernels were compiled in), cuda_toolkit, cuda_architectures; cuda_kernels_registered (what
        torch's dispatcher says); cuda_devices (names of the visible devices).
    """
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(
        "levelset_ext::newton_update", "CUDA"
    )
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "version": _C.__version__,
        "torch": torch.__version__,
        **_C.build,
        "cuda_kernels_registered": registered,
        "cuda_devices": devices,
    }


# What the compiled fields use, by the width of their vectors in bytes.
_INSTRUCTION_SETS = {64: "AVX-512", 32: "AVX2", 16: "128-bit vectors"}
_NEEDED = ("numpy", "scipy", "scikit-image", "trimesh", "networkx", "pillow")
_OPTIONAL = ("scikit-learn", "joblib", "distributed", "ray", "matplotlib", "pymeshlab", "viser",
             "tensorboard", "pyautoattack", "advertorch")  # fmt: skip


def system_info() -> dict[str, Any]:
    """What a bug report needs: :func:`build_info`, and what is around this installation.

    Returns:
        all of :func:`build_info`; python, platform; torch_cuda (that torch was built with, None for
        a CPU build); devices (name, compute capability, memory in GB and multiprocessors of the
        CUDA devices); cpu_count; threads (torch's, and the variables that set them);
        instruction_set (of the compiled fields), vector_bytes, mixed_precision (the instructions
        that they have for it, None without), torch_instruction_set; packages (name to version, None
        for one that is not there).
    """
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        **build_info(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch_cuda": torch.version.cuda,
        "devices": [
            {
                "name": device.name,
                "capability": f"{device.major}.{device.minor}",
                "memory_gb": round(device.total_memory / 1e9, 1),
                "multiprocessors": device.multi_processor_count,
            }
            for device in properties
        ],
        "cpu_count": os.cpu_count(),
        "threads": {
            "torch": torch.get_num_threads(),
            "torch_interop": torch.get_num_interop_threads(),
            **{name: os.environ.get(name) for name in variables},
        },
        "instruction_set": _INSTRUCTION_SETS.get(_C.mlp_vector_bytes, "unknown"),
        "vector_bytes": _C.mlp_vector_bytes,
        "mixed_precision": _C.mlp_mixed,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "packages": {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
