"""Mutated files for every reader: typed errors only, bounded memory, and no code is run.

    python tests/fuzz/fuzz_readers.py --cases 100000

Case i of a format is a valid file with a few mutations, chosen by ``(seed, format, i)``. A reader
has to return, or to raise InputError; not for want of memory, of which a file of a few kilobytes
needs next to none; and nothing may start a process, open a socket or a file to write meanwhile.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import driver
import numpy as np
import torch
from torch import nn

from levelset_ext.data import read_mesh, read_points
from levelset_ext.data.images import read_cifar_binary, read_cifar_pickle, read_idx
from levelset_ext.errors import InputError
from levelset_ext.recipes.classifiers import _read_state
from levelset_ext.recipes.files import load_checkpoint, read_json

HEADROOM = 256 << 20  # bytes a worker may map beyond what it has when it begins
PEAK = 8 << 20, 64  # what a reader may allocate: so much, and so many times the file
TRACED = 40  # one case in so many is measured
SECONDS = 10.0  # of processor time for one file


# --- valid files ----------------------------------------------------------------------------------

_VERTICES = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0.5]], np.float32)
_FACES = [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 4)]


def _ply(form: str, polygons: bool = False, strips: bool = False) -> bytes:
    faces = [(0, 1, 4, 2), *_FACES] if polygons else list(_FACES)
    strip = [0, 1, 2, -1, 1, 2, 4, 3, -1]
    header = [
        "ply", f"format {form} 1.0", "comment a test", "element vertex 5",
        "property float x", "property float y", "property float z", "property uchar red",
    ]  # fmt: skip
    header += (
        ["element tristrips 1", "property list int int vertex_indices"]
        if strips
        else [f"element face {len(faces)}", "property list uchar int vertex_indices"]
    )
    head = ("\n".join([*header, "end_header"]) + "\n").encode()
    lists = [strip] if strips else faces
    if form == "ascii":
        rows = [f"{x} {y} {z} 7" for x, y, z in _VERTICES]
        rows += [" ".join(map(str, (len(f), *f))) for f in lists]
        return head + ("\n".join(rows) + "\n").encode()
    order = "<" if form == "binary_little_endian" else ">"
    body = b"".join(struct.pack(order + "fffB", *v, 7) for v in _VERTICES.tolist())
    for f in lists:
        body += struct.pack(order + ("i" if strips else "B") + "i" * len(f), len(f), *f)
    return head + body


def _obj() -> bytes:
    rows = ["# a test", *(f"v {x} {y} {z}" for x, y, z in _VERTICES), "vn 0 0 1"]
    return "\n".join([*rows, *(f"f {a + 1} {b + 1}//1 {c + 1}" for a, b, c in _FACES)]).encode()


def _off() -> bytes:
    rows = ["OFF", "# a test", f"5 {len(_FACES)} 0", *(f"{x} {y} {z}" for x, y, z in _VERTICES)]
    return "\n".join([*rows, *(f"3 {a} {b} {c}" for a, b, c in _FACES)]).encode()


def _stl(binary: bool) -> bytes:
    corners = _VERTICES[np.array(_FACES)]
    if binary:
        rows = [struct.pack("<12fH", 0, 0, 1, *c.flatten().tolist(), 0) for c in corners]
        return b"a test".ljust(80) + struct.pack("<I", len(rows)) + b"".join(rows)
    text = ["solid test"]
    for c in corners:
        text += ["facet normal 0 0 1", "outer loop", *(f"vertex {x} {y} {z}" for x, y, z in c)]
        text += ["endloop", "endfacet"]
    return "\n".join([*text, "endsolid test"]).encode()


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _idx(*shape: int) -> bytes:
    head = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    return head + bytes(k % 10 for k in range(int(np.prod(shape))))


def _cifar(protocol: int) -> bytes:
    entries = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [3, 7], b"batch_label": b"one"}
    return pickle.dumps(entries, protocol)


class _Trap:
    """Unpickled by a careless reader, it writes a file."""

    def __reduce__(self) -> Any:
        return os.mkdir, (f"{tempfile.gettempdir()}/levelset-fuzz-trap",)


def _saved(content: Any, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    data = stream.getvalue()
    if not zipped:  # its names of storages are addresses, another one every time
        names = sorted(set(re.findall(rb"\d{14,15}", data)))
        for k, name in enumerate(names):
            data = data.replace(name, b"%0*d" % (len(name), k))
    return data


def _checkpoints() -> list[bytes]:
    state = {"kind": "fuzz", "state": {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, "n": 3}
    whole = torch.arange(12.0)
    views = OrderedDict(a=whole[2:8].view(2, 3).mT, b=whole.half(), c=nn.Parameter(torch.ones(1)))
    return [
        _saved({"kind": "fuzz", "net": views, "step": torch.tensor(3), "size": whole.shape}),
        _saved(state),
        _saved(state, zipped=False),
        _saved({**state, "trap": _Trap()}),
        _saved({**state, "trap": _Trap()}, zipped=False),
    ]


_CLOUD = np.arange(15, dtype=np.float32).reshape(5, 3)
_TEXT = b"# x y z\n0 0 0\n1.5,2,3\n-1e-3 4 5 0 0 1\n"
_BINARY = "binary_little_endian"

# format: (suffix, reader, valid files)
FORMATS: dict[str, tuple[str, Callable[[Path], Any], Callable[[], list[bytes]]]] = {
    "ply ascii": (".ply", read_points, lambda: [_ply("ascii"), _ply("ascii", polygons=True)]),
    "ply binary": (
        ".ply",
        read_points,
        lambda: [_ply(_BINARY), _ply("binary_big_endian"), _ply(_BINARY, polygons=True)],
    ),
    "ply mesh": (
        ".ply",
        read_mesh,
        lambda: [
            _ply(form, polygons, strips)
            for form in ("ascii", _BINARY)
            for polygons, strips in ((False, False), (True, False), (False, True))
        ],
    ),
    "obj": (".obj", read_points, lambda: [_obj()]),
    "obj mesh": (".obj", read_mesh, lambda: [_obj()]),
    "off": (".off", read_points, lambda: [_off()]),
    "off mesh": (".off", read_mesh, lambda: [_off()]),
    "stl": (".stl", read_points, lambda: [_stl(True), _stl(False)]),
    "stl mesh": (".stl", read_mesh, lambda: [_stl(True), _stl(False)]),
    "xyz": (".xyz", read_points, lambda: [_TEXT, b"0 0 0\n1 1 1\n"]),
    "pts": (".pts", read_points, lambda: [b"2\n0 0 0\n1 1 1\n"]),
    "npy": (
        ".npy",
        read_points,
        lambda: [
            _npy(_CLOUD),
            _npy(_CLOUD.astype(np.int16).T.copy().T),
            _npy(np.array([[_Trap()] * 3], dtype=object)),
        ],
    ),
    "idx": ("", read_idx, lambda: [_idx(4, 3, 3), _idx(7), gzip.compress(_idx(4, 3, 3), mtime=0)]),
    "cifar binary": (".bin", read_cifar_binary, lambda: [bytes(3073), bytes(2 * 3073)]),
    "cifar pickle": (
        "",
        read_cifar_pickle,
        lambda: [*(_cifar(p) for p in (0, 2, 4, 5)), pickle.dumps({b"data": _Trap()}, 2)],
    ),
    "checkpoint": (".pt", lambda path: load_checkpoint(path, "fuzz"), _checkpoints),
    "weights": (".pt", _read_state, _checkpoints),
    "json": (".json", read_json, lambda: [b'{"kind": "attack", "settings": {"eps": [0.1, 2]}}']),
}


# --- mutations ------------------------------------------------------------------------------------

_WORDS = [
    b"-1", b"0", b"1", b"255", b"65536", b"2147483648", b"4294967295", b"9223372036854775808",
    b"1e400", b"-1e400", b"nan", b"inf", b"1e-320", b"9" * 400, b"0x10", b"", b"3.5",
    b"\xff", b"_1",
]  # fmt: skip
_NUMBERS = [
    0,
    1,
    -1,
    127,
    128,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
]


def mutated(source: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """One to six changes of bytes, numbers, words and lengths."""
    data = bytearray(source)
    # Headers are where lengths are: half of all changes are made there.
    for _ in range(draw.choice((1, 1, 2, 3, 6))):
        size = len(data)
        reach = size if draw.random() < 0.5 else min(size, 300)
        at = draw.randrange(reach) if reach else 0
        kind = draw.randrange(10)
        if kind == 0 and size:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and size:
            data[at] = draw.randrange(256)
        elif kind == 2:
            data[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 2, 4, 9))))
        elif kind == 3:
            del data[at : at + draw.choice((1, 2, 4, 16, 64))]
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            piece = bytes(data[at : at + draw.choice((1, 4, 16, 64, 256))])
            data[at:at] = piece * draw.choice((1, 1, 3, 20))
        elif kind == 6:
            width = draw.choice((1, 2, 4, 8))
            number = draw.choice(_NUMBERS) % (1 << 8 * width)
            data[at : at + width] = number.to_bytes(width, draw.choice(("little", "big")))
        elif kind == 7:
            words = bytes(data[: 1 << 12]).split(b" ")
            words[draw.randrange(len(words))] = draw.choice(_WORDS)
            data[: 1 << 12] = b" ".join(words)
        elif kind == 8:
            digits = [k for k in range(min(size, 2000)) if 48 <= data[k] < 58]
            if digits:
                k = draw.choice(digits)
                data[k : k + 1] = draw.choice(_WORDS)
        else:
            other = draw.choice(others)
            cut = draw.randrange(len(other)) if other else 0
            data[at:] = other[cut:]
        if len(data) > 1 << 16:
            del data[1 << 16 :]
    return bytes(data)


def repacked(source: bytes, draw: random.Random) -> bytes:
    """A zip file of torch's with another pickle inside, and all sums right: mutations of the whole
    are found out by their checksum."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = mutated(content, [content], draw)
            new.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def case_bytes(name: str, seed: int, number: int, files: list[bytes] | None = None) -> bytes:
    """The file of a case."""
    files = FORMATS[name][2]() if files is None else files
    draw = random.Random(f"{seed} {name} {number}")
    source = draw.choice(files)
    if source.startswith(b"PK") and draw.random() < 0.5:
        return repacked(source, draw)
    return mutated(source, files, draw)


