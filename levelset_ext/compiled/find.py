"""Which compiled field to use for what a caller passed, if there is one."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from levelset_ext.compiled.mlp import MLP
from levelset_ext.compiled.trace import NotAnMLP

_enabled = True
_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, MLP | None]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def compiled_fields(enabled: bool) -> Iterator[None]:
    """Within it, ``project`` and its kin look for the compiled field of a module or do not; outside
    they do. An :class:`MLP` that is passed itself is always used."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def compiled_field(fn: Any, x: Tensor) -> MLP | None:
    """The compiled field to evaluate ``fn`` at these points with, or None.

    Modules are traced once, and again when something about them has changed that a trace depends
    on: classes, hooks, which parameters they hold, numbers and texts among their attributes.
    """
    if isinstance(fn, MLP):
        return fn if fn.takes(x) else None
    if not _enabled or type(fn) is nn.Module or not isinstance(fn, nn.Module) or x.dim() != 2:
        return None
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    signature = _signature(fn)
    known = _known.get(fn)
    if known is None or known[0] != signature:
        found: MLP | None = None
        with contextlib.suppress(NotAnMLP), torch.inference_mode(False):
            found = MLP(fn, x.shape[1])
        known = signature, found
        _known[fn] = known
    return known[1] if known[1] is not None and known[1].takes(x) else None


def _signature(module: nn.Module) -> list[Any]:
    """What a trace depends on."""
    signature: list[Any] = []
    for name, child in module.named_modules(remove_duplicate=False):
        signature.append((name, type(child)))
        for key, value in child.__dict__.items():
            if key in ("_parameters", "_buffers"):
                signature.append([(k, id(t)) for k, t in value.items()])
            elif key.endswith("_hooks"):
                signature.append([id(hook) for hook in value.values()])
            elif key not in ("_modules", "training") and not key.startswith("_"):
                signature.append((key, _fingerprint(value)))
    return signature


def _fingerprint(value: Any) -> Any:
    if isinstance(value, bool | int | float | complex | str | bytes | type(None)):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [_fingerprint(v) for v in value]
    if isinstance(value, dict):
        return [(k, _fingerprint(v)) for k, v in value.items()]
    return id(value)
