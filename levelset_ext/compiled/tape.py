"""Gradients in theta from the last evaluation of a sampler, instead of from another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from levelset_ext.compiled.mlp import MLP


@dataclass(frozen=True)
class Recording:
    """The last evaluation of some rows: x (n, d), F (n, l), and for every hidden layer h_k (n, n_k)
    and the gradients of F with respect to its pre-activations (l, n, n_k)."""

    mlp: MLP
    serial: int
    points: Tensor
    outputs: Tensor
    hidden: list[Tensor]
    deltas: list[Tensor]


class Tape:
    """What a :class:`~levelset_ext.LevelSetResult` remembers of the evaluation at its points: rows
    of recordings, in the order of the result."""

    def __init__(self, parts: Sequence[tuple[Recording, Tensor | None]]) -> None:
        self._parts = list(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_tape, ()  # a file or a copy has no memory of an evaluation

    def __len__(self) -> int:
        return sum(len(r.points) if rows is None else len(rows) for r, rows in self._parts)

    def __getitem__(self, rows: Any) -> Tape:
        order = torch.arange(len(self))[rows]
        parts, start = [], 0
        if len(self._parts) > 1 and not bool((order.diff() >= 0).all()):
            # Rows of several recordings in a mixed order would need a table of both.
            parts = [(r, self._rows(r, known)) for r, known in self._parts]
            return Tape([(_joined(parts), order)])
        for recording, known in self._parts:
            number = len(recording.points) if known is None else len(known)
            own = order[(order >= start) & (order < start + number)] - start
            parts.append((recording, own if known is None else known[own]))
            start += number
        return Tape(parts)

    @staticmethod
    def _rows(recording: Recording, known: Tensor | None) -> Tensor:
        return torch.arange(len(recording.points)) if known is None else known

    @staticmethod
    def cat(tapes: Sequence[Tape]) -> Tape | None:
        """The tapes one after the other, or None where they are of several fields."""
        parts = [part for tape in tapes for part in tape._parts]
        return Tape(parts) if len({id(recording.mlp) for recording, _ in parts}) == 1 else None

    def fits(self, fn: object) -> bool:
        """Whether it is of this field, and of the parameters as they are now."""
        mlp = self._parts[0][0].mlp
        if mlp is not fn or not mlp._follow():
            return False
        with mlp.packed() as pack:
            return all(recording.serial == pack.serial for recording, _ in self._parts)

    def values(self) -> Tensor:
        """F at the points, (n, l), differentiable in the parameters."""
        return _FromTape.apply(self._parts, *self._parts[0][0].mlp.weights())


def _no_tape() -> None:
    """What a pickled tape comes back as."""


def _joined(parts: list[tuple[Recording, Tensor]]) -> Recording:
    first = parts[0][0]

    def rows(pick: Callable[[Recording], Tensor], dim: int) -> Tensor:
        return torch.cat([pick(r).index_select(dim, index) for r, index in parts], dim)

    layers = range(len(first.hidden))
    return Recording(
        first.mlp,
        first.serial if len({r.serial for r, _ in parts}) == 1 else -1,
        rows(lambda r: r.points, 0),
        rows(lambda r: r.outputs, 0),
        [rows(lambda r, k=k: r.hidden[k], 0) for k in layers],  # type: ignore[misc]
        [rows(lambda r, k=k: r.deltas[k], 1) for k in layers],  # type: ignore[misc]
    )


class _FromTape(torch.autograd.Function):
    """F at recorded points, whose gradient in W_k is sum_i c_i delta_k,i h_{k-1,i}^T."""

    @staticmethod
    def forward(ctx: Any, parts: list[tuple[Recording, Tensor | None]], *weights: Tensor) -> Tensor:
        ctx.parts = parts
        ctx.save_for_backward(*weights)
        return torch.cat([r.outputs if rows is None else r.outputs[rows] for r, rows in parts])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the gradient is to have a gradient, which a tape has not
            points = [r.points if rows is None else r.points[rows] for r, rows in ctx.parts]
            weights, wanted = ctx.saved_tensors, ctx.needs_input_grad[1:]
            values = ctx.parts[0][0].mlp.replay(torch.cat(points), weights)
            asked = [w for w, want in zip(weights, wanted, strict=True) if want]
            found_for = iter(torch.autograd.grad(values, asked, gradient, create_graph=True))
            return None, *(next(found_for) if want else None for want in wanted)
        totals: list[Tensor] | None = None
        start = 0
        for recording, rows in ctx.parts:
            number = len(recording.points) if rows is None else len(rows)
            part = gradient[start : start + number]
            start += number
            if rows is not None:
                full = part.new_zeros(len(recording.points), part.shape[1])
                part = full.index_add_(0, rows, part)
            found = _weight_gradients(recording, part)
            totals = found if totals is None else list(torch._foreach_add(totals, found))
        assert totals is not None
        return None, *totals


def _weight_gradients(recording: Recording, gradient: Tensor) -> list[Tensor]:
    """dL/dW, dL/dU and dL/db of every layer for dL/dF (n, l), in the order of ``MLP.weights``."""
    found = []
    n, l = gradient.shape  # noqa: E741
    layers = recording.mlp._layers
    ones = gradient.new_ones(n)
    for k, layer in enumerate(layers):
        if k == len(layers) - 1:
            deltas, factors = gradient, ones
        elif l == 1:
            deltas, factors = recording.deltas[k][0], gradient[:, 0]
        else:
            deltas = (recording.deltas[k] * gradient.t()[:, :, None]).sum(0)
            factors = ones
        sources = [None if layer.hidden is None else recording.hidden[k - 1]]
        sources.append(None if layer.inputs is None else recording.points)
        found += [
            torch.ops.levelset_ext.mlp_weight_gradient(deltas, source, factors)
            for source in sources
            if source is not None
        ]
        if layer.bias is not None:
            found.append(deltas.t() @ factors)
    return found
