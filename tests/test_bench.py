"""``levelset-ext bench``: every command runs, and a wrong result is never given a time."""

from __future__ import annotations

import csv
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from levelset_ext.bench import command, ops, plain, published, timing, train_step
from levelset_ext.bench.newton import Reference, fc28, problem
from levelset_ext.bench.timing import Competitor, Mismatch, Settings, compare, measured, spread
from levelset_ext.cli import main
from levelset_ext.networks import ImplicitMLP
from levelset_ext.recipes.progress import Progress

TINY = Settings("tiny", 2)
CPU = torch.device("cpu")

COMPETITORS = {
    "newton": {"ours", "published", "eager", "torch.func", "compaction", "compaction, oneDNN"},
    "false-position": {"ours", "published", "eager", "compaction"},
    "train-step": {"ours", "ours, module", "published", "compaction"},
    "nearest": {"ours", "ours, new cloud", "scipy", "scipy, new cloud", "cdist", "published"},
    "ops": {"ours", "ours, out=", "eager"},
}


@pytest.mark.parametrize("what", command.WHAT)
def test_a_command_gives_tables_and_files(what, tmp_path, capsys):
    if what in ("ops", "newton"):
        pytest.importorskip("matplotlib")
    result = command.bench((what,), TINY, tmp_path)[what]

    assert json.loads((tmp_path / f"{what}.json").read_text()) == json.loads(json.dumps(result))
    for key in ("torch", "threads", "cpu", "mlp_vector_bytes", "scale", "repeats"):
        assert key in result["environment"]
    limits = result["limits"]
    assert all(rate > 0 for rate in limits["matrix_gflops"].values())
    assert set(limits["copy_gb_per_s"]) == {"in_cache", "out_of_cache"}
    names = set()
    for case in result["cases"]:
        names |= set(case["competitors"])
        assert not case["skipped"]
        for name, entry in case["competitors"].items():
            assert 0 < entry["seconds"]["q1"] <= entry["seconds"]["median"]
            assert entry["seconds"]["median"] <= entry["seconds"]["q3"]
            assert 1 <= entry["rounds"] <= 2
            if name == case["ours"]:
                assert entry["ratio"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
            assert entry["cpu_seconds"]["median"] > 0
            assert entry["cpu_ratio"]["median"] > 0
    assert names >= COMPETITORS[what]

    rows = list(csv.DictReader((tmp_path / f"{what}.csv").open()))
    assert len(rows) == sum(len(case["competitors"]) for case in result["cases"])
    assert {row["competitor"] for row in rows} == names
    output = capsys.readouterr()
    assert all(case["case"].split(",")[0] in output.out for case in result["cases"])
    if "matplotlib" in sys.modules:
        assert (tmp_path / f"{what}.png").read_bytes().startswith(b"\x89PNG")


def test_less_work_is_counted_as_less():
    """The rows that are not done are few: compaction evaluates them and the others evaluate all."""
    one = problem("one without a root", fc28(24, 3), 64, TINY, unreachable=True)
    evaluate = plain.by_autograd(one.net)
    everyone = plain.newton_all_rows(evaluate, one.x, one.level, 20, 1e-5)
    compacted = plain.newton_compacted(evaluate, one.x, one.level, 20, 1e-5)
    assert everyone.rows == 21 * 64
    assert compacted.rows < 6 * 64
    close = torch.linalg.vector_norm(everyone.points - compacted.points, dim=1)[1:] < 1e-4
    assert int(close.sum()) >= 62


def wrong_newton(*args: Any) -> Any:
    points, values, jacobian, count = published_newton(*args)
    return points + 0.05, values, jacobian, count


published_newton = published.newton
published_search = published.false_position
published_distance = published.squared_distance

WRONG: list[tuple[str, Any, str, Any]] = [
    ("newton", published, "newton", wrong_newton),
    (
        "false-position",
        published,
        "false_position",
        lambda f, a, b, *more: (published_search(f, a, b, *more)[0] + 0.1, torch.zeros(len(a)), 1),
    ),
    (
        "train-step",
        published,
        "squared_distance",
        lambda x, cloud: published_distance(x, cloud.flip(1)),
    ),
    ("nearest", published, "squared_distance", lambda x, cloud: published_distance(x, cloud[:99])),
    ("ops", ops, "apply", lambda jacobian, r: (jacobian * r[:, :, None]).sum(1)),
]


def test_long_cases_say_how_far_they_are(monkeypatch, capsys):
    monkeypatch.setattr(timing, "Progress", lambda name, total: Progress(name, total, every=0.0))
    slow = Competitor("slow", lambda: 1, rounds=1)
    many = Competitor("many", lambda: 1, rounds=9)  # takes part in all three
    field = [Competitor("ours", lambda: 1), slow, many]
    compare("case", field, lambda name, result: {}, Settings("tiny", 3), memory=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run ")]
    assert [line.split()[1] for line in lines] == [f"{k}/7" for k in range(1, 8)]
    assert "left" in lines[0]
    assert "spent" in lines[-1]


@pytest.mark.parametrize(("what", "module", "name", "wrong"), WRONG, ids=[w[0] for w in WRONG])
def test_a_wrong_competitor_fails_the_command(what, module, name, wrong, monkeypatch, capsys):
    monkeypatch.setattr(module, name, wrong)
    monkeypatch.setattr(Settings, "size", lambda self, full, quick, tiny: tiny)
    monkeypatch.setattr(
        "levelset_ext.bench.newton.fc28", lambda width=24, depth=3: fc28(width, depth)
    )
    monkeypatch.setattr(train_step, "fc28", lambda: fc28(24, 3))
    monkeypatch.setattr(Settings, "compiles", False)
    monkeypatch.setattr("levelset_ext.bench.limits.fastest", lambda *args: 1.0)
    assert main(["bench", what, "--quick", "--repeats", "1"]) == 1
    error = capsys.readouterr().err
    assert "allowed" in error
    assert ("eager" if what == "ops" else "published") in error.splitlines()[-1]


def test_the_check_of_newton_sees_each_fault():
    one = problem("problem", fc28(24, 3), 64, TINY)
    reference = Reference(one, 64)
    found = plain.newton_compacted(plain.by_autograd(one.net), one.x, one.level, 20, 1e-5)
    assert reference.check("right", found)["converged"] == 64
    with pytest.raises(Mismatch, match="did not converge"):  # stays where it was, and says so
        reference.check("lazy", found._replace(points=one.x, values=one.net(one.x).detach()))
    with pytest.raises(Mismatch, match="calls converged"):  # and says that it has converged
        reference.check("liar", found._replace(points=one.x))
    # On the level set, but not where Newton goes from these starts.
    with pytest.raises(Mismatch, match="elsewhere"):
        reference.check("elsewhere", found._replace(points=found.points.flip(0)))
    with pytest.raises(Mismatch):
        reference.check("NaN", found._replace(points=found.points * math.nan))


# --- competitors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("outputs", [1, 2])
def test_ways_to_evaluate_agree(outputs, skip):
    net = ImplicitMLP(3, outputs, 20, 3, activation="relu", skip=skip).requires_grad_(False)
    x = torch.randn(17, 3)
    exact_net = ImplicitMLP(3, outputs, 20, 3, activation="relu", skip=skip).double()
    exact_net.load_state_dict(net.state_dict())
    values, jacobian = plain.by_autograd(exact_net)(x.double())
    for evaluate in (
        plain.by_autograd(net),
        plain.by_vjp(net),
        plain.by_jacrev(net),
        plain.PackedEvaluate(net, 17),
    ):
        f, j = evaluate(x)
        torch.testing.assert_close(f.double(), values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(j.double(), jacobian, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", [plain.step, plain.step_by_pinv])
def test_an_affine_field_takes_one_step(step):
    net = nn.Linear(3, 2).double().requires_grad_(False)
    x = torch.randn(9, 3, dtype=torch.float64)
    level = torch.zeros(9, 2, dtype=torch.float64)
    found = plain.newton_all_rows(plain.by_autograd(net), x, level, 5, 1e-9, step)
    expected = x - net(x) @ torch.linalg.pinv(net.weight).T
    torch.testing.assert_close(found.points, expected)
    assert found.rows == 2 * 9


class Counted(nn.Module):
    """x^3 - 1/8 of the first coordinate, and how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return (self.scale * x[:, 0] ** 3 - 0.125).reshape(-1, *(1,) * (x.dim() == 2))


def test_the_published_newton_goes_on_until_the_worst_row_is_done():
    net = Counted()
    gradients = []
    net.scale.register_hook(lambda g: gradients.append(g.clone()))
    x = torch.tensor([[0.5, 0.0], [0.9, 3.0]])  # the first is done before it begins
    points, values, _, count = published.newton(net, x, torch.zeros(2, 1), 20, 1e-5)
    assert count == net.calls == len(gradients)
    assert 4 <= count <= 8
    assert net.scale.grad is None
    torch.testing.assert_close(points, torch.tensor([[0.5, 0.0], [0.5, 3.0]]))
    assert float(values.abs().max()) <= 1e-5
    net.calls = 0
    assert published.newton(net, x, torch.zeros(2, 1), 3, 0.0)[3] == net.calls == 4


def test_the_published_search_evaluates_three_times_an_iteration():
    net = Counted()
    start, end = torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)

    def margin(x):
        return net(x.flatten(1)).flatten()

    points, values, forwards = published.false_position(margin, start, end, 40, 1e-5)
    assert forwards == net.calls
    assert (forwards - 2) % 3 == 0
    assert float(values.abs().max()) <= 1e-5
    torch.testing.assert_close(points.flatten(), torch.full((2,), 0.5), atol=1e-4, rtol=0)
    net.calls = 0
    assert published.false_position(margin, start, end, 2, 1e-9)[2] == net.calls == 2 + 3 * 3


# --- timing ---------------------------------------------------------------------------------------


def test_rounds_run_everyone_in_turns():
    order: list[str] = []
    monkey = [
        Competitor(name, lambda name=name: order.append(name), rounds=rounds)
        for name, rounds in (("ours", 3), ("second", 3), ("third", 1))
    ]
    table = compare("case", monkey, lambda name, result: {}, Settings("tiny", 3), memory=False)
    assert order[:3] == ["ours", "second", "third"]  # the checked call
    assert order[3:] == ["ours", "second", "third", "second", "ours", "ours", "second"]
    assert [table["competitors"][n]["rounds"] for n in ("ours", "second", "third")] == [3, 3, 1]


def test_a_competitor_that_may_fail_is_left_out_but_a_wrong_one_never():
    def fails():
        raise RuntimeError("no compiler\nand more")

    def check(name, result):
        if result != 1:
            raise Mismatch(f"{name}: {result}")
        return {}

    right = Competitor("ours", lambda: 1)
    missing = Competitor("compiled", fails, may_fail=True)
    table = compare("case", [right, missing], check, TINY)
    assert table["skipped"] == {"compiled": "no compiler"}
    assert set(table["competitors"]) == {"ours"}
    with pytest.raises(Mismatch):
        compare("case", [right, Competitor("x", lambda: 2, may_fail=True)], check, TINY)
    with pytest.raises(RuntimeError, match="no compiler"):
        compare("case", [right, Competitor("x", fails)], check, TINY)


def test_spread_and_memory():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    result, extra = measured(lambda: float(torch.ones(10_000_000).sum()), CPU)
    assert result == 1e7
    if extra is not None:  # the kernel lets a process reset its high-water mark
        assert 38e6 < extra < 60e6


def test_a_copy_moves_what_it_is_said_to():
    assert timing.fastest(lambda: None, CPU, 2) > 0
    names = {"pinv_apply", "pinv_adjoint", "newton_update", "newton_update_", "bracket_update_"}
    cases = list(ops.cases(TINY))
    assert {case.op for case in cases} == names
    for case in cases:
        least = 4 * case.n * case.l * case.d if case.op != "bracket_update_" else 12 * case.d
        assert case.moved > least


def test_large_cases_near_a_copy_are_counted():
    def case(op, size, near):
        return {"op": op, "bytes": size, "competitors": {"ours": {"near_copy": near}}}

    found = [
        case("a", 1e7, True),
        case("a", 1e7, False),
        case("a", 1e3, True),
        case("b", 1e3, True),
    ]
    assert ops.near_copies(found) == {"a": {"ours": [1, 2]}}


@pytest.mark.parametrize(
    "options", [["--threads", "0"], ["--repeats", "0"], ["--device", "abacus"]], ids=str
)
def test_bad_options_are_one_line(options, capsys):
    assert main(["bench", "nearest", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert options[0].strip("-") in error


def test_an_unknown_benchmark_is_bad_input(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "everything"])
    assert stopped.value.code == 2
    assert "everything" in capsys.readouterr().err


# --- the scripts in benchmarks/ -------------------------------------------------------------------

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("attack_throughput", ["--rows", "0"], "rows: expected at least 1, got 0"),
        ("warm_pool", ["--cases", "nosuch"], "cases: expected some of fast, paper, got 'nosuch'"),
        ("collect_robust", ["no", "a", "--json", "a.json", "--history", "a.csv"], "no/a/config"),
        ("train_step", ["--data", "missing"], "missing: expected a folder with images"),
        ("search_steps", ["a.pt", "--data", "missing"], "missing: expected a folder with images"),
        ("curve_accuracy", ["--out", "no/a.json"], "out: expected a file that can be written"),
        ("curve_accuracy", ["--out", "a.json", "--seeds", "0"], "seeds: expected at least 1"),
    ],
)
def test_bad_input_of_a_script_is_one_line(name, words, message, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    assert script.command(script.main) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{name}.py: ")
    assert message in error
    assert error.count("\n") == 1


def test_the_points_of_the_timed_objective_are_checked(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("train_step")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x = torch.rand(32, 1, 2, 2)
    y = network(x).argmax(1)
    with script.checked_points("right") as counts:
        script.Robust()(network, x, y)
    assert sum(counts) > 0
    search = script.level_sets.find_boundary

    def wrong(*args: Any, **options: Any) -> Any:
        found = search(*args, **options)
        found.result.points.add_(0.1 * torch.rand_like(found.result.points))
        return found

    monkeypatch.setattr(script.level_sets, "find_boundary", wrong)
    refused = pytest.raises(SystemExit, match="wrong: boundary points with")
    with refused, script.checked_points("wrong"):
        script.Robust()(network, x, y)
    assert script.level_sets.find_boundary is wrong
