"""The compiled ops, and their derivatives.

With ``J = D_xF`` of full row rank, everything the method needs is two linear maps per row,

    apply    r -> J^T (J J^T)^-1 r      (l -> d)    Newton step (Eq. 4), sample network (Eq. 9)
    adjoint  g -> (J J^T)^-1 J g        (d -> l)    backward of the sample network (Eq. 8)

With J held fixed each is the transpose of the other, so each is the other's backward. The
derivative with respect to J is the same expression for both; it is written once below.

Every op is registered as ``torch.ops.levelset_ext.*`` (fake kernel, ``torch.compile``,
``torch.export``, ``vmap``) and wrapped in a ``torch.autograd.Function`` (``torch.func`` transforms,
other people's autograd code). Both give the same numbers; the functions here take whichever fits.
Forward-mode derivatives are refused. A row whose Jacobian has lost rank, or is not finite, gives
zeros and says so in its status.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from levelset_ext import _C

__all__ = [
    "NearestDistance",
    "NewtonUpdate",
    "PinvAdjoint",
    "PinvApply",
    "bracket_state",
    "bracket_update_",
    "level_rows",
    "nearest_distance",
    "newton_update",
    "newton_update_",
    "pinv_adjoint",
    "pinv_apply",
    "rank_tolerance",
]

_raw = torch.ops.levelset_ext
_CONVERGED = _C.status_codes["CONVERGED"]
_RUNNING = _C.status_codes["RUNNING"]
_STALLED = _C.status_codes["STALLED"]


def _same_dtype(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Promotes mixed floating dtypes to a common one, as arithmetic between the tensors would."""
    common = None
    mixed = False
    for t in tensors:
        if t is not None and t.dtype is not common:
            mixed = common is not None
            common = t.dtype if common is None else torch.promote_types(common, t.dtype)
    if not mixed:
        return tensors
    return tuple(None if t is None else t.to(common) for t in tensors)


def _call(op: Any, function: type[torch.autograd.Function], *args: Any) -> tuple[Tensor, Tensor]:
    """The op in the form that suits where it is called, in the order of the questions below.

    torch.compile and torch.export take the registered op. The autograd Function also works inside
    torch.func transforms, and refuses forward-mode derivatives, which the registered op would
    answer with zeros. Outside of them its own ``apply`` spends most of a small call on binding
    arguments to signatures, which the ``apply`` of its base does without; and where no derivative
    is asked for, neither autograd is.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return function.apply(*args)
    args = unwrap_dead_wrappers(args)
    grad = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
    if grad or forward_ad._current_level >= 0:
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _refuse_gradient(op: str, instead: str, **tensors: Any) -> None:
    """An op that writes into memory of the caller has no derivative."""
    forward = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    backward = torch.is_grad_enabled()
    if not (forward or backward):
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and (
            (backward and tensor.requires_grad)
            or (forward and forward_ad.unpack_dual(tensor).tangent is not None)
        ):
            raise RuntimeError(
                f"{name}: expected a tensor that needs no gradient, as {op}; {instead}"
            )


def _wrote(*tensors: Tensor) -> None:
    """Tells autograd that memory was written to, so that a graph which has kept it says so. What is
    compiled knows it from the schema."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def rank_tolerance(dtype: torch.dtype) -> float:
    """The rank rule's fraction for a dtype: 2^-20 for float64, 2^-17 for the others."""
    return _C.rank_tolerance_float64 if dtype == torch.float64 else _C.rank_tolerance_float32


