"""Mesh files: a strict PLY parser, a deterministic PLY writer, and `read_mesh` for every format.

The PLY parser is our own for two reasons: a file that ends before its header says so must be
refused (general loaders fill what is missing or drop it), and scanner archives store their
triangles as `tristrips`, which general loaders do not know.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import trimesh

from levelset_ext.data.text_meshes import read_obj, read_off
from levelset_ext.errors import InputError
from levelset_ext.whole_files import write_whole

Column = np.ndarray | list[np.ndarray]

MESH_SUFFIXES = (".ply", ".obj", ".off", ".stl")

_MAX_HEADER_BYTES = 1 << 20
_SCALARS = {
    "char": "i1",
    "int8": "i1",
    "uchar": "u1",
    "uint8": "u1",
    "short": "i2",
    "int16": "i2",
    "ushort": "u2",
    "uint16": "u2",
    "int": "i4",
    "int32": "i4",
    "uint": "u4",
    "uint32": "u4",
    "int64": "i8",
    "uint64": "u8",
    "float": "f4",
    "float32": "f4",
    "double": "f8",
    "float64": "f8",
}
_STRUCT_CODES = {
    "i1": "b",
    "u1": "B",
    "i2": "h",
    "u2": "H",
    "i4": "i",
    "u4": "I",
    "i8": "q",
    "u8": "Q",
    "f4": "f",
    "f8": "d",
}


def check_regular_file(path: str | os.PathLike[str], what: str) -> Path:
    """The path as a `Path`, once it is known to be a regular file with something in it.

    Raises:
        InputError: nothing there, a directory, a device or a pipe, not readable, or 0 bytes.
    """
    file = Path(path)
    try:
        if not file.exists():
            raise InputError(f"{file}: no such file; expected {what}")
        if file.is_dir():
            raise InputError(f"{file}: is a directory; expected {what}")
        if not file.is_file():
            raise InputError(f"{file}: is not a regular file; expected {what}")
        if file.stat().st_size == 0:
            raise InputError(f"{file}: is empty (0 bytes); expected {what}")
        if not os.access(file, os.R_OK):
            raise InputError(f"{file}: cannot be read (permission denied); expected {what}")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: cannot be opened ({error}); expected {what}") from error
    return file


# --- PLY, reading ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Property:
    name: str
    scalar: str  # numpy type code without byte order, such as "f4"
    counter: str | None  # type code of the length, for a list property


@dataclass(frozen=True)
class _Element:
    name: str
    count: int
    properties: tuple[_Property, ...]

    @property
    def has_lists(self) -> bool:
        return any(p.counter is not None for p in self.properties)


class _TruncatedError(Exception):
    """The body ended inside an element; carries how many whole rows were there."""

    def __init__(self, element: _Element, rows: int) -> None:
        super().__init__()
        self.element, self.rows = element, rows


def read_ply(path: str | os.PathLike[str]) -> dict[str, dict[str, Column]]:
    """Everything a PLY file holds: element name -> property name -> values of all its rows.

    A scalar property is an array (count,), a list property an array (count, k) when all its lists
    have the same length k and a list of arrays otherwise. ASCII, little-endian and big-endian.

    Raises:
        InputError: not a PLY file, a malformed header, or a body shorter than the header says.
    """
    file = check_regular_file(path, "a PLY file")
    blob = file.read_bytes()
    encoding, elements, offset = _parse_header(file, blob)
    try:
        if encoding == "ascii":
            return _parse_ascii(file, blob[offset:], elements)
        order = "<" if encoding == "binary_little_endian" else ">"
        return _parse_binary(file, blob, offset, elements, order)
    except _TruncatedError as cut:
        raise InputError(
            f"{file}: truncated PLY: expected {cut.element.count} rows of element "
            f"'{cut.element.name}' as its header says, got {cut.rows}"
        ) from None


def _parse_header(file: Path, blob: bytes) -> tuple[str, list[_Element], int]:
    """Encoding, elements in file order, and where the body begins."""
    if blob[:3] != b"ply" or blob[3:4] not in (b"\n", b"\r", b" ", b"\t"):
        raise InputError(f"{file}: not a PLY file: expected the first line to be 'ply'")
    end = blob.find(b"end_header", 0, _MAX_HEADER_BYTES)
    if end < 0:
        raise InputError(f"{file}: malformed PLY: expected a line 'end_header', found none")
    offset = end + len(b"end_header")
    newline = blob[offset : offset + 2]
    if newline == b"\r\n":
        offset += 2
    elif newline[:1] in (b"\n", b"\r"):
        offset += 1

    encoding = ""
    elements: list[tuple[str, int, list[_Property]]] = []
    # As bytes: of text, splitlines would also split within a comment in UTF-8.
    for line in blob[:end].splitlines()[1:]:
        raw = line.decode("latin-1")
        words = raw.split()
        if not words or words[0] in ("comment", "obj_info"):
            continue
        try:
            if words[0] == "format":
                encoding = words[1]
            elif words[0] == "element":
                count = int(words[2])
                if count < 0:
                    raise ValueError
                elements.append((words[1], count, []))
            elif words[0] == "property" and words[1] == "list":
                counter, scalar = _SCALARS[words[2]], _SCALARS[words[3]]
                if counter[0] == "f":
                    raise ValueError
                elements[-1][2].append(_Property(words[4], scalar, counter))
            elif words[0] == "property":
                elements[-1][2].append(_Property(words[2], _SCALARS[words[1]], None))
            else:
                raise ValueError
        except (IndexError, KeyError, ValueError):
            raise InputError(
                f"{file}: expected a PLY header line, got {raw.strip()[:80]!r}"
            ) from None
    if encoding not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise InputError(
            f"{file}: malformed PLY: expected format ascii, binary_little_endian or "
            f"binary_big_endian, got {encoding!r}"
        )
    return encoding, [_Element(n, c, tuple(p)) for n, c, p in elements], offset


def _parse_ascii(file: Path, body: bytes, elements: list[_Element]) -> dict[str, dict[str, Column]]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            numbers = np.fromstring(body.decode("ascii"), sep=" ") if body.strip() else np.empty(0)
        except (DeprecationWarning, ValueError):
            raise InputError(
                f"{file}: malformed ascii PLY: expected numbers only after 'end_header'"
            ) from None
    result: dict[str, dict[str, Column]] = {}
    at = 0
    for element in elements:
        width = len(element.properties)
        if width == 0:
            result[element.name] = {}
        elif not element.has_lists:
            rows = (len(numbers) - at) // width
            if rows < element.count:
                raise _TruncatedError(element, rows)
            table = numbers[at : at + element.count * width].reshape(element.count, width)
            at += element.count * width
            result[element.name] = {
                p.name: table[:, i].astype(p.scalar) for i, p in enumerate(element.properties)
            }
        else:
            result[element.name], at = _ascii_lists(numbers, at, element)
    return result


def _ascii_lists(numbers: np.ndarray, at: int, element: _Element) -> tuple[dict[str, Column], int]:
    columns: dict[str, list[np.ndarray]] = {p.name: [] for p in element.properties}
    for row in range(element.count):
        for prop in element.properties:
            length = 1
            if prop.counter is not None:
                if at >= len(numbers):
                    raise _TruncatedError(element, row)
                promised = numbers[at]
                at += 1
                if not 0 <= promised <= len(numbers):  # also where it is no number at all
                    raise _TruncatedError(element, row)
                length = int(promised)
            if at + length > len(numbers):
                raise _TruncatedError(element, row)
            columns[prop.name].append(numbers[at : at + length].astype(prop.scalar))
            at += length
    return {p.name: _stack(columns[p.name], p) for p in element.properties}, at


def _parse_binary(
    file: Path, blob: bytes, at: int, elements: list[_Element], order: str
) -> dict[str, dict[str, Column]]:
    result: dict[str, dict[str, Column]] = {}
    for element in elements:
        if element.count == 0 or not element.properties:
            result[element.name] = {p.name: np.empty(0, p.scalar) for p in element.properties}
            continue
        dtype = _row_dtype(blob, at, element, order)
        rows = (len(blob) - at) // dtype.itemsize
        if not element.has_lists and rows < element.count:
            raise _TruncatedError(element, rows)
        if rows >= element.count:
            table = np.frombuffer(blob, dtype, element.count, at)
            lists = [i for i, p in enumerate(element.properties) if p.counter is not None]
            if all((table[f"n{i}"] == table[f"n{i}"][0]).all() for i in lists):
                result[element.name] = {
                    p.name: table[f"p{i}"].astype(p.scalar)
                    for i, p in enumerate(element.properties)
                }
                at += element.count * dtype.itemsize
                continue
        result[element.name], at = _binary_lists(blob, at, element, order)
    return result


def _row_dtype(blob: bytes, at: int, element: _Element, order: str) -> np.dtype:
    """The row layout if every list had the length it has in the first row."""
    fields: list[tuple[str, str] | tuple[str, str, tuple[int, ...]]] = []
    for i, prop in enumerate(element.properties):
        if prop.counter is None:
            fields.append((f"p{i}", order + prop.scalar))
            at += np.dtype(prop.scalar).itemsize
            continue
        size = np.dtype(prop.counter).itemsize
        if at + size > len(blob):
            raise _TruncatedError(element, 0)
        length = int(np.frombuffer(blob, order + prop.counter, 1, at)[0])
        at += size + length * np.dtype(prop.scalar).itemsize
        if length < 0 or at > len(blob):
            raise _TruncatedError(element, 0)
        fields.append((f"n{i}", order + prop.counter))
        fields.append((f"p{i}", order + prop.scalar, (length,)))
    return np.dtype(fields)


def _binary_lists(
    blob: bytes, at: int, element: _Element, order: str
) -> tuple[dict[str, Column], int]:
    """Row by row, for lists of different lengths."""
    columns: dict[str, list[np.ndarray]] = {p.name: [] for p in element.properties}
    counters = [
        None if p.counter is None else struct.Struct(order + _STRUCT_CODES[p.counter])
        for p in element.properties
    ]
    types = [np.dtype(order + p.scalar) for p in element.properties]
    for row in range(element.count):
        for prop, counter, dtype in zip(element.properties, counters, types, strict=True):
            length = 1
            if counter is not None:
                if at + counter.size > len(blob):
                    raise _TruncatedError(element, row)
                (length,) = counter.unpack_from(blob, at)
                at += counter.size
            stop = at + length * dtype.itemsize
            if length < 0 or stop > len(blob):
                raise _TruncatedError(element, row)
            columns[prop.name].append(np.frombuffer(blob, dtype, length, at))
            at = stop
    return {p.name: _stack(columns[p.name], p) for p in element.properties}, at


def _stack(rows: list[np.ndarray], prop: _Property) -> Column:
    if prop.counter is None:
        return np.concatenate(rows).astype(prop.scalar) if rows else np.empty(0, prop.scalar)
    if rows and all(len(r) == len(rows[0]) for r in rows):
        return np.stack(rows).astype(prop.scalar)
    return [r.astype(prop.scalar) for r in rows]


def ply_vertices(file: Path, elements: dict[str, dict[str, Column]]) -> np.ndarray:
    """The x, y, z of element `vertex` as (n, 3) float64.

    Raises:
        InputError: no such element, or one without x, y and z.
    """
    if "vertex" not in elements:
        raise InputError(
            f"{file}: expected a PLY element 'vertex', got {sorted(elements) or 'no element'}"
        )
    vertex = elements["vertex"]
    if not all(isinstance(vertex.get(axis), np.ndarray) for axis in "xyz"):
        raise InputError(
            f"{file}: expected PLY vertices with properties x, y, z (three dimensions), "
            f"got {', '.join(vertex) or 'none'}"
        )
    columns = [np.asarray(vertex[axis], dtype=np.float64) for axis in "xyz"]
    if any(column.ndim != 1 for column in columns):
        raise InputError(f"{file}: expected scalar PLY properties x, y, z, got lists")
    return np.column_stack(columns)


def _ply_faces(file: Path, elements: dict[str, dict[str, Column]]) -> np.ndarray:
    """All triangles of `face` and `tristrips`, (f, 3) int64; polygons are split as fans."""
    parts: list[np.ndarray] = []
    for element, names in (
        ("face", ("vertex_indices", "vertex_index")),
        ("tristrips", ("vertex_indices", "vertex_index")),
    ):
        table = elements.get(element, {})
        column = next((table[name] for name in names if name in table), None)
        if column is None:
            continue
        split = _fan if element == "face" else _strip
        if isinstance(column, np.ndarray) and column.ndim == 2 and element == "face":
            parts.append(_fan(column.astype(np.int64)))
        elif isinstance(column, np.ndarray) and column.ndim == 1 and len(column):
            raise InputError(f"{file}: expected PLY element '{element}' to hold index lists")
        else:
            parts.extend(split(np.asarray(row, dtype=np.int64)[None]) for row in column)
    return np.concatenate(parts) if parts else np.empty((0, 3), np.int64)


def _fan(polygons: np.ndarray) -> np.ndarray:
    """(m, k) polygons -> (m * max(k - 2, 0), 3) triangles."""
    m, k = polygons.shape
    if k < 3:
        return np.empty((0, 3), np.int64)
    corner = np.arange(1, k - 1)
    first = np.broadcast_to(polygons[:, :1], (m, k - 2))
    return np.stack([first, polygons[:, corner], polygons[:, corner + 1]], -1).reshape(-1, 3)


def _strip(row: np.ndarray) -> np.ndarray:
    """(1, k) indices of triangle strips, each ended by -1 -> (f, 3) triangles, none degenerate."""
    indices = row[0]
    triangles = np.stack([indices[:-2], indices[1:-1], indices[2:]], -1)
    if not len(triangles):
        return np.empty((0, 3), np.int64)
    # Every second triangle of a strip is wound the other way; count from the strip's own start.
    starts = np.concatenate([[0], np.flatnonzero(indices == -1) + 1])
    place = np.arange(len(triangles))
    parity = (place - starts[np.searchsorted(starts, place, side="right") - 1]) % 2
    triangles[parity == 1] = triangles[parity == 1][:, [1, 0, 2]]
    whole = (triangles >= 0).all(1)
    distinct = (triangles != np.roll(triangles, 1, axis=1)).all(1)
    return triangles[whole & distinct]


# --- meshes ---------------------------------------------------------------------------------


def read_mesh(path: str | os.PathLike[str]) -> trimesh.Trimesh:
    """A triangle mesh from PLY (faces, polygons, `tristrips`), OBJ, OFF or STL.

    Vertices keep the order and the values of the file; only STL, which repeats the corners of
    every triangle, has equal corners joined. float64 vertices (v, 3), int64 faces (f, 3).

    Raises:
        InputError: everything `check_regular_file` refuses, an unknown extension, a malformed or
            truncated file, points without faces, NaN or infinite vertices, indices out of range.
    """
    what = f"a triangle mesh ({', '.join(MESH_SUFFIXES)})"
    file = check_regular_file(path, what)
    suffix = file.suffix.lower()
    if suffix not in MESH_SUFFIXES:
        raise InputError(f"{file}: unknown extension {suffix!r}; expected {what}")
    if suffix == ".ply":
        elements = read_ply(file)
        vertices, faces = ply_vertices(file, elements), _ply_faces(file, elements)
    elif suffix == ".obj":
        vertices, faces = read_obj(file)
    elif suffix == ".off":
        vertices, faces = read_off(file)
    else:
        vertices, faces = load_with_trimesh(file)
    if not len(vertices):
        raise InputError(f"{file}: no vertices; expected {what}")
    if not len(faces):
        raise InputError(
            f"{file}: {len(vertices)} points without faces; expected {what}, not a point cloud"
        )
    check_finite(file, vertices)
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise InputError(
            f"{file}: expected face indices in 0..{len(vertices) - 1}, "
            f"got {faces.min()}..{faces.max()}"
        )
    if suffix == ".stl":
        vertices, faces = _joined(vertices, faces)
    return trimesh.Trimesh(vertices, faces, process=False, validate=False)


def _joined(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mesh with equal vertices joined, each where it is first. 0 and -0 are equal."""
    # Not with trimesh, which also joins what is nearer than 1e-8, in whatever units.
    order = np.lexsort(vertices.T)  # stable; np.unique takes four times as long
    new = np.ones(len(vertices), dtype=bool)
    new[1:] = (vertices[order[1:]] != vertices[order[:-1]]).any(1)
    first = np.empty_like(order)
    first[order] = order[new][np.cumsum(new) - 1]
    kept = np.zeros(len(vertices), dtype=bool)
    kept[order[new]] = True
    return vertices[kept], (np.cumsum(kept) - 1)[first[faces]]


