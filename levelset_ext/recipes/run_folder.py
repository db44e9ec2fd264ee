"""The folder of a run: begun afresh, gone on with, or found finished.

Every run keeps ``config.json``, written before anything else, which says what the run is of, and
``metrics.json``, written last: a folder with it holds a finished run.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from levelset_ext.errors import InputError
from levelset_ext.recipes.files import plain, prepare_folder, read_json, write_json

__all__ = ["begin_run", "check_apart", "check_own_files", "digest", "network_digest"]


def begin_run(
    out: Path,
    header: dict[str, Any],
    *,
    results: Sequence[str],
    what: str,
    same: str,
    named: str | None = None,
    resume: bool,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """Makes ``out`` the folder of the run that ``header`` describes.

    Args:
        out: folder, made if missing. Without ``resume`` a run of the same kind is removed.
        header: contents of config.json: "kind", "settings" and whatever else names the run.
        results: names of the other files and folders of such a run, beside metrics.json.
        what: how messages call such a run: "an attack".
        same: what a run that is gone on with must have in common: "a run with the same settings".
        named: entry of the header with the name of the run's input, whose contents are known by
            their digest alone: the same input under another name is the same run.
        resume: go on with the run in ``out``, if there is one.
        say: where messages go.

    Returns:
        The metrics of a finished run, or None where there is something to do.

    Raises:
        InputError: ``out`` cannot be written, holds another run than the one to go on with, or
            files with the names of results that no run of this kind has made.
    """
    prepare_folder(out)
    if resume and (out / "config.json").exists():
        _check_same_run(out, header, what, same, named)
        if (out / "metrics.json").exists():
            say(f"{out}: this run is finished; nothing to do")
            return read_json(out / "metrics.json")
        return None
    names = ("metrics.json", *results, "config.json")
    check_own_files(out, names, header["kind"], what)
    for name in names:
        if (out / name).is_dir():
            shutil.rmtree(out / name, ignore_errors=True)
        else:
            (out / name).unlink(missing_ok=True)
    write_json(out / "config.json", header)
    return None


def check_apart(name: str, path: str | Path, out: Path, results: Sequence[str]) -> None:
    """Raises InputError if a file that is read, called ``name``, is one that a run in ``out`` with
    these results removes or writes."""
    source = Path(path).resolve()
    for result in ("metrics.json", *results, "config.json"):
        written = (out / result).resolve()
        if written == source or written in source.parents:
            raise InputError(
                f"{name}: {path} is where this run writes its own {result}; choose another --out"
            )


def check_own_files(out: Path, names: Sequence[str], kind: str, what: str) -> None:
    """Raises InputError if one of the names is there, which a new run removes, and config.json does
    not tell of an earlier run of its kind, whatever the version at the end of the kind."""
    there = [name for name in names if (out / name).exists()]
    if not there:
        return
    try:
        stored = read_json(out / "config.json")
    except InputError:
        stored = None
    found = stored.get("kind") if isinstance(stored, dict) else None
    if not isinstance(found, str) or _unversioned(found) != _unversioned(kind):
        raise InputError(
            f"{out}: {', '.join(there)} would be replaced and is not of {what}; choose another "
            "folder"
        )


def _unversioned(kind: str) -> str:
    return re.sub(r" \d+$", "", kind)


def digest(*tensors: Tensor) -> str:
    """SHA-256 of shapes and contents, the same on every device. Double precision counts in full;
    every other dtype counts as float32."""
    sha = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().cpu()
        if values.dtype != torch.float64:
            values = values.float()
        array = np.ascontiguousarray(values.numpy())
        sha.update(f"{array.shape}".encode() + array.tobytes())
    return sha.hexdigest()


def network_digest(network: nn.Module) -> str:
    """SHA-256 of what a network computes with: its weights and buffers with their names, its
    layers' classes, and numbers and texts among their attributes. Two networks of the same weights
    whose ``forward`` reads another option are two."""
    sha = hashlib.sha256()
    for name, value in network.state_dict().items():
        what = digest(value) if isinstance(value, Tensor) else repr(value)
        sha.update(f"{name}={what};".encode())
    for name, layer in network.named_modules():
        settings = {k: v for k, v in vars(layer).items() if k != "training" and _is_plain(v)}
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        sha.update(f"{name}:{kind}{sorted(settings.items())};".encode())
    return sha.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | type(None))


def _check_same_run(
    out: Path, header: dict[str, Any], what: str, same: str, named: str | None
) -> None:
    config = out / "config.json"
    stored = read_json(config)
    wanted = json.loads(json.dumps(plain(header)))  # as a file gives it back
    if (
        not isinstance(stored, dict)
        or stored.get("kind") != wanted["kind"]
        or not isinstance(stored.get("settings"), dict)
    ):
        raise InputError(f"{config}: expected the config of {what}, got another")
    if named is not None and stored.get("digest") != wanted["digest"]:
        raise InputError(f"{out}: expected the run of {wanted[named]}, got one of {stored[named]}")
    apart = {"settings", named}
    changed = _differing(
        {k: v for k, v in stored.items() if k not in apart},
        {k: v for k, v in wanted.items() if k not in apart},
    )
    changed += _differing(stored["settings"], wanted["settings"])
    if changed:
        raise InputError(f"{out}: expected {same} to resume, got other {', '.join(changed)}")


def _differing(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    names = [*wanted, *(name for name in stored if name not in wanted)]
    missing = object()
    return [name for name in names if stored.get(name, missing) != wanted.get(name, missing)]
