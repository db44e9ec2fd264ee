"""The readers again, with mutations that atheris chooses by the branches they reach.

    python tests/fuzz/guided_readers.py --cases 100000

Needs the package atheris. What counts as a failure is what fuzz_readers.py says.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
# The folder above holds what is imported below.

import atheris

# First, as what is imported already is not instrumented any more.
with atheris.instrument_imports(include=["levelset_ext.data"]):
    import levelset_ext.data
    import levelset_ext.data.images
    import levelset_ext.data.torch_files  # noqa: F401

import driver
import fuzz_readers

LONGEST = 4096  # bytes of a case, or twice its target's longest seed
KEPT = 1500  # bytes of a failing case that go into the report


def work(job: driver.Job, journal: driver.Journal) -> tuple[int, int, list[dict[str, Any]]]:
    """All cases in a child, as the fuzzer ends the process it runs in."""
    with tempfile.TemporaryDirectory(dir=driver.SCRATCH) as folder:
        report = Path(folder) / "report"
        child = os.fork()
        if child == 0:
            _fuzz(job, journal, Path(folder), report)
        _, status = os.waitpid(child, 0)
        if status or not report.exists():
            raise SystemExit(f"the fuzzer ended with status {status}")
        done, accepted, failures = json.loads(report.read_text())
        return done, accepted, failures


def _fuzz(job: driver.Job, journal: driver.Journal, folder: Path, report: Path) -> None:
    suffix, reader, make = fuzz_readers.FORMATS[job.target]
    corpus = folder / "corpus"
    corpus.mkdir()
    path = folder / f"case{suffix}"
    seeds = make()
    for number, content in enumerate(seeds):
        (corpus / f"{number}").write_bytes(content)
        path.write_bytes(content)
        fuzz_readers.read_once(reader, path, len(content), False)
    fuzz_readers.prepare()
    done = accepted = 0
    failures: list[dict[str, Any]] = []
    kinds: set[str] = set()

    def one(content: bytes) -> None:
        nonlocal done, accepted
        # What a death of the process leaves behind: the case itself, if it is short.
        case = base64.b64encode(content[:KEPT]).decode()
        journal.note(done, case)
        path.write_bytes(content)
        traced = done % fuzz_readers.TRACED == 0
        took, wrong = fuzz_readers.read_once(reader, path, len(content), traced)
        done += 1
        accepted += took
        kind = "".join(c for c in wrong if not c.isdigit())[:60]
        if wrong and kind not in kinds:
            kinds.add(kind)
            failures.append({"target": job.target, "case": case, "what": wrong})
        if done == job.cases:
            report.write_text(json.dumps((done, accepted, failures)))

    longest = max(LONGEST, 2 * max(map(len, seeds)))
    options = [f"-runs={job.cases}", f"-max_len={longest}", f"-seed={job.seed + 1}"]
    # libFuzzer's own limit on memory is of the process, which is torch's for the most part.
    options += ["-verbosity=0", "-rss_limit_mb=0", f"-artifact_prefix={folder}/"]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    atheris.Setup([sys.argv[0], *options, f"{corpus}"], one)
    fuzz_readers._limit_memory()
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(driver.main(__file__, work, list(fuzz_readers.FORMATS)))
