"""Files that ``torch.save`` wrote, by whomever.

``torch.load(weights_only=True)`` runs no code, and believes every number it reads: a file of a
kilobyte may ask for a terabyte, or for a tensor that reaches beyond its storage. So a file is
checked first, and what passes is no larger in memory than on disk.
"""

from __future__ import annotations

import collections
import functools
import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from levelset_ext.data.plain_pickle import load_plain
from levelset_ext.errors import InputError

__all__ = ["read_torch_file"]

_ZIP = b"PK\x03\x04"
_LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)  # how files of torch < 1.6 begin
_ELEMENTS = {  # bytes, by what stands before "Storage" in torch's names
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "ComplexDouble": 16, "ComplexFloat": 8,
    "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
}  # fmt: skip
_MOST_AXES = 64  # torch's own limit


def read_torch_file(path: Path, what: str) -> Any:
    """The content of a file that ``torch.save`` wrote, on the CPU.

    Only tensors, plain values and containers are read, and no code is run. The memory it takes is
    bounded by the size of the file, whatever the file says.

    Args:
        path: the file.
        what: how messages call what is expected, such as "weights".

    Raises:
        InputError: no such file, a truncated or foreign one, or one that asks for anything else.
    """
    try:
        with path.open("rb") as stream:
            _check(stream, os.fstat(stream.fileno()).st_size)
            stream.seek(0)
            # Not mapped into memory: a file that shrinks meanwhile would then end the process.
            return torch.load(stream, map_location="cpu", weights_only=True)
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # a broken file makes torch and pickle raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise InputError(f"{path}: expected {what}, cannot read it ({reason})")


def _check(stream: IO[bytes], size: int) -> None:
    """Raises unless what the file says of itself fits into its ``size`` bytes."""
    head = stream.read(len(_LEGACY))
    stream.seek(0)
    if head.startswith(_ZIP):
        _check_zip(stream, size)
    elif head == _LEGACY:
        _check_legacy(stream, size)
    else:
        raise pickle.UnpicklingError(
            "not written by torch.save" if size else "the file is empty, was it cut off?"
        )


def _check_zip(stream: IO[bytes], size: int) -> None:
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        sizes: dict[str, int] = {}
        for member in members:
            # torch.save compresses nothing, and torch looks names up without regard to case.
            name = member.filename.lower()
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise pickle.UnpicklingError(f"{member.filename} is compressed or encrypted")
            if name in sizes or member.file_size != member.compress_size:
                raise pickle.UnpicklingError(f"{member.filename} is there twice, or in two sizes")
            sizes[name] = member.file_size
        if sum(sizes.values()) > size:
            raise pickle.UnpicklingError(
                f"promises {sum(sizes.values())} bytes in a file of {size}"
            )
        folder = members[0].filename.partition("/")[0] if members else ""
        claims = _Claims(size, sizes, f"{folder.lower()}/data/")
        with archive.open(f"{folder}/data.pkl") as inner:
            load_plain(inner, claims.known(), persistent=claims.storage)


def _check_legacy(stream: IO[bytes], size: int) -> None:
    # Magic number, version and machine, then the content, then the order of the storages, whose
    # bytes follow.
    for _ in range(3):
        load_plain(stream, {})
    claims = _Claims(size, None, "")
    load_plain(stream, claims.known(), persistent=claims.storage)
    load_plain(stream, {})
    left = size - stream.tell()
    if sum(claims.bytes.values()) > left:
        raise pickle.UnpicklingError(
            f"promises {sum(claims.bytes.values())} bytes of tensors where {left} are left"
        )


class _Storage:
    """A storage that the file promises."""

    def __init__(self, elements: int) -> None:
        self.elements = elements


class _StorageType:
    """Such as torch.FloatStorage."""

    def __init__(self, element_size: int) -> None:
        self.element_size = element_size


class _Tensor:
    """A tensor that fits into its storage."""


@functools.cache
def _inert() -> dict[tuple[str, str], Any]:
    """Names of torch's that are no tensors."""
    found: dict[tuple[str, str], Any] = {
        ("torch", "Size"): tuple,
        ("torch", "device"): lambda *_: None,
        ("torch.storage", "UntypedStorage"): _StorageType(1),
    }
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype):
            found["torch", name] = None
    for kind, element_size in _ELEMENTS.items():
        found["torch", f"{kind}Storage"] = _StorageType(element_size)
    return found


class _Claims:
    """Stands in for torch while a pickle is read: counts and compares, and allocates nothing.

    Args:
        size: bytes of the file.
        sizes: of the members of a zip file by name, or None for a file without them.
        folder: where among the members the storages are.
    """

    def __init__(self, size: int, sizes: dict[str, int] | None, folder: str) -> None:
        self.size = size
        self.sizes = sizes
        self.folder = folder
        self.bytes: dict[Any, int] = {}  # by the key of the storage

    def known(self) -> dict[tuple[str, str], Any]:
        return {
            **_inert(),
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor"): self.tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_parameter"): self.parameter,
        }

    def storage(self, pid: Any) -> _Storage:
        kind, of, key, _, elements, *_ = pid
        if kind not in ("storage", b"storage") or not isinstance(of, _StorageType):
            raise pickle.UnpicklingError("asks for an object that is no storage")
        if type(elements) is not int or elements < 0:
            raise pickle.UnpicklingError(f"asks for a storage of {elements!r:.40} elements")
        needed = elements * of.element_size
        if self.sizes is not None:
            there = self.sizes.get(f"{self.folder}{key}".lower())
            if needed != there:
                raise pickle.UnpicklingError(
                    f"storage {key!r:.40} has {there} bytes where {needed} are promised"
                )
        if self.bytes.setdefault(key, needed) != needed:
            raise pickle.UnpicklingError(f"storage {key!r:.40} is promised in two sizes")
        return _Storage(elements)

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        numbers = (offset, *shape, *strides)
        if (
            not isinstance(storage, _Storage)
            or len(shape) != len(strides)
            or len(shape) > _MOST_AXES
            or not all(type(k) is int and k >= 0 for k in numbers)
        ):
            raise pickle.UnpicklingError(f"asks for a tensor of shape {shape!r:.80}")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        empty = 0 in shape
        if (offset > storage.elements) if empty else (last >= storage.elements):
            raise pickle.UnpicklingError(
                f"asks for a tensor {shape!r:.80} beyond its {storage.elements} elements"
            )
        # An expanded tensor is larger than its storage: harmless until somebody copies it.
        if math.prod(shape) > self.size:
            raise pickle.UnpicklingError(f"asks for a tensor {shape!r:.80}, larger than the file")
        return _Tensor()

    def parameter(self, data: Any, *_: Any) -> _Tensor:
        if not isinstance(data, _Tensor):
            raise pickle.UnpicklingError("asks for a parameter without a tensor")
        return data
