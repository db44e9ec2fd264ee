"""Which compiled field to use for what a caller passed, if there is one."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from levelset_ext.compiled.mlp import MLP, in_transform
from levelset_ext.compiled.trace import NotAnMLP

_enabled = True
# For every module what its traces depend on, and the trace for each number of columns: a call with
# points that do not fit the module must not decide about those that do.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[int, MLP | None]]]
_known = weakref.WeakKeyDictionary()


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
    on: classes, their forward, hooks, which parameters they hold, numbers and texts among their
    attributes and among those of plain objects (a configuration) that they hold. What a forward
    reads elsewhere, such as a global variable, is taken to stay as it is.
    """
    if isinstance(fn, MLP):
        return fn if fn.takes(x) else None
    if not _enabled or type(fn) is nn.Module or not isinstance(fn, nn.Module) or x.dim() != 2:
        return None
    if x.device.type not in ("cpu", "cuda") or x.shape[1] == 0 or torch.compiler.is_compiling():
        return None
    if in_transform() or torch.get_default_device().type != "cpu":
        return None
    if isinstance(getattr(fn, "_orig_mod", None), nn.Module):
        fn = fn._orig_mod  # what torch.compile wrapped
    # Hooks for all modules would not run; within parametrize.cached() a layer may lag behind its
    # parameters, which are what a compiled field watches.
    if _has_any_global_hook() or parametrize._cache_enabled or not _plain(fn):
        return None
    signature = _signature(fn)
    known = _known.get(fn)
    if known is None or known[0] != signature:
        known = _known[fn] = signature, {}
    dimension = x.shape[1]
    if dimension not in known[1]:
        found: MLP | None = None
        with contextlib.suppress(NotAnMLP), torch.inference_mode(False):
            found = MLP(fn, dimension)
        known[1][dimension] = found
    field = known[1][dimension]
    return field if field is not None and field.takes(x) else None


def _plain(module: nn.Module) -> bool:
    """Whether the compiled loop can read the numbers of a module and see when they change: tensors
    of torch's own classes, with a version."""
    for child in module.modules():
        for tensor in (*child._parameters.values(), *child._buffers.values()):
            if tensor is not None and (
                type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference()
            ):
                return False
    return True


_FEW = 32  # attributes; what has more is no configuration, and would take long to look through

# What nn.Module itself keeps; hooks and tensors are looked at on their own.
_OWN = frozenset(nn.Module().__dict__) | {"_compiled_call_impl", "_is_full_backward_hook"}


def _signature(module: nn.Module) -> list[Any]:
    """What a trace depends on."""
    signature: list[Any] = []
    for name, child in module.named_modules(remove_duplicate=False):
        signature.append((name, type(child), getattr(type(child), "forward", None)))
        for key, value in child.__dict__.items():
            if key in ("_parameters", "_buffers"):
                signature.append([(k, id(t)) for k, t in value.items()])
            elif key.endswith("_hooks") and isinstance(value, dict):
                signature.append([id(hook) for hook in value.values()])
            elif key not in _OWN:
                signature.append((key, _fingerprint(value)))
    return signature


def _fingerprint(value: Any, depth: int = 4) -> Any:
    if isinstance(value, bool | int | float | complex | str | bytes | type(None)):
        return value
    if depth == 0 or isinstance(value, Tensor | nn.Module | type):
        return id(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_fingerprint(v, depth - 1) for v in value]
    if isinstance(value, dict):
        return [(k, _fingerprint(v, depth - 1)) for k, v in value.items()]
    # An object that holds a few things, as configurations do, is looked into.
    held = getattr(value, "__dict__", None)
    if not held or len(held) > _FEW:
        return id(value)
    return [id(value), _fingerprint(dict(held), depth - 1)]
