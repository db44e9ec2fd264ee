"""Many trainings at once: every method on every share of the images with every seed.

A sweep is a folder. Runs are independent of each other and each has a folder of its own, made by
``levelset-ext train``, so what is finished stays finished and what was killed goes on:

    config.json              what all runs have in common
    runs/METHOD-SHARE-SEED/  the run, and log.txt with what it said
    results.csv              one row for every run, rewritten as they finish
    results.json             the same, and mean and deviation over the seeds
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from levelset_ext.data.images import Images, fraction, load_images
from levelset_ext.errors import InputError
from levelset_ext.objectives import OBJECTIVES
from levelset_ext.recipes.attack import (
    AttackConfig,
    add_strength,
    check_attack,
    run_attack,
    strength,
)
from levelset_ext.recipes.classifiers import load_classifier
from levelset_ext.recipes.engines import ENGINES, processes, run_all
from levelset_ext.recipes.files import read_json, write_json
from levelset_ext.recipes.progress import Progress, clock, say
from levelset_ext.recipes.run_folder import begin_run
from levelset_ext.recipes.settings import parse_settings
from levelset_ext.recipes.train import check_images, merged, train
from levelset_ext.recipes.train_presets import preset
from levelset_ext.recipes.training import TrainConfig, new_network
from levelset_ext.whole_files import write_whole

__all__ = ["Common", "Run", "add_sweep_command", "sweep"]

KIND = "levelset_ext sweep 1"
_ATTACK = ("attack", "eps", "step", "iters")  # of Common: what trainings do not depend on
_INPUT = ("method", "fraction", "seed", "status")
_ACCURACIES = ("clean_accuracy", "robust_accuracy")
_COLUMNS = (*_INPUT, *_ACCURACIES, "rows", "steps", "skipped_steps", "training_seconds", "error")


# --- trainings ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training of a sweep."""

    method: str  # an objective
    fraction: float  # share of the training images, chosen by the seed
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.fraction:g}-{self.seed}"


@dataclass(frozen=True)
class Common:
    """What all trainings of a sweep have in common; arguments of the commands train and attack."""

    data: str | None = None
    limit: int | None = None
    classes: int | None = None
    network: str | None = None
    preset: str = "fast"
    epochs: float | None = None
    steps: int | None = None
    batch: int | None = None
    lr: float | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    attack: str | None = None
    eps: float | None = None  # of the attack, as the next two; by the images if None
    step: float | None = None
    iters: int | None = None


@lru_cache(maxsize=1)
def _images(data: str | None, limit: int | None, classes: int | None) -> tuple[Images, Images]:
    train_all, test = (load_images(data, split, limit) for split in ("train", "test"))
    if classes is not None:
        return merged(train_all, classes), merged(test, classes)
    return train_all, test


def one_run(run: Run, common: Common, folder: Path) -> dict[str, Any]:
    """The training, and the attack if there is one; gone on with in its folder."""
    data, test = _images(common.data, common.limit, common.classes)
    config = _config(run, common, data)
    rows = fraction(data.labels, run.fraction, run.seed)
    some = replace(data, images=data.images[rows], labels=data.labels[rows])
    metrics = train(some, test, folder, config, resume=True, say=say)
    names = ("clean_accuracy", "rows", "steps", "skipped_steps", "training_seconds")
    found = {name: metrics[name] for name in names}
    if common.attack is not None:
        settings = _attack_config(common, test, config)
        network, attacked_in = load_classifier(folder / "checkpoint.pt"), folder / "attack"
        # Another attack than before is begun anew; the training stays.
        before = attacked_in / "config.json"
        known = before.exists() and read_json(before).get("settings") == asdict(settings)
        attacked = run_attack(network, test, settings, out=attacked_in, resume=known, say=say)
        found["robust_accuracy"] = attacked["robust_accuracy"]
    return found


def _attack_config(common: Common, test: Images, config: TrainConfig) -> AttackConfig:
    return AttackConfig(
        attack=common.attack or "",
        **strength(test.name, eps=common.eps, step=common.step, iters=common.iters),
        binary=config.options.get("classes") == 1,
    )


