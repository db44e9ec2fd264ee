"""A network as a field: F and D_xF at points, without leaving a trace on the network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Field", "evaluation_copy", "value_and_jacobian"]

Field = Callable[[Tensor], Tensor]


def evaluation_copy(module: nn.Module) -> nn.Module:
    """A shallow clone of the module tree in eval mode that shares every parameter and buffer.

    The clone has its own mode flags, submodule tables and plain attributes, so evaluating it
    changes neither the mode of ``module`` nor what its ``forward`` sets on itself, also while
    another thread trains ``module``. Submodules used twice stay one. A module kept outside the
    module tree (in a plain list or a closure) is not reached and is used as it is.
    """
    if isinstance(module, torch.jit.ScriptModule):
        if any(m.training for m in module.modules()):
            raise ValueError("fn: expected a ScriptModule in eval mode, as its mode is compiled in")
        return module
    # torch.compile wraps the module it was given; the wrapper cannot be cloned, and needs not be.
    if isinstance(getattr(module, "_orig_mod", None), nn.Module):
        module = module._orig_mod  # type: ignore[assignment]
    return _clone(module, {})


def _clone(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    clone = module.__class__.__new__(module.__class__)
    seen[id(module)] = clone
    state = module.__dict__.copy()
    state["training"] = False
    for table in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        state[table] = copy.copy(state[table])
    state["_modules"] = {
        name: None if child is None else _clone(child, seen)
        for name, child in state["_modules"].items()
    }
    clone.__dict__ = state
    return clone


def as_field(fn: Field) -> Field:
    """What the samplers evaluate: the eval-mode clone of a module, any other callable as it is."""
    if isinstance(fn, nn.Module):
        return evaluation_copy(fn)
    if not callable(fn):
        raise TypeError(f"fn: expected a module or a callable, got {type(fn).__name__}")
    return fn


def evaluate(field: Field, x: Tensor) -> Tensor:
    """F(x) as (n, l), with the shape checked and the graph kept."""
    values = field(x)
    if not isinstance(values, Tensor):
        raise TypeError(f"fn: expected a tensor (n,) or (n, l) back, got {type(values).__name__}")
    n = x.shape[0]
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


def values_of(field: Field, x: Tensor) -> Tensor:
    """F(x), (n, l), without any graph."""
    with torch.no_grad():
        return evaluate(field, x).to(x.dtype)


def jacobian_of(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """F and D_xF of an already prepared field; see :func:`value_and_jacobian`."""
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
    """
    x = check_points("x", x)
    return jacobian_of(as_field(fn), x)
