"""Which compiled field to use for what a caller passed, if there is one."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from levelset_ext.compiled.mlp import MLP, in_transform
from levelset_ext.compiled.signature import signature_of
from levelset_ext.compiled.trace import NotAnMLP

_enabled: ContextVar[bool] = ContextVar("levelset_ext.compiled_fields", default=True)
# For every module what its traces depend on, and the trace for each number of columns: a call with
# points that do not fit the module must not decide about those that do.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[int, MLP | None]]]
_known = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def compiled_fields(enabled: bool) -> Iterator[None]:
    """Within it, ``project`` and its kin look for the compiled field of a module or do not; outside
    they do, and so do other threads. An :class:`MLP` that is passed itself is always used."""
    before = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(before)


def compiled_field(fn: Any, x: Tensor) -> MLP | None:
    """The compiled field to evaluate ``fn`` at these points with, or None.

    Modules are traced once, and again when something about them has changed that a trace depends
    on: classes, their forward and numbers, hooks, which parameters they hold, numbers, texts, small
    arrays and tensors among their attributes and among those of plain objects (a configuration)
    that they hold. What a forward reads elsewhere, such as a global variable, is taken to stay as
    it is.
    """
    if isinstance(fn, MLP):
        return fn if fn.takes(x) else None
    if not isinstance(fn, nn.Module) or type(fn) is nn.Module or x.dim() != 2:
        return None
    if not _enabled.get():
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
    signature = signature_of(fn)
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
