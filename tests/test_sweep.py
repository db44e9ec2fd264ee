"""``levelset-ext sweep``: its table, going on after an interruption, runs that break."""

from __future__ import annotations

import csv
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from levelset_ext.cli import main
from levelset_ext.recipes import sweep as recipe
from levelset_ext.recipes.engines import ENGINES, processes, run_all
from levelset_ext.recipes.sweep import summarize

pytest.importorskip("sklearn")  # joblib with it

WORDS = ["--limit", "60", "--network", "convnet-2a", "--steps", "2", "--batch", "20"]


def table(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open() as stream:
        return list(csv.DictReader(stream))


def command(out: Path, methods: str = "cross-entropy,hinge", *more: str) -> int:
    return main(["sweep", methods, "--out", str(out), "--fractions", "0.5,1", "--seeds", "2",
                 *WORDS, *more])  # fmt: skip


def test_a_table_of_all_runs_and_nothing_is_done_twice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    plain = recipe.train

    def train(data: Any, test: Any, out: Path, *args: Any, **more: Any) -> Any:
        trained.append(out.name)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return plain(data, test, out, *args, **more)

    monkeypatch.setattr(recipe, "train", train)
    out = tmp_path / "out"
    assert command(out) == 130
    assert len(table(out)) == 3
    kept = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/metrics.json")}
    assert len(kept) == 3
    capfd.readouterr()
    assert command(out, "cross-entropy,hinge", "--resume", "--limit", "50") == 2
    assert "got other limit" in capfd.readouterr().err
    assert command(out, "cross-entropy,hinge", "--resume") == 0
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    rows = table(out)
    assert [(r["method"], r["fraction"], r["seed"], r["status"]) for r in rows] == [
        (method, share, seed, "done")
        for method in ("cross-entropy", "hinge")
        for share in ("0.5", "1")
        for seed in ("0", "1")
    ]
    assert {r["rows"] for r in rows if r["fraction"] == "1"} == {"60"}
    assert max(int(r["rows"]) for r in rows if r["fraction"] == "0.5") < 40
    assert len({r["clean_accuracy"] for r in rows}) > 2
    captured = capfd.readouterr()
    assert "run 8/8" in captured.err
    assert "cross-entropy on 50 %: 2 done, clean accuracy" in captured.err
    results = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in results["runs"]] == [row["method"] for row in rows]
    first = results["summary"][0]
    values = [float(row["clean_accuracy"]) for row in rows[:2]]
    assert first["clean_accuracy_mean"] == pytest.approx(statistics.fmean(values))
    assert first["clean_accuracy_deviation"] == pytest.approx(statistics.stdev(values))
    assert "step 2/2" in (out / "runs" / "hinge-1-0" / "log.txt").read_text()


def test_networks_that_are_there_can_be_attacked_and_attacked_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(out, "hinge") == 0
    kept = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/metrics.json")}
    assert "robust" not in capfd.readouterr().err
    for strength in ("0.1", "0.1", "0"):
        assert command(out, "hinge", "--resume", "--attack", "pgd-xent-2", "--eps", strength) == 0
        rows = table(out)
        assert all(r["robust_accuracy"] <= r["clean_accuracy"] for r in rows)
    assert all(r["robust_accuracy"] == r["clean_accuracy"] for r in rows)  # eps 0
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    attacked = json.loads((out / "runs/hinge-1-0/attack/config.json").read_text())
    assert attacked["settings"]["eps"] == 0


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (["--attack", "pgd-xentt"], "attack: expected one of"),
        (["--attack", "pgd-xent", "--eps", "-1"], "eps: expected a finite number >= 0"),
        (["--attack", "transfer-xent"], "source: expected a network"),
    ],
)
def test_an_attack_that_cannot_be_is_said_before_anything_is_trained(
    attack: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path / "out", "hinge", *attack) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_trained_on_are_said_before_anything_is_trained(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path / "out", "hinge", "--limit", "1") == 2
    assert "data: expected images of two or more classes" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_single_seed_has_no_deviation(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "hinge", "--out", str(tmp_path / "out"), "--seeds", "1", *WORDS]
    assert main(words) == 0
    said = capfd.readouterr().err
    assert "1 done, clean accuracy" in said
    assert "nan" not in said


def test_files_of_somebody_else_are_not_removed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    (out / "runs" / "mine.txt").write_text("mine")
    assert command(out, "hinge") == 2
    assert "runs would be replaced and is not of a sweep" in capfd.readouterr().err
    assert (out / "runs" / "mine.txt").read_text() == "mine"


