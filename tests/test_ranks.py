"""Two processes under torchrun: the same run as one process, also after one of them was killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_reconstruct_command import SMALL, small_cloud
from two_processes import on_loopback

from levelset_ext.attacks import search_squares
from levelset_ext.cli import main
from levelset_ext.networks import build
from levelset_ext.recipes import reconstruct as recipe
from levelset_ext.recipes.attack import AttackConfig, run_attack
from levelset_ext.recipes.ranks import Ranks, WholeDraws, in_rounds

HERE = Path(__file__).parent


def launch(
    script: str, *args: object, more: tuple[str, ...] = (), size: int = 2
) -> subprocess.Popen[str]:
    """torchrun with a script that finds this folder's modules."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    # The launcher keeps the port that it chooses: nobody else can take it in between.
    command += ["--standalone", "--local-addr", "127.0.0.1", *more, script]
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    on_loopback()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    out, err = child.communicate(timeout=600)
    assert child.returncode == status, err
    return out, err


def close(a: Any, b: Any, tolerance: float) -> None:
    """Two states with equal names, numbers close and counters equal."""
    if isinstance(a, torch.Tensor):
        if a.is_floating_point():
            scale = float(a.abs().max()) if a.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(scale, 1e-3))
        else:
            assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            close(a[name], b[name], tolerance)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            close(one, other, tolerance)


# --- what the processes of a run say to each other, in one launch -----------------------------


SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_ranks
from levelset_ext.recipes.ranks import launched
with launched("cpu") as (ranks, device):
    found = test_ranks.work(ranks, Path(sys.argv[1]))
    everyone = ranks.gather(found)
    if ranks.main:
        torch.save(everyone, Path(sys.argv[1]) / "found.pt")
"""

FEW = replace(SMALL, resolution=24)
# SOAP's bases are any where there is no gradient yet, and its next steps depend on them: a sum in
# another order becomes another run. What is shared is shown with Adam, whose steps are stable.
STEADY = replace(SMALL, optimizer="adam", distance="points")
CASES = {
    "plain": {},
    "p1": {"p": 1.0, "min_slope": 0.0, "pool": 0},
    "levels": {"levels": (0.0, 0.1), "distance": "disks"},
    "warm": {"warm_pool": 100, "projected": 33},  # shares of different size
    "soap": {"optimizer": "soap"},
}
STEPS = 6


def unit_cloud() -> torch.Tensor:
    unit = (small_cloud().points - [100.0, 0.0, -7.0]) / 3.4
    return torch.from_numpy(unit).to(torch.get_default_dtype())


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    """Float64 for all that is made: what differs is then a mistake, and no rounding."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def steps_of(ranks: Ranks, **more: Any) -> dict[str, Any]:
    training = recipe.Training(unit_cloud(), replace(STEADY, width=16, **more), ranks)
    losses = [float(training.advance().total.detach()) for _ in range(STEPS)]
    return {"losses": losses, **{k: v for k, v in training.state().items() if k != "guard"}}


def classifier_steps(ranks: Ranks, objective: str) -> dict[str, Any]:
    from test_train_command import SHORT, digits, small

    from levelset_ext.recipes.training import Training, accuracy

    data = digits(classes=2 if objective == "svm" else 10)
    data = replace(data, images=data.images.double())
    config = small(objective, 5, network="convnet-2a")
    if objective == "madry":
        settings = {**SHORT["madry"], "warm_start": 0.5}
        config = replace(config, settings=settings, clip_norm=0.5, batch=25, shift=1)
    if objective == "robust":
        config = replace(config, settings={**config.settings, "warm_start": 0.9}, bend=0.1)
    training = Training(data, config, ranks=ranks)
    losses = [training.advance()["loss"] for _ in range(5)]
    state = {k: v for k, v in training.state().items() if k not in ("guard", "history")}
    right = accuracy(training.network, data, torch.device("cpu"), 7, ranks)
    return {"losses": losses, "accuracy": right, **state}


OBJECTIVES = ("cross-entropy", "madry", "trades", "mma", "llr", "robust", "svm")


def mesh_of(ranks: Ranks) -> tuple[np.ndarray, ...]:
    training = recipe.Training(unit_cloud(), SMALL, ranks)
    return tuple(
        value
        for fn in (training.network, torch.nn.Sequential(training.network, torch.nn.Tanh()))
        for value in vars(
            recipe.extract_mesh(
                fn, ([-1.2] * 3, [1.2] * 3), resolution=64, batch=5000, spread=ranks.spread
            )
        ).values()
    )


