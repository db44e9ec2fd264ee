"""Hidden units of a network as fields, so that their level sets can be sampled and controlled."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["LayerField"]


# torch counts hooks without a lock, and two of one number would be one.
_REGISTERING = threading.Lock()


class _Reached(BaseException):
    """Ends a forward at a layer. Not an Exception, which the network might catch."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class LayerField(nn.Module):
    """The output of a layer inside a network, as a field (n, *event) -> (n,) or (n, l).

    The network is a submodule: samplers clone it in eval mode as they do any module, and its
    parameters are the field's. What comes after the layer is not evaluated, and gets no gradient.

    Args:
        network: any module.
        layer: name of a submodule as in ``network.named_modules()``, whose output is a tensor of
            n rows. Of a layer that is used several times the first use counts.
        units: which of the layer's outputs, flattened per row: a number for (n,), several for
            (n, l), or a callable (n, *output) -> (n,) or (n, l), such as a difference of features
            or a mean over a feature map. None keeps all of them, which are to be few.

    Raises:
        ValueError: no such submodule; later, when evaluated: a layer that was not reached, an
            output that is not one tensor of n rows, or a unit that it does not have.

    Not for ``torch.compile``.
    """

    def __init__(
        self,
        network: nn.Module,
        layer: str,
        units: int | Sequence[int] | Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        names = [name for name, _ in network.named_modules() if name]
        if layer not in names:
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise ValueError(f"layer: expected one of {known}, got {layer!r}")
        self.network, self.layer = network, layer
        self.units = units if callable(units) or units is None else _numbers(units)

    def forward(self, x: Tensor) -> Tensor:
        output = self._output(x)
        if not isinstance(output, Tensor) or output.dim() == 0 or output.shape[0] != x.shape[0]:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"layer: expected {self.layer} to give one tensor of {x.shape[0]} rows, got {got}"
            )
        if callable(self.units):
            return self.units(output)
        flat = output.flatten(1) if output.dim() > 1 else output[:, None]
        if self.units is None:
            return flat
        wanted = (self.units,) if isinstance(self.units, int) else self.units
        for unit in wanted:
            if not -flat.shape[1] <= unit < flat.shape[1]:
                raise ValueError(
                    f"units: expected numbers below {flat.shape[1]}, which {self.layer} has, "
                    f"got {unit}"
                )
        return flat[:, self.units] if isinstance(self.units, int) else flat[:, list(wanted)]

    def _output(self, x: Tensor) -> Any:
        target = self.network.get_submodule(self.layer)
        thread = threading.get_ident()

        def stop(module: nn.Module, arguments: Any, output: Any) -> None:
            # Another thread may be evaluating the same layer for itself, and a clone shares the
            # table of hooks with its original.
            if module is target and threading.get_ident() == thread:
                raise _Reached(output)

        with _REGISTERING:
            hook = target.register_forward_hook(stop)
        try:
            self.network(x)
        except _Reached as reached:
            return reached.output
        finally:
            hook.remove()
        raise ValueError(f"layer: expected {self.layer} to be used by the network's forward")

    def extra_repr(self) -> str:
        return f"layer={self.layer!r}, units={self.units!r}"


def _numbers(units: int | Sequence[int]) -> int | tuple[int, ...]:
    """Integers of any kind, such as numpy's, as Python's."""
    try:
        return operator.index(units)  # type: ignore[arg-type]
    except TypeError:
        pass
    try:
        return tuple(operator.index(unit) for unit in units)  # type: ignore[union-attr]
    except TypeError:
        raise ValueError(
            f"units: expected an integer, several, a function or None, got {units!r}"
        ) from None
