"""Reads a module as a chain of layers, by playing its traced graph with what each value is."""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize

Number = int | float
Weights = Callable[[], Tensor]


class NotAnMLP(ValueError):
    """Why a module cannot be compiled."""


@dataclass(frozen=True)
class _Wire:
    """Columns that are passed on as they are: (source, number, factor) one after the other; a
    source is -1 for the point x, or the number of a layer."""

    parts: tuple[tuple[int, int, float], ...]

    @property
    def width(self) -> int:
        return sum(number for _, number, _ in self.parts)


@dataclass(frozen=True)
class _Affine:
    """W wire + b, not yet given to an activation."""

    wire: _Wire
    weight: Weights  # (outputs, wire.width)
    bias: Weights | None
    outputs: int


@dataclass(frozen=True)
class _Constant:
    """A tensor made of parameters and buffers alone."""

    value: Weights


@dataclass(frozen=True)
class Layer:
    """One step of the chain; ``hidden`` (outputs, before) and ``inputs`` (outputs, d) read W, U."""

    outputs: int
    hidden: Weights | None
    inputs: Weights | None
    bias: Weights | None
    activation: str = "none"
    sharpness: float = 1.0
    threshold: float = math.inf


@dataclass
class _Chain:
    """The layers found so far, while a module is traced."""

    dimension: int
    layers: list[Layer] = field(default_factory=list)

    def add(self, affine: _Affine, activation: str, sharpness: float, threshold: float) -> _Wire:
        last = len(self.layers) - 1
        hidden: list[tuple[int, int, float]] = []
        inputs: list[tuple[int, int, float]] = []
        start = 0
        for source, number, factor in affine.wire.parts:
            if source not in (-1, last):
                raise NotAnMLP("it reads a layer that is not the one before (a residual network?)")
            (inputs if source == -1 else hidden).append((start, number, factor))
            start += number
        if last >= 0 and not hidden:
            raise NotAnMLP("a layer does not read the one before")
        self.layers.append(
            Layer(
                affine.outputs,
                _columns(affine.weight, hidden, start) if hidden else None,
                _columns(affine.weight, inputs, start) if inputs else None,
                affine.bias,
                activation,
                sharpness,
                threshold,
            )
        )
        return _Wire(((len(self.layers) - 1, affine.outputs, 1.0),))


def _columns(weight: Weights, parts: list[tuple[int, int, float]], width: int) -> Weights:
    """The sum of the named columns of a weight, each part times its factor."""
    if len(parts) == 1 and parts[0] == (0, width, 1.0):
        return weight

    def read() -> Tensor:
        whole = weight()
        pieces = [
            whole[:, start : start + number] * factor
            if factor != 1.0
            else whole[:, start : start + number]
            for start, number, factor in parts
        ]
        return pieces[0] if len(pieces) == 1 else torch.stack(pieces).sum(0)

    return read


