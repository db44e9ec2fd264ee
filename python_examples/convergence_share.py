"""How many rows reach the decision boundary, over the whole of a training?

    python python_examples/convergence_share.py --out DIR RUN ...             (what runs wrote down)
    python python_examples/convergence_share.py --out DIR --quick             (digits)
    python python_examples/convergence_share.py --out DIR --data FOLDER       (trains, and looks)

The authors report that of ten Newton steps 80-90 % of the rows converge early in robust training
and 20-30 % at its end. Their robust training itself finds its points by a short attack and false
position instead.

With folders of ``levelset-ext train robust``, their history.csv is shown: the share of the rows of
a batch that the attack carries over the boundary (crossed), the share of those whose search met
its tolerance (converged), and their product (both), nearly the share of Eq. 12's points. Neither
the first nor the last is to be compared with the authors' figures: a row that does not cross has
its boundary beyond eps, which is what the training is for. The Newton share at the end is measured
on the network of the checkpoint.

Without, a network is trained here, and on the way the same test images are projected again and
again, each to the level set 0 of the margin of its own label. The authors say neither where they
start from nor their tolerance; here it is the image itself and |F| <= --tol. F grows during a
training, so "near" counts the rows for which what is left is a Newton step shorter than 0.001.

history.csv, .png   of RUN ...: one row per run and row of its history
newton.csv          of RUN ...: Newton steps on the finished network
shares.csv, .png    of a training here: Newton and false position on the way
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _robustness import COLORS, plan
from _shared import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Run,
    arguments,
    class_margin,
    command,
    images_digest,
    pyplot,
    quantiles,
    save_picture,
    write_table,
)
from torch import nn

import levelset_ext as ls
from levelset_ext.data.images import Images, load_images, merge_labels
from levelset_ext.errors import InputError
from levelset_ext.field import evaluation_copy
from levelset_ext.recipes.classifiers import load_classifier
from levelset_ext.recipes.devices import parse_device
from levelset_ext.recipes.files import load_checkpoint, plain, read_json, save_checkpoint
from levelset_ext.recipes.progress import say
from levelset_ext.recipes.run_folder import network_digest
from levelset_ext.recipes.settings import parse_settings
from levelset_ext.recipes.training import Training, accuracy, plain_config

EARLY, LATE = (80, 90), (20, 30)  # percent, the authors'
NEAR = 1e-3  # L2, in units of the images
_SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Search:
    """The walk before false position: boxes of correct and of wrong rows, steps."""

    eps_correct: float
    eps_wrong: float
    step: float
    iters: int


SEARCHES = {
    "mnist": Search(0.4, 0.5, 0.01, 40),
    "cifar10": Search(0.045, 0.05, 0.007, 20),
    "digits": Search(0.2, 0.25, 0.005, 40),
}


@dataclass(frozen=True)
class Setting:
    objective: str = "robust"
    preset: str = "fast"
    rows: int = 1000
    records: int = 25
    iters: int = 10
    tol: float = 1e-3
    seed: int = 0


# --- what is measured ------------------------------------------------------------------------


def newton_share(network: nn.Module, data: Images, iters: int, tol: float) -> dict[str, float]:
    """Projects every image to the boundary of its own label, the images of one label at a time."""
    device = next(network.parameters()).device
    parts = []
    moved = torch.full((len(data),), math.nan)
    for label in range(data.classes):
        rows = torch.nonzero(data.labels == label).squeeze(1)
        for some in rows.split(250):
            x = data.images[some].to(device)
            found = ls.project(class_margin(network, label), x, 0.0, iters, tol)
            moved[some] = torch.linalg.vector_norm((found.points - x).flatten(1), dim=1).cpu()
            parts.append((some, found.converged.cpu(), found.distance.cpu(), found.residual.cpu()))
    order = torch.cat([part[0] for part in parts])
    converged, left, residual = (torch.cat([part[k] for part in parts]) for k in (1, 2, 3))
    return {
        "newton": float(converged.double().mean()),
        "newton_near": float((left <= NEAR).double().mean()),
        "residual_median": quantiles(residual, (0.5,))[0],
        "distance_median": quantiles(moved[order][converged], (0.5,))[0],
    }


def search_share(
    network: nn.Module, data: Images, search: Search, tol: float, seed: int
) -> dict[str, float]:
    """The walk of Section 3.2 and false position, from the same random starts every time."""
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    crossed = converged = 0
    for x, y in zip(data.images.split(250), data.labels.split(250), strict=True):
        samples = ls.find_boundary(
            network,
            x.to(device),
            y.to(device),
            search.eps_correct,
            search.eps_wrong,
            search.step,
            search.iters,
            tol=tol,
            generator=generator,
        )
        crossed += int(samples.crossed.sum())
        converged += int(samples.result.converged.sum())
    return {
        "crossed": crossed / len(data),
        "search_converged": converged / crossed if crossed else math.nan,
        "found": converged / len(data),
    }


# --- a training here -------------------------------------------------------------------------


def marks(steps: int, records: int) -> list[int]:
    """When to look: more often at the beginning, where more happens."""
    return sorted({round(steps * (k / (records - 1)) ** 2) for k in range(records)})


def train_and_look(
    run: Run, training: Training, test: Images, some: Images, setting: Setting, at: Sequence[int]
) -> list[dict[str, float]]:
    """Trains to the end and measures at the steps ``at``. What is needed to go on is kept in one
    file, as a state holds a place for every training image."""
    file = run.parts / "state.pt"
    records: list[dict[str, float]] = []
    if file.exists():
        try:
            state = load_checkpoint(file, run.kind)
            training.load(state["training"])
            records = state["records"]
        except InputError:
            say(f"{file}: damaged, begun again")
    search = SEARCHES[some.name]

    def save() -> None:
        state = {"kind": run.kind, "training": training.state(), "records": records}
        save_checkpoint(file, state)

    saved = time.monotonic()
    while True:
        if training.step in at and training.step not in [record["step"] for record in records]:
            network = evaluation_copy(training.result)
            with torch.no_grad():
                records.append(
                    {
                        "step": training.step,
                        "epoch": training.epoch,
                        "clean_accuracy": accuracy(network, test, training.device),
                        **newton_share(network, some, setting.iters, setting.tol),
                        **search_share(network, some, search, setting.tol, setting.seed),
                    }
                )
            save()
            saved = time.monotonic()
        last = training.step == training.steps
        if last or run.progress.due():
            note = f"Newton {100 * records[-1]['newton']:.1f} %" if records else ""
            run.progress.report(training.step, note, last)
        if last:
            return records
        training.advance()
        if time.monotonic() - saved >= _SAVE_SECONDS:
            save()
            saved = time.monotonic()


def draw_shares(
    records: Sequence[dict[str, float]], setting: Setting, some: Images, path: Path
) -> None:
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 4.3))
    x = [record["epoch"] for record in records]
    end = x[-1]
    # Where "early" ends and "late" begins is not said: a quarter at either end.
    for (low, high), (first, last), what in (
        (EARLY, (0, end / 4), "authors, early"),
        (LATE, (0.75 * end, end), "authors, late"),
    ):
        left.fill_between([first, last], low, high, color=ORANGE, alpha=0.3, lw=0)
        left.text((first + last) / 2, low - 5, what, ha="center", fontsize=7.5, color=ORANGE)
    left.plot(
        x, [100 * r["newton"] for r in records], "o-", ms=3, color=BLUE,
        label=f"|F| <= {setting.tol:g}",
    )  # fmt: skip
    left.plot(
        x, [100 * r["newton_near"] for r in records], ":", lw=1.8, color=GREEN,
        label=f"Newton step left <= {NEAR:g}",
    )  # fmt: skip
    left.plot(
        x, [100 * r["clean_accuracy"] for r in records], "-", lw=1, color=GREY,
        label="clean accuracy",
    )  # fmt: skip
    left.set(title=f"{setting.iters} Newton steps from the image", ylabel="test images, %")
    for key, label, color in (
        ("crossed", "the walk crosses", BLUE),
        ("search_converged", "of these false position converges", GREEN),
    ):
        values = [100 * record[key] for record in records]
        right.plot(x, values, "o-", ms=3, color=color, label=label)
    right.set_title("Section 3.2: walk, then false position")
    for panel in (left, right):
        panel.set(xlabel="epoch", ylim=(-3, 106))
        # Below, as a curve may end anywhere inside.
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=7.5)
    figure.supxlabel(
        f"{len(some)} test images of {some.name}, objective {setting.objective}. Bands: the "
        "authors' 80-90 % and 20-30 % for ten Newton steps;\ntheir starting points and tolerance "
        "are not stated, and the ends of the bands are drawn at a guess.",
        fontsize=7.5,
        color="#555a63",
    )
    save_picture(figure, path)


# --- runs that are there ---------------------------------------------------------------------

_NEEDED = ("step", "epoch", "crossed", "converged")
_SHOWN = (*_NEEDED, "accuracy", "distance", "clean_accuracy")


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's history that have a share of crossed rows."""
    file = folder / "history.csv"
    try:
        with file.open(newline="") as stream:
            table = list(csv.DictReader(stream))
    except OSError as error:
        raise InputError(f"{file}: expected the history of a training ({error.strerror})") from None
    if not table or any(name not in table[0] for name in _NEEDED):
        raise InputError(
            f"{file}: expected the columns {', '.join(_NEEDED)}, as levelset-ext train robust "
            "writes them"
        )
    rows = []
    for line in table:
        try:
            row = {name: float(line.get(name) or "nan") for name in _SHOWN}
        except ValueError as error:
            raise InputError(f"{file}: expected numbers ({error})") from None
        # Where no row crossed, none had anything to converge.
        share = row["crossed"] * row["converged"] if row["crossed"] > 0 else 0.0
        rows.append({"run": folder.resolve().name, **row, "both": share})
    return rows


