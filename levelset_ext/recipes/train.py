"""The command that trains a classifier with one of the objectives: from images to a checkpoint.

A run is a folder. Everything in it is written beside its name and renamed, and the folder alone is
enough to go on after the process was killed at any moment:

    config.json      every setting, and which images
    checkpoint.pt    the classifier, as ``levelset-ext attack`` takes it, and the state of the run
    history.csv      one row for every so many steps, and history.png
    metrics.json     written last: a folder with it holds a finished run
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from levelset_ext._load import build_info
from levelset_ext.data.images import Images, fraction, load_images, merge_labels
from levelset_ext.errors import InputError
from levelset_ext.networks import CLASSIFIERS
from levelset_ext.objectives import OBJECTIVES
from levelset_ext.recipes.classifiers import KIND as CLASSIFIER_KIND
from levelset_ext.recipes.classifiers import classifier_state, load_classifier
from levelset_ext.recipes.files import kept_checkpoint, save_checkpoint, taking_up, write_json
from levelset_ext.recipes.history import HistoryPicture
from levelset_ext.recipes.observers import (
    Observer,
    Observers,
    ProgressLine,
    Run,
    add_observer_options,
    chosen_observers,
)
from levelset_ext.recipes.progress import Spent, clock, peak_memory_gb, say
from levelset_ext.recipes.ranks import ALONE, Ranks, launched, restarted
from levelset_ext.recipes.run_folder import begin_run, check_apart, digest
from levelset_ext.recipes.settings import parse_settings
from levelset_ext.recipes.tensorboard import FOLDER as TENSORBOARD_FOLDER
from levelset_ext.recipes.train_presets import PRESETS, preset
from levelset_ext.recipes.training import (
    TrainConfig,
    Training,
    accuracy,
    check_seed,
    make_objective,
    plain_config,
)

__all__ = [
    "PRESETS",
    "TrainConfig",
    "Training",
    "add_train_command",
    "make_objective",
    "preset",
    "train",
]

KIND = "levelset_ext train 1"
RESULTS = ("history.csv", "history.png", "checkpoint.pt", TENSORBOARD_FOLDER)
_SAVE_SECONDS = 60.0


def train(
    data: Images,
    test: Images,
    out: Path,
    config: TrainConfig,
    *,
    init: nn.Module | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
    observers: Sequence[Observer] = (),
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Trains, or with ``resume`` goes on training, in the folder ``out``.

    Args:
        data: images to train on.
        test: images for the accuracy in metrics.json, and in the history unless rows are held out.
        out: folder, made if missing. Without ``resume`` a run that is there is replaced.
        config: settings, see :func:`preset`.
        init: network to start from, made by ``networks.build`` with the options in ``config``.
        device: where to train.
        resume: go on with the run in ``out``; afresh if there is none, nothing to do if finished.
        say: where messages go; progress goes to stderr. Of several processes the first one speaks.
        observers: who else watches, see :mod:`levelset_ext.recipes.observers`; the caller
            closes them. Of several processes the first one is watched.
        ranks: the processes of the run, all of which call this; the first one writes.

    Returns:
        The contents of metrics.json.

    Raises:
        InputError: images, labels, weights or settings that cannot be used, said before anything is
            written; ``out`` cannot be written, or holds another run.
        RuntimeError: the loss was not finite for too long.
    """
    # Before anything is written.
    check_images(data, test, config)
    if init is not None:
        _check_init(init, config)
    training = Training(data, config, device, init, ranks)
    training.guard.say = say = ranks.speaker(say)
    _try(training)
    header = {
        "kind": KIND,
        "data": digest(data.images, data.labels),
        "test": digest(test.images, test.labels),
        "data_name": data.name,
        "rows": len(data),
        "init": None if init is None else digest(*init.state_dict().values()),
        "settings": plain_config(config),
    }
    finished = ranks.first(
        lambda: begin_run(
            out,
            header,
            results=RESULTS,
            what="a training",
            same="the run of the same images and settings",
            resume=resume,
            say=say,
        )
    )
    if finished is not None:
        return finished

    spent = Spent()
    saved = ranks.first(lambda: kept_checkpoint(out, CLASSIFIER_KIND)) if resume else None
    if saved is not None:
        spent = _load(training, saved, out / "checkpoint.pt")
        say(f"going on at step {training.step} of {training.steps}")
    sinks = [ProgressLine(), HistoryPicture(), *observers] if ranks.main else []
    watch = Observers(sinks, say)
    per_step = len(training.labels) / training.steps_per_epoch
    watch.begin(
        Run(
            out,
            training.steps,
            training.step,
            plain_config(config),
            training,
            (per_step, "images"),
        )
    )
    _train(training, test, out, spent, watch)
    metrics = _metrics(training, test, spent.seconds(), spent.cpu_seconds())
    watch.done({}, metrics)
    ranks.first(lambda: write_json(out / "metrics.json", metrics))
    return metrics


