"""From the name of a device to the device, or to one clear line."""

from __future__ import annotations

import torch

from levelset_ext.errors import InputError


def parse_device(name: str) -> torch.device:
    """'cpu', 'cuda' or 'cuda:N', if it is there; otherwise InputError names what is."""
    available = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name in available or (name == "cuda" and len(available) > 1):
        return torch.device(name)
    raise InputError(f"device: expected one of {', '.join(available)}, got {name!r}")