def _check_attack(common: Common, test: Images, config: TrainConfig) -> None:
    """Raises InputError if no network of these trainings could be attacked as wanted."""
    network = new_network(config, seed=0)
    one = replace(test, images=test.images[:1], labels=test.labels[:1])
    check_attack(network, one, _attack_config(common, test, config))


def _config(run: Run, common: Common, data: Images) -> TrainConfig:
    return preset(
        run.method,
        data,
        common.preset,
        network=common.network,
        seed=run.seed,
        epochs=common.epochs,
        steps=common.steps,
        batch=common.batch,
        lr=common.lr,
        settings=dict(common.settings),
    )


def sweep(
    runs: list[Run],
    common: Common,
    out: Path,
    *,
    jobs: int = 1,
    engine: str = "loky",
    address: str | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Trains all runs in the folder ``out``; with ``resume`` those that it lacks.

    Args:
        runs: what to train; a sweep that is gone on with may have other runs than before.
        common: what they have in common.
        out: folder, made if missing. Without ``resume`` a sweep that is there is removed.
        jobs: how many at a time on this machine.
        engine: what runs them, one of ``engines.ENGINES``.
        address: of a cluster of that engine, whose processes are used instead. ``out`` and the
            images have to be the same files on all of its machines.
        resume: keep what is finished and go on with what is not. Broken runs are tried again. With
            another attack than before the networks are kept and attacked anew.
        say: where messages go; progress goes to stderr.

    Returns:
        The contents of results.json: "runs", a row each, and "summary".

    Raises:
        InputError: settings of a run that cannot be used, said before anything is written; a
            folder that cannot be written, or holds another sweep; an engine that is not
            installed, or has no cluster at that address.
    """
    path = None if common.data is None else str(Path(common.data).resolve())
    placed = replace(common, data=path)  # a process of a cluster has a working directory of its own
    data, test = _images(placed.data, placed.limit, placed.classes)
    for run in runs:
        config = _config(run, common, data)
        fraction(data.labels, run.fraction, run.seed)
        if run.seed == runs[0].seed:
            check_images(data, test, config)  # a share of them has the same classes
            if common.attack is not None:
                _check_attack(common, test, config)
    order = {run.name: run for run in runs}
    rows: dict[str, dict[str, Any]] = {}
    progress = Progress("run", len(order), every=0.0 if jobs == 1 else None)

    def done(name: str, result: dict[str, Any]) -> None:
        rows[name] = {**vars(order[name]), **result}
        if result["status"] == "failed":
            say(f"{name}: failed: {result['error']} ({out / 'runs' / name / 'log.txt'})")
        last = len(rows) == len(order)
        _write(out, [rows[name] for name in order if name in rows])
        if last or progress.due():
            progress.report(len(rows), name, last)

    folder = out.resolve() / "runs"
    tasks = {name: partial(one_run, run, placed, folder / name) for name, run in order.items()}
    with processes(jobs, engine, address) as by:
        settings = {**vars(common), "settings": dict(common.settings)}
        # The folder of a sweep has no metrics.json, so it never counts as finished.
        begin_run(
            out,
            {"kind": KIND, "settings": {k: v for k, v in settings.items() if k not in _ATTACK}},
            results=("results.csv", "results.json", "runs"),
            what="a sweep",
            same="the same settings",
            resume=resume,
            say=say,
        )
        run_all(tasks, folder, by, done)
    return _write(out, [rows[name] for name in order])


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of the runs that are done, for every method and
    fraction; the deviation of a single run is NaN."""
    found = []
    for method, share in dict.fromkeys((row["method"], row["fraction"]) for row in rows):
        same = [r for r in rows if (r["method"], r["fraction"]) == (method, share)]
        good = [r for r in same if r["status"] == "done"]
        entry = {"method": method, "fraction": share, "done": len(good)}
        entry["failed"] = len(same) - len(good)
        for name in _ACCURACIES:
            values = [row[name] for row in good if name in row]
            if values:
                entry[f"{name}_mean"] = statistics.fmean(values)
                entry[f"{name}_deviation"] = (
                    statistics.stdev(values) if len(values) > 1 else math.nan
                )
        found.append(entry)
    return found


def _write(out: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    text = io.StringIO()
    table = csv.DictWriter(text, _COLUMNS, restval="", lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()})
    write_whole(out / "results.csv", lambda stream: stream.write(text.getvalue().encode()))
    results = {"runs": rows, "summary": summarize(rows)}
    write_json(out / "results.json", results)
    return results


# --- the command line -----------------------------------------------------------------------


def add_sweep_command(commands: Any) -> None:
    """Adds ``sweep`` to the subparsers of the command line."""
    one = commands.add_parser(
        "sweep",
        help="many trainings at once: methods x shares of the images x seeds",
        description="Trains a classifier with every method on every share of the images with every "
        "seed, several at a time, and writes results.csv, results.json and the folders of the "
        "runs. Methods: " + ", ".join(OBJECTIVES) + ".",
    )
    one.add_argument("methods", metavar="METHODS", help="objectives, comma-separated")
    one.add_argument("--out", required=True, metavar="DIR", help="folder of the sweep")
    one.add_argument("--fractions", default="1", metavar="S,S", help="shares of the images; 1")
    one.add_argument("--seeds", type=int, default=5, metavar="N", help="0 ... N - 1")
    one.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time; 1")
    one.add_argument("--engine", default="loky", help="what runs them: " + ", ".join(ENGINES))
    one.add_argument("--address", help="of a Dask or Ray cluster, whose processes are used instead")
    one.add_argument("--data", metavar="DIR", help="images; scikit-learn's digits if left out")
    one.add_argument("--limit", type=int, metavar="N", help="only the first N images of each split")
    one.add_argument("--classes", type=int, metavar="K", help="merge the classes into K")
    one.add_argument("--network", metavar="NAME", help="by the images if left out")
    one.add_argument("--preset", default="fast", help="fast (the default, for a CPU) or paper")
    length = one.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float)
    length.add_argument("--steps", type=int, help="instead of epochs")
    one.add_argument("--batch", type=int)
    one.add_argument("--lr", type=float)
    one.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as of train")
    one.add_argument("--attack", metavar="NAMES", help="attack every network with these")
    add_strength(one)
    one.add_argument(
        "--resume",
        action="store_true",
        help="keep the runs that DIR has; the tables are of those asked for",
    )
    one.set_defaults(run=_command)


