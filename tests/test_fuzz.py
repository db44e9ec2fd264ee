"""A short run of every fuzz target, and that the fuzzers would notice what they look for.

`make soak` runs them for long; see tests/fuzz/.
"""

import ast
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(FOLDER))

pytest.importorskip("hypothesis")

import driver  # noqa: E402
import fuzz_geometry  # noqa: E402
import fuzz_ops  # noqa: E402
import fuzz_readers  # noqa: E402
import page  # noqa: E402

from levelset_ext.data import read_points, validate_cloud  # noqa: E402
from levelset_ext.data.images import read_cifar_pickle  # noqa: E402
from levelset_ext.data.meshes import read_ply  # noqa: E402
from levelset_ext.errors import InputError  # noqa: E402
from levelset_ext.geometry import (  # noqa: E402
    compare_meshes,
    estimate_coverage,
    sample_level_set,
)


def no_failures(script, targets, cases):
    said: list[str] = []
    jobs = [driver.Job(name, 3, cases) for name in targets]
    outcome = driver.run(str(FOLDER / script), jobs, said.append)
    assert not outcome.failures, json.dumps(outcome.failures, indent=1)
    assert set(outcome.done) == set(targets)
    assert min(outcome.done.values()) > 0
    return outcome


def test_ops():
    outcome = no_failures("fuzz_ops.py", list(fuzz_ops.TARGETS), 24)
    assert sum(outcome.accepted.values()) > outcome.total() / 4  # most calls are no refusals


def test_geometry():
    outcome = no_failures("fuzz_geometry.py", list(fuzz_geometry.TARGETS), 12)
    assert sum(outcome.accepted.values()) > outcome.total() / 5


def test_readers():
    outcome = no_failures("fuzz_readers.py", list(fuzz_readers.FORMATS), 100)
    assert 0.05 < sum(outcome.accepted.values()) / outcome.total() < 0.9


WORKER = """
import os, sys
sys.path.insert(0, {folder!r})
import driver

def work(job, journal):
    for number in range(job.first, job.first + job.cases):
        journal.note(number, "drawn")
        if job.target == "crashes" and number == 3:
            os.kill(os.getpid(), 11)
        if job.target == "hangs" and number == 2:
            while True:
                pass
    return job.cases, job.cases, []

driver.main(__file__, work, ["fine", "crashes", "hangs"])
"""


def test_a_crash_and_a_hang_are_findings_and_the_rest_goes_on(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(FOLDER)))
    monkeypatch.setattr(driver, "BUSY", 1.0)
    jobs = [driver.Job(name, 0, 5) for name in ("fine", "crashes", "hangs")]
    outcome = driver.run(str(script), jobs, lambda line: None)
    assert outcome.done == {"fine": 5, "crashes": 5, "hangs": 5}
    assert [f["target"] for f in outcome.failures] == ["crashes", "hangs"]
    assert "exit -11" in outcome.failures[0]["what"]
    assert "case 3 drawn" in outcome.failures[0]["case"]
    assert "no progress" in outcome.failures[1]["what"]


def test_the_reader_fuzzer_notices_code_memory_and_other_errors(tmp_path):
    path = tmp_path / "case"
    path.write_bytes(pickle.dumps(fuzz_readers._Trap()))
    script = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import fuzz_readers as f, pickle;"
        f"sys.addaudithook(f._audit); path = f.Path({str(path)!r});"
        "readers = [lambda p: pickle.loads(p.read_bytes()), lambda p: bytearray(1 << 26), "
        "lambda p: [][0], lambda p: p.read_bytes()];"
        "print([f.read_once(r, path, 60, True)[1] for r in readers])"
    )
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=driver.ROOT)
    code, memory, other, nothing = ast.literal_eval(said.stdout)
    assert code.startswith("runs code: os.mkdir")
    assert memory.startswith("allocates ")
    assert other.startswith("IndexError")
    assert nothing == ""


