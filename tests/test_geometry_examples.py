"""docs/geometry.md, block by block, and the geometry experiments in settings of a few seconds."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "python_examples"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def same_text(printed: str, quoted: str) -> bool:
    """The same words, and numbers as close as another order of additions leaves them."""
    if NUMBER.sub("#", printed) != NUMBER.sub("#", quoted):
        return False
    for a, b in zip(NUMBER.findall(printed), NUMBER.findall(quoted), strict=True):
        if "e" in b:  # an order of magnitude
            if abs(math.log10(float(a) / float(b))) > 1:
                return False
        elif float(a) != pytest.approx(float(b), rel=0.15, abs=0.06):
            return False
    return True


def test_comparison_of_texts() -> None:
    assert same_text("area 5.79 +- 0.13", "area 5.81 +- 0.14")
    assert not same_text("area 5.79 +- 0.13", "area 7.81 +- 0.13")
    assert not same_text("area 5.79", "volume 5.79")
    assert not same_text("1e-7", "1e-4")


def test_the_page_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "geometry.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", page, re.S)
    assert len(blocks) == page.count("```python") >= 10
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code, quoted in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/geometry.md", "exec"), names)
        assert same_text(printed.getvalue(), quoted), f"{printed.getvalue()!r} for {quoted!r}"


def test_the_page_names_files_that_exist() -> None:
    page = (ROOT / "docs" / "geometry.md").read_text()
    for link in re.findall(r"\]\(([^)]*)\)", page):
        assert (ROOT / "docs" / link).exists(), link


def test_fit_depth(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = example("fit_depth")
    monkeypatch.setattr(depth, "FITS", ("radius, depth", "radius, silhouette"))
    assert depth.main(["--out", str(tmp_path), "--quick"]) is None
    rows = table(tmp_path / "steps.csv")
    assert len(rows) == 2 * 31
    ends = json.loads((tmp_path / "fit.json").read_text())
    exact, outline = (ends["fits"][name] for name in depth.FITS)
    assert exact["last_error"] < 1e-5
    assert outline["last_error"] < 0.15 * ends["pixel"]
    for found in (exact, outline):
        assert found["first_error"] == pytest.approx(0.17)
        assert found["worst_slope_mismatch"] < 1e-3
    assert is_png(tmp_path / "fit.png")


@pytest.mark.parametrize("image", ["depth", "silhouette"])
def test_gradients_of_images_of_a_network(example: Any, image: str) -> None:
    depth = example("fit_depth")
    net = depth.sphere(0.45, 0)
    loss = (depth.depth_loss if image == "depth" else depth.silhouette_loss)(8)
    slope, difference = depth.slopes(net, loss, 1e-6)
    assert slope > 0.01
    assert difference == pytest.approx(slope, rel=1e-4)


def test_move_vertex(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vertex = example("move_vertex")
    small = vertex.camera(40)
    monkeypatch.setattr(vertex, "camera", lambda: small)
    found = vertex.move(0, 80, 16)
    facts = found["facts"]
    assert facts["first_distance"] == pytest.approx(vertex.RISE, abs=1e-3)
    assert facts["last_distance"] < 0.2 * vertex.RISE
    assert facts["off_the_ray"] < 0.3 * vertex.RISE
    assert facts["others_moved_mean"] < 0.1 * vertex.RISE
    before, after = found["views"]
    assert before.shape == after.shape == (40, 40, 3)
    assert bool((before != after).any())


def test_figure_a1(example: Any, tmp_path: Path) -> None:
    figure = example("figure_a1_coverage")
    found = figure.one_network(0, 40, 150)
    for method in figure.METHODS:
        assert len(found[method]["points"]) == 40
        for name in ("chamfer", "hausdorff") if method != "even" else ():
            assert found["even"][name] < found[method][name]
    timed = [figure.cost(0, 50, n) for n in (20, 40)]
    assert [row["points"] for row in timed] == [20, 40]
    figure.draw(found, timed, tmp_path / "a.png")
    assert is_png(tmp_path / "a.png")


def test_the_figures_of_figure_a1_that_are_kept() -> None:
    rows = {r["method"]: r for r in table(ROOT / "benchmarks/results/coverage_summary.csv")}
    even = rows.pop("even")
    assert len(rows) == 3
    for row in rows.values():
        assert row["even_is_better"] == row["networks"] == "10"
        for name in ("chamfer", "hausdorff"):
            assert float(even[name]) < min(float(row[name]), float(row[f"paper_{name}"]))


def test_hidden_margin(example: Any) -> None:
    pytest.importorskip("sklearn")
    hidden = example("hidden_margin")
    plain, margin = (hidden.one(kind, 0, 300) for kind in ("plain", "margin"))
    assert margin["distance_median"] > 1.3 * plain["distance_median"]
    assert margin["switched"][-1] < plain["switched"][-1]
    # The distance to the zero set of a unit that is affine in the input is known.
    net = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(3)), torch.nn.Linear(5, 2))
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    distance, near = hidden.switching_distance(net, x, 1)
    exact = net(x)[:, 1].abs() / net[3].weight[1].norm()
    assert near.all()
    assert torch.allclose(distance, exact, atol=2e-3)
