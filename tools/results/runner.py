"""Runs what the page lacks: every result in a work folder of its own, then its files are kept.

A result is left alone where its files are there and made by the commands of the registry, or before
there was a record. What fails is told and does not keep the others from running. A killed run goes
on with the command it was at; most commands then go on inside too.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any

from tools.results.registry import FILES, ROOT, Result, Step

__all__ = [
    "MISSING",
    "PRESENT",
    "STALE",
    "Failed",
    "read_record",
    "run_all",
    "state_of",
    "words_of",
]

RECORD = "provenance.json"  # beside the results: how each was made
PRESENT, STALE, MISSING = "there", "made by other commands", "not run"


class Failed(RuntimeError):
    """A command of a result ended with an error, or left a file out."""


def read_record(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    file = root / FILES / RECORD
    return json.loads(file.read_text()) if file.exists() else {}


def state_of(result: Result, full: bool, root: Path = ROOT) -> str:
    """Whether its files are there, and made by the commands that the registry has now."""
    files = list(result.kept(full)) or [f"{FILES}/{name}" for name in result.files]
    if not all((root / file).exists() for file in files):
        return MISSING
    known = read_record(root).get(result.name + (" full" if full else ""), {}).get("commands")
    return PRESENT if known in (None, _commands(result, full)) else STALE


def run_all(
    results: Iterable[Result],
    data: Mapping[str, Path],
    work: Path,
    *,
    full: bool = False,
    again: bool = False,
    root: Path = ROOT,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Runs what is missing or stale; returns the names of what failed.

    Args:
        results: what to run, in this order.
        data: folders, by the names of ``registry.DATA``. What needs another one is left out.
        work: folder for the work folders.
        full: the paper's setting instead of that for a CPU.
        again: also what is there.
        root: the repository to leave files in.
        say: where messages go.
    """
    failed = []
    for result in results:
        if not result.chosen(full):
            continue
        state = state_of(result, full, root)
        if state == PRESENT and not again:
            say(f"{result.name}: {state}")
            continue
        lacking = [name for name in result.needs(full) if name not in data]
        if lacking:
            say(
                f"{result.name}: left out, needs " + ", ".join(f"{name}=FOLDER" for name in lacking)
            )
            continue
        say(f"{result.name}: {state}, about {_minutes(result, full)} minutes")
        try:
            run_one(result, data, work, full=full, afresh=again or state == STALE, root=root)
        except (Failed, OSError) as error:
            failed.append(result.name)
            say(f"{result.name}: FAILED: {error}")
    return failed


def run_one(
    result: Result,
    data: Mapping[str, Path],
    work: Path,
    *,
    full: bool,
    afresh: bool = False,
    root: Path = ROOT,
) -> None:
    """Runs the commands of a result that are not done, and keeps its files.

    Raises:
        Failed: a command, or a file that should be there.
    """
    folder = work / (result.name + ("-full" if full else ""))
    if afresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done.json"
    times: dict[str, list[float]] = json.loads(done.read_text()) if done.exists() else {}
    for step in result.chosen(full):
        if step.command not in times:
            times[step.command] = _run_step(step, data, folder, work)
            _write(done, times)
    for step in result.chosen(full):
        for name, place in step.keep.items():
            made, kept = folder / name, root / place
            if not made.exists():
                raise Failed(f"{step.command}: expected it to leave {name}")
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made, kept)
    record = read_record(root)
    record[result.name + (" full" if full else "")] = {
        "commands": _commands(result, full),
        "cpu_minutes": round(sum(cpu for _, cpu in times.values()) / 60, 2),
        "minutes": round(sum(wall for wall, _ in times.values()) / 60, 2),
        "machine": machine(),
    }
    _write(root / FILES / RECORD, record)


def words_of(command: str, places: Mapping[str, Path]) -> list[str]:
    """The words to run a command with; what ``$NAME`` stands for may hold blanks."""
    words = [
        Template(word).substitute({k: str(v) for k, v in places.items()})
        for word in shlex.split(command)
    ]
    if words[0] == "levelset-ext":
        return [sys.executable, "-m", "levelset_ext", *words[1:]]
    return [sys.executable, *words[1:]] if words[0] == "python" else words


def machine() -> str:
    """What the figures were made on, in words that fit into a table."""
    import torch

    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores ({model or 'unknown'}), {gpu}, torch {torch.__version__}"


def _run_step(step: Step, data: Mapping[str, Path], out: Path, work: Path) -> list[float]:
    """Seconds on the clock and on the processor."""
    places = {**data, "OUT": out, "WORK": work}
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        words_of(step.command, places),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE if step.printed else None,
        check=False,
    )
    if found.returncode:
        raise Failed(f"{step.command}: exit status {found.returncode}")
    if step.printed:
        (out / step.printed).write_bytes(found.stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [time.monotonic() - began, cpu]


def _commands(result: Result, full: bool) -> list[str]:
    return [step.command for step in result.chosen(full)]


def _minutes(result: Result, full: bool) -> str:
    return f"{result.full_minutes if full else result.minutes:g}"


def _write(file: Path, content: Any) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    part.replace(file)
