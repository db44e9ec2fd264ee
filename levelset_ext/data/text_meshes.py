"""OBJ and OFF files: vertices and faces in the order of the file, whatever else is in it.

Materials, groups and texture coordinates do not split a mesh here, as they do for a renderer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from levelset_ext.errors import InputError

__all__ = ["data_lines", "excerpt", "numbers", "read_obj", "read_off", "words"]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8, which some editors put before the first line


def read_obj(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (v, 3) float64 and triangles (f, 3) int64, polygons as fans.

    Raises:
        InputError: a malformed line, or an index that no vertex has.
    """
    vertices: list[list[float]] = []
    faces: list[tuple[int, int, int]] = []
    for number, line in _whole_lines(file):
        parts = line.split(b"#", 1)[0].split()
        if parts[:1] == [b"v"]:
            try:
                vertices.append([float(parts[1]), float(parts[2]), float(parts[3])])
            except (IndexError, ValueError):
                raise InputError(
                    f"{file}: line {number}: expected 'v x y z' with three numbers, "
                    f"got {excerpt(line)}"
                ) from None
        elif parts[:1] == [b"f"]:
            try:
                # From 1, or from -1 backwards; v/vt/vn.
                corners = [int(part.split(b"/", 1)[0]) for part in parts[1:]]
                corners = [c - 1 if c > 0 else len(vertices) + c for c in corners]
                if min(corners) < 0 or b"0" in (part.split(b"/", 1)[0] for part in parts[1:]):
                    raise ValueError
            except ValueError:
                raise InputError(
                    f"{file}: line {number}: expected 'f a b c' with numbers of vertices from 1, "
                    f"got {excerpt(line)}"
                ) from None
            faces += _fan(corners)
    if not vertices:
        raise InputError(f"{file}: no vertex lines 'v x y z'; expected an OBJ file with points")
    return np.array(vertices), np.array(faces, dtype=np.int64).reshape(-1, 3)


def read_off(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (v, 3) float64 and triangles (f, 3) int64, polygons as fans.

    Raises:
        InputError: a malformed or truncated file.
    """
    lines = data_lines(file, (b"#",))
    number, first = next(lines, (0, b""))
    head = first.split()
    if not head or not head[0].upper().endswith(b"OFF") or len(head[0]) > 6:
        raise InputError(f"{file}: not an OFF file: expected the first line to be 'OFF'")
    del head[0]
    try:
        if not head:
            number, first = next(lines, (number, b""))
            head = first.split()
        count, polygons = int(head[0]), int(head[1])
        if count < 0 or polygons < 0:
            raise ValueError
    except (IndexError, ValueError):
        raise InputError(
            f"{file}: line {number}: expected the counts of vertices and faces, "
            f"got {excerpt(first)}"
        ) from None
    vertices: list[list[float]] = []
    while len(vertices) < count:
        number, line = next(lines, (0, b""))
        if not number:
            raise InputError(
                f"{file}: truncated OFF: expected {count} vertices, got {len(vertices)}"
            )
        vertices.append(numbers(file, number, line, 3))
    faces: list[tuple[int, int, int]] = []
    for k in range(polygons):
        number, line = next(lines, (0, b""))
        if not number:
            raise InputError(f"{file}: truncated OFF: expected {polygons} faces, got {k}")
        try:
            parts = line.split()
            corners = [int(part) for part in parts[1 : 1 + int(parts[0])]]
            if len(corners) != int(parts[0]):
                raise ValueError
        except (IndexError, ValueError):
            raise InputError(
                f"{file}: line {number}: expected a count and as many numbers of vertices, "
                f"got {excerpt(line)}"
            ) from None
        faces += _fan(corners)
    return np.array(vertices).reshape(-1, 3), np.array(faces, dtype=np.int64).reshape(-1, 3)


def _fan(corners: list[int]) -> list[tuple[int, int, int]]:
    # A number too large for an index is as wrong as the largest one.
    corners = [max(-1, min(corner, 2**62)) for corner in corners]
    return [(corners[0], corners[k], corners[k + 1]) for k in range(1, len(corners) - 1)]


def _whole_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers (from 1) and contents; a backslash at the end joins a line with the next."""
    with file.open("rb") as stream:
        kept, first = b"", 0
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            first = first if kept else number
            kept += line
            if line.rstrip(b"\r\n").endswith(b"\\"):
                kept = kept.rstrip(b"\r\n")[:-1] + b" "
                continue
            yield first, kept
            kept = b""
        if kept:
            yield first, kept


def data_lines(file: Path, comments: tuple[bytes, ...]) -> Iterator[tuple[int, bytes]]:
    """Line numbers (from 1) and contents, without comments and empty lines."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            for mark in comments:
                line = line.split(mark, 1)[0]
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():
                yield number, line


def words(line: bytes) -> list[bytes]:
    """What stands between spaces, commas and semicolons."""
    return line.replace(b",", b" ").replace(b";", b" ").split()


def numbers(file: Path, number: int, line: bytes, count: int) -> list[float]:
    """The first numbers of a line.

    Raises:
        InputError: there are fewer, or something else, or commas that may be decimal ones.
    """
    # With other marks between them, and no point, a comma within is most likely a decimal one.
    fields = line.replace(b";", b" ").split()
    inside = any(b"," in field.strip(b",") for field in fields)
    if inside and len(fields) > 1 and b"." not in line:
        raise InputError(
            f"{file}: line {number}: expected decimal points, got commas in {excerpt(line)}"
        )
    try:
        row = [float(word) for word in words(line)[:count]]
    except ValueError:
        row = []
    if len(row) < count:
        raise InputError(
            f"{file}: line {number}: expected at least {count} numbers, got {excerpt(line)}"
        )
    return row


def excerpt(line: bytes) -> str:
    return repr(line.strip()[:40].decode("ascii", "replace"))