def network_of(folder: Path, data: Images, device: Any) -> nn.Module | None:
    """The network of a run, if its images are those at hand."""
    config = folder / "config.json"
    trained_on = read_json(config).get("data_name") if config.exists() else None
    if trained_on != data.name:
        say(f"{folder}: trained on {trained_on}, got images {data.name}; no Newton steps on it")
        return None
    return load_classifier(folder / "checkpoint.pt", device)


def newton_at_the_end(
    folder: Path, network: nn.Module | None, data: Images, setting: Setting
) -> dict[str, Any] | None:
    """Newton steps on the network of a run."""
    if network is None:
        return None
    try:
        return {
            "run": folder.resolve().name,
            **newton_share(network, data, setting.iters, setting.tol),
        }
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from None


def draw_history(
    histories: Sequence[list[dict[str, Any]]], newton: Sequence[dict[str, Any] | None], path: Path
) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.8), sharex=True)
    titles = {
        "crossed": "crossed the boundary, % of rows",
        "converged": "converged, % of those that crossed",
        "both": "crossed and converged, % of rows",
    }
    for panel, (key, title) in zip(axes, titles.items(), strict=True):
        for rows, end, color in zip(histories, newton, COLORS * 9, strict=False):
            label = rows[0]["run"]
            if end is not None:
                label += f" (Newton at its end: {100 * end['newton']:.0f} %)"
            x = [row["epoch"] for row in rows]
            panel.plot(x, [100 * row[key] for row in rows], color=color, lw=1.2, label=label)
        panel.set(title=title, xlabel="epoch", ylim=(-3, 103))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", fontsize=8)
    figure.supxlabel(
        "The authors' 80-90 % early and 20-30 % late are for ten Newton steps, to be compared with "
        "the Newton share alone;\na row that does not cross has its boundary beyond the reach of "
        "the attack, which is what the training is for.",
        fontsize=7.5,
        color="#555a63",
    )
    save_picture(figure, path)


