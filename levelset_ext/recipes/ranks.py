"""Several processes that work on one run, as ``torchrun`` starts them.

Every process keeps the whole state and draws all random numbers of a step, the same ones, then
takes its share of the rows. Sums over rows are added up before anything that is not linear in
them, and gradients after the backward pass: a step is that of one process with all rows, up to
the order of summation, and the number of processes is no setting of a run. It may change from one
restart to the next.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from levelset_ext.errors import InputError
from levelset_ext.recipes.devices import parse_device

__all__ = ["ALONE", "Ranks", "WholeDraws", "in_rounds", "launched"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. All of them call the same methods in the same order.

    rank: 0 ... size - 1; rank 0 alone writes files and reports. device: of tensors that are sent.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"

    @property
    def main(self) -> bool:
        return self.rank == 0

    def speaker(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """Where messages go: to ``say`` on the first process, nowhere on the others."""
        return say if self.main else lambda text: None

    def share(self, count: int) -> slice:
        """The rows of this process out of ``count``: consecutive, and nearly as many for all."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over all processes, in float64."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def add(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes. Its gradient reaches this process's values
        alone, so that the gradients of the processes have to be added, see :meth:`add_gradients`.
        """
        if self.size == 1:
            return values
        sums = values.detach().to(self.device, copy=True)
        dist.all_reduce(sums)
        return sums.to(values.device) + (values - values.detach())

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """``.grad`` becomes the sum over all processes, in one message; none counts as 0."""
        if self.size == 1:
            return
        wanted = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in wanted]
        flat = torch.cat([grad.reshape(-1) for grad in grads]).to(self.device)
        dist.all_reduce(flat)
        parts = flat.split([grad.numel() for grad in grads])
        for parameter, grad, part in zip(wanted, grads, parts, strict=True):
            # Contiguous or channels last, as the parameter is.
            parameter.grad = grad.copy_(part.view(grad.shape))

    def gather(self, thing: T) -> list[T]:
        """What every process has, in the order of ranks; things are pickled."""
        if self.size == 1:
            return [thing]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, thing)
        return found

    def to_first(self, thing: T) -> list[T]:
        """As :meth:`gather`, for rank 0 alone; the others get nothing."""
        if self.size == 1:
            return [thing]
        found: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(thing, found)
        return found or []

    def first(self, work: Callable[[], T]) -> T:
        """Rank 0 does the work, and all get what comes of it: a result, or what was raised."""
        if self.size == 1:
            return work()
        box: list[Any] = [None, None]
        if self.main:
            try:
                box[0] = work()
            except (InputError, OSError, RuntimeError) as error:
                box[1] = error
        dist.broadcast_object_list(box, 0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def rows(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``work(x)`` of a function whose result has a row for each row of x, shared out."""
        if self.size == 1:
            return work(x)
        return torch.cat(self.gather(work(x[self.share(len(x))]).cpu())).to(x.device)

    def spread(
        self,
        work: Callable[[np.ndarray], tuple[np.ndarray, ...]],
        x: np.ndarray,
        batch: int,
    ) -> tuple[np.ndarray, ...]:
        """``work(x)`` of a function whose results have a row for each row of x, shared out in whole
        batches, so that the batches are those of one process."""
        if self.size == 1:
            return work(x)
        batches = self.share(-(-len(x) // batch))
        mine = work(x[batches.start * batch : batches.stop * batch])
        return tuple(np.concatenate(parts) for parts in zip(*self.gather(mine), strict=True))


ALONE = Ranks()


def in_rounds(
    ranks: Ranks,
    count: int,
    read: Callable[[int], T | None],
    make: Callable[[int, dict[int, T]], T],
    keep: Callable[[int, T], None],
    report: Callable[[int, dict[int, T]], None],
) -> list[T]:
    """The parts 0 ... count - 1 of a result, each made by one process and sent to the first.

    Args:
        ranks: of the run.
        count: how many parts there are.
        read: a part that is there from before, or None; asked of the first process.
        make: the part of this index, from the parts that this process has.
        keep: writes a part that was made; by the first process.
        report: called there after every part, with its index and all parts so far.

    Returns:
        The parts in order on the first process, and nothing on the others.

    Raises:
        InputError: one that a process met while making a part, on all processes.
    """
    found: dict[int, T] = {}
    if ranks.main:
        kept = ((index, read(index)) for index in range(count))
        found = {index: part for index, part in kept if part is not None}
    missing = ranks.first(lambda: [index for index in range(count) if index not in found])
    for at in range(0, len(missing), ranks.size):
        mine: tuple[int, T] | None = None
        failed: InputError | None = None
        if at + ranks.rank < len(missing):
            index = missing[at + ranks.rank]
            try:
                mine = (index, make(index, found))
            except InputError as error:
                failed = error
        if ranks.total(failed is not None)[0] > 0:
            raise next(error for error in ranks.gather(failed) if error is not None)
        for made in ranks.to_first(mine):
            if made is not None:
                found[made[0]] = made[1]
                keep(*made)
                report(made[0], found)
    return [found[index] for index in sorted(found)]


class WholeDraws(TorchFunctionMode):
    """Within it, ``torch.rand`` and ``torch.randn`` with the given generator draw for all rows of
    a batch and return those of this process.

    An objective knows the rows it is handed and nothing of the others; this is how its starts are
    those of one process with all rows, and how the generator stays the same on every process.

    Args:
        ranks: of the run.
        generator: whose numbers are meant.
        count: rows of the whole batch, of which the objective is handed ``ranks.share(count)``.
    """

    def __init__(self, ranks: Ranks, generator: torch.Generator, count: int) -> None:
        super().__init__()
        self.rows, self.generator, self.count = ranks.share(count), generator, count

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not self.generator or func not in (torch.rand, torch.randn):
            return func(*args, **kwargs)
        size = tuple(args[0]) if isinstance(args[0], tuple | list) else args
        own = self.rows.stop - self.rows.start
        if size[0] != own:
            raise RuntimeError(
                f"random numbers: expected a draw for the {own} rows of this process, got one of "
                f"{size[0]} rows; such an objective cannot be shared by several processes"
            )
        return func(self.count, *size[1:], **kwargs)[self.rows]


@contextlib.contextmanager
def launched(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """The processes that ``torchrun`` started, joined for as long as the context lasts, and the
    device of this one; without ``torchrun`` this process alone.

    "cuda" is the GPU of the process's local rank, and messages go through NCCL; "cpu" uses gloo.

    Raises:
        InputError: a device that is not there, or "cuda:N", which would be one for all.
    """
    size = started()
    if size == 1:
        yield ALONE, parse_device(device)
        return
    if device.startswith("cuda:"):
        raise InputError(f"device: expected cpu or cuda with several processes, got {device!r}")
    # It takes the group of all processes as default arguments when it is first imported, by
    # torch.compile for one. A group that is there by then is never destroyed, and its threads now
    # and then abort a process that is done.
    importlib.import_module("torch.distributed.nn")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    own = parse_device(device if device != "cuda" else f"cuda:{local}")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        # A launcher with a fixed address keeps its store, and with it the addresses of processes
        # that have ended.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0]
        raise RuntimeError(
            f"rank {os.environ['RANK']} of {size} on {socket.gethostname()} could not join the "
            f"others at {where} ({reason})"
        ) from None
    try:
        yield Ranks(rank, size, own), own
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        raise RuntimeError(
            f"rank {rank} of {size} lost the others, of which one has ended; what it said last "
            f"tells why ({str(error).splitlines()[0]})"
        ) from None
    finally:
        dist.destroy_process_group()


def started() -> int:
    """How many processes ``torchrun`` has started for this command; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def restarted() -> bool:
    """Whether ``torchrun`` has started the processes again after one of them ended: such a run goes
    on from its checkpoint without being told."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def rank_of_launch() -> int:
    """The rank that ``torchrun`` gave this process; 0 without it."""
    return int(os.environ.get("RANK", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0
