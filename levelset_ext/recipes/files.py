"""The files of a run: JSON, checkpoints, and the folder they are in."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from levelset_ext.data.torch_files import read_torch_file
from levelset_ext.errors import InputError
from levelset_ext.whole_files import write_whole


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(plain(content), indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_whole(path, lambda stream: stream.write(text.encode()))


def plain(content: Any) -> Any:
    """Infinity and NaN, which JSON lacks, as the strings that float() reads back."""
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    return content


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected a JSON file written by this program ({error})"
        ) from None


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    # Into memory first: of a disk that is full torch's writer makes an error of its own.
    content = io.BytesIO()
    torch.save(state, content)
    write_whole(path, lambda stream: stream.write(content.getbuffer()))


@contextlib.contextmanager
def taking_up(path: Path) -> Iterator[None]:
    """Within it, entries of a checkpoint that are missing or do not fit are an InputError."""
    try:
        yield
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{path}: expected a checkpoint of this run ({reason})") from None


def load_checkpoint(path: Path, kind: str) -> dict[str, Any]:
    """A checkpoint of the given kind. Only tensors and plain values are unpickled, no code, and
    what a file promises has to be in it, see :mod:`levelset_ext.data.torch_files`."""
    state = read_torch_file(path, f"a {kind} checkpoint")
    named = state.get("kind") if isinstance(state, dict) else None
    if not isinstance(named, str) or named != kind:
        raise InputError(f"{path}: expected a {kind} checkpoint, got another file")
    return state


def kept_checkpoint(folder: Path, kind: str) -> dict[str, Any] | None:
    """The checkpoint.pt of a run of the given kind, or None where there is none yet."""
    path = folder / "checkpoint.pt"
    return load_checkpoint(path, kind) if path.exists() else None


def prepare_folder(path: Path) -> Path:
    """Makes a folder for results, or says in one line why it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{path}: expected a folder that can be written ({error.strerror or error})"
        ) from None
    for leftover in path.glob(".*.part"):
        leftover.unlink(missing_ok=True)  # of a run that was killed while writing
    return path
