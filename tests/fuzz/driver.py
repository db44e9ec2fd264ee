"""Runs fuzz targets in processes of their own, so that a crash is a finding and not the end.

A worker notes every case in a journal before it begins it. Where a worker dies, or its journal
stands still, the parent reports the case that the journal names, and starts a new worker with what
is left to do.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# In memory where there is such a place: a disk would take longer than the readers.
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
# A hang: so many seconds of processor time on one case, or so many of the clock. The first is what
# an endless loop takes on any machine, however busy; the second is for who waits for nothing.
BUSY, IDLE = 60.0, 900.0


_NOTE = 2000  # characters of a case in the journal


@dataclass
class Job:
    """``cases`` cases of one target, from number ``first`` on."""

    target: str
    seed: int
    cases: int
    first: int = 0


@dataclass
class Outcome:
    """Cases that ran, of which ``accepted`` were not refused with a typed error, and what failed:
    target, the case, and what happened."""

    done: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def total(self) -> int:
        return sum(self.done.values())

    def add(self, target: str, done: int, accepted: int, failures: list[dict[str, Any]]) -> None:
        self.done[target] = self.done.get(target, 0) + done
        self.accepted[target] = self.accepted.get(target, 0) + accepted
        self.failures += failures


class Journal:
    """The case in hand, in a file that outlives the process."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)

    def note(self, number: int, case: str = "") -> None:
        text = f"{number} {case}"[:_NOTE].ljust(64).encode() + b"\n"
        os.pwrite(self._file, text, 0)

    def beat(self, text: str) -> None:
        """Says that the case in hand goes on, where it waits for others."""
        os.pwrite(self._file, text[:64].ljust(64).encode(), 4 * _NOTE)


# Cases that ran, how many of them were not refused, and what failed.
Worker = Callable[[Job, Journal], tuple[int, int, list[dict[str, Any]]]]


def run(script: str, jobs: list[Job], say: Callable[[str], None] = print) -> Outcome:
    """Works through the jobs with ``script --worker``, with a new process after every death."""
    outcome = Outcome()
    left = list(jobs)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        journal, report = Path(folder) / "journal", Path(folder) / "report"
        while left:
            journal.write_bytes(b"")
            report.write_bytes(b"")
            work = {
                "jobs": [asdict(j) for j in left],
                "journal": f"{journal}",
                "report": f"{report}",
            }
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            code, errors = _watch([sys.executable, script, "--worker", json.dumps(work)], journal)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            outcome.cpu_seconds += (
                after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            )
            finished = [json.loads(line) for line in report.read_text().splitlines()]
            for entry in finished:
                outcome.add(**entry)
                say(f"{entry['target']}: {entry['done']} cases, {len(entry['failures'])} failures")
            left = left[len(finished) :]
            if code == 0 or not left:
                break
            job = left.pop(0)
            noted = journal.read_text(errors="replace").splitlines() or [""]
            number, _, case = noted[0].partition(" ")
            at = int(number) if number.strip().isdigit() else job.first
            happened = "no progress" if code is None else f"exit {code}: {errors[-300:]}"
            case = f"seed {job.seed}, case {at} {case.strip()}"
            outcome.add(
                job.target,
                at - job.first + 1,
                0,
                [{"target": job.target, "case": case, "what": f"worker died, {happened}"}],
            )
            say(f"{job.target}: worker died, {happened} at {case}")
            rest = job.first + job.cases - at - 1
            if rest > 0 and len(outcome.failures) < 50:
                left.insert(0, Job(job.target, job.seed + 1_000_003, rest, at + 1))
    return outcome


def _watch(command: list[str], journal: Path) -> tuple[int | None, str]:
    """Exit code (None: killed, as its journal stood still) and the end of stderr."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )
        last = b""
        since, busy = time.monotonic(), 0.0
        code: int | None = None
        while True:
            try:
                code = process.wait(1.0)
                break
            except subprocess.TimeoutExpired:
                now, spent = journal.read_bytes(), processor_time(process.pid)
                if now != last:
                    last, since, busy = now, time.monotonic(), spent
                elif spent - busy > BUSY or time.monotonic() - since > IDLE:
                    process.kill()
                    process.wait()
                    break
        errors.seek(0)
        return code, errors.read()


def processor_time(pid: int) -> float:
    """Seconds that a process has computed so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0  # it has ended
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(script: str, worker: Worker, targets: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000, help="over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=targets, default=targets)
    parser.add_argument("--out", type=Path, help="JSON file to put the counts into")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work = json.loads(options.worker)
        journal = Journal(work["journal"])
        with open(work["report"], "a") as report:
            for job in work["jobs"]:
                done, accepted, failures = worker(Job(**job), journal)
                entry = {"target": job["target"], "done": done, "accepted": accepted}
                report.write(json.dumps({**entry, "failures": failures}) + "\n")
                report.flush()
        return 0
    share = -(-options.cases // len(options.only))
    outcome = run(script, [Job(name, options.seed, share) for name in options.only])
    for failure in outcome.failures:
        print(f"FAILED {failure['target']}: {failure['what']}\n    {failure['case']}")
    print(f"{outcome.total()} cases, {len(outcome.failures)} failures")
    if options.out:
        record(options.out, Path(script).stem, options.seed, outcome)
    return 1 if outcome.failures else 0


def record(path: Path, name: str, seed: int, outcome: Outcome) -> None:
    """Puts the counts of a run into a file; targets that it did not run keep theirs."""
    content = json.loads(path.read_text()) if path.exists() else {}
    targets = content.get(name, {}).get("targets", {})
    for target, done in outcome.done.items():
        failing = [f for f in outcome.failures if f["target"] == target]
        accepted = outcome.accepted[target]
        targets[target] = {"cases": done, "accepted": accepted, "seed": seed, "failing": failing}
    content[name] = {
        "cases": sum(t["cases"] for t in targets.values()),
        "failures": sum(len(t["failing"]) for t in targets.values()),
        "targets": targets,
    }
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
