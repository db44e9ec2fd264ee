"""One line of progress on stderr: done, speed, time left, and what the job wants to say."""

from __future__ import annotations

import resource
import sys
import time
from typing import TextIO

import torch


def say(text: str) -> None:
    """A message to a person: stderr, as stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in GB (10^9 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def per_second(speed: float, what: str = "") -> str:
    """A speed in few digits: "12.8/s", "33 k points/s", "1 in 40 s"."""
    name = f" {what}" if what else ""
    if 0 < speed < 0.5:
        return f"1{name} in {1 / speed:.0f} s"
    for size, letter in ((1e6, " M"), (1e3, " k")):
        if speed >= 10 * size:
            return f"{speed / size:.0f}{letter}{name}/s"
    return f"{speed:.1f}{name}/s" if speed < 100 else f"{speed:.0f}{name}/s"


def memory() -> str:
    """The largest memory so far, that of the GPU too where one is in use."""
    text = f"{peak_memory_gb():.2f} GB"
    if torch.cuda.is_initialized():
        text += f"  GPU {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
    return text


class Progress:
    """Reports at most every ``every`` seconds: in place on a terminal, as lines elsewhere.

    Progress never decides anything, so a slow machine and a fast one do the same work.
    ``rate`` is what one unit of ``total`` holds, such as (2560, "points"), for a second speed.
    """

    def __init__(
        self,
        name: str,
        total: int,
        start: int = 0,
        every: float | None = None,
        stream: TextIO | None = None,
        rate: tuple[float, str] | None = None,
    ) -> None:
        self.rate = rate
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        self.every = every if every is not None else (0.2 if self.terminal else 10.0)
        self.name, self.total, self.first = name, total, start
        self.began = time.monotonic()
        self.reported = self.began
        self.width = 0

    def due(self) -> bool:
        return time.monotonic() - self.reported >= self.every

    def report(self, done: int, note: str = "", last: bool = False) -> None:
        now = time.monotonic()
        spent = now - self.began
        speed = (done - self.first) / spent if spent > 0 else 0.0
        left = clock((self.total - done) / speed) if speed > 0 else "?"
        when = f"{clock(spent)} spent" if last else f"{left} left"
        line = f"{self.name} {done}/{self.total}  {per_second(speed)}"
        if self.rate is not None:
            line += f"  {per_second(speed * self.rate[0], self.rate[1])}"
        line += f"  {when}  {memory()}  {note}"
        if self.terminal:
            padded = line.ljust(self.width)
            self.width = len(line)
            self.stream.write("\r" + padded + ("\n" if last else ""))
        else:
            self.stream.write(line + "\n")
        self.stream.flush()
        self.reported = now


class Spent:
    """Time since it was made, on the wall and on the processor, and what earlier processes took."""

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self._before = (seconds - time.monotonic(), cpu_seconds - time.process_time())

    def seconds(self) -> float:
        return self._before[0] + time.monotonic()

    def cpu_seconds(self) -> float:
        """Of all threads of the process together."""
        return self._before[1] + time.process_time()