def check_images(data: Images, test: Images, config: TrainConfig) -> None:
    """Raises InputError if a network of these settings cannot be trained on the images."""
    _check_images("data", data, config)
    _check_images("test", test, config)
    if len(torch.unique(data.labels)) < 2:
        raise InputError("data: expected images of two or more classes, got one class alone")


def _check_images(name: str, data: Images, config: TrainConfig) -> None:
    images, labels = data.images, data.labels
    if images.dim() != 4 or images.dtype != torch.float32:
        raise InputError(
            f"{name}: expected float32 images (n, c, h, w), got {images.dtype} "
            f"{tuple(images.shape)}"
        )
    shape = config.options.get("shape")
    if shape is not None and tuple(images.shape[1:]) != tuple(shape):
        raise InputError(
            f"{name}: expected images {tuple(shape)} as the network takes, got "
            f"{tuple(images.shape[1:])}"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise InputError(
            f"{name}: expected int64 labels ({len(images)},), got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    if len(images) == 0:
        raise InputError(f"{name}: expected at least one image, got none")
    low, high = (float(v) for v in torch.aminmax(images))
    if not (low >= 0 and high <= 1):  # written so that NaN fails
        raise InputError(f"{name}: expected values in [0, 1], got values from {low:g} to {high:g}")
    classes = max(2, config.options.get("classes", 10))  # one logit is for the labels 0 and 1
    first, last = (int(v) for v in torch.aminmax(labels))
    if first < 0 or last >= classes:
        raise InputError(
            f"{name}: expected labels 0 ... {classes - 1} for a network with "
            f"{config.options.get('classes', 10)} logit(s), got labels from {first} to {last}"
        )


def _check_init(network: nn.Module, config: TrainConfig) -> None:
    made = getattr(network, "config", {})
    if made != {"network": config.network, "options": config.options}:
        raise InputError(
            f"init: expected {_described(config.network, config.options)}, got "
            f"{_described(made.get('network'), made.get('options', {}))}"
        )
    for name, weight in network.state_dict().items():
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"init: expected finite weights, got NaN or inf in {name}")


def _described(name: str | None, options: dict[str, Any]) -> str:
    inner = ", ".join(f"{k}={v}" for k, v in options.items())
    return f"{name or 'another network'} ({inner})"


def _try(training: Training) -> None:
    """The objective on a few images and a copy of the network: settings that do not go together
    show before anything is written."""
    rows = min(4, len(training.labels))
    try:
        training.objective(
            copy.deepcopy(training.network),
            training.images[:rows],
            training.labels[:rows],
            generator=torch.Generator().manual_seed(0),
            progress=0.0,
        )
    except ValueError as error:
        raise InputError(f"{training.config.objective}: {error}") from None


def _load(training: Training, saved: dict[str, Any], path: Path) -> Spent:
    """Brings the training to where its checkpoint is; returns the time that took."""
    if "training" not in saved or "seconds" not in saved:
        raise InputError(f"{path}: expected the checkpoint of a training, got a classifier alone")
    with taking_up(path):
        training.load(saved["training"])
        return Spent(float(saved["seconds"]), float(saved["cpu_seconds"]))


def _train(training: Training, test: Images, out: Path, spent: Spent, watch: Observers) -> None:
    config, per_epoch = training.config, training.steps_per_epoch
    watched = training.held_out or test
    clean: float | None = None
    saved = time.monotonic()
    while training.step < training.steps:
        figures = training.advance()
        last = training.step == training.steps
        epoch_ends = last or training.step % per_epoch == 0
        if epoch_ends:
            clean = accuracy(training.result, watched, training.device, ranks=training.ranks)
        if epoch_ends or training.step % config.log_every == 0:
            training.history.close(
                training.step, training.epoch, spent.seconds(), clean if epoch_ends else None
            )
        due = training.step % config.checkpoint_every == 0
        due = (due or time.monotonic() - saved >= _SAVE_SECONDS) and training.guard.sound()
        saving = last or due
        if saving and training.ranks.main:
            training.history.write(out / "history.csv")
            save_checkpoint(
                out / "checkpoint.pt",
                {
                    **classifier_state(training.result),
                    "settings": plain_config(config),
                    "training": training.state(),
                    "seconds": spent.seconds(),
                    "cpu_seconds": spent.cpu_seconds(),
                },
            )
        if saving:
            saved = time.monotonic()  # of every process, or the others look at their weights anew
        watch.after_step(
            training.step, partial(_look, training, figures, clean), last=last, saved=saving
        )


def _look(
    training: Training, figures: dict[str, float], clean: float | None
) -> tuple[dict[str, float], str]:
    """What observers are shown of a step: its figures and the last accuracy."""
    seen = figures if clean is None else {**figures, "clean_accuracy": clean}
    return seen, _note(training, figures, clean)


def _note(training: Training, figures: dict[str, float], clean: float | None) -> str:
    note = f"epoch {training.epoch:.2f}"
    for name, value in figures.items():
        note += f"  {name} {value:.4g}"
    if clean is not None:
        note += f"  clean {100 * clean:.2f} %"
    if training.skipped_steps:
        note += f"  skipped {training.skipped_steps}"
    return note


def _metrics(
    training: Training, test: Images, seconds: float, cpu_seconds: float
) -> dict[str, Any]:
    network, device = training.result, training.device
    seen = training.steps / training.steps_per_epoch * len(training.labels)
    metrics: dict[str, Any] = {
        "objective": training.config.objective,
        "network": training.config.network,
        "parameters": sum(p.numel() for p in network.parameters()),
        "rows": len(training.labels),
        "test_rows": len(test),
        "clean_accuracy": accuracy(network, test, device, ranks=training.ranks),
        "steps": training.step,
        "epochs": training.epoch,
        "skipped_steps": training.skipped_steps,
        "divergences": training.guard.returns,
        # What the objective says of the last epoch: boundary points found, converged, and so on.
        "last_epoch": training.history.means(max(0, training.steps - training.steps_per_epoch)),
        "training_seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "samples_per_second": seen / max(seconds, 1e-9),
        "peak_memory_gb": peak_memory_gb(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "build": build_info(),
    }
    if training.held_out is not None:
        metrics["held_out_accuracy"] = accuracy(
            network, training.held_out, device, ranks=training.ranks
        )
    if device.type == "cuda":
        metrics["peak_device_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return metrics


# --- the command line --------------------------------------------------------------------------


def add_train_command(commands: Any) -> None:
    """Adds ``train`` to the subparsers of the command line."""
    one = commands.add_parser(
        "train",
        help="a classifier, with an objective on level sets or one to compare with",
        description="Trains a classifier and writes checkpoint.pt, history.csv, metrics.json and "
        "config.json. Objectives: " + ", ".join(OBJECTIVES) + ".",
    )
    one.add_argument("objective", metavar="OBJECTIVE", help="what to train with")
    one.add_argument("--data", metavar="DIR", help="images; scikit-learn's digits if left out")
    one.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    one.add_argument("--limit", type=int, metavar="N", help="only the first N images of each split")
    one.add_argument(
        "--fraction", type=float, metavar="S", help="only this share of the training images"
    )
    one.add_argument("--classes", type=int, metavar="K", help="merge the classes into K")
    one.add_argument(
        "--network", metavar="NAME", help=", ".join(CLASSIFIERS) + "; by the images if left out"
    )
    one.add_argument("--network-options", metavar="JSON", help='such as {"released": true}')
    one.add_argument("--init", metavar="CHECKPOINT", help="classifier to start from")
    one.add_argument(
        "--preset", default="fast", help="fast (the default, for a CPU) or paper (for a GPU)"
    )
    length = one.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, help="the schedules stretch to them")
    length.add_argument("--steps", type=int, help="instead of epochs")
    one.add_argument("--batch", type=int, help="images of a step")
    one.add_argument("--lr", type=float, help="the largest of the schedule")
    one.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other setting of the objective or the training, see config.json",
    )
    one.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="shift images by up to 4 pixels and mirror half of them",
    )
    one.add_argument("--seed", type=int, default=0, help="of every random choice; 0 if left out")
    one.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    one.add_argument("--threads", type=int, metavar="N", help="of the CPU; they change last digits")
    one.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    add_observer_options(one, viewer=False)
    one.set_defaults(run=_command)


