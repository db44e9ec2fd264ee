"""Reading labelled images, and what the experiments do with them."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from levelset_ext.data.images import (
    fraction,
    load_images,
    merge_labels,
    read_cifar_pickle,
    read_idx,
)
from levelset_ext.errors import InputError

RANDOM = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def mnist(folder: Path, n: int = 5, compress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    images = RANDOM.integers(0, 256, (n, 4, 3), np.uint8)
    images[0, 0, 0] = 255
    labels = RANDOM.integers(0, 10, n).astype(np.uint8)
    for part in ("train", "t10k"):
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            blob = idx(array)
            path = folder / f"{part}-{name}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(blob, mtime=0) if compress else blob)
    return images, labels


def cifar(folder: Path, layout: str, n: int = 3) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    all_images, all_labels = [], []
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        images = RANDOM.integers(0, 256, (n, 3072), np.uint8)
        labels = RANDOM.integers(0, 10, n)
        if layout == "bin":
            table = np.concatenate([labels[:, None].astype(np.uint8), images], 1)
            (folder / f"{name}.bin").write_bytes(table.tobytes())
        else:
            batch = {b"data": images, b"labels": labels.tolist(), b"batch_label": b"a batch"}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=int(layout)))
        if name != "test_batch":
            all_images.append(images)
            all_labels.append(labels)
    return np.concatenate(all_images), np.concatenate(all_labels)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("inner", ["", "raw", "MNIST/raw"])
def test_mnist(tmp_path: Path, compress: bool, inner: str) -> None:
    images, labels = mnist(tmp_path / inner, compress=compress)
    for split in ("train", "test"):
        data = load_images(tmp_path, split)
        assert data.images.shape == (5, 1, 4, 3)
        assert data.images.dtype == torch.float32
        assert data.labels.dtype == torch.int64
        assert (data.name, data.classes, len(data)) == ("mnist", 10, 5)
        assert np.array_equal(data.images[:, 0].numpy(), images.astype(np.float32) / 255)
        assert float(data.images.max()) == 1.0
        assert data.labels.tolist() == labels.tolist()
    assert len(load_images(tmp_path, limit=2)) == 2


@pytest.mark.parametrize(
    ("limit", "every", "rows"),
    [(None, 1, range(15)), (None, 4, (0, 4, 8, 12)), (3, 6, (0, 6, 12)), (2, 6, (0, 6)),
     (9, 7, (0, 7, 14)), (None, 99, (0,))],
)  # fmt: skip
def test_some_rows(tmp_path: Path, limit: int | None, every: int, rows: tuple[int, ...]) -> None:
    cifar(tmp_path, "bin")
    whole = load_images(tmp_path)
    some = load_images(tmp_path, "train", limit, every)
    assert torch.equal(some.images, whole.images[list(rows)])
    assert torch.equal(some.labels, whole.labels[list(rows)])
    assert (some.name, some.classes, some.every) == ("cifar10", 10, every)
    assert some.images.is_contiguous()


@pytest.mark.parametrize("name", ["limit", "every"])
def test_no_rows(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: expected at least 1, got 0"):
        load_images(None, "test", **{name: 0})


@pytest.mark.parametrize("layout", ["bin", "2", "4", "5"])
def test_cifar(tmp_path: Path, layout: str) -> None:
    inner = "cifar-10-batches-bin" if layout == "bin" else "cifar-10-batches-py"
    images, labels = cifar(tmp_path / inner, layout)
    data = load_images(tmp_path, "train")
    assert data.images.shape == (15, 3, 32, 32)
    expected = images.reshape(-1, 3, 32, 32).astype(np.float32) / 255
    assert np.array_equal(data.images.numpy(), expected)
    assert data.labels.tolist() == labels.tolist()
    assert len(load_images(tmp_path, "test")) == 3
    assert len(load_images(tmp_path, "train", limit=4)) == 4


def test_digits() -> None:
    pytest.importorskip("sklearn")
    train, test = load_images(), load_images(split="test")
    assert train.images.shape == (1437, 1, 8, 8)
    assert test.images.shape == (360, 1, 8, 8)
    assert (float(train.images.min()), float(train.images.max())) == (0.0, 1.0)
    assert torch.equal(test.labels, load_images(split="test").labels)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch escaped",)


class EvilBuild:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("open('escaped', 'w')",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("evil", [Evil(), EvilBuild(), Path("x"), len])
def test_pickled_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evil: Any, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(pickle.dumps({b"data": evil, b"labels": [1]}, protocol=protocol))
    with pytest.raises(InputError, match="which is refused"):
        read_cifar_pickle("a")
    assert not Path("escaped").exists()


DATA = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a pickled dict, got list"),
        ({b"data": DATA}, "expected entries 'data' and 'labels'"),
        ({b"data": DATA.astype(np.float32), b"labels": [1, 2]}, "of uint8"),
        ({b"data": DATA[:, :9], b"labels": [1, 2]}, r"shape \(n, 3072\), got \(2, 9\)"),
        ({b"data": DATA, b"labels": [1]}, "expected 2 labels .* got 1"),
        ({b"data": DATA, b"labels": [1, 10]}, "expected labels 0 ... 9, got 10"),
        ({b"data": DATA, b"labels": [1, -1]}, "expected labels 0 ... 9, got -1"),
        ({b"data": DATA, b"labels": [1, 0.5]}, "list of integers"),
    ],
)
def test_bad_cifar_batches(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "a").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(InputError, match=message):
        read_cifar_pickle(tmp_path / "a")


def test_a_pickled_batch_by_columns_is_read_by_rows(tmp_path: Path) -> None:
    data = RANDOM.integers(0, 256, (2, 3072), np.uint8)
    batch = {b"data": np.asfortranarray(data), b"labels": [1, 2]}
    (tmp_path / "a").write_bytes(pickle.dumps(batch, protocol=2))
    images, _ = read_cifar_pickle(tmp_path / "a")
    assert np.array_equal(images.reshape(2, -1), data)


def test_truncated_pickle(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(pickle.dumps({b"data": DATA, b"labels": [1, 2]})[:-50])
    with pytest.raises(InputError, match="cannot unpickle it"):
        read_cifar_pickle(tmp_path / "a")


IDX = idx(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "not an IDX file: .* got an empty file"),
        (b"PNG and more", "not an IDX file: .* got 50 4e 47"),
        (b"\0\0\x0d\x03" + IDX[4:], "expected IDX type 0x08 .* got 0x0d"),
        (IDX[:9], "truncated IDX: the header"),
        (IDX[:-1], r"truncated IDX: expected 24 bytes .* shape \(2, 4, 3\), got only 23"),
        (IDX + b"x", "malformed IDX: expected 24 bytes .* got more"),
        (gzip.compress(IDX, mtime=0)[:-12], "cannot read it"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "truncated IDX"),
    ],
)
def test_bad_idx(tmp_path: Path, blob: bytes, message: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(blob)
    with pytest.raises(InputError, match=message):
        read_idx(path)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_images(tmp_path / "missing")
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte.*data_batch_1.*got none"):
        load_images(tmp_path)
    with pytest.raises(InputError, match="split: expected one of train, test"):
        load_images(tmp_path, "validation")
    mnist(tmp_path / "a")
    (tmp_path / "a/train-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match="expected train-labels-idx1-ubyte"):
        load_images(tmp_path / "a")
    (tmp_path / "a/train-labels-idx1-ubyte").write_bytes(idx(np.zeros(4, np.uint8)))
    with pytest.raises(InputError, match=r"expected 5 labels .* got 4"):
        load_images(tmp_path / "a")
    (tmp_path / "a/train-labels-idx1-ubyte").write_bytes(idx(np.full(5, 10, np.uint8)))
    with pytest.raises(InputError, match=r"expected labels 0 ... 9, got 10"):
        load_images(tmp_path / "a")
    cifar(tmp_path / "b", "bin")
    (tmp_path / "b/data_batch_3.bin").unlink()
    with pytest.raises(InputError, match=r"data_batch_3\.bin.* no such file"):
        load_images(tmp_path / "b")
    (tmp_path / "b/test_batch.bin").write_bytes(b"\0" * 3072)
    with pytest.raises(InputError, match=r"records of 3073 bytes.* got 3072 bytes"):
        load_images(tmp_path / "b", "test")


def test_merge_labels() -> None:
    labels = torch.arange(10)
    assert merge_labels(labels).tolist() == [0] * 5 + [1] * 5
    assert merge_labels(labels, 3).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    drawn = merge_labels(labels, seed=1)
    assert drawn.sum() == 5
    assert drawn.tolist() == merge_labels(labels, seed=1).tolist() != merge_labels(labels).tolist()
    with pytest.raises(ValueError, match=r"labels: expected values in 0 ... 9"):
        merge_labels(torch.tensor([10]))
    with pytest.raises(ValueError, match="classes: expected 1 to 10"):
        merge_labels(labels, 11)


def test_fraction_is_balanced_nested_and_deterministic() -> None:
    labels = torch.from_numpy(RANDOM.integers(0, 10, 1000))
    small, large = fraction(labels, 0.1, seed=3), fraction(labels, 0.5, seed=3)
    counts, whole = torch.bincount(labels[small]), torch.bincount(labels)
    assert all(abs(c - 0.1 * w) <= 0.5 for c, w in zip(counts, whole, strict=True))
    assert set(small.tolist()) <= set(large.tolist())
    assert torch.equal(small, fraction(labels, 0.1, seed=3))
    assert not torch.equal(small, fraction(labels, 0.1, seed=4))
    assert torch.equal(fraction(labels, 1.0), torch.arange(1000))
    assert len(fraction(labels, 1e-9)) == 10
    with pytest.raises(ValueError, match="share: expected 0 < share <= 1, got 0"):
        fraction(labels, 0)


def test_conversion_of_jpegs(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    script = Path(__file__).parent.parent / "python_examples" / "convert_cifar_jpeg.py"
    plain = np.arange(10, dtype=np.uint8) * 20
    for name in ("train", "test"):
        files = []
        for value in plain:
            path = tmp_path / "one.jpg"
            flat = np.full((32, 32, 3), value, np.uint8)
            image_module.fromarray(flat).save(path, quality=95)
            files.append(path.read_bytes())
        np.savez(
            tmp_path / f"{name}.npz",
            bytes=np.frombuffer(b"".join(files), np.uint8),
            offsets=np.cumsum([0] + [len(f) for f in files]),
            labels=np.arange(10, dtype=np.uint8),
        )
    arguments = [str(tmp_path / "train.npz"), str(tmp_path / "test.npz"), "--out", str(tmp_path)]
    subprocess.run([sys.executable, str(script), *arguments], check=True, capture_output=True)
    data = load_images(tmp_path)
    assert data.labels.tolist() == list(range(10))
    assert (data.images - torch.from_numpy(plain / 255.0)[:, None, None, None]).abs().max() < 0.02
    assert len(load_images(tmp_path, "test")) == 10
