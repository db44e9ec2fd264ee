"""Labelled images: MNIST and its relatives or CIFAR10 from a folder, or scikit-learn's digits.

Files keep the names and layouts of their publishers:

    MNIST, Fashion-MNIST    {train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte,
                            each plain or with .gz; in the folder or in its raw/ or MNIST/raw/
    CIFAR10, python         data_batch_1 ... data_batch_5, test_batch (pickles), in the folder or in
                            its cifar-10-batches-py/
    CIFAR10, binary         data_batch_1.bin ... data_batch_5.bin, test_batch.bin, in the folder or
                            in its cifar-10-batches-bin/

A pickle can run any code when it is read. The CIFAR10 files are therefore read by an unpickler that
knows byte strings, numbers, lists, dicts and numpy arrays, and refuses everything else.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from levelset_ext.data.plain_pickle import load_plain
from levelset_ext.errors import InputError

__all__ = [
    "Images",
    "fraction",
    "load_images",
    "merge_labels",
    "read_cifar_binary",
    "read_cifar_pickle",
    "read_idx",
]

SPLITS = ("train", "test")
_IDX_PARTS = {"train": "train", "test": "t10k"}
_IDX_FOLDERS = ("", "raw", "MNIST/raw", "FashionMNIST/raw")
_CIFAR_FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin")
_CIFAR_RECORD = 1 + 3 * 32 * 32  # label, then the red, green and blue planes
_DIGITS_TEST = 360  # the last rows, written by other people than the first ones
_CLASSES = 10


@dataclass(frozen=True)
class Images:
    """Images with their labels.

    Attributes:
        images: (n, c, h, w) float32 in [0, 1].
        labels: (n,) int64 in 0 ... classes - 1.
        name: "mnist" (also Fashion-MNIST, whose files cannot be told apart), "cifar10", "digits".
        classes: number of classes.
        every: they are each so many-th row of their split; 1 for all rows, or the first ones.
    """

    images: Tensor
    labels: Tensor
    name: str
    classes: int = _CLASSES
    every: int = 1

    def __len__(self) -> int:
        return len(self.labels)


def load_images(
    folder: str | os.PathLike[str] | None = None,
    split: str = "train",
    limit: int | None = None,
    every: int = 1,
) -> Images:
    """The images of a folder in file order, or scikit-learn's digits.

    The order may matter: AutoAttack at eps 0.3 takes 8 % of the first half of MNIST's test split
    from a robust network and 4 % of the second, so a sample wants to be spread over the split
    (``every``).

    Args:
        folder: where the files are, see the head of this module; None for the digits, 8 x 8 images
            of which the last 360 are the test split and the other 1437 the training split.
        split: "train" or "test".
        limit: only so many rows from the start, of those that ``every`` leaves.
        every: only each so many-th row: 0, every, 2 every, ...

    Raises:
        InputError: no such folder, none of the known files in it, a file that is missing,
            truncated, of another kind or with labels out of range; scikit-learn not installed.
    """
    if split not in SPLITS:
        raise InputError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    for name, count in (("limit", limit), ("every", every)):
        if count is not None and count < 1:
            raise InputError(f"{name}: expected at least 1, got {count}")
    needed = None if limit is None else (limit - 1) * every + 1
    data = _first_images(folder, split, needed)
    if every == 1:
        return data
    images, labels = data.images[::every].clone(), data.labels[::every].clone()
    return replace(data, images=images, labels=labels, every=every)


def _first_images(folder: str | os.PathLike[str] | None, split: str, limit: int | None) -> Images:
    """The first rows, all of them if ``limit`` is None."""
    if folder is None:
        return _digits(split, limit)
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: expected a folder with images, got no such folder")
    images_name = f"{_IDX_PARTS[split]}-images-idx3-ubyte"
    for inner in _IDX_FOLDERS:
        if _idx_file(root / inner, images_name) is not None:
            return _idx_images(root / inner, split, limit)
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    for inner in _CIFAR_FOLDERS:
        for suffix, read in (("", read_cifar_pickle), (".bin", read_cifar_binary)):
            if any((root / inner / f"{name}{suffix}").is_file() for name in names):
                files = [root / inner / f"{name}{suffix}" for name in names]
                return _cifar_images(files, read, limit)
    raise InputError(
        f"{root}: expected {images_name}[.gz] (MNIST, Fashion-MNIST) or {names[0]}[.bin] (CIFAR10) "
        f"for the {split} split, got none of them"
    )


# --- IDX ---------------------------------------------------------------------------------------


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of an IDX file of unsigned bytes, plain or gzip-compressed: uint8, 1 to 4 axes.

    Raises:
        InputError: no such file, not IDX, other values than unsigned bytes, shorter or longer than
            its header says.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: expected an IDX file, got no such file")
    try:
        with file.open("rb") as stream:
            compressed = stream.read(2) == b"\x1f\x8b"
        with gzip.open(file, "rb") if compressed else file.open("rb") as stream:
            return _parse_idx(file, stream)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: expected an IDX file, cannot read it ({error})") from None


def _parse_idx(file: Path, stream: Any) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or not 1 <= magic[3] <= 4:
        raise InputError(
            f"{file}: not an IDX file: expected it to start with 00 00 08 and the number of axes, "
            f"got {magic.hex(' ') or 'an empty file'}"
        )
    if magic[2] != 0x08:
        raise InputError(f"{file}: expected IDX type 0x08 (unsigned bytes), got {magic[2]:#04x}")
    header = stream.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise InputError(f"{file}: truncated IDX: the header ends after {4 + len(header)} bytes")
    shape = tuple(int(v) for v in np.frombuffer(header, ">u4"))
    size = int(np.prod(shape, dtype=object))
    # In pieces: neither a wrong header nor a compressed file of zeros may fill the memory.
    parts, left = [], size + 1
    while left > 0 and (part := stream.read(min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    body = b"".join(parts)
    if len(body) != size:
        got = f"only {len(body)}" if len(body) < size else "more"
        kind = "truncated IDX" if len(body) < size else "malformed IDX"
        raise InputError(
            f"{file}: {kind}: expected {size} bytes of values for shape {shape}, got {got}"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def _idx_file(folder: Path, name: str) -> Path | None:
    dotted = name.replace("-idx", ".idx")  # as some tools unpack them
    for candidate in (name, f"{name}.gz", dotted, f"{dotted}.gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    return None


def _idx_images(folder: Path, split: str, limit: int | None) -> Images:
    arrays = []
    for kind, axes in (("images-idx3", 3), ("labels-idx1", 1)):
        name = f"{_IDX_PARTS[split]}-{kind}-ubyte"
        file = _idx_file(folder, name)
        if file is None:
            raise InputError(f"{folder}: expected {name}[.gz] beside the images, got no such file")
        array = read_idx(file)
        if array.ndim != axes:
            raise InputError(f"{file}: expected {axes} axes, got shape {array.shape}")
        arrays.append((file, array))
    (image_file, images), (label_file, labels) = arrays
    if len(images) != len(labels):
        raise InputError(
            f"{label_file}: expected {len(images)} labels as {image_file.name} has images, "
            f"got {len(labels)}"
        )
    if images.size == 0:
        raise InputError(f"{image_file}: expected at least one image, got shape {images.shape}")
    _check_range(label_file, labels)
    return _as_images(images[:limit, None], labels[:limit], "mnist")


# --- CIFAR10 -----------------------------------------------------------------------------------


def read_cifar_binary(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) uint8 of one file of the binary layout.

    Raises:
        InputError: no such file, not a whole number of records, or a label out of range.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: expected a CIFAR10 binary file, got no such file")
    blob = np.fromfile(file, np.uint8)
    if blob.size == 0 or blob.size % _CIFAR_RECORD:
        raise InputError(
            f"{file}: expected records of {_CIFAR_RECORD} bytes (CIFAR10 binary layout), "
            f"got {blob.size} bytes"
        )
    table = blob.reshape(-1, _CIFAR_RECORD)
    _check_range(file, table[:, 0])
    return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0]


def read_cifar_pickle(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) uint8 of one file of the python layout.

    Raises:
        InputError: no such file, a pickle that asks for anything but arrays and plain values (none
            of its code has run), or arrays of another shape, type or range.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: expected a CIFAR10 batch, got no such file")
    try:
        blob = file.read_bytes()
        content = load_plain(io.BytesIO(blob), _KNOWN)
    except OSError as error:
        raise InputError(f"{file}: expected a CIFAR10 batch, cannot read it ({error})") from None
    except Exception as error:  # a broken pickle raises nearly anything
        reason = str(error) or type(error).__name__
        raise InputError(
            f"{file}: expected a CIFAR10 batch, cannot unpickle it ({reason})"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a pickled dict, got {type(content).__name__}")
    entries = {k.decode("latin-1") if isinstance(k, bytes) else k: v for k, v in content.items()}
    if not {"data", "labels"} <= set(entries):
        raise InputError(f"{file}: expected entries 'data' and 'labels', got {list(entries)}")
    data, labels = (
        v.value if isinstance(v, _PlainArray) else v for v in (entries["data"], entries["labels"])
    )
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2):
        raise InputError(f"{file}: expected 'data' as an array (n, 3072) of uint8")
    if data.shape[1] != _CIFAR_RECORD - 1 or len(data) == 0:
        raise InputError(f"{file}: expected 'data' of shape (n, 3072), got {data.shape}")
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if not isinstance(labels, list) or not all(type(v) is int for v in labels):
        raise InputError(f"{file}: expected 'labels' as a list of integers")
    if len(labels) != len(data):
        raise InputError(
            f"{file}: expected {len(data)} labels as there are images, got {len(labels)}"
        )
    odd = [v for v in labels if not 0 <= v < _CLASSES]
    if odd:
        raise InputError(f"{file}: expected labels 0 ... {_CLASSES - 1}, got {odd[0]}")
    return data.reshape(-1, 3, 32, 32), np.array(labels, np.uint8)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """What pickles written by Python 3 in protocol 2 call to make byte strings."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"asks for the codec {encoding!r}")
    return text.encode("latin-1")