def level_rows(level: Tensor | float, n: int, l: int, like: Tensor) -> Tensor:  # noqa: E741
    """The level c as the ops take it: (n, l), or (1, l) when all rows share it.

    Args:
        level: scalar, (l,), (n,) when l = 1, or (n, l). Where shapes coincide (n, l) wins.
        n, l: rows and network outputs.
        like: tensor whose dtype and device the result has.

    Returns:
        (n, l) or (1, l), differentiable in ``level``.

    Raises:
        ValueError: another shape.
    """
    if not isinstance(level, Tensor):
        if isinstance(level, int | float):
            # Filled on the device: a copy from the host would wait for it and break graph capture.
            return torch.full((1, 1), float(level), dtype=like.dtype, device=like.device).expand(
                1, l
            )
        level = torch.as_tensor(level)
    c = level.to(dtype=like.dtype, device=like.device)
    shape = tuple(c.shape)
    if shape in ((), (1,)):
        return c.reshape(1, 1).expand(1, l)
    if shape == (n, l):
        return c
    if shape in ((l,), (1, l)):
        return c.reshape(1, l)
    if shape == (n,) and l == 1:
        return c.reshape(n, 1)
    raise ValueError(
        f"level: expected a scalar, (l,) = ({l},), (n, l) = ({n}, {l})"
        + (f" or (n,) = ({n},)" if l == 1 else "")
        + f", got {shape}"
    )


# --- pinv_apply and pinv_adjoint ------------------------------------------------------------------


def pinv_apply(
    jacobian: Tensor,
    residual: Tensor,
    *,
    return_status: bool = False,
    out: Tensor | None = None,
) -> Any:
    """``J^T (J J^T)^-1 r`` for every row: the shortest vector that J maps to ``r``.

    Args:
        jacobian: J, (n, l, d), floating point, 1 <= l <= 8. On CUDA also float16 and bfloat16, with
            float32 arithmetic.
        residual: r, (n, l).
        return_status: also return the status of every row, (n,) int8.
        out: (n, d), contiguous, of the inputs' dtype and device, memory that no input shares: the
            result is written there and returned, without a derivative. Worth it for large results,
            whose new memory costs more than the arithmetic.

    Returns:
        (n, d). A row without full rank gives 0 and status ``RANK_DEFICIENT``; the rule is that a
        row of J is dependent when its part orthogonal to the rows before it is shorter than
        :func:`rank_tolerance` of it.

    Differentiable in both arguments, to any order.
    """
    jacobian, residual = _same_dtype(jacobian, residual)
    if out is None:
        result, status = _call(_raw.pinv_apply.default, PinvApply, jacobian, residual)
    else:
        _refuse_gradient(
            "pinv_apply writes to out",
            "leave out away",
            jacobian=jacobian,
            residual=residual,
            out=out,
        )
        result, status = out, _raw.pinv_apply_out(jacobian, residual, out)
        _wrote(out)
    return (result, status) if return_status else result


def pinv_adjoint(jacobian: Tensor, gradient: Tensor, *, return_status: bool = False) -> Any:
    """``(J J^T)^-1 J g`` for every row, the transpose of :func:`pinv_apply`.

    Args:
        jacobian: J, (n, l, d), dtypes and l as for :func:`pinv_apply`.
        gradient: g, (n, d).
        return_status: also return the status of every row, (n,) int8.

    Returns:
        (n, l); 0 for a row without full rank. Differentiable in both arguments, to any order.
    """
    jacobian, gradient = _same_dtype(jacobian, gradient)
    result, status = _call(_raw.pinv_adjoint.default, PinvAdjoint, jacobian, gradient)
    return (result, status) if return_status else result


def _jacobian_gradient(jacobian: Tensor, r: Tensor, g: Tensor) -> Tensor:
    """Derivative of the form ``g . J^T (J J^T)^-1 r`` with respect to J.

    With y = J^T (J J^T)^-1 r, s = (J J^T)^-1 r and u = (J J^T)^-1 J g it is
    s (g - J^T u)^T - u y^T; and s needs no solve of its own, it is the adjoint of y.
    Both ops have this derivative: the backward of apply contracts its result with g, the backward
    of adjoint contracts its result with r.
    """
    y, status = pinv_apply(jacobian, r, return_status=True)
    # A row without full rank gives the constant 0, and its J may hold NaN, which must not spread.
    usable = (status == _CONVERGED)[:, None, None]
    jacobian = torch.where(usable, jacobian, 0.0)
    s, u = pinv_adjoint(jacobian, y), pinv_adjoint(jacobian, g)
    # Products and sums, not einsum: autocast would round those to half precision.
    across = g - (jacobian * u[:, :, None]).sum(1)
    gradient = s[:, :, None] * across[:, None] - u[:, :, None] * y[:, None]
    return torch.where(usable, gradient, 0.0)


