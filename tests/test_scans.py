"""Reading, refusing, checking and normalising point clouds; writing and reading meshes."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from scipy.spatial import cKDTree

from levelset_ext.data import (
    Normalization,
    read_mesh,
    read_ply,
    read_points,
    synthetic_scan,
    validate_cloud,
    write_mesh,
)
from levelset_ext.errors import InputError

BOX = trimesh.creation.box()
CLOUD = np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32).astype(np.float64)


def ply(header: str, body: bytes, form: str = "binary_little_endian") -> bytes:
    return f"ply\nformat {form} 1.0\ncomment made by a test\n{header}end_header\n".encode() + body


def vertex_header(count: int, kind: str = "float") -> str:
    return f"element vertex {count}\n" + "".join(f"property {kind} {axis}\n" for axis in "xyz")


def text_body(points: np.ndarray) -> bytes:
    return "".join(" ".join(repr(float(v)) for v in p) + "\n" for p in points).encode()


# --- what is read ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("kind", ["float", "double"])
def test_ply_points(tmp_path: Path, form: str, kind: str) -> None:
    if form == "ascii":
        body = text_body(CLOUD)
    else:
        order = "<" if "little" in form else ">"
        body = CLOUD.astype(order + ("f4" if kind == "float" else "f8")).tobytes()
    path = tmp_path / "a.ply"
    path.write_bytes(ply(vertex_header(200, kind), body, form))
    points = read_points(path)
    assert points.dtype == np.float64
    assert np.array_equal(points, CLOUD)


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_ply_with_lists_of_all_kinds(tmp_path: Path, form: str) -> None:
    """An element before the vertices, a list inside them, mixed polygons, strips, a tail."""
    header = (
        "element camera 1\nproperty float view\nproperty list uchar int hits\n"
        "element vertex 4\nproperty uchar red\nproperty float x\nproperty list uchar short tags\n"
        "property float y\nproperty float z\n"
        "element face 2\nproperty list uchar int vertex_indices\nproperty uchar flag\n"
        "element tristrips 1\nproperty list int int vertex_indices\n"
        "element tail 1\nproperty double t\n"
    )
    corners = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    rows: list[list[tuple[str, float]]] = [[("f", 0.5), ("B", 2), ("i", 7), ("i", 8)]]
    for i, (x, y, z) in enumerate(corners):
        rows.append([("B", 9), ("f", x), ("B", i), *[("h", 5)] * i, ("f", y), ("f", z)])
    rows.append([("B", 3), ("i", 0), ("i", 2), ("i", 1), ("B", 1)])
    rows.append([("B", 4), ("i", 0), ("i", 1), ("i", 2), ("i", 3), ("B", 0)])
    rows.append([("i", 8), *[("i", v) for v in (0, 1, 2, 3, -1, 3, 2, 0)]])
    rows.append([("d", 0.25)])
    if form == "ascii":
        body = "\n".join(" ".join(str(v) for _, v in row) for row in rows).encode()
    else:
        order = "<" if "little" in form else ">"
        body = b"".join(struct.pack(order + c, v) for row in rows for c, v in row)
    path = tmp_path / "a.ply"
    path.write_bytes(ply(header, body, form))
    assert np.array_equal(read_points(path), np.array(corners, dtype=float))
    expected = [(0, 2, 1), (0, 1, 2), (0, 2, 3), (0, 1, 2), (2, 1, 3), (3, 2, 0)]
    assert read_mesh(path).faces.tolist() == [list(f) for f in expected]
    assert read_ply(path)["tail"]["t"][0] == 0.25

    for cut in (1, len(body) // 3, len(body) // 2):
        path.write_bytes(ply(header, body[:-cut].rstrip(b"0123456789.-"), form))
        with pytest.raises(InputError, match="truncated PLY"):
            read_points(path)


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".off", ".stl"])
def test_meshes_give_their_vertices(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"box{suffix}"
    BOX.export(path)
    points = read_points(path)
    assert len(points) == 8
    assert np.array_equal(np.unique(points, axis=0), np.unique(BOX.vertices, axis=0))
    mesh = read_mesh(path)
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e12])
def test_an_stl_of_any_size_has_equal_corners_joined(tmp_path: Path, scale: float) -> None:
    sphere = trimesh.creation.icosphere(2)
    corners = (scale * sphere.vertices[sphere.faces]).astype(np.float32)
    corners[:400][corners[:400] == 0] = -0.0  # equal to 0
    soup = trimesh.Trimesh(corners.reshape(-1, 3), np.arange(960).reshape(-1, 3), process=False)
    soup.export(tmp_path / "a.stl")
    mesh = read_mesh(tmp_path / "a.stl")
    assert np.array_equal(mesh.vertices[mesh.faces], corners)
    # In the order in which the file has them, each where it is first.
    seen = list(dict.fromkeys(map(tuple, corners.reshape(-1, 3).tolist())))
    assert mesh.vertices.tolist() == [list(corner) for corner in seen]
    assert len(seen) == 162
    assert mesh.is_watertight


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.xyz", "# scan\n0 1 2\n3 4 5\n\n"),
        ("a.txt", "0,1,2,255,0\n3,4,5,255,0\n"),
        ("a.asc", "// head\n0;1;2\n3;4;5"),
        ("a.pts", "2\n0 1 2 9 9\n3 4 5 9 9\n"),
        ("a.obj", "o thing\nv 0 1 2\nv 3 4 5 1.0\nvn 0 0 1\n"),
        ("a.off", "OFF\n# cloud\n2 0 0\n0 1 2\n3 4 5\n"),
        ("a.OFF", "COFF 2 0 0\n0 1 2 9 9 9 9\n3 4 5 9 9 9 9\n"),
    ],
)
def test_text_points(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert read_points(path).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("name", ["a.xyz", "a.off", "a.obj"])
def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path, name: str) -> None:
    text = {"a.xyz": "0 1 2\n3 4 5\n", "a.off": "OFF\n2 0 0\n0 1 2\n3 4 5\n"}
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.get(name, "v 0 1 2\nv 3 4 5\n").encode())
    assert read_points(tmp_path / name).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "i8", "u1", "f2"])
def test_npy_points(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "a.npy"
    array = np.arange(12).reshape(4, 3).astype(dtype)
    np.save(path, np.asfortranarray(array))
    assert np.array_equal(read_points(path), array.astype(np.float64))


def test_two_dimensions_on_request(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("0 1\n2 3\n")
    assert read_points(tmp_path / "a.xyz", dim=None).shape == (2, 2)
    assert read_points(tmp_path / "a.xyz", dim=2).shape == (2, 2)
    with pytest.raises(InputError, match="dimension 3, got dimension 2"):
        read_points(tmp_path / "a.xyz")


# --- what is refused ------------------------------------------------------------------------


def _bad_files() -> dict[str, tuple[bytes, str]]:
    full = CLOUD.astype("<f4").tobytes()
    nan = CLOUD.copy()
    nan[3, 1], nan[7, 2] = np.nan, np.inf
    prose = b"It was a dark and stormy night;\nthe rain fell in torrents.\n"
    faces = "element face 2\nproperty list uchar int vertex_indices\n"
    stl = BOX.export(file_type="stl")
    assert isinstance(stl, bytes)
    return {
        "empty.ply": (b"", "empty \\(0 bytes\\)"),
        "prose.ply": (prose, "not a PLY file"),
        "prose.xyz": (prose, "line 1: expected at least 3 numbers"),
        "header.xyz": (
            b"x y z\n" + text_body(CLOUD),
            "line 1: expected at least 3 numbers, got .x y z. \\(a header line",
        ),
        "commas.xyz": (b"1,5 2,5 3,5\n", "got commas in '1,5 2,5 3,5'"),
        "prose.txt": (prose, "line 1"),
        "prose.obj": (prose, "no vertex lines"),
        "prose.off": (prose, "not an OFF file"),
        "prose.stl": (prose, "STL|no points"),
        "prose.npy": (prose, "NPY"),
        "notes.md": (prose, "unknown extension '.md'"),
        "none.ply": (ply(vertex_header(0), b""), "no points"),
        "comment.xyz": (b"# nothing here\n", "no points"),
        "none.off": (b"OFF\n0 0 0\n", "no points"),
        "nan.ply": (ply(vertex_header(200), nan.astype("<f4").tobytes()), "in 2 of 200 points"),
        "nan.xyz": (text_body(nan), "in 2 of 200 points"),
        "cut.ply": (ply(vertex_header(200), full[:-1]), "expected 200 rows .* got 199"),
        "half.ply": (ply(vertex_header(200), full[:1200]), "expected 200 rows .* got 100"),
        "big.ply": (
            ply(vertex_header(200), CLOUD.astype(">f4").tobytes()[:1200], "binary_big_endian"),
            "expected 200 rows .* got 100",
        ),
        "ascii.ply": (ply(vertex_header(200), text_body(CLOUD[:100]), "ascii"), "got 100"),
        "body.ply": (ply(vertex_header(2), b"0 0 0\n0 oops 0\n", "ascii"), "numbers only"),
        "nobody.ply": (ply(vertex_header(200), b""), "got 0"),
        "nobody-ascii.ply": (ply(vertex_header(200), b"", "ascii"), "got 0"),
        "huge.ply": (ply(vertex_header(10**15), full), "got 200"),
        "list.ply": (
            ply(vertex_header(2) + faces, bytes(24) + struct.pack("<B3i", 255, 0, 1, 0)),
            "'face'",
        ),
        "flat.ply": (
            ply("element vertex 2\nproperty float x\nproperty float y\n", bytes(16)),
            "x, y, z",
        ),
        "faces.ply": (ply(faces.replace("2", "0"), b""), "element 'vertex'"),
        "head.ply": (b"ply\nformat ascii 1.0\nelement vertex 3\n", "end_header"),
        "type.ply": (ply("element vertex 1\nproperty quaternion x\n", b""), "header line"),
        "form.ply": (ply(vertex_header(1), bytes(12), "utf8"), "expected format"),
        "neg.ply": (ply("element vertex -4\n", b""), "header line"),
        "flat.xyz": (b"0 1\n2 3\n", "dimension 3, got dimension 2"),
        "ragged.xyz": (b"0 1 2\n3 4\n", "line 2"),
        "one.xyz": (b"17\n", "line 1"),
        "short.pts": (b"3\n0 0 0\n1 1 1\n", "expected 3 points, got 2"),
        "short.off": (b"OFF\n3 0 0\n0 0 0\n1 1 1\n", "expected 3 vertices, got 2"),
        "flat.obj": (b"v 0 1\n", "line 1"),
        "cut.stl": (stl[:-40], "STL|no points"),
    }


@pytest.mark.parametrize("name", sorted(_bad_files()))
def test_bad_file(tmp_path: Path, name: str) -> None:
    content, message = _bad_files()[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_points(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[0, 1, None]], dtype=object), "pickled or object"),
        (np.zeros((4, 3), dtype=complex), "complex128"),
        (np.zeros((4, 3), dtype=bool), "bool"),
        (np.array([["a", "b", "c"]]), "dtype <U1"),
        (np.zeros(12), r"shape \(12,\)"),
        (np.zeros((2, 2, 3)), r"shape \(2, 2, 3\)"),
        (np.zeros((4, 2)), "dimension 3, got dimension 2"),
        (np.zeros((0, 3)), "no points"),
        (np.full((4, 3), np.nan), "in 4 of 4 points"),
        (np.zeros(4, dtype=[("x", "f4")]), "dtype"),
    ],
)
def test_bad_npy(tmp_path: Path, array: np.ndarray, message: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, array)
    with pytest.raises(InputError, match=message) as caught:
        read_points(path)
    assert str(path) in str(caught.value)


def test_npy_that_lies_about_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, CLOUD)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(InputError, match="NPY"):
        read_points(path)
    path.write_bytes(whole.replace(b"(200, 3)", b"(9999999999, 3)"))
    with pytest.raises(InputError, match="NPY"):
        read_points(path)
    path.write_bytes(pickle.dumps(CLOUD))
    with pytest.raises(InputError, match="pickled"):
        read_points(path)


def test_nothing_but_the_message(tmp_path: Path) -> None:
    """The loader underneath logs a traceback for a bad normal; none of it may be shown."""
    text = str(BOX.export(file_type="stl_ascii")).replace("normal", "normal oops", 1)
    (tmp_path / "a.stl").write_text(text)
    (tmp_path / "b.stl").write_text(text.replace("vertex", "vertex oops", 1))
    code = (
        "from levelset_ext.data import read_points\n"
        "print(len(read_points('a.stl')))\n"
        "try: read_points('b.stl')\n"
        "except ValueError as error: print(error)\n"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert lines[0] == "8"
    assert lines[1].startswith("b.stl: expected a valid STL file")
    assert len(lines) == 2


def test_not_a_regular_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_points(tmp_path / "missing.ply")
    with pytest.raises(InputError, match="is a directory"):
        read_points(tmp_path)
    with pytest.raises(InputError, match="/dev/null: is not a regular file"):
        read_points("/dev/null")
    os.mkfifo(tmp_path / "pipe.ply")
    with pytest.raises(InputError, match="not a regular file"):
        read_points(tmp_path / "pipe.ply")
    with pytest.raises(InputError, match=r"cannot be opened|no such file"):
        read_points("null\0byte.ply")


def test_a_mesh_of_several_materials_and_polygons_is_one(tmp_path: Path) -> None:
    sphere = trimesh.creation.icosphere(2)
    lines = ["mtllib a.mtl", "vt 0 0", "vn 0 0 1"]
    lines += [f"v {x!r} {y!r} {z!r} 0.5 0.5 0.5" for x, y, z in sphere.vertices.tolist()]
    for k, (a, b, c) in enumerate((sphere.faces + 1).tolist()):
        lines += [f"usemtl {k % 3}", f"o part{k % 2}"] if k % 50 == 0 else []
        lines.append(f"f {a}/1/1 {b}//1 {c}/1" if k % 2 else f"f {a - 163} {b} \\\n {c}")
    (tmp_path / "a.obj").write_text("\n".join(lines))
    mesh = read_mesh(tmp_path / "a.obj")
    assert np.array_equal(mesh.vertices, sphere.vertices)
    assert np.array_equal(mesh.faces, sphere.faces)
    assert mesh.is_watertight
    (tmp_path / "b.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4\nl 1 2\n")
    assert read_mesh(tmp_path / "b.obj").faces.tolist() == [[0, 1, 2], [0, 2, 3]]
    (tmp_path / "c.obj").write_text(
        "v 0 0 0 # a\nv 1 0 0#b\nv 1 1 0\nf 1 2 3 # c\n#f 4\nf 1/1 3 2#"
    )
    assert read_mesh(tmp_path / "c.obj").faces.tolist() == [[0, 1, 2], [0, 2, 1]]
    off = "COFF\n# a square\n4 1 0\n0 0 0 255 0 0\n1 0 0\n1 1 0\n0 1 0\n\n4 0 1 2 3 0.5 0.5 0.5\n"
    (tmp_path / "b.off").write_text(off)
    assert read_mesh(tmp_path / "b.off").faces.tolist() == [[0, 1, 2], [0, 2, 3]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.off", "OFF\n3 2 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "expected 2 faces, got 1"),
        ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1\n", "line 6: expected a count"),
        ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", r"indices in 0\.\.2"),
        ("a.off", "OFF\n3 -1 0\n0 0 0\n", "line 2: expected the counts"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 0 1 2\n", "line 4: expected 'f a b c'"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf -4 -2 -1\n", "line 4: expected 'f a b c'"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf a b c\n", "line 4: expected 'f a b c'"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf\n", "line 4: expected 'f a b c'"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", r"indices in 0\.\.2, got 0\.\.8"),
    ],
)
def test_faces_that_cannot_be(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_mesh(tmp_path / name)


@pytest.mark.parametrize("line", ["1,5;2,5;3,5", "1,5 2,5 3,5", "1,5\t2\t3"])
def test_decimal_commas_are_not_misread(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(f"{line}\n")
    with pytest.raises(InputError, match="line 1: expected decimal points, got commas"):
        read_points(tmp_path / "a.xyz")


@pytest.mark.parametrize("line", ["1.5,2,3", "1,2,3", "1, 2, 3", "1;2;3", "1.0,2.0,3.0 255,0,0"])
def test_commas_between_numbers_are_fine(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(f"{line}\n")
    assert read_points(tmp_path / "a.xyz").shape == (1, 3)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_comments_of_a_ply_may_be_in_any_language(end: str, tmp_path: Path) -> None:
    header = [
        "ply",
        "format ascii 1.0",
        "comment scanned by \u00c5sa \u2028 \u5c45",
        "element vertex 1",
    ]
    header += [f"property float {axis}" for axis in "xyz"] + ["end_header", "1 2 3", ""]
    (tmp_path / "a.ply").write_bytes(end.join(header).encode())
    assert read_points(tmp_path / "a.ply").tolist() == [[1, 2, 3]]


def test_bad_meshes(tmp_path: Path) -> None:
    path = tmp_path / "a.ply"
    path.write_bytes(ply(vertex_header(200), CLOUD.astype("<f4").tobytes()))
    with pytest.raises(InputError, match="200 points without faces"):
        read_mesh(path)
    header = vertex_header(3) + "element face 1\nproperty list uchar int vertex_indices\n"
    path.write_bytes(ply(header, b"0 0 0 1 0 0 0 1 0\n3 0 1 3", "ascii"))
    with pytest.raises(InputError, match=r"indices in 0\.\.2, got 0\.\.3"):
        read_mesh(path)
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\n")
    with pytest.raises(InputError, match=r"a\.obj"):
        read_mesh(tmp_path / "a.obj")
    (tmp_path / "a.xyz").write_text("0 0 0\n")
    with pytest.raises(InputError, match="unknown extension"):
        read_mesh(tmp_path / "a.xyz")
    with pytest.raises(InputError, match="no such file"):
        read_mesh(tmp_path / "b.ply")


# --- checks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_validate_cloud(scale: float, offset: float) -> None:
    def placed(points: np.ndarray) -> np.ndarray:
        return (points + offset) * scale

    summary = validate_cloud(placed(CLOUD))
    assert (summary.count, summary.distinct, summary.rank) == (200, 200, 3)
    assert not summary.coplanar
    plane = CLOUD @ np.array([[1, 2, 0], [0, 1, 1], [0, 0, 0]])
    assert validate_cloud(placed(plane)).coplanar
    assert validate_cloud(np.concatenate([placed(CLOUD)] * 2)).distinct == 200
    line = np.outer(CLOUD[:, 0], [1, -2, 0.3])
    with pytest.raises(InputError, match=r"scan\.ply: .*on one line"):
        validate_cloud(placed(line), name="scan.ply")
    with pytest.raises(InputError, match="all 200 equal"):
        validate_cloud(placed(np.tile(CLOUD[:1], (200, 1))))


def test_validate_cloud_refuses() -> None:
    with pytest.raises(InputError, match="at least 100 points, got 99"):
        validate_cloud(CLOUD[:99])
    assert validate_cloud(CLOUD[:10], minimum=10).count == 10
    with pytest.raises(InputError, match=r"\(n, 3\), got shape \(200, 2\)"):
        validate_cloud(CLOUD[:, :2])
    assert validate_cloud(CLOUD[:, :2], dim=2).rank == 2
    with pytest.raises(InputError, match="in 1 of 200"):
        validate_cloud(np.where(np.arange(600).reshape(200, 3) == 5, np.nan, CLOUD))
    with pytest.raises(InputError, match="1e150"):
        validate_cloud(CLOUD * 1e200)
    with pytest.raises(InputError, match="dtype"):
        validate_cloud(CLOUD.astype(complex))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_normalization(scale: float, offset: float) -> None:
    points = CLOUD * scale + offset * scale
    norm = Normalization.fit(points)
    unit = norm.to_unit(points)
    assert np.abs(unit).max() == pytest.approx(0.9, abs=1e-9)
    assert np.allclose(unit.max(0) + unit.min(0), 0, atol=1e-9)
    assert np.allclose(norm.to_input(unit), points, rtol=4e-16, atol=1e-12 * scale)
    # A tiny shape far away keeps the digits float64 has there.
    assert np.allclose(unit, Normalization.fit(CLOUD).to_unit(CLOUD), atol=1e-9)
    with pytest.raises(ValueError, match="extent above 0"):
        Normalization.fit(np.ones((5, 3)))


# --- the synthetic scan ---------------------------------------------------------------------


def test_synthetic_scan() -> None:
    scan = synthetic_scan(points=4000, seed=1)
    assert scan.points.shape == (4000, 3)
    assert validate_cloud(scan.points).rank == 3
    assert np.array_equal(scan.points, synthetic_scan(points=4000, seed=1).points)
    assert not np.array_equal(scan.points, synthetic_scan(points=4000, seed=2).points)
    truth = scan.truth
    assert truth.is_watertight
    assert truth.volume > 0
    assert (truth.body_count, truth.euler_number) == (1, 0)  # one piece with one handle
    diagonal = float(np.linalg.norm(truth.extents))
    surface = truth.sample(20_000, seed=0)
    off = cKDTree(truth.sample(400_000, seed=1)).query(scan.points)[0] / diagonal
    assert np.median(off) < 2e-3
    assert off.max() < 1e-2
    gap = cKDTree(scan.points).query(surface)[0] / diagonal
    assert 0.02 < (gap > 0.04).mean() < 0.2  # some of the surface was not seen
    with pytest.raises(ValueError, match="points"):
        synthetic_scan(points=0)
    with pytest.raises(ValueError, match="noise"):
        synthetic_scan(points=10, noise=-1.0)


# --- writing --------------------------------------------------------------------------------


def test_write_mesh(tmp_path: Path) -> None:
    vertices = np.asarray(BOX.vertices) + 1e6 + 1e-7
    normals = np.asarray(BOX.vertex_normals)
    path = tmp_path / "mesh.ply"
    path.write_text("an older file")
    write_mesh(path, vertices, BOX.faces, normals)
    first = hashlib.sha256(path.read_bytes()).hexdigest()
    write_mesh(path, vertices, BOX.faces, normals)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == first
    assert [p.name for p in tmp_path.iterdir()] == ["mesh.ply"]
    mesh = read_mesh(path)
    assert np.array_equal(mesh.vertices, vertices)
    assert np.array_equal(mesh.faces, BOX.faces)
    other = trimesh.load(path, process=False)
    assert isinstance(other, trimesh.Trimesh)
    assert np.array_equal(other.vertices, vertices)
    assert np.allclose(other.vertex_normals, normals, atol=1e-6)
    write_mesh(path, vertices, BOX.faces)
    assert np.array_equal(read_points(path), vertices)
    write_mesh(path, np.empty((0, 3)), np.empty((0, 3), int), np.empty((0, 3)))
    with pytest.raises(InputError, match="no vertices"):
        read_mesh(path)


def test_write_mesh_refuses(tmp_path: Path) -> None:
    path = tmp_path / "mesh.ply"
    with pytest.raises(ValueError, match="vertices: expected"):
        write_mesh(path, np.zeros((4, 2)), BOX.faces)
    with pytest.raises(ValueError, match="faces: expected indices below 7"):
        write_mesh(path, BOX.vertices[:7], BOX.faces)
    with pytest.raises(ValueError, match="normals: expected"):
        write_mesh(path, BOX.vertices, BOX.faces, np.zeros((3, 3)))
    with pytest.raises(FileNotFoundError):
        write_mesh(tmp_path / "no" / "mesh.ply", BOX.vertices, BOX.faces)
    assert not list(tmp_path.iterdir())
