"""SIGKILL at random moments of every training command, until a run has gone on to its end.

    python tests/fuzz/kill_runs.py --cases 150

A case is one kill. After it every file in the folder of the run has to be whole, the run has to go
on, and what it ends with has to be what it ends with undisturbed, to the bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import driver
import numpy as np
import torch
import torch._dynamo  # what a step compiles with, loaded once for all children
from PIL import Image

from levelset_ext.data.images import load_images
from levelset_ext.data.meshes import read_ply
from levelset_ext.data.torch_files import read_torch_file
from levelset_ext.recipes import curve, reconstruct
from levelset_ext.recipes import train as classifier
from levelset_ext.recipes.files import read_json

# Of the processor time of a whole run. The child that goes on has less to do, so a run of several
# kills comes to its end.
LATEST = 0.6
POLL = 0.001  # seconds
TIMES = (  # of metrics.json
    "seconds", "cpu_seconds", "training_seconds", "samples_per_second", "peak_memory_gb", "open",
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """run: starts or goes on with a run in a folder. same: files that do not depend on when."""

    run: Callable[[Path], Any]
    same: tuple[str, ...]


def _reconstruct(out: Path) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((300, 3))
    x *= [3.0, 2.0, 2.0] / np.linalg.norm(x, axis=1, keepdims=True)
    config = replace(
        reconstruct.preset("fast", steps=24, seed=3), width=16, hidden_layers=2, projected=32,
        general=32, cloud_points=32, pool=100, resolution=24, checkpoint_every=3,
        learning_rate=6e-3, warmup_steps=0,
    )  # fmt: skip
    reconstruct.reconstruct(reconstruct.Cloud(x, "ellipsoid"), out, config, resume=True)


def _curve(out: Path) -> None:
    t = np.random.default_rng(0).uniform(0, 2 * np.pi, 100)
    x = np.stack([3 * np.cos(t), 3 * np.sin(t), 0.4 * np.cos(2 * t)], 1)
    config = replace(
        curve.curve_preset("fast", steps=30, seed=3), width=16, start_steps=60, projected=32,
        general=16, cloud_points=32, checkpoint_every=3, trace_seeds=60, trace_step=0.1,
    )  # fmt: skip
    curve.reconstruct_curve(curve.CurvePoints(x, "bent circle"), out, config, resume=True)


def _train(out: Path) -> None:
    data = load_images(None, "train", 60)
    settings = {"checkpoint_every": 3, "log_every": 2, "eps": 0.1, "step": 0.05, "iters": 2}
    config = classifier.preset("madry", data, batch=24, steps=24, seed=3, settings=settings)
    classifier.train(data, load_images(None, "test", 30), out, config, resume=True)


COMMANDS = {
    "reconstruct": Command(_reconstruct, ("mesh.ply", "preview.png")),
    "curve": Command(_curve, ("curve.ply", "preview.png")),
    "train": Command(_train, ()),
}

# How each kind of file is read by those who use it; half of one raises.
READERS: dict[str, Callable[[Path], Any]] = {
    ".ply": read_ply,
    ".json": read_json,
    ".png": lambda path: np.asarray(Image.open(path)),
    ".pt": lambda path: read_torch_file(path, "a checkpoint"),
    ".csv": lambda path: np.genfromtxt(path, delimiter=",", names=True),
}


def whole_files(folder: Path) -> str:
    """What is wrong with the files of a run that was killed, "" for nothing."""
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        if not path.name.startswith("."):
            try:
                READERS[path.suffix](path)
            except Exception as error:
                return f"{path.name} is not whole: {type(error).__name__}: {error}"
    return ""


def results(folder: Path, command: Command) -> dict[str, str]:
    """A digest of all that a finished run holds, times apart."""
    found = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in command.same}
    found["metrics.json"] = json.dumps(_untimed(read_json(folder / "metrics.json")))
    checkpoint = read_torch_file(folder / "checkpoint.pt", "a checkpoint")
    found["checkpoint.pt"] = hashlib.sha256(repr(_untimed(checkpoint)).encode()).hexdigest()
    found["names"] = " ".join(sorted(path.name for path in folder.iterdir()))
    return found


def _untimed(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: _untimed(v) for k, v in content.items() if k not in TIMES}
    if isinstance(content, list | tuple):
        return [_untimed(v) for v in content]
    if isinstance(content, torch.Tensor):
        plain = content.detach().contiguous().view(-1).view(torch.uint8)
        return f"{content.dtype} {tuple(content.shape)} {plain.numpy().tobytes()!r}"
    return content


class Child:
    """A run in a process of its own. Forked: to load the libraries takes longer than the run."""

    def __init__(self, command: Command, folder: Path) -> None:
        self._errors = folder.with_suffix(".errors")
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
                command.run(folder)
                code = 0
            except BaseException:
                self._errors.write_text(traceback.format_exc())
            finally:
                os._exit(code)

    def spent(self) -> float:
        """Seconds of processor time so far."""
        return driver.processor_time(self.pid)

    def ended(self) -> bool:
        """Whether it has come to an end by itself; raises if that was an error."""
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        status = os.waitpid(self.pid, 0)[1]
        if status:
            said = self._errors.read_text() if self._errors.exists() else ""
            raise AssertionError(f"the run ended with status {status}: {said[-400:]}")
        return True

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _live(child: Child, until: Callable[[float], bool], journal: driver.Journal) -> bool:
    """Waits for the moment; False if the run ended before."""
    while not child.ended():
        spent = child.spent()
        if until(spent):
            return True
        journal.beat(f"{spent:.1f} s")
        time.sleep(POLL)
    return False


def work(job: driver.Job, journal: driver.Journal) -> tuple[int, int, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    command = COMMANDS[job.target]
    failures: list[dict[str, Any]] = []
    draw = random.Random(f"{job.seed} {job.target} {job.first}")
    kills = finished = 0
    with tempfile.TemporaryDirectory(dir=driver.SCRATCH) as base:
        length = 0.0

        def undisturbed(spent: float) -> bool:
            nonlocal length
            length = spent
            return False

        _live(Child(command, Path(base) / "whole"), undisturbed, journal)
        expected = results(Path(base) / "whole", command)
        out = Path(base) / "killed"
        moment, writing = 0.0, False

        def now(spent: float) -> bool:
            return spent >= moment and (not writing or any(out.glob(".*.part")))

        while (kills < job.cases or out.exists()) and len(failures) < 3:
            # Half of the kills wait for a file that is being written.
            moment, writing = draw.uniform(0, LATEST * length), draw.random() < 0.5
            if kills >= job.cases:
                moment = float("inf")
            case = f"seed {job.seed}, kill {kills} after {moment:.2f} s, writing {writing}"
            try:
                journal.note(job.first + kills, case)
                child = Child(command, out)
                if _live(child, now, journal):
                    child.kill()
                    kills += 1
                    wrong = whole_files(out)
                else:
                    found = results(out, command)
                    apart = [name for name in expected if found[name] != expected[name]]
                    wrong = f"another result: {', '.join(apart)}" if apart else ""
                    finished += 1
                    shutil.rmtree(out)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"[-600:]
            if wrong:
                failures.append({"target": job.target, "case": case, "what": wrong})
                shutil.rmtree(out, ignore_errors=True)
    print(f"{job.target}: {kills} kills in {finished} runs of {length:.2f} s", file=sys.stderr)
    return kills, kills - len(failures), failures


if __name__ == "__main__":
    sys.exit(driver.main(__file__, work, list(COMMANDS)))
