"""CIFAR10 stored as JPEGs in an NPZ file, turned into the official binary layout.

    python python_examples/convert_cifar_jpeg.py train.npz test.npz --out cifar-10-batches-bin

Each NPZ holds ``bytes`` (uint8, all JPEG files one after the other), ``offsets`` (int64, n + 1
places at which they start and end) and ``labels`` (uint8, n). The training images are written as
data_batch_1.bin ... data_batch_5.bin in equal parts, the test images as test_batch.bin.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image, UnidentifiedImageError


def records(path: Path) -> np.ndarray:
    """(n, 3073) uint8: label, then the red, green and blue planes of 32 x 32."""
    with np.load(path, allow_pickle=False) as file:
        blob, offsets, labels = file["bytes"], file["offsets"], file["labels"]
    if len(offsets) != len(labels) + 1 or (np.diff(offsets) <= 0).any():
        raise ValueError(f"offsets: expected {len(labels) + 1} ascending places")
    if offsets[0] < 0 or offsets[-1] > len(blob):
        raise ValueError(f"offsets: expected places within {len(blob)} bytes")
    if len(labels) and labels.max() > 9:
        raise ValueError(f"expected labels of 0 to 9, got {labels.max()}")
    table = np.empty((len(labels), 3073), np.uint8)
    table[:, 0] = labels
    for row, (begin, end) in enumerate(itertools.pairwise(offsets)):
        image = Image.open(io.BytesIO(blob[begin:end].tobytes())).convert("RGB")
        if image.size != (32, 32):
            raise ValueError(f"image {row}: expected 32 x 32 pixels, got {image.size}")
        table[row, 1:] = np.asarray(image).transpose(2, 0, 1).reshape(-1)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("train", type=Path, metavar="TRAIN.npz")
    parser.add_argument("test", type=Path, metavar="TEST.npz")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"{args.out}: {error}", file=sys.stderr)
        return 2
    for path, names in (
        (args.train, [f"data_batch_{i}.bin" for i in range(1, 6)]),
        (args.test, ["test_batch.bin"]),
    ):
        try:
            table = records(path)
        except (OSError, KeyError, ValueError, UnidentifiedImageError, BadZipFile) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
        for name, part in zip(names, np.array_split(table, len(names)), strict=True):
            beside = args.out / f".{name}.part"
            beside.write_bytes(part.tobytes())
            beside.replace(args.out / name)
            print(f"{args.out / name}: {len(part)} images", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