def _command(args: argparse.Namespace) -> None:
    with launched(args.device) as (ranks, device):
        _train_as_told(args, ranks, device)


def _train_as_told(args: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"threads: expected at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.objective not in OBJECTIVES:
        raise InputError(
            f"objective: expected one of {', '.join(OBJECTIVES)}, got {args.objective!r}"
        )
    observers = chosen_observers(args)
    if args.init is not None:
        check_apart("init", args.init, Path(args.out), RESULTS)
    init = None if args.init is None else load_classifier(args.init)
    if init is not None and (args.network is not None or args.network_options is not None):
        raise InputError("init: expected it without --network and --network-options, got both")
    data = load_images(args.data, "train", args.limit)
    test = load_images(args.data, "test", args.limit)
    if args.fraction is not None:
        if not 0 < args.fraction <= 1:
            raise InputError(f"fraction: expected 0 < S <= 1, got {args.fraction}")
        check_seed(args.seed)  # it chooses the rows, before there is a config that looks at it
        rows = fraction(data.labels, args.fraction, args.seed)
        data = replace(data, images=data.images[rows], labels=data.labels[rows])
    if args.classes is not None:
        data, test = merged(data, args.classes), merged(test, args.classes)
    network, options = args.network, _options(args.network_options)
    if init is not None:
        network, options = init.config["network"], init.config["options"]  # type: ignore[assignment, index]
    config = preset(
        args.objective,
        data,
        args.preset,
        network=network,
        network_options=options,
        seed=args.seed,
        epochs=args.epochs,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        augment=args.augment,
        settings=parse_settings(args.set),
    )
    with observers:
        metrics = train(
            data,
            test,
            Path(args.out),
            config,
            init=init,
            device=device,
            resume=args.resume or restarted(),
            say=say,
            observers=observers,
            ranks=ranks,
        )
    if ranks.main:
        say(
            f"{args.out}/checkpoint.pt: clean accuracy {100 * metrics['clean_accuracy']:.2f} % of "
            f"{metrics['test_rows']}, trained in {clock(metrics['training_seconds'])}"
        )


def merged(data: Images, classes: int) -> Images:
    """The images with their classes merged into fewer; InputError if there cannot be so many."""
    if not 2 <= classes <= data.classes:
        raise InputError(f"classes: expected 2 to {data.classes}, got {classes}")
    labels: Tensor = merge_labels(data.labels, classes, original=data.classes)
    return Images(data.images, labels, data.name, classes)


def _options(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        options = json.loads(text)
    except ValueError as error:
        raise InputError(f"network-options: expected a JSON object ({error})") from None
    if not isinstance(options, dict):
        raise InputError(f"network-options: expected a JSON object, got {text!r}")
    return options
