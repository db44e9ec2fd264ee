"""Loads the compiled module, or says in one line why it cannot."""

from __future__ import annotations

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

try:
    from levelset_ext import _C
except ImportError as error:
    raise ImportError(
        "levelset_ext: the compiled module _C is not built or does not fit this Python; "
        f"in a checkout run 'make' or 'python setup.py build_ext --inplace' ({error})"
    ) from error


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
