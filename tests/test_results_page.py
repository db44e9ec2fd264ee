"""tools/results: the committed page is what its files make, commands parse, runs go on."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

pytest.importorskip("matplotlib")

from levelset_ext import cli  # noqa: E402
from tools.results import __main__ as main_module  # noqa: E402
from tools.results import page, registry, robustness, runner  # noqa: E402
from tools.results.registry import RESULTS, Result, Step  # noqa: E402
from tools.results.tables import NOT_RUN, Book, Comparison, Files, fixed, table  # noqa: E402

# --- the page --------------------------------------------------------------------------------


def test_the_committed_page_is_what_the_files_make() -> None:
    assert page.page() == (ROOT / page.PAGE).read_text(), "make results writes it anew"


def test_every_result_is_on_the_page_and_every_file_is_used() -> None:
    shown = {name for names in page.CHAPTERS.values() for name in names}
    assert shown | set(page.WITHIN) == {result.name for result in RESULTS}
    assert set(page.TEXTS) == shown
    assert {name for names in page.INDEX.values() for name in names} <= shown
    for names in page.PICTURES.values():
        for picture, words in names:
            assert words
            assert picture.endswith(".png")


def test_without_files_everything_says_not_run(tmp_path: Path) -> None:
    text = page.page(Files(tmp_path))
    for name in page.TEXTS:
        book = Book(Files(tmp_path))
        assert NOT_RUN in page.TEXTS[name](book), name
        assert not book.found, name
    assert "Of 0 comparisons" in text


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result.name)
def test_one_missing_file_is_no_error(result: Result) -> None:
    class Without(Files):
        def json(self, name: str) -> Any:
            return None if name in result.files else super().json(name)

        def csv(self, name: str) -> Any:
            return None if name in result.files else super().csv(name)

    assert "# Results" in page.page(Without(ROOT))


def test_a_changed_file_changes_the_page(tmp_path: Path) -> None:
    folder = tmp_path / registry.FILES
    folder.mkdir(parents=True)
    stored = json.loads((ROOT / registry.FILES / "attack_throughput.json").read_text())
    stored["standing"]["ratio_median"] = 7.25
    (folder / "attack_throughput.json").write_text(json.dumps(stored))
    assert "| 7.25 |" in page.page(Files(tmp_path))
    assert "| 7.25 |" not in page.page()


def test_comparisons_know_who_is_ahead() -> None:
    text = fixed(1)
    assert Comparison("a", 1.0, "b", 2.0, text, low=True).verdict == "ahead"
    assert Comparison("a", 1.0, "b", 2.0, text, low=False).verdict == "behind"
    assert Comparison("a", 1.0, "b", 2.0, text, low=False, near=1.5).verdict == "even"
    book = Book(Files())
    book.compare("a", 3.0, {"x": 1.0, "y": 2.0, "none": float("nan")}, text, low=True)
    assert (book.found[0].who, book.found[0].other) == ("x", 1.0)
    book.compare("a", 3.0, {"none": float("nan")}, text, low=True)
    assert len(book.found) == 1


@pytest.mark.parametrize(
    ("rows", "every", "text"),
    [
        (10_000, 1, "all 10000 test images"),
        (500, 1, "the first 500 test images"),
        (1000, 10, "1000 test images, one in 10"),
        (500, 10, "the first 500 test images, one in 10"),
    ],
)
def test_which_images_were_looked_at(rows: int, every: int, text: str) -> None:
    assert robustness._some(rows, every, "MNIST") == text


def test_a_network_that_autoattack_has_not_seen(tmp_path: Path) -> None:
    folder = tmp_path / registry.FILES
    folder.mkdir(parents=True)
    stored = json.loads((ROOT / registry.FILES / "robust_mnist.json").read_text())
    stored["runs"]["first"]["autoattack"] = None
    stored["runs"]["madry"]["autoattack"] |= {"rows": 2000, "every": 5}
    (folder / "robust_mnist.json").write_text(json.dumps(stored))
    text = robustness.robust_mnist(Book(Files(tmp_path)))
    (line,) = (line for line in text.splitlines() if "first settings" in line)
    assert line.endswith("| - | - |")
    assert "AutoAttack, 2000 test images, one in 5" in text
    stored["runs"]["ours"]["autoattack"] = None
    (folder / "robust_mnist.json").write_text(json.dumps(stored))
    book = Book(Files(tmp_path))
    assert (
        sum(line.endswith("| - | - |") for line in robustness.robust_mnist(book).splitlines()) == 2
    )
    assert not any("51 min: AutoAttack" in one.what for one in book.found)
    assert f"AutoAttack {NOT_RUN} and " in robustness.answer(book)


def test_collecting_runs(tmp_path: Path) -> None:
    def write(folder: str, name: str, content: dict[str, Any]) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(json.dumps(content))

    for name in ("a", "b"):
        write(name, "config.json", {"settings": {"objective": "madry"}})
        write(name, "metrics.json", {"steps": 7, "other": 1})
        (tmp_path / name / "history.csv").write_text("step,loss\n1,2\n")
        write(f"{name}-pgd", "metrics.json", {"rows": 20, "every": 5, "build": {}})
    write("a-autoattack", "metrics.json", {"rows": 10, "robust_accuracy": 0.5})
    words = [str(tmp_path), "a", "b", "--json", str(tmp_path / "all.json")]
    words += ["--history", str(tmp_path / "all.csv")]
    command = [sys.executable, str(ROOT / "benchmarks" / "collect_robust.py"), *words]
    place = {**os.environ, "PYTHONPATH": str(ROOT)}
    failed = subprocess.run(command, capture_output=True, text=True, check=False, env=place)
    assert failed.returncode != 0
    assert "b-autoattack" in failed.stderr
    assert not (tmp_path / "all.json").exists()
    subprocess.run([*command, "--without-autoattack", "b"], check=True, env=place)
    found = json.loads((tmp_path / "all.json").read_text())["runs"]
    assert found["a"]["autoattack"] == {"rows": 10, "robust_accuracy": 0.5}
    assert found["b"]["autoattack"] is None
    assert found["b"]["training"] == {"steps": 7}
    assert found["b"]["pgd"] == {"rows": 20, "every": 5}


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    assert table(["a", "b"], [["|F|", "1"]]).splitlines()[-1] == "| \\|F\\| | 1 |"


# --- commands --------------------------------------------------------------------------------

STEPS = [
    pytest.param(step, id=f"{result.name}-{'full-' if full else ''}{number}")
    for result in RESULTS
    for full in (False, True)
    for number, step in enumerate(result.chosen(full))
]


class _Parsed(Exception):
    pass


@pytest.mark.parametrize("step", STEPS)
def test_every_command_parses(step: Step, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    places = {name: tmp_path for name in (*registry.DATA, "OUT", "WORK")}
    words = runner.words_of(step.command, places)
    assert words[0] == sys.executable
    for name in ("MNIST", "CIFAR", "SCANS", "OUT", "WORK"):
        assert f"${name}" not in " ".join(words)
    parse = argparse.ArgumentParser.parse_args

    def stop(self: Any, args: Any = None, namespace: Any = None) -> NoReturn:
        parse(self, args, namespace)
        raise _Parsed

    def error(self: Any, message: str) -> NoReturn:
        raise AssertionError(f"{step.command}: {message}")

    monkeypatch.setattr(argparse.ArgumentParser, "error", error)
    if words[1:3] == ["-m", "levelset_ext"]:
        cli._parser().parse_args(words[3:])
        return
    script = ROOT / words[1]
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", words[1:])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    module = importlib.import_module(script.stem)
    with pytest.raises(_Parsed):
        module.work(words[2:]) if hasattr(module, "work") else module.main()


def test_files_of_a_result_are_made_by_it() -> None:
    """What the page reads comes from the commands, or from no command at all."""
    for result in RESULTS:
        if not result.steps:
            continue
        made = {Path(file).name for file in result.kept()}
        shared = {"robust_mnist_history.csv"} if result.name == "convergence" else set()
        assert {Path(name).name for name in result.files} <= made | shared, result.name


def test_needs_are_read_off_the_commands() -> None:
    assert registry.find("surface_table").needs() == ("SCANS",)
    assert registry.find("equal_digits").needs() == ()
    assert registry.find("cifar10").needs(full=True) == ("CIFAR",)
    with pytest.raises(ValueError, match="only: expected one of"):
        registry.find("nothing")


# --- runs ------------------------------------------------------------------------------------


def _result(name: str, *scripts: str, file: str = "") -> Result:
    """Each script is Python in which OUT is the work folder; the first one leaves ``file``."""
    steps = []
    for number, script in enumerate(scripts):
        code = f"import pathlib; OUT = pathlib.Path(r'$OUT'); {script}"
        keep = {"x.json": f"{registry.FILES}/{file}"} if number == 0 and file else {}
        steps.append(Step(f"python -c {shlex.quote(code)}", keep))
    return Result(name, name, "nothing", (file,) if file else (), tuple(steps))


WRITE = "(OUT / 'x.json').write_text('1')"
COUNT = "f = OUT / 'n'; f.write_text((f.read_text() if f.exists() else '') + 'x')"


def run(results: list[Result], tmp_path: Path, **more: Any) -> tuple[list[str], list[str]]:
    told: list[str] = []
    failed = runner.run_all(
        results, more.pop("data", {}), tmp_path / "work", root=tmp_path, say=told.append, **more
    )
    return failed, told


def test_runs_keep_files_and_skip_what_is_there(tmp_path: Path) -> None:
    one = _result("one", f"{WRITE}; {COUNT}", file="one.json")
    assert runner.state_of(one, False, tmp_path) == runner.MISSING
    assert run([one], tmp_path)[0] == []
    kept = tmp_path / registry.FILES / "one.json"
    assert kept.read_text() == "1"
    record = runner.read_record(tmp_path)["one"]
    assert record["commands"] == [one.steps[0].command]
    assert record["cpu_minutes"] >= 0
    assert "torch" in record["machine"]
    assert run([one], tmp_path) == ([], [f"one: {runner.PRESENT}"])
    assert (tmp_path / "work/one/n").read_text() == "x"
    # Other commands than those that made it: afresh.
    other = _result("one", WRITE.replace("1", "2"), file="one.json")
    assert runner.state_of(other, False, tmp_path) == runner.STALE
    run([other], tmp_path)
    assert kept.read_text() == "2"
    run([one], tmp_path, again=True)
    assert kept.read_text() == "1"


def test_a_run_goes_on_at_the_command_that_failed(tmp_path: Path) -> None:
    bad = _result("bad", f"{WRITE}; {COUNT}", "assert (OUT / 'go').exists()", file="bad.json")
    good = _result("good", WRITE, file="good.json")
    failed, told = run([bad, good], tmp_path)
    assert failed == ["bad"]
    assert any("exit status 1" in line for line in told)
    assert (tmp_path / registry.FILES / "good.json").exists()
    assert not (tmp_path / registry.FILES / "bad.json").exists()
    (tmp_path / "work/bad/go").touch()
    assert run([bad, good], tmp_path)[0] == []
    assert (tmp_path / "work/bad/n").read_text() == "x"  # the first command was not run again


def test_what_a_command_should_leave_is_missed(tmp_path: Path) -> None:
    failed, told = run([_result("none", "1", file="none.json")], tmp_path)
    assert failed == ["none"]
    assert any("expected it to leave x.json" in line for line in told)


def test_results_without_their_data_are_left_out(tmp_path: Path) -> None:
    one = replace(_result("one", WRITE), steps=(Step("python -c 'raise SystemExit(3)' $MNIST"),))
    one = replace(one, files=("one.json",))
    failed, told = run([one], tmp_path)
    assert failed == []
    assert told == ["one: left out, needs MNIST=FOLDER"]
    assert run([one], tmp_path, data={"MNIST": tmp_path})[0] == ["one"]


def test_what_a_command_prints_can_be_kept(tmp_path: Path) -> None:
    step = Step("python -c 'print(5)'", {"p.txt": f"{registry.FILES}/p.txt"}, printed="p.txt")
    run([Result("p", "p", "nothing", ("p.txt",), (step,))], tmp_path)
    assert (tmp_path / registry.FILES / "p.txt").read_text() == "5\n"


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_module.main(["list"]) == 0
    told = capsys.readouterr().out
    assert all(result.name in told for result in RESULTS)
    assert main_module.main(["list", "--full"]) == 0
    assert "cifar10" in capsys.readouterr().out
    assert main_module.main(["page", "--check"]) == 0
    assert main_module.main(["run", "--only", "nothing"]) == 2
    assert main_module.main(["run", "--mnist", "/no/such/folder"]) == 2
    assert "mnist: expected a folder" in capsys.readouterr().err