def test_the_page_has_the_counts_of_the_last_soak_run():
    text, soak = page.PAGE.read_text(), json.loads(page.SOAK.read_text())
    assert page.filled(text, soak) == text, "run tests/fuzz/page.py"
    assert f"| {soak['fuzz_ops']['cases']} |" in text


# --- what it has found ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["inf", "nan", "-1", "1e300"])
def test_ply_list_whose_length_is_no_number(tmp_path, length):
    file = tmp_path / "a.ply"
    header = "ply\nformat ascii 1.0\nelement face 1\nproperty list uchar int vertex_indices\n"
    file.write_text(f"{header}end_header\n{length} 0 1 2\n")
    with pytest.raises(InputError, match="truncated PLY: expected 1 rows"):
        read_ply(file)


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian"])
def test_ply_element_without_properties_may_promise_any_count(tmp_path, form):
    file = tmp_path / "a.ply"
    vertices = "element vertex 1\nproperty float x\nproperty float y\nproperty float z\n"
    header = f"ply\nformat {form} 1.0\nelement odd {2**62}\n{vertices}end_header\n"
    body = b"1 2 3\n" if form == "ascii" else np.array([1, 2, 3], "<f4").tobytes()
    file.write_bytes(header.encode() + body)
    assert read_points(file).tolist() == [[1.0, 2.0, 3.0]]


def shaped(count):
    """A pickle that asks numpy for an array of so many bytes."""
    ask = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(L%dL\ntS'b'\ntR." % count
    return b"\x80\x02" + ask


@pytest.mark.parametrize(
    "blob",
    [b"\x80\x02Nr\xff\xff\xff\x7f.", b"\x80\x02Np4000000000\n.", shaped(1 << 40)],
    ids=["memo entry", "memo entry in text", "array"],
)
def test_cifar_pickle_that_asks_for_memory(tmp_path, blob):
    import resource

    file = tmp_path / "data_batch_1"
    file.write_bytes(blob)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"CIFAR10 batch|pickled dict"):
        read_cifar_pickle(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB


def test_cifar_pickle_with_a_dtype_that_would_make_numpy_read_addresses(tmp_path):
    """Objects where the file holds bytes: numpy's own arrays take them as pointers."""
    whole = pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [3]}, 2)
    assert whole.count(b"X\x02\x00\x00\x00u1") == 1
    file = tmp_path / "data_batch_1"
    file.write_bytes(whole)
    assert read_cifar_pickle(file)[0].shape == (1, 3, 32, 32)
    for code in (b"O8", b"V8", b"M8", b"c8"):
        file.write_bytes(whole.replace(b"X\x02\x00\x00\x00u1", b"X\x02\x00\x00\x00" + code))
        with pytest.raises(InputError, match=f"asks for an array of '{code.decode()}'"):
            read_cifar_pickle(file)


def mesh(last, size):
    """A triangle whose last corner has this number, in a space that is so large."""
    return SimpleNamespace(vertices=size * np.eye(3), faces=np.array([[0, 1, last]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: validate_cloud(np.zeros((0, 3)), 0), "points: expected at least 1 points, got 0"),
        (lambda: sample_level_set(nn.Linear(2, 1), 3, (torch.zeros(2), torch.inf)), "box: expect"),
        (lambda: estimate_coverage(nn.Linear(2, 1), torch.full((3, 2), torch.nan)), "points: exp"),
        (lambda: estimate_coverage(nn.Linear(0, 1), torch.zeros(3, 0)), "points: expected"),
        (
            lambda: compare_meshes(mesh(3, 1.0), mesh(2, 1.0)),
            "mesh: faces: expected indices",
        ),
        (lambda: compare_meshes(mesh(2, 1.0), mesh(2, np.nan)), "truth: expected finite"),
    ],
)
def test_clouds_boxes_and_meshes_that_cannot_be_used_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