_NUMBERS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8")


class _PlainDtype:
    """A dtype as pickles write it: a code such as "u1", then the order of bytes. numpy's own would
    take any state from the file, and crash on some."""

    def __init__(self, code: Any, *_: Any) -> None:
        code = code.decode("latin-1") if isinstance(code, bytes) else code
        if code not in _NUMBERS:
            raise pickle.UnpicklingError(f"asks for an array of {code!r:.40}, expected numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, order, *_ = state
        order = order.decode("latin-1") if isinstance(order, bytes) else order
        self.dtype = self.dtype.newbyteorder(order)


class _PlainArray:
    """An array of numbers as pickles write it: first without contents, then with them."""

    value: np.ndarray = np.empty(0, np.uint8)

    def __init__(self, *_: Any) -> None:
        """The shape that is asked for here is always (0,); another one would be memory for
        nothing."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.fill(content, dtype, shape, "F" if fortran else "C")

    def fill(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
        if not isinstance(dtype, _PlainDtype) or not isinstance(content, bytes | bytearray):
            raise pickle.UnpicklingError("an array without a dtype or without contents")
        flat = np.frombuffer(content, dtype.dtype)
        if math.prod(shape) != flat.size:
            raise pickle.UnpicklingError(f"an array of shape {shape} with {flat.size} values")
        self.value = flat.reshape(shape, order=order)


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> _PlainArray:
    """What pickles of protocol 5 call to make arrays."""
    array = _PlainArray()
    array.fill(content, dtype, shape, order)
    return array


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _PlainArray,
    ("numpy", "dtype"): _PlainDtype,
    ("numpy.core.multiarray", "_reconstruct"): _PlainArray,
    ("numpy._core.multiarray", "_reconstruct"): _PlainArray,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _latin1,
}


def _cifar_images(
    files: list[Path],
    read: Callable[[Path], tuple[np.ndarray, np.ndarray]],
    limit: int | None,
) -> Images:
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for file in files:
        parts.append(read(file))
        if limit is not None and sum(len(labels) for _, labels in parts) >= limit:
            break
    images = np.concatenate([images for images, _ in parts])[:limit]
    labels = np.concatenate([labels for _, labels in parts])[:limit]
    return _as_images(images, labels, "cifar10")


# --- digits, and what all have in common -------------------------------------------------------


def _digits(split: str, limit: int | None) -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "data: expected a folder with images, or scikit-learn for its digits (not installed)"
        ) from None
    bunch = load_digits()
    part = slice(-_DIGITS_TEST, None) if split == "test" else slice(None, -_DIGITS_TEST)
    images = torch.from_numpy((bunch.images[part][:limit] / 16).astype(np.float32))
    labels = torch.from_numpy(bunch.target[part][:limit].astype(np.int64))
    return Images(images[:, None], labels, "digits")


def _check_range(file: Path, labels: np.ndarray) -> None:
    """Unsigned labels of a file."""
    if labels.max() >= _CLASSES:
        raise InputError(f"{file}: expected labels 0 ... {_CLASSES - 1}, got {labels.max()}")


def _as_images(images: np.ndarray, labels: np.ndarray, name: str) -> Images:
    scaled = torch.from_numpy(images.astype(np.float32)).div_(255)
    return Images(scaled, torch.from_numpy(labels.astype(np.int64)), name)


# --- what the experiments do with them ---------------------------------------------------------


def merge_labels(
    labels: Tensor, classes: int = 2, *, original: int = _CLASSES, seed: int | None = None
) -> Tensor:
    """Labels merged into fewer classes, as equal in number of old classes as they can be.

    The old classes are taken in order (ten into two: 0 ... 4 become 0, 5 ... 9 become 1), or in an
    order drawn from ``seed``. Which classes are joined is arbitrary, as in Section 5.1, and the
    same in every run.

    Args:
        labels: (n,) integers in 0 ... original - 1.
        classes: how many are left, 1 to ``original``.
        original: how many there were.
        seed: None for the order of the numbers.

    Returns:
        (n,) int64 in 0 ... classes - 1.
    """
    if not 1 <= classes <= original:
        raise ValueError(f"classes: expected 1 to {original}, got {classes}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < original:
        raise ValueError(
            f"labels: expected values in 0 ... {original - 1}, got values from "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    order = np.arange(original)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(original)
    table = torch.empty(original, dtype=torch.int64)
    table[torch.from_numpy(order)] = torch.arange(original) * classes // original
    return table.to(labels.device)[labels.long()]


def fraction(labels: Tensor, share: float, seed: int = 0) -> Tensor:
    """Rows of a training set cut down to a share of it, with the mix of classes kept.

    Every class keeps round(share * its rows) of its rows, at least one. For one seed the rows of a
    smaller share are among those of a larger one, so that a curve over the share adds data and
    does not exchange it.

    Args:
        labels: (n,) integers.
        share: 0 < share <= 1.
        seed: which rows.

    Returns:
        Row numbers, int64, ascending, on the CPU.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected 0 < share <= 1, got {share}")
    values = labels.detach().cpu().numpy()
    kept: list[np.ndarray] = []
    for label in np.unique(values):
        rows = np.flatnonzero(values == label)
        order = np.random.default_rng([seed, int(label) & 0xFFFFFFFF]).permutation(len(rows))
        kept.append(rows[order[: max(1, round(share * len(rows)))]])
    if not kept:
        return torch.empty(0, dtype=torch.int64)
    return torch.from_numpy(np.sort(np.concatenate(kept)).astype(np.int64))
