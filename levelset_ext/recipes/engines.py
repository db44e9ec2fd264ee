"""Independent tasks in many processes: by loky on this machine, by Dask or Ray on one or on many.

All three give results as they finish and say which process died, which is what a sweep needs.
Joblib's own front does not: with loky a death ends all processes and is nobody's, its backend for
Ray keeps all results until the last, and that for Dask leaves tasks running when one of them dies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from levelset_ext.errors import InputError

__all__ = ["ENGINES", "processes", "run_all"]

_DEATHS = 2  # of the process of a task, before it counts as broken
_WAIT = 30.0  # seconds for a cluster to answer and to have a worker

Call = Callable[[], dict[str, Any]]
# Name and result as they finish; None where the process died.
Finished = Iterator[tuple[str, dict[str, Any] | None]]
Start = Callable[[dict[str, Call]], Finished]  # does the calls


@dataclass(frozen=True)
class Processes:
    """What does the tasks of ``run_all``."""

    start: Start
    threads: int  # of each


@contextlib.contextmanager
def processes(jobs: int, engine: str = "loky", address: str | None = None) -> Iterator[Processes]:
    """Processes for ``run_all``, which end with the block.

    Args:
        jobs: how many on this machine, each with its part of the cores; 1 is this one with loky. Of
            a cluster that is named all are used, each with one thread.
        engine: one of ``ENGINES``.
        address: of a cluster that is running, for dask and ray; None starts one here.

    Raises:
        InputError: a package that is missing, or a cluster that cannot be used.
    """
    if engine not in ENGINES:
        raise InputError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    if address is not None and engine == "loky":
        raise InputError(f"address: expected engine dask or ray for a cluster, got loky, {address}")
    cores = 1 if address is not None else max(1, (os.cpu_count() or 1) // jobs)
    alone = jobs == 1 and engine == "loky"
    with ENGINES[engine](jobs, address) as start:
        yield Processes(start, torch.get_num_threads() if alone else cores)


def run_all(
    tasks: Mapping[str, Call],
    folder: Path,
    by: Processes,
    done: Callable[[str, dict[str, Any]], None],
) -> None:
    """Does the tasks, in any order.

    Args:
        tasks: by name, each with a result of plain values; sent to a process, so a ``partial`` of a
            function of a module.
        folder: tasks NAME log to folder/NAME/log.txt what they print; the same on all machines.
        by: what does them.
        done: called with the name and the result as they finish. One that raised has the result
            {"status": "failed", "error": ...}, and so has one whose process died twice.
    """
    folder = folder.resolve()
    left, deaths = dict(tasks), dict.fromkeys(tasks, 0)
    while left:
        calls: dict[str, Call] = {
            name: partial(_guarded, task, folder / name, by.threads) for name, task in left.items()
        }
        for name, result in by.start(calls):
            if result is None:
                deaths[name] += 1
                if deaths[name] < _DEATHS:
                    continue
                result = _broken(f"its process died {_DEATHS} times")
            del left[name]
            done(name, result)


def _guarded(task: Call, folder: Path, threads: int) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stderr(log):
        try:
            result = {"status": "done", "error": "", **task()}
        except Exception as error:  # whatever it is, the others go on
            traceback.print_exc()
            result = _broken(str(error).splitlines()[0] if str(error) else type(error).__name__)
    return result


def _broken(error: str) -> dict[str, Any]:
    return {"status": "failed", "error": error}


def _missing(engine: str, package: str) -> InputError:
    return InputError(f"engine: {engine} needs the package {package} (pip install {package})")


# --- the engines ----------------------------------------------------------------------------


@contextlib.contextmanager
def _loky(jobs: int, address: str | None) -> Iterator[Start]:
    try:
        from joblib.externals.loky import ProcessPoolExecutor
        from joblib.externals.loky.process_executor import TerminatedWorkerError
    except ImportError:
        raise _missing("loky", "joblib") from None
    if jobs == 1:  # this process
        yield lambda calls: ((name, call()) for name, call in calls.items())
        return
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    env = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)

    # A pool ends with the first of its processes that dies, and does not say whose task that was:
    # so each process is a pool of its own, and a death is of one task.
    def pool() -> Any:
        return ProcessPoolExecutor(1, env=env)

    idle = [pool() for _ in range(jobs)]
    running: dict[Future[dict[str, Any]], tuple[str, Any]] = {}

    def start(calls: dict[str, Call]) -> Finished:
        waiting = list(calls.items())[::-1]
        while waiting or running:
            while waiting and idle:
                name, call = waiting.pop()
                one = idle.pop()
                running[one.submit(call)] = name, one
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, one = running.pop(future)
                try:
                    result: dict[str, Any] | None = future.result()
                except TerminatedWorkerError:
                    one.shutdown(wait=False)
                    result, one = None, pool()
                idle.append(one)
                yield name, result

    try:
        yield start
    finally:
        for one in [*idle, *(one for _, one in running.values())]:
            one.shutdown(kill_workers=True)


@contextlib.contextmanager
def _dask(jobs: int, address: str | None) -> Iterator[Start]:
    try:
        import dask
        import distributed
    except ImportError:
        raise _missing("dask", "distributed") from None
    # A scheduler of our own gives a task to a process when it can begin, and reports each death.
    settings = {
        "distributed.scheduler.allowed-failures": 0,
        "distributed.scheduler.worker-saturation": 1.0,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(settings))
        if address is None:
            cluster: Any = stack.enter_context(
                distributed.LocalCluster(
                    n_workers=jobs, threads_per_worker=1, dashboard_address=None,
                    silence_logs=logging.CRITICAL,
                    local_directory=stack.enter_context(tempfile.TemporaryDirectory()),
                )
            )  # fmt: skip
        else:
            cluster = address
        try:
            client = distributed.Client(cluster, timeout=_WAIT, set_as_default=False)
            stack.enter_context(client)
            client.wait_for_workers(1, timeout=_WAIT)
        except (OSError, TimeoutError, ValueError) as error:
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"address: no Dask cluster at {address} ({what})") from None
        # What a task prints and its number of threads are the process's.
        most = max(client.nthreads().values())
        if most > 1:
            raise InputError(f"address: expected workers with one thread, got one with {most}")

        def start(calls: dict[str, Call]) -> Finished:
            names = {client.submit(call, pure=False): name for name, call in calls.items()}
            for future in distributed.as_completed(names, loop=client.loop):
                error = future.exception()
                if error is None:
                    yield names[future], future.result()
                elif isinstance(error, distributed.KilledWorker):
                    yield names[future], None
                else:
                    yield names[future], _broken(f"{type(error).__name__}: {error}")

        yield start


@contextlib.contextmanager
def _ray(jobs: int, address: str | None) -> Iterator[Start]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        import ray
    except ImportError:
        raise _missing("ray", "ray") from None
    try:
        ray.init(
            address,
            num_cpus=jobs if address is None else None,
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"address: no Ray cluster at {address} ({what})") from None
    do = ray.remote(num_cpus=1, max_retries=0)(_called)

    def start(calls: dict[str, Call]) -> Finished:
        names = {do.remote(call): name for name, call in calls.items()}
        waiting = list(names)
        while waiting:
            (first, *_), waiting = ray.wait(waiting)
            try:
                yield names[first], ray.get(first)
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError):
                yield names[first], None
            except ray.exceptions.RayError as error:  # it quotes a traceback, whose end says what
                yield names[first], _broken(str(error).splitlines()[-1])

    try:
        yield start
    finally:
        ray.shutdown()


def _called(call: Call) -> dict[str, Any]:
    return call()


ENGINES = {"loky": _loky, "dask": _dask, "ray": _ray}