def test_a_broken_run_is_reported_and_the_others_finish(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = recipe.train

    def train(data: Any, test: Any, out: Path, *args: Any, **more: Any) -> Any:
        if out.name == "hinge-0.5-1" and not (tmp_path / "mended").exists():
            raise RuntimeError("something broke\nand more")
        return plain(data, test, out, *args, **more)

    monkeypatch.setattr(recipe, "train", train)
    assert command(tmp_path / "out", "hinge", "--attack", "pgd-xent-2", "--eps", "0.1") == 1
    err = capfd.readouterr().err
    assert "hinge-0.5-1: failed: something broke (" in err
    assert "failed: 1 of 4 runs, see" in err
    rows = table(tmp_path / "out")
    assert [row["status"] for row in rows] == ["done", "failed", "done", "done"]
    assert rows[1]["error"] == "something broke"
    assert all(0 <= float(row["robust_accuracy"]) <= 1 for row in rows if row["status"] == "done")
    log = (tmp_path / "out" / "runs" / "hinge-0.5-1" / "log.txt").read_text()
    assert "Traceback" in log
    (tmp_path / "mended").touch()  # tried again, and only it
    more = ("--attack", "pgd-xent-2", "--eps", "0.1", "--resume")
    assert command(tmp_path / "out", "hinge", *more) == 0
    assert [row["status"] for row in table(tmp_path / "out")] == ["done"] * 4


def work(folder: Path, kind: str) -> dict[str, Any]:
    """What a run of the sweep below does: `dies` ends its process while `slow` is in the other."""
    with (folder / f"{kind}.txt").open("a") as stream:
        stream.write("x")
    if kind == "dies":
        _wait_for(folder / "slow.txt")
        os._exit(9)
    if kind == "slow":
        _wait_for(folder / "dies.txt")
        time.sleep(1)  # the death is noticed
    if kind == "raises":
        raise ValueError("no")
    return {"kind": kind}


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


PACKAGES = {"loky": "joblib", "dask": "distributed", "ray": "ray"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_processes_that_die_take_no_other_along(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes: one run ends its process, one raises, two are good, and each is done once."""
    pytest.importorskip(PACKAGES[engine])
    here = Path(__file__).parent  # where a process of Ray finds `work`
    monkeypatch.setenv("PYTHONPATH", f"{here}{os.pathsep}{here.parent}")
    kinds = ("slow", "dies", "raises", "good")
    tasks = {kind: partial(work, tmp_path, kind) for kind in kinds}
    found: dict[str, dict[str, Any]] = {}
    with processes(2, engine) as by:
        run_all(tasks, tmp_path / "runs", by, found.__setitem__)
    for kind in ("slow", "good"):
        assert found[kind] == {"status": "done", "error": "", "kind": kind}
    assert found["raises"] == {"status": "failed", "error": "no"}
    assert found["dies"] == {"status": "failed", "error": "its process died 2 times"}
    times = {kind: len((tmp_path / f"{kind}.txt").read_text()) for kind in kinds}
    assert times == {"slow": 1, "dies": 2, "raises": 1, "good": 1}
    assert "ValueError: no" in (tmp_path / "runs" / "raises" / "log.txt").read_text()


@pytest.mark.slow
def test_a_dask_cluster_that_runs_gives_the_table_of_this_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    distributed = pytest.importorskip("distributed")
    assert command(tmp_path / "here", "hinge") == 0
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster:
        words = ("--engine", "dask", "--address", cluster.scheduler_address)
        assert command(tmp_path / "there", "hinge", *words) == 0
        # It is the cluster that worked, and it goes on without this sweep.
        with distributed.Client(cluster) as client:
            assert len(client.nthreads()) == 2
    seconds = "training_seconds"
    here, there = ([{k: v for k, v in row.items() if k != seconds} for row in table(tmp_path / n)]
                   for n in ("here", "there"))  # fmt: skip
    assert here == there
    with distributed.LocalCluster(1, threads_per_worker=2, dashboard_address=None) as cluster:
        words = ("--engine", "dask", "--address", cluster.scheduler_address)
        capfd.readouterr()
        assert command(tmp_path / "out", "hinge", *words) == 2
        error = capfd.readouterr().err
        assert "address: expected workers with one thread, got one with 2" in error


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_is_not_installed_is_one_line(
    engine: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (PACKAGES[engine], "joblib.externals.loky"):
        monkeypatch.setitem(sys.modules, name, None)
    assert command(tmp_path / "out", "hinge", "--engine", engine) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"engine: {engine} needs the package {PACKAGES[engine]} (pip install" in line
    assert not (tmp_path / "out").exists()


def test_summary_of_what_is_done() -> None:
    def row(seed: int, status: str, **more: float) -> dict[str, Any]:
        return {"method": "m", "fraction": 1.0, "seed": seed, "status": status, **more}

    (entry,) = summarize([row(0, "done", clean_accuracy=0.5), row(1, "failed")])
    assert (entry["done"], entry["failed"], entry["clean_accuracy_mean"]) == (1, 1, 0.5)
    assert entry["clean_accuracy_deviation"] != entry["clean_accuracy_deviation"]
    assert "robust_accuracy_mean" not in entry


@pytest.mark.parametrize(
    "words",
    [["magic"], ["hinge", "--fractions", "0"], ["hinge", "--fractions", "a"],
     ["hinge", "--seeds", "0"], ["hinge", "--jobs", "0"], ["hinge", "--lr", "-1"],
     ["svm"], ["hinge", "--set", "nothing=1"], ["hinge", "--data", "/nowhere"],
     ["hinge", "--engine", "steam"], ["hinge", "--address", "tcp://127.0.0.1:1"],
     *(["hinge", "--classes", classes] for classes in ("0", "1", "20"))],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *words, "--out", str(tmp_path / "out")]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