# --- one reading ----------------------------------------------------------------------------------

_FORBIDDEN = {
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.mkdir", "os.remove", "os.rename",
    "subprocess.Popen", "socket.connect", "shutil.rmtree", "ctypes.dlopen", "webbrowser.open",
}  # fmt: skip
_reading = False
_seen: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _reading:
        return
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if event in _FORBIDDEN or writes:
        _seen.append(f"{event} {arguments!r}"[:200])
        raise RuntimeError(f"refused by the fuzzer: {event}")


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _late(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def read_once(
    reader: Callable[[Path], Any], path: Path, size: int, traced: bool
) -> tuple[bool, str]:
    """Whether the reader took the file, and what is wrong with how it ended ("" for nothing)."""
    global _reading
    _seen.clear()
    accepted, wrong = False, ""
    if traced:
        tracemalloc.start()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    _reading = True
    try:
        reader(path)
        accepted = True
    except InputError as error:
        if "MemoryError" in str(error) or "allocate" in str(error):
            wrong = f"asks for too much memory: {error}"
        elif "more than" in str(error) and f"{SECONDS} s" in str(error):
            wrong = f"hangs: {error}"
    except BaseException as error:
        wrong = f"{type(error).__name__}: {error}"[:300]
    finally:
        _reading = False
        signal.setitimer(signal.ITIMER_PROF, 0)
    if _seen:
        wrong = f"runs code: {_seen[0]}"
    if traced:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if not wrong and peak > PEAK[0] + PEAK[1] * size:
            wrong = f"allocates {peak} bytes for a file of {size}"
    return accepted, wrong


def prepare() -> None:
    """What a process needs before it reads: no code that the files bring, no endless readers."""
    sys.addaudithook(_audit)
    signal.signal(signal.SIGPROF, _late)
    np.seterr(all="ignore")


# --- the worker -----------------------------------------------------------------------------------


def work(job: driver.Job, journal: driver.Journal) -> tuple[int, int, list[dict[str, Any]]]:
    if not getattr(work, "ready", False):
        prepare()
        work.ready = True  # type: ignore[attr-defined]
    suffix, reader, make = FORMATS[job.target]
    files = make()
    accepted = 0
    failures: list[dict[str, Any]] = []
    kinds: set[str] = set()
    with tempfile.TemporaryDirectory(dir=driver.SCRATCH) as folder:
        path = Path(folder) / f"case{suffix}"
        for content in files:  # what a reader imports when it is first used
            path.write_bytes(content)
            read_once(reader, path, len(content), False)
        _limit_memory()
        for number in range(job.first, job.first + job.cases):
            journal.note(number)
            content = case_bytes(job.target, job.seed, number, files)
            path.write_bytes(content)
            took, wrong = read_once(reader, path, len(content), number % TRACED == 0)
            accepted += took
            kind = "".join(c for c in wrong if not c.isdigit())[:60]
            if wrong and kind not in kinds:
                kinds.add(kind)
                case = f"seed {job.seed}, case {number}"
                failures.append({"target": job.target, "case": case, "what": wrong})
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return job.cases, accepted, failures


if __name__ == "__main__":
    sys.exit(driver.main(__file__, work, list(FORMATS)))
