"""Points that stay where they are, on whatever level set passes through them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from levelset_ext.compiled import MLP
from levelset_ext.field import Field, as_field, check_points, full_precision, jacobian_of
from levelset_ext.result import LevelSetResult, Status
from levelset_ext.samplers.state import SamplerState


def level_points(fn: Field, x: Tensor) -> LevelSetResult:
    """x as samples of its own level sets: c = F(x), zero iterations.

    This is how Eq. 13 samples the levels t other than zero: every point lies on some level set, and
    its value is the t that the distance is compared with. As in :func:`~levelset_ext.project`,
    autocast is left.

    Args:
        fn: module or callable (n, *event) -> (n,) or (n, l).
        x: (n, *event), floating point.

    Returns:
        A :class:`~levelset_ext.LevelSetResult` with ``level == values``; rows are ``CONVERGED``,
        ``RANK_DEFICIENT`` or ``NON_FINITE``.
    """
    x = check_points("x", x)
    keep = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.no_grad(), full_precision(x):
        if isinstance(fn, MLP) and fn.takes(x):
            found = fn.evaluate(x, keep)
            finite = found.status != Status.NON_FINITE
            status = torch.where(finite, found.rank_status, found.status)
            return replace(found, level=found.values.clone(), status=status)
        values, jacobian = jacobian_of(as_field(fn), x)
        state = SamplerState(x, values)
        state.record(values, jacobian.flatten(2))
        result = state.finish(tol=0.0)
        status = torch.where(result.converged, result.rank_status, result.status)
        return replace(result, status=status)
