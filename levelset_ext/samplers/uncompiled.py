"""Samplers as calls that ``torch.compile`` leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")


def uncompiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorator: breaks the graph of a compiled caller, and runs the function as it is.

    A sampler asks which rows still run, which breaks a graph anyway. The decorator
    ``torch.compiler.disable`` does the same but imports the compiler, and with it takes as long as
    everything else in this package, for those who compile nothing too.
    """

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if torch.compiler.is_compiling():
            apart: Callable[_P, _T] = torch.compiler.disable(function)
            return apart(*args, **kwargs)
        return function(*args, **kwargs)

    return call
