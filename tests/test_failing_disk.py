"""Disks that fill up or fail while a run is writing, and inputs that are gone when it goes on: a
clear error, and the last good checkpoint is still there."""

import errno
import io
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

import driver
import kill_runs

from levelset_ext.cli import main
from levelset_ext.errors import InputError
from levelset_ext.recipes.files import (
    load_checkpoint,
    prepare_folder,
    read_json,
    save_checkpoint,
    write_json,
)

FAILURES = [errno.ENOSPC, errno.EROFS, errno.EIO]
names = pytest.mark.parametrize("failure", FAILURES, ids=[errno.errorcode[f] for f in FAILURES])


class Disk:
    """Stands in for the disk under files that are opened to write: it has ``left`` bytes left in
    files whose names hold ``name``, and then fails."""

    def __init__(self, monkeypatch):
        self.left, self.name, self.failure = float("inf"), "", errno.ENOSPC
        opened = Path.open

        def open_(path, mode="r", *args, **kwargs):
            if "w" not in mode or self.name not in path.name:
                return opened(path, mode, *args, **kwargs)
            return io.BufferedWriter(_File(path, self))

        monkeypatch.setattr(Path, "open", open_)

    def take(self, count):
        self.left -= count
        if self.left < 0:
            raise OSError(self.failure, os.strerror(self.failure))


class _File(io.FileIO):
    def __init__(self, path, disk):
        super().__init__(path, "wb")
        self.disk = disk

    def write(self, content):
        self.disk.take(len(content))
        return super().write(content)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@names
@pytest.mark.parametrize("left", [0, 1000, 30_000])
def test_what_cannot_be_written_leaves_the_file_before(tmp_path, disk, left, failure):
    checkpoint, plain = tmp_path / "checkpoint.pt", tmp_path / "metrics.json"
    old = {"kind": "a", "x": torch.arange(5.0)}
    save_checkpoint(checkpoint, old)
    write_json(plain, {"step": 1})
    disk.left, disk.failure = left, failure
    with pytest.raises(OSError, match=r"checkpoint\.pt") as said:
        save_checkpoint(checkpoint, {"kind": "a", "x": torch.zeros(20_000)})
    assert said.value.errno == failure
    disk.left = left
    with pytest.raises(OSError, match=r"metrics\.json") as said:
        write_json(plain, {"step": list(range(20_000))})
    assert said.value.errno == failure
    assert torch.equal(load_checkpoint(checkpoint, "a")["x"], old["x"])
    assert read_json(plain) == {"step": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "metrics.json"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an undisturbed run of each command ends with."""
    found = {}
    for name in ("train", "reconstruct"):
        out = tmp_path_factory.mktemp("whole") / name
        kill_runs.COMMANDS[name].run(out)
        found[name] = kill_runs.results(out, kill_runs.COMMANDS[name])
    return found


@pytest.mark.parametrize("name", ["train", "reconstruct"])
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path, disk, whole, name):
    command, out = kill_runs.COMMANDS[name], tmp_path / "run"
    size = _size_of_a_checkpoint(command, out, disk)
    before = (out / "checkpoint.pt").read_bytes()
    assert 0 < len(before) <= size
    for _ in range(2):  # the disk is still full at the second attempt
        disk.left = size // 2
        with pytest.raises(OSError, match=r"No space left on device: '.*run/checkpoint\.pt'"):
            command.run(out)
        assert (out / "checkpoint.pt").read_bytes() == before
        assert kill_runs.whole_files(out) == ""
        assert not list(out.glob(".*"))
    disk.left = float("inf")
    command.run(out)
    assert kill_runs.results(out, command) == whole[name]


def _size_of_a_checkpoint(command, out, disk):
    """Runs until the disk has taken one checkpoint and not the second one."""
    disk.name, disk.left = "checkpoint.pt", 1
    with pytest.raises(OSError, match="checkpoint"):
        command.run(out)
    assert not (out / "checkpoint.pt").exists()
    size = 1 - int(disk.left)  # what it asked for
    disk.left = size + size // 2
    with pytest.raises(OSError, match="checkpoint"):
        command.run(out)
    return size


def test_the_command_line_says_it_in_one_line(tmp_path, disk, capfd):
    disk.name, disk.left = "checkpoint.pt", 100
    settings = ["--set", "checkpoint_every=2", "--set", "iters=1"]
    out = str(tmp_path / "run")
    arguments = ["train", "madry", "--limit", "40", "--batch", "20", "--steps", "4", "--out", out]
    assert main([*arguments, *settings]) == 1
    said = capfd.readouterr().err.splitlines()
    assert said[-1].startswith("levelset-ext train: [Errno 28] No space left on device: ")
    assert "Traceback" not in "".join(said)
    disk.left = float("inf")
    assert main([*arguments, *settings, "--resume"]) == 0


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, monkeypatch):
    def touch(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(InputError, match=r"expected a folder that can be written \(Read-only"):
        prepare_folder(tmp_path / "run")


@pytest.mark.parametrize("command", [["reconstruct"], ["curve"], ["train", "madry", "--data"]])
def test_an_input_that_is_gone_leaves_the_run_as_it_was(tmp_path, capfd, command):
    out, gone = tmp_path / "run", str(tmp_path / "scan.npy")
    out.mkdir()
    save_checkpoint(out / "checkpoint.pt", {"kind": "a"})
    write_json(out / "config.json", {"kind": "a"})
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([*command, gone, "--out", str(out), "--resume"]) == 2
    assert gone in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# --- kills ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(kill_runs.COMMANDS))
def test_killed_at_any_moment_a_run_goes_on_to_the_same_result(tmp_path, name):
    journal = driver.Journal(str(tmp_path / "journal"))
    assert kill_runs.work(driver.Job(name, 5, 3), journal) == (3, 3, [])


def test_half_a_file_and_another_result_are_noticed(tmp_path, monkeypatch):
    def half(path, write):
        content = io.BytesIO()
        write(content)
        with path.open("wb") as stream:
            for byte in content.getvalue():
                stream.write(bytes([byte]))
                stream.flush()

    content = {"rows": list(range(100_000))}
    command = kill_runs.Command(lambda out: _write(out, half, content), ())
    monkeypatch.setattr(kill_runs, "results", lambda out, command: {})
    monkeypatch.setitem(kill_runs.COMMANDS, "careless", command)
    journal = driver.Journal(str(tmp_path / "journal"))
    failures = kill_runs.work(driver.Job("careless", 0, 4), journal)[2]
    assert failures
    assert all("a.json is not whole" in failure["what"] for failure in failures)


def _write(out, write, content):
    out.mkdir(exist_ok=True)
    write(out / "a.json", lambda stream: stream.write(repr(content).replace("'", '"').encode()))
