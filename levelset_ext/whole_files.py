"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls ``write`` with a file beside ``path``, then renames it: a reader, or a process killed
    at any moment, sees the old file or the new one and never half of one.

    Raises:
        OSError: the disk is full, read-only or broken; it names ``path``, where the old file is
            still what it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except OSError as error:
        if error.errno is None:
            raise
        # A write that fails does not know the name of its file.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