def load_with_trimesh(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (v, 3) float64 and faces (f, 3) int64 of a file trimesh knows, parts put together.

    Raises:
        InputError: trimesh cannot read it.
    """
    kind = file.suffix.lower().lstrip(".")
    try:
        with file.open("rb") as stream, _quiet_trimesh(), np.errstate(all="ignore"):
            loaded = trimesh.load(stream, file_type=kind, process=False, maintain_order=True)
        parts = list(loaded.geometry.values()) if isinstance(loaded, trimesh.Scene) else [loaded]
        vertices, faces, offset = [np.empty((0, 3))], [np.empty((0, 3), np.int64)], 0
        for part in parts:
            corner = np.asarray(getattr(part, "vertices", np.empty((0, 3))), dtype=np.float64)
            vertices.append(corner)
            faces.append(np.asarray(getattr(part, "faces", []), np.int64).reshape(-1, 3) + offset)
            offset += len(corner)
        return np.concatenate(vertices), np.concatenate(faces)
    except Exception as error:  # a general loader may raise anything on a malformed file
        reason = f"{type(error).__name__}: {error}"[:120]
        raise InputError(f"{file}: expected a valid {kind.upper()} file ({reason})") from error


@contextmanager
def _quiet_trimesh() -> Iterator[None]:
    """Keep trimesh from logging tracebacks of what becomes one line of ours anyway."""
    logger = trimesh.util.log
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def check_finite(file: str | os.PathLike[str], points: np.ndarray) -> None:
    """Raises InputError with the number of rows that hold a NaN or an infinity, if any."""
    bad = int((~np.isfinite(points)).any(1).sum())
    if bad:
        raise InputError(
            f"{file}: expected finite coordinates, got NaN or infinity in {bad} of "
            f"{len(points)} points"
        )


def mesh_arrays(
    vertices: npt.ArrayLike, faces: npt.ArrayLike, name: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of a mesh, (v, 3) float64 and (f, 3) integers, once they are known to fit.

    Args:
        vertices, faces: as the caller got them; either may be empty.
        name: of the argument that they are part of, for the messages.

    Raises:
        ValueError: a shape is wrong, or an index is out of range.
    """
    within = f"{name}: " if name else ""
    corner, index = np.asarray(vertices, dtype=np.float64), np.asarray(faces)
    if corner.ndim != 2 or corner.shape[1] != 3:
        raise ValueError(f"{within}vertices: expected (v, 3), got {corner.shape}")
    if index.ndim != 2 or index.shape[1] != 3:
        raise ValueError(f"{within}faces: expected (f, 3), got {index.shape}")
    if not len(index):
        return corner, index.astype(np.int64)
    if index.dtype.kind not in "iu":
        raise ValueError(f"{within}faces: expected integers, got {index.dtype}")
    if index.min() < 0 or index.max() >= len(corner):
        raise ValueError(
            f"{within}faces: expected indices below {len(corner)}, the number of vertices, got "
            f"{index.min()} to {index.max()}"
        )
    return corner, index


def write_mesh(
    path: str | os.PathLike[str],
    vertices: npt.ArrayLike,
    faces: npt.ArrayLike,
    normals: npt.ArrayLike | None = None,
) -> None:
    """Write a binary little-endian PLY: the same mesh gives the same bytes, always.

    Positions are stored as float64, so that a vertex on the surface stays on it whatever the
    position and the units; normals as float32, indices as int32. The file is written beside its
    final name and renamed, so that a reader never sees half of it.

    Args:
        path: the file to make or to replace.
        vertices: (v, 3) positions.
        faces: (f, 3) indices into `vertices`.
        normals: (v, 3) unit normals, or None to leave them out.

    Raises:
        ValueError: a shape is wrong or an index is out of range.
        OSError: the directory cannot be written.
    """
    corner, index = mesh_arrays(vertices, faces)
    fields: list[tuple[str, str, tuple[int, ...]]] = [("xyz", "<f8", (3,))]
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(corner)}",
        *(f"property double {axis}" for axis in "xyz"),
    ]
    if normals is not None:
        if np.shape(normals) != corner.shape:
            raise ValueError(f"normals: expected {corner.shape}, got {np.shape(normals)}")
        fields.append(("normal", "<f4", (3,)))
        header += [f"property float n{axis}" for axis in "xyz"]
    header += [f"element face {len(index)}", "property list uchar int vertex_indices", "end_header"]

    rows = np.zeros(len(corner), np.dtype(fields))
    rows["xyz"] = corner
    if normals is not None:
        rows["normal"] = np.asarray(normals)
    triangles = np.zeros(len(index), np.dtype([("n", "u1"), ("index", "<i4", (3,))]))
    triangles["n"], triangles["index"] = 3, index

    blob = ("\n".join(header) + "\n").encode("ascii") + rows.tobytes() + triangles.tobytes()
    write_whole(Path(path), lambda stream: stream.write(blob))