_RELU = (functional.relu, torch.relu, torch.relu_, "relu", "relu_")
_SILU = (functional.silu,)
_SOFTPLUS = (functional.softplus,)
_SINE = (torch.sin, "sin")
_TANH = (torch.tanh, functional.tanh, "tanh")
_TIMES = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul")
_OVER = (operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div")
_PLUS = (operator.add, operator.iadd, torch.add, "add")
_MINUS = (operator.sub, operator.isub, torch.sub, "sub")
_SAME = (torch.clone, "clone", "contiguous")
_SQUEEZE = (torch.squeeze, "squeeze")
_MATMUL = (operator.matmul, torch.matmul, torch.mm, "matmul", "mm")
_CAT = (torch.cat, torch.concat, torch.hstack)
_LEAVES = (nn.Linear, nn.ReLU, nn.SiLU, nn.Softplus, nn.Tanh, nn.Identity, nn.Dropout)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module does what its layer class says. A subclass with a forward of its own (an
    adapter, a clamp) need not, and is traced through."""
    return "forward" not in module.__dict__ and any(
        isinstance(module, leaf) and type(module).forward is leaf.forward for leaf in _LEAVES
    )


# While torch.fx traces it replaces nn.Module.__call__ and __getattr__, for every thread: two traces
# at once would put each other's functions back, and other threads' modules come by here.
_TRACING = threading.RLock()


class _Tracer(fx.Tracer):
    """Records what its own thread calls, and lets other threads' modules through."""

    proxy_buffer_attributes = True  # else a buffer read as a number would be kept as it is now

    def __init__(self) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]  # none is fine
        self._thread = threading.get_ident()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with _TRACING:
            return super().trace(root, concrete_args)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return _is_leaf(module)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class Reader:
    """Plays a traced graph with what each node is instead of tensors."""

    def __init__(self, module: nn.Module, dimension: int | None) -> None:
        self.module = module
        for child in module.modules():
            _check_hooks(child)
        self.tracer = _Tracer()
        try:
            graph = self.tracer.trace(module)
        except Exception as error:
            raise NotAnMLP(f"torch.fx cannot trace it ({_first_line(error)})") from error
        self.chain = _Chain(0)
        self.flat = False  # (n,) instead of (n, l)
        self.values: dict[fx.Node, Any] = {}
        self.dimension = dimension
        for node in graph.nodes:
            try:
                self.values[node] = self._node(node)
            except NotAnMLP:
                raise
            except Exception as error:  # arguments in a form that nothing below looks for
                raise NotAnMLP(f"{node.target} is called in a way that cannot be read") from error

    def _node(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if self.chain.dimension or node.args:
                raise NotAnMLP("it takes more than the points")
            self.chain.dimension = self._dimension(node)
            return _Wire(((-1, self.chain.dimension, 1.0),))
        if node.op == "get_attr":
            return _Constant(self._attribute(str(node.target)))
        args = fx.map_arg(node.args, lambda n: self.values[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: self.values[n])
        if node.op == "call_module":
            return self._module(self.module.get_submodule(str(node.target)), *args, **kwargs)
        if node.op == "output":
            return self._output(args[0])
        if not _holds(args, kwargs, (_Wire, _Affine)):
            return _Constant(_deferred(node, args, kwargs))
        return self._function(node, args, kwargs)

    def _dimension(self, node: fx.Node) -> int:
        """d, from the first layer that reads the points if it is not given."""
        if self.dimension is not None:
            return self.dimension
        found: list[int] = []
        for user in self._readers(node):
            if user.op == "call_module":
                child = self.module.get_submodule(str(user.target))
                if isinstance(child, nn.Linear):
                    found.append(child.in_features)
            elif user.target is functional.linear or user.target in _MATMUL:
                weight = user.args[1] if len(user.args) > 1 else user.kwargs.get("weight")
                if isinstance(weight, fx.Node) and weight.op == "get_attr":
                    shape = self._attribute(str(weight.target))().shape
                    found.append(shape[1 if user.target is functional.linear else 0])
        if not found:
            raise NotAnMLP("the dimension of the points cannot be seen; pass dimension=")
        # The first layer reads the points alone; later ones read more beside them.
        return min(found)

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """Nodes that read a node, looking through scaling."""
        for user in node.users:
            if user.target in _TIMES + _OVER + _SAME:
                yield from self._readers(user)
            else:
                yield user

    def _attribute(self, name: str) -> Weights:
        owner, _, leaf = name.rpartition(".")
        holder = self.module.get_submodule(owner)
        if leaf not in holder._parameters and leaf not in holder._buffers:
            raise NotAnMLP(f"it uses the tensor {name}, neither a parameter nor a buffer")
        return lambda: getattr(holder, leaf)

    def _module(self, child: nn.Module, input: Any) -> Any:
        value = input  # the name that all of torch's layers have for it
        if isinstance(child, nn.Linear):
            return self._linear(value, *_linear_weights(child))
        if isinstance(child, nn.ReLU):
            return self._activation(value, "relu")
        if isinstance(child, nn.SiLU):
            return self._activation(value, "silu")
        if isinstance(child, nn.Softplus):
            return self._activation(value, "softplus", child.beta, child.threshold)
        if isinstance(child, nn.Tanh):
            return self._activation(value, "tanh")
        return value  # Identity, and Dropout in eval mode

    def _function(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target = node.target
        if target is functional.linear:
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            weight, bias = given["weight"], given.get("bias")
            if isinstance(weight, _Constant):
                return self._linear(
                    given["input"], weight.value, None if bias is None else bias.value
                )
        first = args[0] if args else kwargs.get("input")
        if target in _MATMUL and isinstance(args[1], _Constant):
            transposed = args[1].value
            return self._linear(first, lambda: transposed().t(), None)
        if target in _RELU:
            return self._activation(first, "relu")
        if target in _SILU:
            return self._activation(first, "silu")
        if target in _SINE:
            return self._activation(first, "sine")
        if target in _TANH:
            return self._activation(first, "tanh")
        if target in _SOFTPLUS:
            names = ("beta", "threshold")
            given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
            return self._activation(
                first, "softplus", given.get("beta", 1.0), given.get("threshold", 20.0)
            )
        if target in _CAT and first is not None:
            dim = (
                args[1] if len(args) > 1 else kwargs.get("dim", 1 if target is torch.hstack else 0)
            )
            parts = [self._wire(value) for value in first]
            if dim in (1, -1):
                return _Wire(tuple(part for wire in parts for part in wire.parts))
        if target in _TIMES and len(args) == 2:
            a, b = args if isinstance(args[1], Number) else reversed(args)
            if isinstance(b, Number):
                return _scaled(a, float(b))
        if target in _OVER and isinstance(args[1], Number) and not kwargs:
            return _scaled(first, 1.0 / float(args[1]))
        if target is operator.neg or target in (torch.neg, "neg"):
            return _scaled(first, -1.0)
        if target in _PLUS and not kwargs:
            a, b = args if isinstance(args[0], _Affine) else reversed(args)
            if isinstance(a, _Affine) and isinstance(b, Number | _Constant):
                return _shifted(a, b, 1.0)
        if target in _MINUS and not kwargs and isinstance(args[1], Number | _Constant):
            return _shifted(first, args[1], -1.0)
        if target in _SAME:
            return first
        if target is operator.getitem:
            return self._slice(first, args[1])
        if target in _SQUEEZE and isinstance(first, _Affine) and first.outputs == 1:
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            if dim in (1, -1):
                self.flat = True
                return first
        name = getattr(target, "__name__", str(target))
        raise NotAnMLP(f"{name} is not among the operations of a perceptron")

    def _wire(self, value: Any) -> _Wire:
        """A value as columns that a layer can read; two layers in a row have no activation."""
        if isinstance(value, _Affine):
            return self.chain.add(value, "none", 1.0, math.inf)
        if not isinstance(value, _Wire):
            raise NotAnMLP("it mixes points and parameters")
        return value

    def _linear(self, value: Any, weight: Weights, bias: Weights | None) -> _Affine:
        wire = self._wire(value)
        shape = tuple(weight().shape)
        if len(shape) != 2 or shape[1] != wire.width:
            raise NotAnMLP(f"a layer of shape {shape} reads {wire.width} columns")
        return _Affine(wire, weight, bias, shape[0])

    def _activation(
        self, value: Any, name: str, sharpness: float = 1.0, threshold: float = math.inf
    ) -> _Wire:
        if not isinstance(value, _Affine):
            raise NotAnMLP(f"{name} of something that is not a layer")
        if self.flat:
            raise NotAnMLP(f"{name} after a squeeze")
        return self.chain.add(value, name, float(sharpness), float(threshold))

    def _slice(self, value: Any, index: Any) -> Any:
        """Columns of what the network returns: value[:, 0], value[..., :1]."""
        pair = isinstance(index, tuple) and len(index) == 2 and isinstance(value, _Affine)
        if not pair or not (index[0] is Ellipsis or index[0] == slice(None)):
            raise NotAnMLP(f"it takes the part {index} of a tensor")
        column = index[1]
        if isinstance(column, int):
            self.flat = True
            column = slice(column % value.outputs, column % value.outputs + 1)
        if not isinstance(column, slice):
            raise NotAnMLP(f"it takes the columns {column} of a tensor")
        chosen, weight, bias = column, value.weight, value.bias
        return _Affine(
            value.wire,
            lambda: weight()[chosen],
            None if bias is None else lambda: bias()[chosen],
            len(range(value.outputs)[chosen]),
        )

    def _output(self, value: Any) -> None:
        if isinstance(value, _Wire):
            # A network that ends with an activation gets the identity as its last layer.
            if not (len(value.parts) == 1 and value.parts[0][0] == len(self.chain.layers) - 1 >= 0):
                raise NotAnMLP("it returns something else than its last layer")
            width, some = value.width, next(self.module.parameters())
            value = _Affine(value, lambda: torch.eye(width).to(some), None, width)
        if not isinstance(value, _Affine):
            raise NotAnMLP(f"it returns a {type(value).__name__.strip('_')}, not one tensor")
        self.chain.add(value, "none", 1.0, math.inf)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _holds(args: Any, kwargs: Any, kinds: tuple[type, ...]) -> bool:
    found: list[bool] = []
    fx.node.map_aggregate((args, kwargs), lambda a: found.append(isinstance(a, kinds)))
    return any(found)


def _deferred(node: fx.Node, args: Any, kwargs: Any) -> Weights:
    """A tensor of parameters, computed when it is asked for."""

    def now(a: Any) -> Any:
        return a.value() if isinstance(a, _Constant) else a

    def compute() -> Tensor:
        given = fx.node.map_aggregate(args, now)
        named = fx.node.map_aggregate(kwargs, now)
        if node.op == "call_method":
            return getattr(given[0], str(node.target))(*given[1:], **named)
        return node.target(*given, **named)  # type: ignore[operator]

    return compute


def _check_hooks(child: nn.Module) -> None:
    """No hook runs in a compiled loop, nor with what samplers evaluate; that of torch's old
    ``weight_norm`` is known."""
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        hooks = getattr(child, kind)
        if hooks and not (kind == "_forward_pre_hooks" and _weight_norm(child) is not None):
            raise NotAnMLP(f"{type(child).__name__} has hooks")


def _weight_norm(child: nn.Module) -> Any:
    from torch.nn.utils.weight_norm import WeightNorm

    hook: Any = next(iter(child._forward_pre_hooks.values()), None)
    known = isinstance(child, nn.Linear) and len(child._forward_pre_hooks) == 1
    return hook if known and isinstance(hook, WeightNorm) and hook.name == "weight" else None


def _linear_weights(child: nn.Linear) -> tuple[Weights, Weights | None]:
    norm = _weight_norm(child)
    for name in ("weight", "bias"):
        known = (*child._parameters, *child._buffers, "weight" if norm is not None else "")
        if name not in known and not parametrize.is_parametrized(child, name):
            raise NotAnMLP(f"the {name} of a Linear layer is neither a parameter nor a buffer")
    bias = None if child.bias is None else (lambda: child.bias)
    if norm is None:
        return (lambda: child.weight), bias
    return (lambda: norm.compute_weight(child)), bias


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, _Wire):
        return _Wire(tuple((source, n, f * factor) for source, n, f in value.parts))
    if not isinstance(value, _Affine):
        raise NotAnMLP("it scales something that is not a layer")
    weight, bias = value.weight, value.bias
    return replace(
        value,
        weight=lambda: weight() * factor,
        bias=None if bias is None else lambda: bias() * factor,
    )


def _shifted(value: Any, by: Number | _Constant, sign: float) -> _Affine:
    if not isinstance(value, _Affine):
        raise NotAnMLP("it adds to something that is not a layer")
    weight, bias = value.weight, value.bias
    if isinstance(by, _Constant) and tuple(by.value().shape) not in ((), (1,), (value.outputs,)):
        raise NotAnMLP(f"it adds a tensor of shape {tuple(by.value().shape)} to a layer")

    def shifted() -> Tensor:
        some = weight()
        added = by.value() if isinstance(by, _Constant) else some.new_tensor(float(by))
        added = (sign * added).expand(value.outputs)
        return added if bias is None else bias() + added

    return replace(value, bias=shifted)