def _command(args: argparse.Namespace) -> None:
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise InputError(f"{name}: expected at least 1, got {getattr(args, name)}")
    runs = list(_runs(args.methods, args.fractions, args.seeds))
    given: dict[str, Any] = {
        field.name: getattr(args, field.name, None) for field in fields(Common)
    }
    given["settings"] = tuple(sorted(parse_settings(args.set).items()))
    common = Common(**given)
    results = sweep(
        runs,
        common,
        Path(args.out),
        jobs=args.jobs,
        engine=args.engine,
        address=args.address,
        resume=args.resume,
        say=say,
    )
    for entry in results["summary"]:
        words = f"{entry['method']} on {100 * entry['fraction']:g} %: {entry['done']} done"
        for name in _ACCURACIES:
            if f"{name}_mean" in entry:
                mean, deviation = entry[f"{name}_mean"], entry[f"{name}_deviation"]
                spread = "" if math.isnan(deviation) else f" +- {100 * deviation:.2f}"
                words += f", {name.replace('_', ' ')} {100 * mean:.2f}{spread} %"
        say(words)
    spent = sum(row.get("training_seconds", 0.0) for row in results["runs"])
    say(f"{args.out}/results.csv: {len(results['runs'])} runs, {clock(spent)} of training")
    failed = sum(row["status"] == "failed" for row in results["runs"])
    if failed:
        raise RuntimeError(f"{failed} of {len(results['runs'])} runs, see {args.out}/results.csv")


def _runs(methods: str, fractions: str, seeds: int) -> Iterator[Run]:
    try:
        shares = [float(part) for part in fractions.split(",")]
    except ValueError:
        raise InputError(f"fractions: expected numbers, got {fractions!r}") from None
    for share in shares:
        if not 0 < share <= 1:
            raise InputError(f"fractions: expected 0 < S <= 1, got {share}")
    for method in methods.split(","):
        if method not in OBJECTIVES:
            raise InputError(f"methods: expected some of {', '.join(OBJECTIVES)}, got {method!r}")
        for share in shares:
            for seed in range(seeds):
                yield Run(method, share, seed)