# --- the command line ------------------------------------------------------------------------


def work(argv: Sequence[str] | None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of trainings")
    parser.add_argument("--data", metavar="DIR", help="MNIST or CIFAR10 files (default: digits)")
    parser.add_argument("--rows", type=int, help="test images to look at")
    parser.add_argument("--iters", type=int, help="Newton steps; 10 are the authors'")
    parser.add_argument("--tol", type=float, help="of |F|, in units of the logits")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    one = parser.add_argument_group("a training here, without RUN")
    one.add_argument("--objective", help="of levelset-ext train; robust if left out")
    one.add_argument("--preset", help="fast (default) or paper")
    one.add_argument("--classes", type=int, metavar="K", help="merge the classes into K")
    one.add_argument("--epochs", type=float, help="the preset's if left out")
    one.add_argument("--records", type=int, help="how often to look")
    one.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="of the training"
    )
    args = parser.parse_args(argv)
    device = parse_device(args.device)
    setting = replace(Setting(), seed=args.seed)
    if args.quick:
        setting = replace(setting, rows=200, records=12)
        args.epochs = 30.0 if args.epochs is None else args.epochs
    names = ("rows", "iters", "tol", "objective", "preset", "records")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    setting = replace(setting, **given)
    if setting.iters < 1:
        raise InputError(f"iters: expected at least 1, got {setting.iters}")
    if setting.records < 2:
        raise InputError(f"records: expected at least 2, got {setting.records}")
    if not 0 < setting.tol < math.inf:
        raise InputError(f"tol: expected a number > 0, got {setting.tol}")
    test = load_images(args.data, "test")
    some = load_images(args.data, "test", setting.rows)
    if args.runs:
        show_runs(args, setting, some, device)
        return

    data = load_images(args.data, "train")
    if args.classes is not None:
        if not 2 <= args.classes <= data.classes:
            raise InputError(f"classes: expected 2 to {data.classes}, got {args.classes}")
        data, test, some = (merged(images, args.classes) for images in (data, test, some))
    config = plan(
        setting.objective,
        data,
        setting.preset,
        parse_settings(args.set),
        seed=setting.seed,
        epochs=args.epochs,
    )
    if config.options["classes"] == 1:
        raise InputError("objective: expected one for networks with a logit per class, got svm")
    training = Training(data, config, device)
    at = marks(training.steps, setting.records)
    settings = {
        **asdict(setting),
        "training": plain(plain_config(config)),
        "data": [images_digest(images) for images in (data, some)],
    }
    run = Run(args.out, "convergence", settings, training.steps, args.resume)
    records = train_and_look(run, training, test, some, setting, at)
    write_table(args.out / "shares.csv", records)
    draw_shares(records, setting, some, args.out / "shares.png")


