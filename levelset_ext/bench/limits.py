"""What the machine can do at best, measured in the same run as what is compared with it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from levelset_ext import _C, ops
from levelset_ext._load import build_info
from levelset_ext.bench.timing import Settings, fastest


def environment(settings: Settings) -> dict[str, Any]:
    """What a figure depends on besides the code; nothing that names the machine."""
    device = settings.device
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        **build_info(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "mlp_vector_bytes": _C.mlp_vector_bytes,
        "device": device.type,
        "accelerator": accelerator,
        "scale": settings.scale,
        "repeats": settings.repeats,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


class PackedLinear:
    """act(x W^T + b) by oneDNN with W packed beforehand: the fastest linear layer that PyTorch has
    on a CPU, the one torch.compile uses for frozen weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, relu: bool = False) -> None:
        weight = weight.detach().contiguous()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self._bias = None if bias is None else bias.detach()
        self._after = "relu" if relu else "none"

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, self._after, [], "")


@torch.no_grad()
def machine_limits(settings: Settings, rows: int = 5000, width: int = 512) -> dict[str, Any]:
    """Matrix rates in GFLOP/s at the shape of a hidden layer, the rate of copies in GB/s (reads and
    writes counted) in cache and out of it, and microseconds of a call that does next to nothing."""
    device = settings.device
    rows = settings.size(rows, rows // 2, 64)
    width = settings.size(width, width, 32)
    x = torch.randn(rows, width, device=device)
    weight = torch.randn(width, width, device=device)
    flop = 2.0 * rows * width * width
    rates = {
        "mm_float32": flop / fastest(lambda: torch.mm(x, weight), device),
        "linear_float32": flop / fastest(lambda: functional.linear(x, weight), device),
    }
    x16, weight16 = x.bfloat16(), weight.bfloat16()
    rates["mm_bfloat16"] = flop / fastest(lambda: torch.mm(x16, weight16), device)
    if device.type == "cpu":
        packed = PackedLinear(weight, None, rows)
        rates["packed_linear_float32"] = flop / fastest(lambda: packed(x), device)
    copies = CopyRates(settings)
    one = torch.ones(1, 1, 3, device=device)
    number = torch.ones(1, 1, device=device)
    calls = {
        "torch_add": fastest(lambda: number + number, device),
        "pinv_apply": fastest(lambda: ops.pinv_apply(one, number), device),
        "pinv_apply_registered": fastest(
            lambda: torch.ops.levelset_ext.pinv_apply(one, number), device
        ),
    }
    return {
        "matrix_gflops": {name: rate / 1e9 for name, rate in rates.items()},
        "matrix_shape": [rows, width, width],
        "copy_gb_per_s": {
            "in_cache": copies.rate(1 << 18) / 1e9,
            "out_of_cache": copies.rate(settings.size(1 << 28, 1 << 26, 1 << 20)) / 1e9,
        },
        "call_microseconds": {name: seconds * 1e6 for name, seconds in calls.items()},
    }


def matrix_rate(limits: dict[str, Any]) -> float:
    """FLOP/s of the fastest float32 product that PyTorch has here."""
    rates = limits["matrix_gflops"]
    return 1e9 * max(rate for name, rate in rates.items() if name.endswith("float32"))


class CopyRates:
    """Bytes per second of torch's copy, reads and writes counted, by how much is moved."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: dict[int, float] = {}

    def rate(self, moved: float) -> float:
        """For about as many bytes as ``moved``: the next power of two, at least 4 KiB."""
        size = max(1 << 12, 1 << (int(moved) - 1).bit_length())
        if size not in self._known:
            source = torch.ones(size // 8, dtype=torch.float32, device=self._settings.device)
            target = torch.empty_like(source)
            seconds = fastest(lambda: target.copy_(source), self._settings.device, 3)
            self._known[size] = size / seconds
        return self._known[size]