def attacked(ranks: Ranks, out: Path | None) -> dict[str, Any]:
    from test_train_command import digits

    network = build("convnet-2a", shape=(1, 8, 8))
    with torch.no_grad():
        for k, parameter in enumerate(network.parameters()):
            parameter.copy_(torch.sin(torch.arange(parameter.numel()) + k).view_as(parameter) / 4)
    config = AttackConfig("pgd-xent,pgd-margin", 0.1, 0.03, 3, batch=9, linearity=True)
    images = digits()
    with torch.no_grad():
        labels = network(images.images).argmax(1)
    labels[:7] = (labels[:7] + 1) % 10
    return run_attack(network, replace(images, labels=labels), config, out=out, ranks=ranks)


def second_breaks(index: int, found: dict[int, int]) -> int:
    if index == 1:
        raise recipe.InputError("of the second alone")
    return index


def work(ranks: Ranks, out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with doubles():
        found |= {name: steps_of(ranks, **more) for name, more in CASES.items()}
        found |= {name: classifier_steps(ranks, name) for name in OBJECTIVES}
    found["mesh"] = [torch.as_tensor(value) for value in mesh_of(ranks)]
    recipe.reconstruct(
        recipe.Cloud(small_cloud().points, "a cloud"), out / "whole", FEW, ranks=ranks
    )
    found["attack"] = attacked(ranks, out / "attack")
    try:
        in_rounds(ranks, 4, lambda k: None, second_breaks, lambda *x: None, lambda *x: None)
    except recipe.InputError as error:
        found["round"] = str(error)
    try:
        ranks.first(lambda: (_ for _ in ()).throw(recipe.InputError("of the first alone")))
    except recipe.InputError as error:
        found["error"] = str(error)
    return found


class Shared(NamedTuple):
    """What two processes found, and the folder with the run they made."""

    folder: Path
    found: list[dict[str, Any]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(SCRIPT)
    finish(launch(str(folder / "script.py"), folder))
    return Shared(folder, torch.load(folder / "found.pt", weights_only=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *OBJECTIVES])
def test_two_processes_take_the_steps_of_one(name: str, shared: Shared) -> None:
    """Weights, optimizer, random state, warm points and offsets, from one batch shared by two."""
    first, second = (found[name] for found in shared.found)
    close(first, second, 0.0)
    with doubles():
        if name in CASES:
            alone = steps_of(Ranks(), **CASES[name])
        else:
            alone = classifier_steps(Ranks(), name)
    # Where there is no gradient yet, rounding chooses the basis that SOAP scales in from then on.
    same = 2 if name == "soap" else len(alone["losses"])
    np.testing.assert_allclose(first["losses"][:same], alone["losses"][:same], rtol=1e-8)
    if name != "soap":
        close(first, alone, 1e-8)
    assert alone["losses"][-1] != alone["losses"][0]


@pytest.mark.slow
def test_two_processes_extract_the_mesh_of_one(shared: Shared) -> None:
    alone = [torch.as_tensor(value) for value in mesh_of(Ranks())]
    assert len(alone[0]) > 1000
    for found in shared.found:
        assert len(found["mesh"]) == len(alone)
        for one, other in zip(found["mesh"], alone, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_two_processes_attack_as_one(shared: Shared, tmp_path: Path) -> None:
    """Seven batches for two processes: every count and every bit of the examples."""
    alone = attacked(Ranks(), tmp_path)
    assert 0 < alone["robust_accuracy"] < alone["clean_accuracy"] < 1
    timeless = [without_times(found) for found in (alone, *(f["attack"] for f in shared.found))]
    assert timeless[0] == timeless[1] == timeless[2]
    there = shared.folder / "attack"
    assert {p.name for p in there.iterdir()} == {p.name for p in tmp_path.iterdir()}
    assert (there / "examples.csv").read_bytes() == (tmp_path / "examples.csv").read_bytes()
    with (
        np.load(there / "adversarial.npz") as one,
        np.load(tmp_path / "adversarial.npz") as other,
    ):
        for name in other.files:
            np.testing.assert_array_equal(one[name], other[name])


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in metrics.items() if k != "seconds"}
    kept["attacks"] = [
        {k: v for k, v in one.items() if k != "seconds"} for one in metrics["attacks"]
    ]
    return kept


@pytest.mark.slow
def test_an_error_of_any_process_in_a_round_is_everyones(shared: Shared) -> None:
    assert [found["round"] for found in shared.found] == ["of the second alone"] * 2


@pytest.mark.slow
def test_an_error_of_the_first_process_is_everyones(shared: Shared) -> None:
    assert [found["error"] for found in shared.found] == ["of the first alone"] * 2


def test_shares_are_all_rows_once() -> None:
    for size in (1, 2, 3, 7):
        for count in (0, 1, 5, 7, 100):
            rows = [list(range(count))[Ranks(k, size).share(count)] for k in range(size)]
            assert [row for some in rows for row in some] == list(range(count))
            assert max(map(len, rows)) - min(map(len, rows)) <= 1


def _darkness(delta: torch.Tensor) -> torch.Tensor:
    return -delta.flatten(1).sum(1)


def test_whole_draws_are_those_of_one_process() -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    for draw, more in ((torch.rand, (3, 4)), (torch.randn, (40,)), (torch.rand, ())):
        whole = draw(7, *more, generator=generator())
        for rank in range(2):
            ranks, mine = Ranks(rank, 2), generator()
            rows = ranks.share(7)
            with WholeDraws(ranks, mine, 7):
                own = draw(len(range(7)[rows]), *more, generator=mine)
                again = draw((len(range(7)[rows]), *more), generator=mine)
                torch.rand(2, generator=generator())  # another's
            assert torch.equal(own, whole[rows])
            assert not torch.equal(own, again)
    # The squares that a training proposes, too.
    x = torch.rand(7, 2, 6, 6)
    found = search_squares(_darkness, x, torch.zeros_like(x), 0.1, 3, generator())
    for rank in range(2):
        ranks, mine = Ranks(rank, 2), generator()
        rows = ranks.share(7)
        with WholeDraws(ranks, mine, 7):
            own = search_squares(_darkness, x[rows], torch.zeros_like(x[rows]), 0.1, 3, mine)
        assert torch.equal(own, found[rows])
    with (
        pytest.raises(RuntimeError, match="4 rows of this process, got one of 9"),
        WholeDraws(Ranks(1, 2), mine, 7),
    ):
        torch.rand(9, generator=mine)


# --- the commands ---------------------------------------------------------------------------


COMMAND = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_ranks
from levelset_ext.cli import main
from levelset_ext.recipes import reconstruct as recipe
recipe.PRESETS["fast"] = test_ranks.FEW
status = main(sys.argv[1:])
# One of these that outlives the group may abort the process as it exits.
left = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in left if "gloo" in name], left
raise SystemExit(status)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_by_itself(shared: Shared, tmp_path: Path) -> None:
    """One of two processes is killed after a checkpoint; torchrun starts both again, and the mesh
    is that of two processes which nobody killed."""
    (tmp_path / "command.py").write_text(COMMAND)
    np.save(tmp_path / "cloud.npy", small_cloud().points)
    out = tmp_path / "out"
    words = ["reconstruct", tmp_path / "cloud.npy", "--seed", 3, "--out", out]
    child = launch(str(tmp_path / "command.py"), *words, more=("--max-restarts", "1"))
    victims: list[int] = []
    while child.poll() is None and not (out / "checkpoint.pt").exists():
        time.sleep(0.005)
        victims = children(child.pid)
    os.kill(victims[-1], signal.SIGKILL)
    _, err = finish(child)
    assert "going on at step" in err
    assert err.count("step 40/40") == 1  # the first process alone reports
    whole = shared.folder / "whole"
    names = {path.name for path in whole.iterdir()}
    assert {"mesh.ply", "metrics.json", "preview.png", "checkpoint.pt", "config.json"} < names
    assert {path.name for path in out.iterdir()} == names
    assert (out / "mesh.ply").read_bytes() == (whole / "mesh.ply").read_bytes()


def children(parent: int) -> list[int]:
    """Process ids, in the order in which they were started."""
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return sorted(map(int, listed))


def test_bad_input_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        for words in (
            ["reconstruct", "--preset", "finest", "--out", str(tmp_path / "out")],
            ["curve", "--out", str(tmp_path / "out")],
            ["reconstruct", "--device", "cuda:0", "--out", str(tmp_path / "out")],
        ):
            assert main(words) == 2
            assert len(capfd.readouterr().err.splitlines()) == lines
    assert not (tmp_path / "out").exists()