def merged(images: Images, classes: int) -> Images:
    labels = merge_labels(images.labels, classes, original=images.classes)
    return replace(images, labels=labels, classes=classes)


def show_runs(args: Any, setting: Setting, some: Images, device: Any) -> None:
    histories = [read_history(folder) for folder in args.runs]
    networks = [network_of(folder, some, device) for folder in args.runs]
    settings = {
        "iters": setting.iters,
        "tol": setting.tol,
        "runs": [folder.resolve().name for folder in args.runs],
        "networks": [None if one is None else network_digest(one) for one in networks],
        "data": images_digest(some),
    }
    run = Run(args.out, "convergence of runs", settings, len(args.runs), args.resume)
    newton = []
    for number, (folder, network) in enumerate(zip(args.runs, networks, strict=True)):

        def measure(folder: Path = folder, network: nn.Module | None = network) -> dict[str, Any]:
            return {"newton": newton_at_the_end(folder, network, some, setting)}

        newton.append(run.unit(f"{number}", measure)["newton"])
    write_table(args.out / "history.csv", [row for rows in histories for row in rows])
    found = [row for row in newton if row is not None]
    if found:
        write_table(args.out / "newton.csv", found)
    draw_history(histories, newton, args.out / "history.png")


def main(argv: Sequence[str] | None = None) -> int:
    return command(work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
