"""Competitors side by side: the result of each is checked first, then all are timed in turns."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from levelset_ext.recipes.progress import Progress, say


class Mismatch(RuntimeError):
    """A competitor's result is wrong, so its time would mean nothing."""


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run.

    scale: "full", "quick" (smaller, no growth curves, no torch.compile) or "tiny" (for tests: does
    every line run). repeats: rounds; a case with a slow competitor gives that one fewer.
    """

    scale: str = "full"
    repeats: int = 5
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def compiles(self) -> bool:
        return self.scale == "full"

    def size(self, full: int, quick: int, tiny: int) -> int:
        return {"full": full, "quick": quick, "tiny": tiny}[self.scale]


@dataclass(frozen=True)
class Competitor:
    """One way to do the job.

    run: takes nothing, returns what the check of its case expects.
    about: what it evaluates, in a line.
    rounds: it is slow and takes part in the first so many rounds only; None is all of them.
    may_fail: where it raises it is left out with a line (torch.compile without a compiler).
    """

    name: str
    run: Callable[[], Any]
    about: str = ""
    rounds: int | None = None
    may_fail: bool = False


Check = Callable[[str, Any], dict[str, Any]]

_SHORTEST = 5e-3  # seconds; a shorter call is repeated until the clock has this much to measure


@contextlib.contextmanager
def _collected() -> Iterator[None]:
    """What is there at the beginning is looked at no more: a collection then takes no time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_collected()
def compare(
    title: str,
    competitors: Sequence[Competitor],
    check: Check,
    settings: Settings,
    *,
    ours: str = "ours",
    memory: bool = True,
) -> dict[str, Any]:
    """Checks and times all competitors.

    A warm-up call of each is checked. Then every round runs each of them once, the order moved on
    by one from round to round, so that a disturbance of the machine meets all alike.

    Args:
        check: takes name and result, returns figures for the table, raises :class:`Mismatch`.
        ours: the competitor that ratios are relative to: a ratio is another's time over the time of
            ours in the same round.
        memory: also measure the memory that one call needs.

    Returns:
        For every competitor the median and quartiles of seconds per call and of the ratio, both
        also in processor time of all threads, which other programs disturb less; first call; peak
        extra memory in MB; the check's figures. And who was left out, and why.
    """
    say(f"{title}: {len(competitors)} competitors, {settings.repeats} rounds")
    entries: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for one in competitors:
        first = _Clock(settings.device)
        try:
            result, extra = measured(one.run, settings.device)
        except Mismatch:
            raise
        except Exception as error:
            if not one.may_fail:
                raise
            skipped[one.name] = _first_line(error)
            say(f"{title}: {one.name} left out ({skipped[one.name]})")
            continue
        seconds = first.seconds()
        figures = check(one.name, result)
        del result
        numbers[one.name] = 1
        if one.rounds is None:
            # The second call: what the first one leaves behind for good is not of interest.
            again = _Clock(settings.device)
            if memory:
                extra = measured(one.run, settings.device)[1]
            else:
                one.run()
            if again.seconds() < 2 * _SHORTEST:
                numbers[one.name] = _calls(one.run, settings.device)
        entries[one.name] = {
            "about": one.about,
            "first_call_seconds": seconds,
            "peak_extra_mb": None if extra is None or not memory else extra / 1e6,
            **figures,
        }

    running = [one for one in competitors if one.name in entries]
    times: dict[str, list[float]] = {one.name: [] for one in running}
    busy: dict[str, list[float]] = {one.name: [] for one in running}
    runs = sum(min(settings.repeats, one.rounds or settings.repeats) for one in running)
    progress, done, said = Progress("run", runs), 0, False
    for turn in range(settings.repeats):
        shift = turn % len(running)
        for one in running[shift:] + running[:shift]:
            if one.rounds is None or turn < one.rounds:
                began = time.process_time()
                times[one.name].append(_time(one.run, numbers[one.name], settings.device))
                busy[one.name].append((time.process_time() - began) / numbers[one.name])
                done += 1
                if progress.due() or (said and done == runs):
                    progress.report(done, one.name, done == runs)
                    said = True
    for name, entry in entries.items():
        entry["rounds"] = len(times[name])
        for kind, taken in (("", times), ("cpu_", busy)):
            base = taken[ours][: len(taken[name])]
            entry[f"{kind}seconds"] = spread(taken[name])
            entry[f"{kind}ratio"] = spread(
                [t / max(b, 1e-9) for t, b in zip(taken[name], base, strict=True)]
            )
    return {"case": title, "ours": ours, "competitors": entries, "skipped": skipped}


def spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75])
    return {"median": float(middle), "q1": float(low), "q3": float(high)}


def fastest(run: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest of several calls: for limits of the machine."""
    run()
    number = _calls(run, device)
    return min(_time(run, number, device) for _ in range(repeats))


class _Clock:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wait()
        self._began = time.perf_counter()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def seconds(self) -> float:
        self._wait()
        return time.perf_counter() - self._began


def _time(run: Callable[[], Any], number: int, device: torch.device) -> float:
    """Seconds of a call, the mean over ``number`` of them, without the garbage collector."""
    gc.disable()
    try:
        watch = _Clock(device)
        for _ in range(number):
            run()
        return watch.seconds() / number
    finally:
        gc.enable()


def _calls(run: Callable[[], Any], device: torch.device) -> int:
    """How many calls fill the shortest time that is worth measuring."""
    one = _time(run, 1, device)
    if one < _SHORTEST:
        one = _time(run, 5, device)
    return max(1, min(10_000, math.ceil(_SHORTEST / max(one, 1e-7))))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


# --- memory ---------------------------------------------------------------------------------------


def measured(run: Callable[[], Any], device: torch.device) -> tuple[Any, float | None]:
    """A call's result, and how many bytes more it had at its peak than there were before it.

    On the CPU it is resident memory as the kernel counts it, so what libraries allocate is in it:
    free heap is given back, the high-water mark is set down to where memory stands, and read
    after the call. None where the kernel does not let a process do so. On a GPU it is what
    torch's allocator handed out.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, float(torch.cuda.max_memory_allocated(device) - before)
    ready = _reset_peak()
    start = _status("VmRSS") if ready else None
    result = run()
    peak = _status("VmHWM") if ready else None
    return result, None if start is None or peak is None else max(0.0, peak - start)


def _reset_peak() -> bool:
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _status(key: str) -> float | None:
    """A line of the process's status, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(key + ":"):
            return float(line.split()[1]) * 1024
    return None
