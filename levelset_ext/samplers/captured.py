"""Samplers whose steps are replayed from CUDA graphs: for networks that no compiled field takes and
batches so small that launching their operations takes longer than running them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from levelset_ext.compiled import MLP, compiled_field
from levelset_ext.field import Field, as_constant_field, check_points, full_precision, values_of
from levelset_ext.result import LevelSetResult
from levelset_ext.samplers.false_position import VARIANTS, false_position
from levelset_ext.samplers.masked import Masked, MaskedNewton, MaskedSearch, repeat
from levelset_ext.samplers.projection import project
from levelset_ext.samplers.state import box_bounds, check_limits


class _Captured:
    """What both have in common: when to capture, and what to do where that is refused.

    Attributes:
        reason: why nothing is captured, or None.
    """

    reason: str | None

    def __init__(self, fn: Field, x: Tensor) -> None:
        self._fn = fn
        self._like = check_points("x", x).detach()
        self._where: list[int] = []
        self._copied: list[tuple[Tensor, Tensor]] = []
        self._capture()

    def _prepare(self, field: Field) -> tuple[Masked, dict[str, Callable[[], object]]]:
        """The masked sampler, ready to be stepped, and what is to be captured of it."""
        raise NotImplementedError

    def _refusal(self) -> str | None:
        if self._like.device.type != "cuda":
            return f"the points are on {self._like.device.type.upper()}, not on CUDA"
        if len(self._like) == 0:
            return "there are no rows"
        return None

    def _capture(self) -> None:
        self._where = _addresses(self._fn)
        with torch.inference_mode(False), torch.no_grad(), full_precision(self._like):
            self.reason = self._refusal()
            if self.reason is not None:
                return
            field = as_constant_field(self._fn)
            if isinstance(field, nn.Module) and isinstance(self._fn, nn.Module):
                # The clone has buffers of its own, which are brought up to date in every call.
                self._copied = list(zip(field.buffers(), self._fn.buffers(), strict=True))
            self._masked, parts = self._prepare(field)
            try:
                self._run = _graphs(parts, self._like.device)
            except Exception as error:
                torch.cuda.synchronize(self._like.device)
                self.reason = (
                    f"the network cannot be captured: {type(error).__name__}: "
                    + str(error).strip().split("\n")[0]
                )

    def _ready(self, **points: Tensor) -> bool:
        """Checks the arguments of a call; whether the graphs can be replayed."""
        for name, x in points.items():
            found = check_points(name, x)
            if found.shape != self._like.shape or found.dtype != self._like.dtype:
                raise ValueError(
                    f"{name}: expected {tuple(self._like.shape)} of {self._like.dtype}, as it was "
                    f"captured, got {tuple(found.shape)} of {found.dtype}"
                )
            if found.device != self._like.device:
                raise ValueError(f"{name}: expected {self._like.device}, got {found.device}")
        if self.reason is None and _addresses(self._fn) != self._where:
            self._capture()
        if self.reason is not None:
            return False
        if self._copied:
            torch._foreach_copy_([a for a, _ in self._copied], [b for _, b in self._copied])
        return True


class CapturedProjection(_Captured):
    """:func:`~levelset_ext.project` by Newton's iteration, for batches of one shape, replayed from
    CUDA graphs.

        captured = CapturedProjection(net, x, max_iters=10)
        result = captured(x, level)

    An iteration is one launch. All rows are evaluated in all iterations, so it pays where an
    iteration is short: its operations take less time than launching them. Results are those of
    ``project`` up to the network's own batch-size rounding.

    Parameters and buffers are read anew in every call, also where an optimizer, ``copy_`` or
    ``load_state_dict`` has written to them. Other changes to the module (submodules, numbers among
    its attributes, hooks) are not seen: make a new one. One call at a time.

    Where capturing is refused (no CUDA device, a forward that waits for the device or allocates in
    a way that graphs cannot), and where the network has a compiled field, which is faster, every
    call is an ordinary ``project``, and ``reason`` says why.

    Args:
        fn: as for ``project``.
        x: points of the shape, dtype and device of all batches to come; the numbers do not matter
            unless the network takes another way at other points.
        max_iters, tol, max_step, box: as for ``project``.

    Attributes:
        reason: why nothing is captured, or None.
    """

    def __init__(
        self,
        fn: Field,
        x: Tensor,
        *,
        max_iters: int = 20,
        tol: float = 1e-5,
        max_step: float = math.inf,
        box: tuple[Any, Any] | None = None,
    ) -> None:
        max_iters = check_limits(max_iters, tol)
        self._limits: dict[str, Any] = {"max_iters": max_iters, "tol": tol, "max_step": max_step}
        self._box = box
        super().__init__(fn, x)

    def _refusal(self) -> str | None:
        refusal = super()._refusal()
        if refusal is None and compiled_field(self._fn, self._like) is not None:
            return "the network has a compiled field, which needs one launch"
        return refusal

    def _prepare(self, field: Field) -> tuple[Masked, dict[str, Callable[[], object]]]:
        outputs = values_of(field, self._like).shape[1]
        bounds = box_bounds(self._box, self._like)
        newton = MaskedNewton(
            field, self._like, outputs, self._limits["tol"], self._limits["max_step"], bounds
        )
        newton.begin(self._like, 0.0)
        return newton, {"step": newton.step, "evaluate": newton.evaluate}

    def __call__(self, x: Tensor, level: Tensor | float = 0.0) -> LevelSetResult:
        """Projects x (n, *event); level as in ``project``."""
        if not self._ready(x=x):
            return project(self._fn, x, level, box=self._box, **self._limits)
        newton, most = self._masked, self._limits["max_iters"]
        assert isinstance(newton, MaskedNewton)
        with torch.inference_mode(False), torch.no_grad():
            newton.begin(x, level)
            if repeat(self._run["step"], newton.state.status, most) == most:
                self._run["evaluate"]()
            return newton.result(self._limits["tol"])


class CapturedFalsePosition(_Captured):
    """:func:`~levelset_ext.false_position` for batches of one shape, replayed from CUDA graphs; see
    :class:`CapturedProjection`.

        captured = CapturedFalsePosition(net, start)
        result = captured(start, end, level)

    Attributes:
        reason: why nothing is captured, or None.
    """

    def __init__(
        self,
        fn: Field,
        start: Tensor,
        *,
        max_iters: int = 40,
        tol: float = 1e-5,
        variant: str = "anderson_bjorck",
    ) -> None:
        max_iters = check_limits(max_iters, tol)
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
        self._limits: dict[str, Any] = {"max_iters": max_iters, "tol": tol, "variant": variant}
        super().__init__(fn, start)

    def _prepare(self, field: Field) -> tuple[Masked, dict[str, Callable[[], object]]]:
        search = MaskedSearch(field, self._like, self._limits["tol"], self._limits["variant"])
        search.begin(self._like, self._like, 0.0)
        return search, {
            "step": search.step,
            "last": lambda: search.step(last=True),
            "end": search.end,
        }

    def __call__(self, start: Tensor, end: Tensor, level: Tensor | float = 0.0) -> LevelSetResult:
        """Searches the segments from start to end, both (n, *event)."""
        if not self._ready(start=start, end=end):
            return false_position(self._fn, start, end, level, **self._limits)
        search, most = self._masked, self._limits["max_iters"]
        assert isinstance(search, MaskedSearch)
        with torch.inference_mode(False), torch.no_grad():
            search.begin(start, end, level, last=most == 0)
            if repeat(self._run["step"], search.state.status, most - 1) == most - 1:
                self._run["last"]()
            self._run["end"]()
            return search.result(self._limits["tol"])


def _addresses(fn: Field) -> list[int]:
    """Where the numbers of a module are."""
    fn = fn.module if isinstance(fn, MLP) else fn
    if not isinstance(fn, nn.Module):
        return []
    return [t.data_ptr() for t in (*fn.parameters(), *fn.buffers())]


def _graphs(
    parts: dict[str, Callable[[], object]], device: torch.device
) -> dict[str, Callable[[], object]]:
    """Every part captured in a CUDA graph, after it has run three times on a side stream."""
    # Streams are set and restored with their device, so all of it is done on this one.
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                for part in parts.values():
                    part()
            # What waits for the device is found here: a capture that fails leaves torch on the
            # stream of the capture, and its random numbers and memory in the state of one.
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for part in parts.values():
                    part()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(side)
        found: dict[str, Callable[[], object]] = {}
        try:
            for name, part in parts.items():
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=side):
                    part()
                found[name] = graph.replay
        finally:
            torch.cuda.set_stream(current)
    return found
