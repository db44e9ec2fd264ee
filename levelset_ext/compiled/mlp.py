"""Compiled fields: multilayer perceptrons whose Newton iteration runs in one compiled loop.

    field = MLP.from_module(net)         # reads the weights of net in place
    result = project(field, x)           # the same as project(net, x), which also uses it by itself

Which networks qualify, and where the loop runs: :class:`MLP`.
"""

from __future__ import annotations

import copy
import functools
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from levelset_ext import _C
from levelset_ext.compiled.signature import signature_of
from levelset_ext.compiled.tape import Recording, Tape
from levelset_ext.compiled.trace import Layer, NotAnMLP, Reader
from levelset_ext.field import evaluation_copy
from levelset_ext.result import LevelSetResult, Status

_ACTIVATIONS: dict[str, Callable[[Tensor, Layer], Tensor]] = {
    "none": lambda h, _: h,
    "relu": lambda h, _: functional.relu(h),
    "silu": lambda h, _: functional.silu(h),
    "sine": lambda h, _: torch.sin(h),
    "tanh": lambda h, _: torch.tanh(h),
    "softplus": lambda h, layer: functional.softplus(h, layer.sharpness, layer.threshold),
}


_NON_FINITE = int(Status.NON_FINITE)


def in_transform() -> bool:
    """Whether a transform of torch.func is at work, whose tensors have no numbers to read."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class MLP:
    """A multilayer perceptron as a compiled field; made by :meth:`from_module`.

    A network qualifies when it is a chain

        h_k = a_k(W_k h_{k-1} + U_k x + b_k),    F = W h + U x + b,

    whatever its modules are called: Linear layers (weight norm included), ReLU, SiLU, softplus,
    sine and tanh, concatenation with the input, scaling by numbers, a slice or squeeze at the end.

    It is a :data:`~levelset_ext.field.Field`: every sampler, :func:`~levelset_ext.sample_network`
    and every loss takes it in the place of the module, whose parameters it reads in place, in eval
    mode. On the CPU in float32 and float64, and on CUDA in float32 for networks of up to 24 layers,
    512 units, 16 inputs and 2 outputs:

    * :func:`~levelset_ext.project` runs the whole iteration in one compiled loop, where a row that
      is done makes room for the next one. The result of a row does not depend on the rows beside it
      nor on the number of threads. On CUDA the loop is one launch.
    * On the CPU, what was found with gradients enabled remembers the last evaluation
      (``result.tape``), and the sample network takes the gradient in theta from it instead of
      evaluating the network again, as long as the parameters have not changed. A gradient that
      is to have a gradient itself (``create_graph=True``) does evaluate it again.

    Elsewhere (other devices and dtypes, points that require a gradient, derivatives of more than 8
    outputs) the module is called.
    """

    is_compiled_field = True  # what the samplers know it by

    def __init__(
        self, module: nn.Module, dimension: int | None = None, mixed: bool = False
    ) -> None:
        self.mixed, self._given, self._compiles = mixed, dimension, True
        self._product = 0  # of the CUDA ops; other numbers are for tests and benchmarks
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]  # torch.compile wrapped it
        if any("_orig_mod" in child._modules for child in module.modules()):
            raise NotAnMLP("a part of it is compiled by torch.compile")
        self.module = evaluation_copy(module)
        reader = Reader(self.module, dimension)
        self.dimension, self._flat = reader.chain.dimension, reader.flat
        self._layers = reader.chain.layers
        self.outputs = self._layers[-1].outputs
        widths = [0, *(layer.outputs for layer in self._layers)]
        self._cuda_plan = _C.mlp_cuda_plan(
            [
                (
                    layer.outputs,
                    0 if layer.hidden is None else before,
                    0 if layer.inputs is None else self.dimension,
                )
                for before, layer in zip(widths, self._layers, strict=False)
            ]
        )
        self._sources = [*self.module.parameters(), *self.module.buffers()]
        if not self._sources:
            raise NotAnMLP("it has no parameters")
        self._pack: _Pack | None = None
        self._packing = threading.Lock()
        self._signature: Any = None  # of the module that it was made of, where that is watched
        self._check()
        if any(buffer._version for buffer in self.module.buffers()):
            raise NotAnMLP("its forward writes to a buffer")
        self._origin: weakref.ref[nn.Module] | None = None
        # The copy's own buffers would miss what is written to those of the module.
        for mine, theirs in zip(self.module.modules(), module.modules(), strict=True):
            mine._buffers = dict(theirs._buffers)
        self._sources = [*self.module.parameters(), *self.module.buffers()]

    def __deepcopy__(self, memo: dict[int, Any]) -> MLP:
        # What reads the parameters is bound to this module, so a copy is made anew from its own.
        return MLP(copy.deepcopy(self.module, memo), self.dimension, self.mixed)

    def __reduce__(self) -> tuple[Any, ...]:
        return MLP, (self.module, self.dimension, self.mixed)

    @classmethod
    def from_module(
        cls, module: nn.Module, dimension: int | None = None, *, mixed: bool = False
    ) -> MLP:
        """The compiled field of a module.

        Args:
            module: a chain of layers as above, in float32 or float64; it is not copied, so what is
                trained is what is evaluated. Where parameters, buffers or layers are replaced by
                others, the field reads the module anew, as long as it is in use elsewhere too.
            dimension: d; None reads it from the first layer, which fails only where the input is
                changed before that layer.
            mixed: run the iteration of float32 networks in mixed precision: the first evaluation of
                a row, and D_xF wherever the row does not end, multiply bfloat16 numbers. Whether a
                row has converged is decided, and ``values`` and ``jacobian`` are returned, in
                float32. A row may take another way, so to another point of the level set a little
                aside. On the CPU this is for AMX, and for AVX512-BF16 unless it is Intel's, which
                gains nothing by it; elsewhere nothing changes (``levelset-ext info`` says which).
                On CUDA the first evaluation of a row is the only one in mixed precision.

        Raises:
            ValueError: the module is no such chain; the message says where it departs from one.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
        try:
            field = cls(module, dimension, mixed)
        except NotAnMLP as error:
            raise ValueError(
                f"module: expected a multilayer perceptron, got a {type(module).__name__}: {error}"
            ) from error
        # A field that `project` finds by itself is made anew by who found it.
        field._watch(module)
        return field

    @torch.no_grad()
    def _check(self) -> None:
        """Compares with the module at a few points: a trace may miss what plain Python decided."""
        device = self._sources[0].device
        if not self._runs_on(device):
            return
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(
            8, self.dimension, generator=generator, dtype=torch.float64, device="cpu"
        ).to(device, self.dtype)
        with torch.autocast(device.type, enabled=False):
            expected = self.module(x).reshape(8, -1)
        found = self.values(x)
        scale = 1.0 + expected.abs().amax()
        # On CUDA the module itself may multiply in TF32.
        rounding = (1e4 if device.type == "cpu" else 1e5) * torch.finfo(self.dtype).eps
        if expected.shape != found.shape or not (expected - found).abs().amax() <= rounding * scale:
            raise NotAnMLP("its output differs from what its layers say")

    def _watch(self, module: nn.Module) -> None:
        self._origin, self._signature = weakref.ref(module), signature_of(module)

    def _follow(self) -> bool:
        """Reads the module anew where it is another by now, as after
        ``load_state_dict(assign=True)``, ``double()`` of buffers, a hook or a layer put in its
        place. False where what it is now is no perceptron, and only the module can be called."""
        module = None if self._origin is None else self._origin()
        if module is None or signature_of(module) == self._signature:
            return self._compiles
        try:
            MLP.__init__(self, module, self._given, self.mixed)
        except NotAnMLP:
            self._compiles, self.module = False, evaluation_copy(module)
        self._watch(module)
        return self._compiles

    @property
    def dtype(self) -> torch.dtype:
        return self._sources[0].dtype

    def _runs_on(self, device: torch.device) -> bool:
        """Whether the compiled loop is there for this device, the dtype and the layers."""
        if device.type == "cpu":
            return self.dtype in (torch.float32, torch.float64)
        if device.type != "cuda" or self.dtype != torch.float32 or self._cuda_plan is None:
            return False
        return self._cuda_plan[1] <= _shared_memory_of(device.index)

    def takes(self, x: Tensor) -> bool:
        """Whether the compiled loop can evaluate F and D_xF at these points, (n, d)."""
        return self._takes_values(x) and self.outputs <= _C.max_outputs

    def _takes_values(self, x: Tensor) -> bool:
        """The same for F alone, which may have any number of outputs."""
        if torch.compiler.is_compiling():
            return False
        return (
            self._follow()
            and x.dim() == 2
            and x.shape[1] == self.dimension
            and x.dtype == self.dtype
            and self._runs_on(x.device)
            and all(s.device == x.device and s.dtype == x.dtype for s in self._sources)
            and not in_transform()
            and not torch.is_autocast_enabled(x.device.type)
            and type(x) is Tensor
        )

    def __call__(self, x: Tensor) -> Tensor:
        """F(x), (n,) or (n, l) as the module returns it, differentiable in the parameters."""
        if not self._takes_values(x) or x.requires_grad:
            return self.module(x)
        if torch.is_grad_enabled() and any(s.requires_grad for s in self._sources):
            if x.device.type != "cpu" or self.outputs > _C.max_outputs:
                return self.module(x)
            tape = self.evaluate(x, keep=True).tape
            assert tape is not None
            values = tape.values()
        else:
            values = self.values(x)
        return values[:, 0] if self._flat else values

    def values(self, x: Tensor) -> Tensor:
        """F(x), (n, l), without gradients."""
        with self.packed() as pack:
            return torch.ops.levelset_ext.mlp_values(
                *pack.tensors, x.detach(), torch.get_num_threads(), self._product
            )

    def evaluate(self, x: Tensor, keep: bool = False) -> LevelSetResult:
        """F and D_xF at x, as a result with zero iterations."""
        return self.newton(x, x.new_zeros(1, self.outputs), 0, 0.0, math.inf, (None, None), keep)

    def newton(
        self,
        x: Tensor,
        level: Tensor,
        max_iters: int,
        tol: float,
        max_step: float,
        bounds: tuple[Tensor | None, Tensor | None],
        keep: bool,
    ) -> LevelSetResult:
        """The loop behind :func:`~levelset_ext.project`; level (n, l) or (1, l)."""
        keep = keep and x.device.type == "cpu"
        with self.packed() as pack:
            points, values, jacobian, status, iterations, hidden, deltas = (
                torch.ops.levelset_ext.mlp_project(
                    *pack.tensors,
                    x.detach(),
                    level,
                    *bounds,
                    max_iters,
                    tol,
                    max_step,
                    keep,
                    torch.get_num_threads(),
                    self._product,
                )
            )
        tape = None
        if keep:
            # The loop has put zeros for a bad row into hidden and deltas, and 0 times NaN is NaN;
            # where its gradient is to have a gradient it is evaluated at 0.
            finite = torch.where(status[:, None] == _NON_FINITE, 0.0, points)
            split = self._split(points, hidden, deltas)
            tape = Tape([(Recording(self, pack.serial, finite, values, *split), None)])
        return LevelSetResult(
            points=points,
            values=values,
            jacobian=jacobian,
            level=level.expand(len(points), -1).clone(),
            status=status,
            iterations=iterations,
            tape=tape,
        )

    def _split(
        self, points: Tensor, hidden: Tensor, deltas: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        widths = [layer.outputs for layer in self._layers[:-1]]
        n, l = len(points), self.outputs  # noqa: E741
        return (
            [
                part.view(n, w)
                for part, w in zip(hidden.split([n * w for w in widths]), widths, strict=True)
            ],
            [
                part.view(l, n, w)
                for part, w in zip(deltas.split([l * n * w for w in widths]), widths, strict=True)
            ],
        )

    def packed(self) -> _Pack:
        """The parameters as the compiled loop reads them, packed anew where they have changed; to
        be read within ``with``, until whose end the memory is not given to others."""
        with self._packing:
            pack = self._pack
            if pack is not None:
                pack.wait()
            if pack is None or not pack.holds(self._sources):
                plan = None if self._sources[0].device.type == "cpu" else self._cuda_plan
                before = None if pack is None or pack.readers else pack
                self._pack = pack = _Pack(
                    self._layers, self._sources, self.mixed, plan, before, self._packing
                )
            pack.readers += 1
        return pack

    def weights(self) -> list[Tensor]:
        """W, U and b of every layer, those that are there, with their graph in the parameters."""
        return [
            read()
            for layer in self._layers
            for read in (layer.hidden, layer.inputs, layer.bias)
            if read is not None
        ]

    def replay(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """F(x), (n, l), by torch's operations on what :meth:`weights` gave."""
        left, before = iter(weights), x
        for layer in self._layers:
            read = (layer.hidden, layer.inputs, layer.bias)
            hidden, inputs, bias = (None if f is None else next(left) for f in read)
            terms = [
                source @ weight.t()
                for source, weight in ((before, hidden), (x, inputs))
                if weight is not None
            ]
            if bias is not None:
                terms.append(bias)
            before = _ACTIVATIONS[layer.activation](functools.reduce(torch.add, terms), layer)
        return before

    def __repr__(self) -> str:
        layers = ", ".join(
            f"{layer.outputs}" + ("" if layer.activation == "none" else f" {layer.activation}")
            for layer in self._layers
        )
        return f"MLP({self.dimension} -> {layers})"


class _Pack:
    """Packed parameters, and a copy of the parameters they were packed from.

    The version counters say that a parameter was written to; they miss what is written through
    ``.data``, as much code does. So where the counters agree the numbers are compared too.
    """

    _serials = 0

    @torch.no_grad()
    def __init__(
        self,
        layers: Sequence[Layer],
        sources: Sequence[Tensor],
        mixed: bool,
        cuda_plan: tuple[int, int, int] | None,
        before: _Pack | None,
        lock: threading.Lock,
    ) -> None:
        self.readers, self._lock = 0, lock  # calls that read the memory; counted under the lock
        _Pack._serials += 1
        self.serial = _Pack._serials
        self._versions = _versions(sources)
        # Memory is taken over from the pack before, which nobody reads, unless another stream may
        # still be at it.
        stream = _stream_of(sources[0].device)
        if before is not None and not before._streams <= {stream}:
            before = None
        self._copies: list[Tensor] = [] if before is None else before._copies
        if [(c.shape, c.device) for c in self._copies] != [(s.shape, s.device) for s in sources]:
            self._copies = [torch.empty_like(s, requires_grad=False) for s in sources]
        torch._foreach_copy_(self._copies, [s.detach() for s in sources])
        rows, scales, read, numbers, pairs = [], [], [], 0, 0
        double = sources[0].dtype == torch.float64
        for layer in layers:
            parts = [None if f is None else f() for f in (layer.hidden, layer.inputs, layer.bias)]
            read.append(parts)
            hidden, inputs = (0 if m is None else m.shape[1] for m in parts[:2])
            size = _C.mlp_packed_size(layer.outputs, hidden, inputs, double)
            numbers, pairs = numbers + size[0], pairs + size[1]
            rows.append([layer.outputs, hidden, inputs, _C.mlp_activations[layer.activation]])
            scales.append([layer.sharpness, layer.threshold])
        if cuda_plan is not None:
            numbers, _, pairs = cuda_plan
        else:
            mixed = mixed and _C.mlp_mixed is not None
        packed, coarse = (None, None) if before is None else before.tensors[:2]
        if packed is None or len(packed) != numbers or packed.device != sources[0].device:
            packed = sources[0].new_empty(numbers)
        pairs = pairs if mixed and sources[0].dtype == torch.float32 else 0
        if coarse is None or len(coarse) != pairs or coarse.device != packed.device:
            coarse = torch.empty(pairs, dtype=torch.int32, device=packed.device)
        self.tensors: tuple[Tensor, Tensor, Tensor, Tensor] = (
            packed,
            coarse,
            torch.tensor(rows, dtype=torch.int64, device="cpu"),
            torch.tensor(scales, dtype=torch.float64, device="cpu"),
        )
        for index, parts in enumerate(read):
            torch.ops.levelset_ext.mlp_pack_(*self.tensors, index, *parts)
        self._streams: set[torch.cuda.Stream | None] = {stream}  # that read it; None on the CPU
        self._ready = None if stream is None else stream.record_event()

    def __enter__(self) -> _Pack:
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self.readers -= 1

    def wait(self) -> None:
        """Has the current stream wait until the pack is there, and the memory for the stream."""
        stream = _stream_of(self.tensors[0].device)
        if stream is None or self._ready is None or stream in self._streams:
            return
        stream.wait_event(self._ready)
        for tensor in (*self.tensors[:2], *self._copies):
            tensor.record_stream(stream)
        self._streams.add(stream)

    def holds(self, sources: Sequence[Tensor]) -> bool:
        if _versions(sources) != self._versions:
            return False
        if sources[0].device.type != "cpu":  # few launches, and one wait for the device
            return torch.equal(_in_one_piece(self._copies), _in_one_piece(sources))
        return all(torch.equal(c, s) for c, s in zip(self._copies, sources, strict=True))


def _stream_of(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _in_one_piece(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _versions(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), t._version) for t in tensors]


@functools.cache
def _shared_memory_of(index: int) -> int:
    """Bytes of shared memory that a block of the fused kernel may have on a CUDA device."""
    return _C.mlp_cuda_room(index)