def _apply_backward(ctx: Any, grad: Tensor, _status: Any = None) -> tuple[Tensor | None, ...]:
    jacobian, residual = ctx.saved_tensors
    return (
        _jacobian_gradient(jacobian, residual, grad) if ctx.needs_input_grad[0] else None,
        pinv_adjoint(jacobian, grad) if ctx.needs_input_grad[1] else None,
        None,
    )


def _adjoint_backward(ctx: Any, grad: Tensor, _status: Any = None) -> tuple[Tensor | None, ...]:
    jacobian, gradient = ctx.saved_tensors
    return (
        _jacobian_gradient(jacobian, grad, gradient) if ctx.needs_input_grad[0] else None,
        pinv_apply(jacobian, grad) if ctx.needs_input_grad[1] else None,
        None,
    )


def _save_two(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


# --- newton_update --------------------------------------------------------------------------------


def newton_update(
    points: Tensor,
    values: Tensor,
    jacobian: Tensor,
    level: Tensor | float = 0.0,
    *,
    status: Tensor | None = None,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    tol: float = 0.0,
    max_step: float = math.inf,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One generalized Newton step (Eq. 4), ``p - J^T (J J^T)^-1 (F - c)``, for every running row.

    Args:
        points: p, (n, d), floating point (float16 and bfloat16 on CUDA only).
        values: F(p), (n, l).
        jacobian: D_xF(p), (n, l, d), 1 <= l <= 8.
        level: c, see :func:`level_rows`.
        status: (n,) int8; rows that are not ``RUNNING`` keep point and status and are not read.
            None means that every row runs.
        lower, upper: (d,), box that the next point is clamped to.
        tol: a row with max_j |F_j - c_j| <= tol stays where it is and becomes ``CONVERGED``.
        max_step: longest step, an L2 length in the units of the points; longer ones are shortened.
        out: as in :func:`pinv_apply`: where the next points are written. To overwrite ``points``
            itself there is :func:`newton_update_`.

    Returns:
        The next points (n, d) and the status (n,) int8 of every row: ``RUNNING`` (moved),
        ``CONVERGED``, ``RANK_DEFICIENT``, ``NON_FINITE`` or ``STALLED``. The point of a
        ``NON_FINITE`` row need not be finite, nor the one it came with.

    Differentiable in points, values, jacobian, level and the box, to any order: the derivative of
    the step itself, with the cap where it acts; a coordinate that the box holds moves with the box.
    A row that the update leaves alone or cannot move passes its point through.
    """
    points, values, jacobian, lower, upper = _same_dtype(points, values, jacobian, lower, upper)
    l = values.shape[1] if values.dim() == 2 else 1  # noqa: E741
    c = level_rows(level, points.shape[0], l, points)
    tol, max_step = float(tol), float(max_step)
    if out is None:
        return _call(
            _raw.newton_update.default, NewtonUpdate,
            points, values, jacobian, c, status, lower, upper, tol, max_step,
        )  # fmt: skip
    _refuse_gradient(
        "newton_update writes to out", "leave out away", points=points, values=values,
        jacobian=jacobian, level=level, lower=lower, upper=upper, out=out,
    )  # fmt: skip
    after = _raw.newton_update_out(
        points, values, jacobian, c, status, lower, upper, tol, max_step, out
    )
    _wrote(out)
    return out, after


def newton_update_(
    points: Tensor,
    status: Tensor,
    values: Tensor,
    jacobian: Tensor,
    level: Tensor | float = 0.0,
    *,
    index: Tensor | None = None,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    tol: float = 0.0,
    max_step: float = math.inf,
) -> None:
    """:func:`newton_update` in place, on the rows named by ``index``.

    Args:
        points: p, (n, d), contiguous, overwritten. No other argument may share their memory.
        status: (n,) int8, contiguous, overwritten where a row takes part.
        values, jacobian: F and D_xF of the rows in ``index``, (m, l) and (m, l, d).
        level: c for the n points, see :func:`level_rows`.
        index: (m,) int64 without repeats, which point each row of ``values`` belongs to; None means
            all n in order. A row outside the points is an error on the CPU and left out on CUDA.
        lower, upper, tol, max_step: as in :func:`newton_update`.

    Not differentiable: raises RuntimeError if a gradient would be lost.
    """
    _refuse_gradient(
        "newton_update_ works in place", "call newton_update, or detach it", points=points,
        values=values, jacobian=jacobian, level=level, lower=lower, upper=upper,
    )  # fmt: skip
    dtype = points.dtype
    values, jacobian = values.to(dtype), jacobian.to(dtype)
    lower = None if lower is None else lower.to(dtype)
    upper = None if upper is None else upper.to(dtype)
    l = values.shape[-1] if values.dim() == 2 else 1  # noqa: E741
    c = level_rows(level, points.shape[0], l, points)
    _raw.newton_update_(
        points, status, values, jacobian, c, index, lower, upper, float(tol), float(max_step)
    )
    _wrote(points, status)


def _newton_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    points, values, jacobian, level, status, lower, upper, _tol, max_step = inputs[:9]
    running = torch.ones_like(output[1], dtype=torch.bool) if status is None else status == _RUNNING
    ctx.max_step = max_step
    ctx.has_box = (lower is not None, upper is not None)
    box = [t for t in (lower, upper) if t is not None]
    ctx.save_for_backward(points, values, jacobian, level, running, output[1], *box)


def _newton_backward(ctx: Any, grad: Tensor, _status: Any = None) -> tuple[Tensor | None, ...]:
    points, values, jacobian, level, running, status, *box = ctx.saved_tensors
    lower: Tensor | None = box.pop(0) if ctx.has_box[0] else None
    upper: Tensor | None = box.pop(0) if ctx.has_box[1] else None
    moved = (running & ((status == _RUNNING) | (status == _STALLED)))[:, None]
    # Rows that stayed have no derivative but the identity, whatever their F and J hold.
    residual = torch.where(moved, values - level, 0.0)
    jacobian = torch.where(moved[:, :, None], jacobian, 0.0)

    step = pinv_apply(jacobian, residual)
    shrink: Tensor | float = 1.0
    unit = step
    capped = torch.zeros_like(moved)
    if math.isfinite(ctx.max_step) and step.shape[1]:
        # In units of the largest entry, whose square need not overflow nor vanish.
        largest = step.abs().amax(1, keepdim=True)
        scaled = step / torch.where(largest > 0, largest, 1.0)
        squares = (scaled * scaled).sum(1, keepdim=True)
        root = torch.where(squares > 0, squares, 1.0).sqrt()
        unit = scaled / root
        capped = (largest > 0) & (largest * root > ctx.max_step)
        shrink = torch.where(capped, ctx.max_step / torch.where(capped, largest * root, 1.0), 1.0)
    through = grad
    on_box: list[Tensor | None] = [None, None]
    target = points - shrink * step
    for side, corner in enumerate((lower, upper)):
        if corner is not None:
            held = moved & (target < corner if side == 0 else target > corner)
            through = torch.where(held, 0.0, through)
            on_box[side] = torch.where(held, grad, 0.0).sum(0)

    # next = points - shrink(step) * step: along the step a capped row does not move any further.
    step_gradient = -shrink * through
    if math.isfinite(ctx.max_step):
        along = (through * unit).sum(1, keepdim=True)
        step_gradient = step_gradient + torch.where(capped, shrink * along * unit, 0.0)
    step_gradient = torch.where(moved, step_gradient, 0.0)

    grad_values = pinv_adjoint(jacobian, step_gradient)
    grad_level = None
    if ctx.needs_input_grad[3]:
        grad_level = -grad_values
        if level.shape[0] == 1 and points.shape[0] != 1:
            grad_level = grad_level.sum(0, keepdim=True)
    return (
        torch.where(moved, through, grad),
        grad_values,
        _jacobian_gradient(jacobian, residual, step_gradient) if ctx.needs_input_grad[2] else None,
        grad_level,
        None,
        *on_box,
        *(None,) * 3,
    )


# --- bracket_update -------------------------------------------------------------------------------

_BRACKET_VARIANTS: dict[str, int] = _C.bracket_variants


def bracket_state(n: int, device: torch.device | str | None = None) -> Tensor:
    """Memory for the state of n root searches that :func:`bracket_update_` fills.

    Args:
        n: rows.
        device: that of the points; None is torch's default.

    Returns:
        (n, columns), float64, zeros. What the columns hold is :func:`bracket_update_`'s own affair:
        bounds of the bracket as shares of the segment, F there, and how the search went.
    """
    return torch.zeros(n, _C.bracket_columns, dtype=torch.float64, device=device)


def bracket_update_(
    points: Tensor,
    status: Tensor,
    bracket: Tensor,
    start: Tensor,
    end: Tensor,
    values: Tensor,
    level: Tensor | float = 0.0,
    *,
    index: Tensor | None = None,
    tol: float = 0.0,
    variant: str = "anderson_bjorck",
    last: bool = False,
) -> None:
    """One pass of a root search on segments, in place: takes F at the points, writes the next ones.

    The first call hands in F at both ends and writes the first points. Every later call hands in F
    at the points that the call before wrote, so a pass costs one evaluation of F.

    Args:
        points: (n, d), contiguous, overwritten: where F is wanted next, or a finished row's answer.
            No other argument may share their memory.
        status: (n,) int8, contiguous. Only ``RUNNING`` rows take part.
        bracket: state, of :func:`bracket_state`, contiguous, overwritten.
        start, end: the segments, (n, d).
        values: F, for l = 1, of the rows in ``index``: (m, 1) at their points, or (m, 2) at start
            and end, which begins their search.
        level: c; scalar, (n,) or (n, 1).
        index: (m,) int64 without repeats, which row each row of ``values`` belongs to; None means
            all n in order. A row outside is an error on the CPU and left out on CUDA.
        tol: a row is ``CONVERGED`` when |F - c| <= tol.
        variant: "regula_falsi", "bisection", "illinois", "chandrupatla" or "anderson_bjorck".
        last: rows that would go on become ``MAX_ITERATIONS``, at the better end of their bracket.

    Statuses besides: ``NOT_BRACKETED`` (at the better end), ``NON_FINITE`` (at the place that is
    not), ``STALLED`` (at the better end: no point of this dtype lies between the ends; or three
    evaluations within 4 ulp of c or of the values at both ends came no closer: F's own rounding).

    Not differentiable: raises RuntimeError if a gradient would be lost.
    """
    if variant not in _BRACKET_VARIANTS:
        names = ", ".join(_BRACKET_VARIANTS)
        raise ValueError(f"variant: expected one of {names}, got {variant!r}")
    _refuse_gradient(
        "bracket_update_ works in place", "detach it", points=points, start=start, end=end,
        values=values, level=level,
    )  # fmt: skip
    dtype = points.dtype
    start, end, values = start.to(dtype), end.to(dtype), values.to(dtype)
    c = level_rows(level, points.shape[0], 1, points)
    code = _BRACKET_VARIANTS[variant]
    _raw.bracket_update_(
        points, status, bracket, start, end, values, c, index, float(tol), code, last
    )
    _wrote(points, status, bracket)


# --- nearest_distance -----------------------------------------------------------------------------


def nearest_distance(x: Tensor, cloud: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance d(x, X) from every point to its nearest cloud point, and its index.

    Args:
        x: (n, d), float32 or float64; on CUDA also float16 and bfloat16.
        cloud: X, (m, d), m >= 1.

    Returns:
        Distance (n,) and index (n,) int64. Among equally near points CUDA takes the smallest index
        and the CPU any one of them. A NaN in x gives distance NaN; cloud points that are not finite
        are never nearest.

    The CPU searches a k-d tree that is kept for the clouds used last and rebuilt when their numbers
    change; CUDA compares all pairs in tiles.

    Differentiable in x and cloud, to any order; the gradient at distance 0 is 0.
    """
    x, cloud = _same_dtype(x, cloud)
    return _call(_raw.nearest.default, NearestDistance, x, cloud)


class _TreeCache:
    """k-d trees of the clouds used last. A cloud is recognised by its numbers, not by its address,
    so a cloud changed in place, or new data at an old address, can never meet an old tree."""

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._trees: OrderedDict[int, tuple[np.ndarray, np.ndarray | None, cKDTree | None]]
        self._trees = OrderedDict()
        self._next_key = 0
        self._lock = threading.Lock()

    def get(self, cloud: np.ndarray) -> tuple[np.ndarray | None, cKDTree | None]:
        """The tree over the finite points of ``cloud``, and their indices (None: all of them)."""
        with self._lock:
            for key, (numbers, kept, tree) in reversed(self._trees.items()):
                if (
                    numbers.dtype == cloud.dtype
                    and numbers.shape == cloud.shape
                    and np.array_equal(numbers, cloud, equal_nan=kept is not None)
                ):
                    self._trees.move_to_end(key)
                    return kept, tree
        numbers = cloud.copy()  # a tree in float64 has no copy of its own, and would change with it
        finite = np.isfinite(numbers).all(1)
        kept = None if finite.all() else np.flatnonzero(finite)
        points = numbers if kept is None else numbers[kept]
        tree = cKDTree(points) if len(points) else None
        with self._lock:
            self._trees[self._next_key] = (numbers, kept, tree)
            self._next_key += 1
            while len(self._trees) > self._size:
                self._trees.popitem(last=False)
        return kept, tree


_trees = _TreeCache()
_ROWS_FOR_WORKERS = 8192


@torch.library.impl("levelset_ext::nearest", "CPU")
def _nearest_cpu(query: Tensor, cloud: Tensor) -> tuple[Tensor, Tensor]:
    _check_nearest(query, cloud)
    if query.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"query: expected float32 or float64 on the CPU, got {query.dtype}")
    x = query.detach().contiguous()
    points = cloud.detach().contiguous()
    index = torch.zeros(len(x), dtype=torch.int64)
    if len(x) and x.shape[1]:
        kept, tree = _trees.get(points.numpy())
        finite = torch.isfinite(x).all(1)
        if tree is not None:
            rows = x.numpy() if bool(finite.all()) else x[finite].numpy()
            # SciPy's workers are Python threads: to start them takes longer than few rows do.
            workers = torch.get_num_threads() if len(rows) >= _ROWS_FOR_WORKERS else 1
            _, found = tree.query(rows, workers=workers)
            found = np.asarray(found, dtype=np.int64)
            found[found == tree.n] = 0  # none: the squared distance to every point overflows
            index[finite] = torch.from_numpy(found if kept is None else kept[found])
    # The tree computes in float64; the distance is that of the inputs as they are.
    return torch.linalg.vector_norm(x - points[index], dim=1), index


def _check_nearest(query: Tensor, cloud: Tensor) -> None:
    if query.dim() != 2 or cloud.dim() != 2 or query.shape[1] != cloud.shape[1]:
        raise RuntimeError(
            f"cloud: expected (m, d) with the d of query (n, d) = {tuple(query.shape)}, "
            f"got {tuple(cloud.shape)}"
        )
    if cloud.shape[0] == 0:
        raise RuntimeError("cloud: expected at least one point, got (0, d)")
    if query.dtype != cloud.dtype or query.device != cloud.device:
        raise RuntimeError(
            f"cloud: expected dtype and device of query ({query.dtype}, {query.device}), "
            f"got {cloud.dtype}, {cloud.device}"
        )


def _nearest_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _nearest_backward(ctx: Any, grad: Tensor, _index: Any = None) -> tuple[Tensor | None, ...]:
    query, cloud, index = ctx.saved_tensors
    difference = query - cloud[index]
    squares = (difference * difference).sum(1)
    # A row that is not finite must not reach the gradient of the cloud point it was given.
    apart = (squares > 0) & torch.isfinite(squares)
    difference = torch.where(apart[:, None], difference, 0.0)
    inverse = torch.where(apart, torch.where(apart, squares, 1.0).rsqrt(), 0.0)
    grad_query = (grad * inverse)[:, None] * difference
    grad_cloud = None
    if ctx.needs_input_grad[1]:
        grad_cloud = torch.zeros_like(cloud).index_add(0, index, -grad_query)
    return grad_query, grad_cloud


# --- registration: fake kernels, autograd, vmap ---------------------------------------------------


def _on_one_device(*arguments: Any) -> None:
    first, *others = (a for a in arguments if isinstance(a, Tensor))
    for other in others:
        torch._check(
            other.device == first.device,
            lambda other=other: f"expected tensors on {first.device}, got one on {other.device}",
        )


@torch.library.register_fake("levelset_ext::pinv_apply")
def _pinv_apply_fake(jacobian: Tensor, residual: Tensor, team: int = 0) -> tuple[Tensor, Tensor]:
    _on_one_device(jacobian, residual)
    n, _, d = jacobian.shape
    return jacobian.new_empty(n, d), jacobian.new_empty(n, dtype=torch.int8)


@torch.library.register_fake("levelset_ext::pinv_adjoint")
def _pinv_adjoint_fake(jacobian: Tensor, gradient: Tensor, team: int = 0) -> tuple[Tensor, Tensor]:
    _on_one_device(jacobian, gradient)
    n, l, _ = jacobian.shape  # noqa: E741
    return jacobian.new_empty(n, l), jacobian.new_empty(n, dtype=torch.int8)


@torch.library.register_fake("levelset_ext::newton_update")
def _newton_update_fake(points: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
    _on_one_device(points, *rest, *named.values())
    return points.new_empty(points.shape), points.new_empty(points.shape[0], dtype=torch.int8)


@torch.library.register_fake("levelset_ext::pinv_apply_out")
@torch.library.register_fake("levelset_ext::newton_update_out")
def _out_fake(first: Tensor, *rest: Any, **named: Any) -> Tensor:
    _on_one_device(first, *rest, *named.values())
    return first.new_empty(first.shape[0], dtype=torch.int8)


@torch.library.register_fake("levelset_ext::newton_update_")
def _newton_update_inplace_fake(*arguments: Any, **named: Any) -> None:
    _on_one_device(*arguments, *named.values())


@torch.library.register_fake("levelset_ext::bracket_update_")
def _bracket_update_inplace_fake(*arguments: Any, **named: Any) -> None:
    _on_one_device(*arguments, *named.values())


@torch.library.register_fake("levelset_ext::nearest")
def _nearest_fake(query: Tensor, cloud: Tensor) -> tuple[Tensor, Tensor]:
    _on_one_device(query, cloud)
    n = query.shape[0]
    return query.new_empty(n), query.new_empty(n, dtype=torch.int64)


torch.library.register_autograd(
    "levelset_ext::pinv_apply", _apply_backward, setup_context=_save_two
)
torch.library.register_autograd(
    "levelset_ext::pinv_adjoint", _adjoint_backward, setup_context=_save_two
)
torch.library.register_autograd(
    "levelset_ext::newton_update", _newton_backward, setup_context=_newton_setup
)
torch.library.register_autograd(
    "levelset_ext::nearest", _nearest_backward, setup_context=_nearest_setup
)


def _rows_vmap(op: Callable[..., tuple[Tensor, Tensor]], shared: tuple[int, ...]) -> Callable:
    """A vmap rule for an op whose rows are independent: the mapped dimension joins the rows.

    ``shared`` are the arguments that all rows share; those cannot be mapped over.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size, rows = info.batch_size, 0
        flat = []
        for position, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
            if not isinstance(arg, Tensor):
                flat.append(arg)
            elif position in shared:
                if dim is not None:
                    name = op.default._schema.arguments[position].name  # type: ignore[attr-defined]
                    raise RuntimeError(
                        f"{name}: expected one for all of vmap, as it is shared by all rows of "
                        f"{op}; loop over it instead"
                    )
                flat.append(arg)
            else:
                arg = arg.movedim(dim, 0) if dim is not None else arg.expand(size, *arg.shape)
                rows = arg.shape[1]
                flat.append(arg.reshape(size * rows, *arg.shape[2:]))
        first, second = op(*flat)
        return (
            (first.reshape(size, rows, *first.shape[1:]), second.reshape(size, rows)),
            (0, 0),
        )

    return rule


def _newton_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    level, dim = args[3], in_dims[3]
    rows = args[0].shape[1 if in_dims[0] == 0 else 0] if in_dims[0] is not None else len(args[0])
    if level.shape[0 if dim is None else (1 if dim == 0 else 0)] == 1:
        # One level for all rows becomes one for each, as the mapped rows may not share it.
        level = (level if dim is None else level.movedim(dim, 0)).expand(
            *(() if dim is None else (info.batch_size,)), rows, level.shape[-1]
        )
        args, in_dims = (
            (*args[:3], level, *args[4:]),
            (*in_dims[:3], None if dim is None else 0, *in_dims[4:]),
        )
    return _rows_vmap(_raw.newton_update, shared=(5, 6))(info, in_dims, *args)


def _no_vmap(op: str) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        raise RuntimeError(
            f"{op} works in place on the rows of a batch and cannot be mapped over by vmap; join "
            "the mapped dimension with the rows"
        )

    return rule


torch.library.register_vmap("levelset_ext::pinv_apply", _rows_vmap(_raw.pinv_apply, ()))
torch.library.register_vmap("levelset_ext::pinv_adjoint", _rows_vmap(_raw.pinv_adjoint, ()))
torch.library.register_vmap("levelset_ext::newton_update", _newton_vmap)
for _name in ("pinv_apply_out", "newton_update_out", "newton_update_", "bracket_update_"):
    torch.library.register_vmap(f"levelset_ext::{_name}", _no_vmap(_name))
torch.library.register_vmap("levelset_ext::nearest", _rows_vmap(_raw.nearest, (1,)))


# --- the same ops as torch.autograd.Function ------------------------------------------------------


class PinvApply(torch.autograd.Function):
    """``PinvApply.apply(jacobian, residual)``: :func:`pinv_apply` as an autograd Function; gives
    the result and the status."""

    generate_vmap_rule = True

    @staticmethod
    def forward(jacobian: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return _raw.pinv_apply(jacobian, residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save_two(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _status: Any) -> Any:
        return _apply_backward(ctx, grad)[:2]


class PinvAdjoint(torch.autograd.Function):
    """``PinvAdjoint.apply(jacobian, gradient)``: :func:`pinv_adjoint` as an autograd Function;
    gives the result and the status."""

    generate_vmap_rule = True

    @staticmethod
    def forward(jacobian: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return _raw.pinv_adjoint(jacobian, gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save_two(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _status: Any) -> Any:
        return _adjoint_backward(ctx, grad)[:2]


class NewtonUpdate(torch.autograd.Function):
    """``NewtonUpdate.apply(points, values, jacobian, level, status, lower, upper, tol, max_step)``:
    :func:`newton_update` as an autograd Function; level is (n, l) or (1, l)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _raw.newton_update(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _newton_setup(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _status: Any) -> Any:
        return _newton_backward(ctx, grad)[:9]


class NearestDistance(torch.autograd.Function):
    """``NearestDistance.apply(x, cloud)``: :func:`nearest_distance` as an autograd Function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cloud: Tensor) -> tuple[Tensor, Tensor]:
        return _raw.nearest(x, cloud)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _nearest_setup(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _index: Any) -> Any:
        return _nearest_backward(ctx, grad)
