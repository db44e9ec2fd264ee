"""What a trace of a module depends on, to notice when it is out of date."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

__all__ = ["signature_of"]

_FEW = 32  # attributes; what has more is no configuration, and would take long to look through
_SMALL = 1024  # bytes of an array whose numbers are looked at

# What nn.Module itself keeps; hooks and tensors are looked at on their own.
_OWN = frozenset(nn.Module().__dict__) | {"_compiled_call_impl", "_is_full_backward_hook"}


def signature_of(module: nn.Module) -> list[Any]:
    """What a trace of the module depends on, equal as long as that has not changed: classes, their
    forward and numbers, hooks, which parameters and buffers there are, and plain attributes."""
    signature: list[Any] = []
    for name, child in module.named_modules(remove_duplicate=False):
        kind = type(child)
        signature.append((name, kind, getattr(kind, "forward", None), _numbers_of(kind)))
        for key, value in child.__dict__.items():
            if key in ("_parameters", "_buffers"):
                signature.append([(k, id(t)) for k, t in value.items()])
            elif key.endswith("_hooks") and isinstance(value, dict):
                signature.append([id(hook) for hook in value.values()])
            elif key not in _OWN:
                signature.append((key, _fingerprint(value)))
    return signature


def _numbers_of(kind: type) -> list[Any]:
    """The plain attributes of a class that is not torch's, which its instances read as theirs."""
    if kind.__module__.startswith("torch."):
        return []
    return [
        (key, value)
        for base in kind.__mro__
        if not base.__module__.startswith(("torch.", "builtins"))
        for key, value in vars(base).items()
        if isinstance(value, bool | int | float | complex | str)
    ]


def _fingerprint(value: Any, depth: int = 4) -> Any:
    if isinstance(value, bool | int | float | complex | str | bytes | type(None)):
        return value
    if isinstance(value, Tensor):  # written to in place its version changes
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, np.ndarray) and value.nbytes <= _SMALL:
        return value.shape, value.dtype.str, value.tobytes()
    if depth == 0 or isinstance(value, nn.Module | type):
        return id(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_fingerprint(v, depth - 1) for v in value]
    if isinstance(value, dict):
        return [(k, _fingerprint(v, depth - 1)) for k, v in value.items()]
    # An object that holds a few things, as configurations do, is looked into.
    held = _held_by(value)
    if not held or len(held) > _FEW:
        return id(value)
    return [id(value), *((k, _fingerprint(v, depth - 1)) for k, v in held.items())]


def _held_by(value: Any) -> dict[str, Any]:
    names = [
        name
        for base in type(value).__mro__
        for name in _slots(base)
        if name not in ("__dict__", "__weakref__") and hasattr(value, name)
    ]
    return {**{name: getattr(value, name) for name in names}, **getattr(value, "__dict__", {})}


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
