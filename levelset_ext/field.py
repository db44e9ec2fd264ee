"""A network as a field: F and D_xF at points, without leaving a trace on the network."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Field", "evaluation_copy", "value_and_jacobian"]

Field = Callable[[Tensor], Tensor]


def evaluation_copy(module: nn.Module) -> nn.Module:
    """A shallow clone of the module tree in eval mode: parameters shared, buffers copied.

    The clone has its own mode flags, submodule tables, plain attributes and buffers, so evaluating
    it changes neither the mode of ``module`` nor what its ``forward`` sets on itself or counts in a
    buffer, also while another thread trains ``module``. Hooks of the module are called, with
    whatever rows a sampler evaluates. Submodules used twice stay one; modules in
    plain lists, tuples and dicts and methods bound to the module follow it. Not reached, and used
    as it is: a module in a closure or deeper inside other objects, and what is inside a mutable
    attribute. An optimizer that steps in another thread meanwhile may make torch's backward raise.
    """
    with torch.inference_mode(False):  # else the copied buffers could not take part in autograd
        return _Cloner().module(module)


class _Cloner:
    """Clones one module tree; remembers what it has cloned, so that shared parts stay shared."""

    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._buffers: dict[int, Tensor] = {}
        self._parameters: dict[int, nn.Parameter] = {}

    def module(self, module: nn.Module) -> nn.Module:
        # torch.compile wraps the module it was given; the wrapper cannot be cloned.
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        if id(module) in self._modules:
            return self._modules[id(module)]
        if isinstance(module, torch.jit.ScriptModule):
            if any(m.training for m in module.modules()):
                raise ValueError(
                    "fn: expected a ScriptModule in eval mode, as its mode is compiled in"
                )
            return module
        # Not through the class's own __new__, which may want arguments or make another class.
        clone: nn.Module = object.__new__(module.__class__)
        self._modules[id(module)] = clone
        tables = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        state = {
            name: copy.copy(value) if name in tables else self._attribute(value)
            for name, value in module.__dict__.copy().items()
        }
        state["training"] = False
        state["_compiled_call_impl"] = None  # module.compile() keeps a call of the original here
        state["_parameters"] = {n: self._parameter(p) for n, p in state["_parameters"].items()}
        state["_buffers"] = {name: self._buffer(b) for name, b in state["_buffers"].items()}
        state["_modules"] = {
            name: None if child is None else self.module(child)
            for name, child in state["_modules"].items()
        }
        clone.__dict__ = state
        return clone

    def _parameter(self, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """Itself, but a copy of one that was made in inference mode, which autograd refuses."""
        if parameter is None or not parameter.is_inference():
            return parameter
        if id(parameter) not in self._parameters:
            copied = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            self._parameters[id(parameter)] = copied
        return self._parameters[id(parameter)]

    def _buffer(self, buffer: Tensor | None) -> Tensor | None:
        if buffer is None:
            return None
        if id(buffer) not in self._buffers:
            self._buffers[id(buffer)] = buffer.clone()
        return self._buffers[id(buffer)]

    def _attribute(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self.module(value.__self__))
        if type(value) in (list, tuple) and any(isinstance(v, nn.Module) for v in value):
            return type(value)(self._attribute(v) for v in value)
        if type(value) is dict and any(isinstance(v, nn.Module) for v in value.values()):
            return {key: self._attribute(v) for key, v in value.items()}
        return value


def as_field(fn: Field) -> Field:
    """What the samplers evaluate: the eval-mode clone of a module, any other callable as it is."""
    if isinstance(fn, nn.Module):
        if torch.compiler.is_compiling():
            return partial(_in_eval_mode, fn)
        return evaluation_copy(fn)
    if not callable(fn):
        raise TypeError(f"fn: expected a module or a callable, got {type(fn).__name__}")
    return fn


_CHUNK = 128  # images; their activations in a small classifier still fit into a CPU's caches


def as_constant_field(fn: Field) -> Field:
    """:func:`as_field` for a sampler, which wants no gradient of parameters: they are constants.

    On a CPU a network of convolutions is given images with the channels last, the layout its
    kernels are written for, and at most 128 of them at once. One that cannot take that layout (it
    flattens by ``view``) gets images as they come.
    """
    field = as_field(fn)
    if field is fn or not isinstance(field, nn.Module):
        return field
    if any(isinstance(m, torch.jit.ScriptModule) for m in field.modules()):
        return field
    constants: dict[int, nn.Parameter] = {}
    filters: list[nn.Parameter] = []
    for module in field.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or type(parameter) is not nn.Parameter:
                continue
            if id(parameter) not in constants:
                value = parameter.detach()
                constants[id(parameter)] = nn.Parameter(value, requires_grad=False)
                if value.dim() == 4 and value.device.type == "cpu":
                    filters.append(constants[id(parameter)])
            module._parameters[name] = constants[id(parameter)]
    return _InChunks(field, filters) if filters else field


class _InChunks:
    """A network of convolutions on a CPU, whose 4-dimensional parameters are ``filters``."""

    def __init__(self, field: Field, filters: list[nn.Parameter]) -> None:
        self.field, self.filters = field, filters
        self.plain = [p.data for p in filters]
        self.layout = torch.channels_last
        self._lay_out()

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.device.type != "cpu":
            return self.field(x)
        if self.layout == torch.channels_last:
            try:
                return self._evaluate(x)
            except RuntimeError:
                # Most likely view(), which needs rows in one piece. If it is something else, the
                # network says so again, in the layout its author knows.
                self.layout = torch.contiguous_format
                self._lay_out()
        return self._evaluate(x)

    def _lay_out(self) -> None:
        for parameter, plain in zip(self.filters, self.plain, strict=True):
            last = self.layout == torch.channels_last
            parameter.data = plain.contiguous(memory_format=self.layout) if last else plain

    def _evaluate(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=self.layout)
        if len(x) <= _CHUNK:
            return self.field(x)
        return torch.cat([as_rows(self.field(part)) for part in x.split(_CHUNK)])


def as_rows(values: Tensor) -> Tensor:
    """As (1,) the value of a single row from a network that ends with squeeze()."""
    return values[None] if isinstance(values, Tensor) and values.dim() == 0 else values


def _in_eval_mode(module: nn.Module, x: Tensor) -> Tensor:
    """The module at x while torch.compile traces it. A clone cannot be traced, and is not needed:
    the compiler plays the flags through without setting them. Buffers and attributes that
    ``forward`` writes in eval mode are written on the module here."""
    modes = [(m, m.training) for m in module.modules()]
    for m, _ in modes:
        m.training = False
    try:
        return module(x)
    finally:
        for m, mode in modes:
            m.training = mode


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Leaves autocast on the device of x: in reduced precision F gets to no tolerance."""
    if not torch.amp.is_autocast_available(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def evaluate(field: Field, x: Tensor) -> Tensor:
    """F(x) as (n, l), with the shape checked and the graph kept."""
    # A copy, as the first layer of a network may work in place.
    values = field(x.clone())
    if not isinstance(values, Tensor):
        raise TypeError(f"fn: expected a tensor (n,) or (n, l) back, got {type(values).__name__}")
    n = x.shape[0]
    if n == 1:
        values = as_rows(values)
    if values.dim() == 1 and values.shape[0] == n:
        return values[:, None]
    if values.dim() == 2 and values.shape[0] == n and values.shape[1] >= 1:
        return values
    raise ValueError(
        f"fn: expected (n,) = ({n},) or (n, l) = ({n}, l) back, got {tuple(values.shape)}"
    )


def check_points(name: str, x: Any) -> Tensor:
    """A floating tensor (n, *event), or an error that names it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor (n, *event), got {type(x).__name__}")
    if x.dim() < 2:
        raise ValueError(f"{name}: expected a tensor (n, *event), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    return x


def check_integer(name: str, value: Any, least: int | None = None) -> int:
    """As an int what Python can index with, a number of NumPy too; a bool is none."""
    number: int | None = None
    if not isinstance(value, bool | np.bool_):
        with contextlib.suppress(TypeError):
            number = operator.index(value)
    if number is None or (least is not None and number < least):
        bound = "" if least is None else f" >= {least}"
        raise ValueError(f"{name}: expected an integer{bound}, got {value!r}")
    return number


def values_of(field: Field, x: Tensor) -> Tensor:
    """F(x), (n, l), without any graph."""
    with torch.no_grad():
        return evaluate(field, x).to(x.dtype)


def jacobian_of(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """F and D_xF of an already prepared field; see :func:`value_and_jacobian`."""
    # Known by a mark that no network bears, as a network may have methods of any name.
    if getattr(type(field), "is_compiled_field", False) and field.takes(x):  # type: ignore[attr-defined]
        found = field.evaluate(x)  # type: ignore[attr-defined]
        return found.values, found.jacobian
    # Inference mode would make tensors that autograd refuses.
    with torch.inference_mode(False), torch.enable_grad():
        point = x.detach().clone() if x.is_inference() else x.detach()
        point = point.requires_grad_()
        values = evaluate(field, point)
        if x.shape[0] == 0:
            empty = x.new_zeros(0, values.shape[1], *x.shape[1:])
            return values.detach().to(x.dtype), empty
        if not values.requires_grad:
            raise ValueError(
                "fn: expected an output that depends on x through differentiable operations, got "
                "one without a graph (a detach(), a no_grad() or a non-torch function inside?)"
            )
        rows = []
        for k in range(values.shape[1]):
            # Only x is asked for, so nothing is accumulated into, or computed for, the parameters.
            (row,) = torch.autograd.grad(
                values[:, k].sum(),
                point,
                retain_graph=k + 1 < values.shape[1],
                allow_unused=True,
            )
            rows.append(torch.zeros_like(point) if row is None else row)
        jacobian = torch.stack(rows, 1)
        return values.detach().to(x.dtype), jacobian.detach().to(x.dtype)


def value_and_jacobian(fn: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """F(x) and D_xF(x).

    Args:
        fn: module or callable (n, *event) -> (n,) or (n, l); row i of the output must depend on
            row i of the input alone. A module runs as its eval-mode clone
            (:func:`evaluation_copy`), so batch normalisation uses its running statistics and leaves
            them as they are.
        x: (n, *event), floating point.

    Returns:
        F (n, l) and J (n, l, *event) in the dtype of x, detached. Works under ``torch.no_grad()``
        and ``torch.inference_mode()``; gradients of parameters are neither computed nor touched.

    Raises:
        TypeError, ValueError: x is no tensor of points, or ``fn`` gives no (n,) or (n, l).
    """
    x = check_points("x", x)
    return jacobian_of(as_field(fn), x)
