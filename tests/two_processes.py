"""Work in two processes that talk through gloo, with the answers of both."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A process that waits longer prints where, and its group gives up soon after.
PATIENCE = 200.0


def on_loopback() -> None:
    """Let gloo use the loopback device: a name that does not resolve is not what is tested."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def one_rank(rank: int, work: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(PATIENCE)
    on_loopback()
    # A file rather than a port: no other process can take it in between.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=1.2 * PATIENCE),
    )
    try:
        torch.save(work(rank), Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


def in_two_processes(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """``[work(0), work(1)]``, each in a process of its own; an error in one is raised here."""
    torch.multiprocessing.spawn(one_rank, (work, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
