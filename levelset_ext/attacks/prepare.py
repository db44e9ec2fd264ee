"""What every attack does before its first step: the network to attack, the checks, the starts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from levelset_ext.field import as_rows, evaluation_copy
from levelset_ext.margin import as_int64, check_labels, two_logits

__all__ = [
    "NORMS",
    "LogitsFunction",
    "attack_copy",
    "check_batch",
    "check_classes",
    "input_gradient",
    "lengths",
    "outside_inference_mode",
    "per_row",
    "random_start",
    "seeded_devices",
]

LogitsFunction = Callable[[Tensor], Tensor]
NORMS = ("linf", "l2")

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def outside_inference_mode(
    function: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    """Lets a function that needs gradients be called under ``torch.inference_mode()``."""

    def usable(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with torch.inference_mode(False):
            args = tuple(usable(v) for v in args)  # type: ignore[assignment]
            kwargs = {k: usable(v) for k, v in kwargs.items()}  # type: ignore[assignment]
            return function(*args, **kwargs)

    return call


def seeded_devices() -> list[int]:
    """The devices whose random state a global seed changes, for ``torch.random.fork_rng``."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def attack_copy(model: LogitsFunction, *, binary: bool = False) -> LogitsFunction:
    """What the attacks evaluate, (n, *event) -> (n, K), K >= 2; it leaves no trace on ``model``.

    A module runs as its eval-mode clone with parameters that share their memory with the original
    but want no gradient: neither a step nor an attack library that calls ``backward()`` computes
    or adds up gradients of parameters. Another callable is evaluated as it is.

    Args:
        model: module or callable.
        binary: the network has one logit, which becomes two, see
            :func:`levelset_ext.margin.two_logits`.

    Raises:
        ValueError: a parameter that is not finite, a buffer with NaN; or, when evaluated, an output
            that is not (n, K) with K >= 2, or with ``binary`` not (n,) or (n, 1).
    """
    if not callable(model):
        raise TypeError(f"model: expected a module or a callable, got {type(model).__name__}")
    logits = model
    if isinstance(model, nn.Module):
        for name, weight in model.named_parameters():
            if not bool(torch.isfinite(weight.detach()).all()):
                raise ValueError(f"model: expected finite weights, got NaN or inf in {name}")
        for name, buffer in model.named_buffers():
            if bool(torch.isnan(buffer).any()):  # inf may be meant, as in a mask
                raise ValueError(f"model: expected finite weights, got NaN in the buffer {name}")
        logits = without_gradients(evaluation_copy(model))

    def evaluate(x: Tensor) -> Tensor:
        out = as_rows(logits(x))
        if not isinstance(out, Tensor):
            raise ValueError(f"model: expected a tensor of logits, got {type(out).__name__}")
        n = x.shape[0]
        if binary:
            if out.shape not in ((n,), (n, 1)):
                raise ValueError(
                    f"model: expected one logit (n,) or (n, 1) with n = {n}, got shape "
                    f"{tuple(out.shape)}"
                )
            return two_logits(out)
        if out.dim() != 2 or out.shape[0] != n or out.shape[1] < 2:
            hint = ""
            if out.shape in ((n,), (n, 1)):
                hint = "; a network with one logit for two classes is attacked with binary=True"
            raise ValueError(
                f"model: expected logits (n, K) with n = {n} and K >= 2 classes, got shape "
                f"{tuple(out.shape)}{hint}"
            )
        return out

    return evaluate


def without_gradients(clone: nn.Module) -> nn.Module:
    """Replaces the parameters of a clone by ones on the same memory that want no gradient."""
    quiet: dict[int, nn.Parameter] = {}
    for module in clone.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            if id(parameter) not in quiet:
                quiet[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
            module._parameters[name] = quiet[id(parameter)]
    return clone


def check_batch(x: Tensor, y: Tensor, norm: str, **numbers: float) -> Tensor:
    """Raises unless images, labels, norm and sizes fit; returns the labels as int64.

    Args:
        x: (n, *event) floating point, values in [0, 1].
        y: (n,) integers. Their range is checked once the number of classes is known.
        norm: one of :data:`NORMS`.
        numbers: eps, step, iters, restarts as far as the attack has them; finite and >= 0, the
            last two integers, restarts >= 1.
    """
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError("x, y: expected tensors, got " + f"{type(x).__name__}, {type(y).__name__}")
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"x: expected floating-point images (n, *event), got {x.dtype} {tuple(x.shape)}"
        )
    y = check_rows("y", y, x)
    if x.numel():
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        if not (low >= 0.0 and high <= 1.0):  # written so that NaN fails
            raise ValueError(f"x: expected values in [0, 1], got values from {low:g} to {high:g}")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    for name, value in numbers.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
        if name in ("iters", "restarts") and not isinstance(value, Integral):
            raise ValueError(f"{name}: expected an integer, got {value!r}")
        if name == "restarts" and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    return y


def check_rows(name: str, labels: Tensor, x: Tensor) -> Tensor:
    """Labels of the images x, (n,) integers, as int64; their range is not looked at."""
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"{name}: expected shape (n,) = ({x.shape[0]},), got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name}: expected an integer dtype, got {labels.dtype}")
    return as_int64(labels.detach())


def check_classes(logits: Tensor, y: Tensor, binary: bool, name: str = "y") -> Tensor:
    """The labels as 0 ... K - 1, once the logits (n, K) of the network are known."""
    if binary:
        check_labels(y, 1, name)
        return (y > 0).long()
    check_labels(y, logits.shape[1], name)
    return y


def input_gradient(values: Tensor, x: Tensor, *, keep: bool = False) -> Tensor:
    """The gradient of the sum of ``values`` (n,) at x; zero where nothing leads from x to them.

    A network that hides its gradient (a rounding, a detach) is attacked all the same: PGD then
    stays where it started, and the report says that there was no gradient.
    """
    if not values.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(values.sum(), x, retain_graph=keep, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def random_start(
    shape: Sequence[int], rows: Sequence[int], *, seed: int, restart: int, norm: str, eps: float
) -> Tensor:
    """Offsets drawn uniformly from the ball of radius eps, float32 on the CPU.

    Every row has a random stream of its own that depends on (seed, restart, number of the row) and
    on nothing else. So a row starts at the same place whatever the batch size, whichever other
    rows are still attacked, and after an interruption.

    Args:
        shape: event shape of one row.
        rows: numbers of the rows in the data set, not negative.
        seed, restart: not negative.
        norm: "linf" (the box [-eps, eps]) or "l2" (the Euclidean ball).
        eps: radius.

    Returns:
        (len(rows), *shape).
    """
    d = math.prod(shape)
    out = np.empty((len(rows), d), np.float32)
    for i, row in enumerate(rows):
        # Philox is a function of key and counter: no two rows or restarts share a part of a stream.
        random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, restart, row]))
        if norm == "linf":
            out[i] = (2 * random.random(d, dtype=np.float32) - 1) * np.float32(eps)
        else:
            direction = random.standard_normal(d, dtype=np.float32)
            radius = eps * random.random() ** (1 / max(d, 1))
            out[i] = direction * np.float32(radius / max(float(np.linalg.norm(direction)), 1e-30))
    return torch.from_numpy(out).reshape(len(rows), *shape)


def lengths(delta: Tensor, norm: str) -> Tensor:
    """(n,) norms of the rows of (n, *event)."""
    flat = delta.flatten(1)
    if norm == "linf":
        return flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(len(flat))
    return torch.linalg.vector_norm(flat, dim=1)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """(n,) reshaped to broadcast over (n, *event)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
