"""Pickles of strangers: they may name what is known here and nothing else, and none of their code
runs."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

__all__ = ["load_plain"]

Known = Mapping[tuple[str, str], Any]


def load_plain(
    stream: IO[bytes],
    known: Known,
    *,
    encoding: str = "bytes",
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The next pickle of a stream, which then stands behind it.

    The memory it takes is bounded by the bytes of the pickle and by what ``known`` makes.

    Args:
        stream: what to read, seekable.
        known: what the pickle may ask for, by (module, name).
        encoding: of the byte strings of Python 2, see ``pickle.load``.
        persistent: makes the objects that the pickle refers to; without it such a reference is an
            error.

    Raises:
        pickle.UnpicklingError: it asks for anything else, or for more memory entries than it has
            bytes. A broken pickle raises nearly anything.
    """
    begin = stream.tell()
    largest = 0
    # Walks all opcodes first: a length that goes beyond the end of the stream raises here, before
    # the unpickler takes the memory for it.
    for opcode, argument, _ in pickletools.genops(cast(IO[bytes], _Bounded(stream))):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            largest = max(largest, int(argument or 0))
    end = stream.tell()
    if largest > end - begin:
        raise pickle.UnpicklingError(f"asks for {largest} memo entries")
    stream.seek(begin)
    return _Unpickler(io.BytesIO(stream.read(end - begin)), known, encoding, persistent).load()


class _Bounded:
    """A stream of which at most what is left is asked for: files take the memory for all."""

    def __init__(self, stream: IO[bytes]) -> None:
        begin = stream.tell()
        self._end = stream.seek(0, io.SEEK_END)
        stream.seek(begin)
        self._stream = stream
        self.tell, self.readline = stream.tell, stream.readline

    def read(self, size: int) -> bytes:
        return self._stream.read(min(size, self._end - self._stream.tell()))


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        stream: IO[bytes],
        known: Known,
        encoding: str,
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(stream, encoding=encoding)
        self._known = known
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, which is refused") from None

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise pickle.UnpicklingError("asks for an object that is not in the file")
        return self._persistent(pid)
