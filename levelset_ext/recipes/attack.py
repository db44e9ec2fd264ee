"""The command that attacks a classifier: from a checkpoint and a data folder to JSON.

A run with a folder can be interrupted at any moment and goes on where it was. The folder holds

    config.json        which network, which data, every setting
    parts/             finished batches, until all are done
    examples.csv       one line per image: label, whether it stood, what broke it, and with
                       --linearity gamma(eps, x)
    adversarial.npz    the images the attacks made
    adversarial.png    some of them, beside what they were made from
    metrics.json       written last: a folder with it holds a finished run
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from levelset_ext._load import build_info
from levelset_ext.attacks.evaluate import (
    ATTACKS,
    AttackRecord,
    Evaluation,
    _device_of,
    check_evaluation,
    evaluate,
)
from levelset_ext.attacks.linearity import local_linearity
from levelset_ext.attacks.report import alarms
from levelset_ext.data.images import Images, load_images, merge_labels
from levelset_ext.errors import InputError
from levelset_ext.recipes.attack_picture import draw_attacks
from levelset_ext.recipes.classifiers import fast_order, load_classifier, load_foreign
from levelset_ext.recipes.devices import parse_device
from levelset_ext.recipes.files import plain, write_json
from levelset_ext.recipes.progress import Progress, say
from levelset_ext.recipes.run_folder import begin_run, digest
from levelset_ext.whole_files import write_whole

__all__ = ["AttackConfig", "add_attack_command", "run_attack"]

KIND = "levelset_ext attack 1"
# What the paper attacks with (eps, step, iterations).
_DEFAULTS = {"cifar10": (0.031, 0.003, 20), "": (0.3, 0.01, 40)}
_RESULTS = ("examples.csv", "adversarial.npz", "adversarial.png", "parts")
_LINEARITY_STEPS = 50  # of the ascent that gamma is found by; those of the attacks may be too few


@dataclass(frozen=True)
class AttackConfig:
    """Settings of a run, see :func:`levelset_ext.attacks.evaluate`."""

    attack: str = "pgd-xent,pgd-margin"
    eps: float = 0.3
    step: float = 0.01
    iters: int = 40
    restarts: int = 1
    seed: int = 0
    norm: str = "linf"
    batch: int = 250
    binary: bool = False
    each: bool = False  # every attack on all correct rows, not only on those still standing
    linearity: bool = False  # gamma(eps, x) of the correct rows as well


def run_attack(
    model: nn.Module,
    data: Images,
    config: AttackConfig,
    *,
    out: Path | None = None,
    source: nn.Module | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Attacks ``model`` on all rows of ``data`` and returns the contents of metrics.json.

    Args:
        model: classifier, on the device to run on.
        data: images and labels.
        config: settings.
        out: folder of the run; without one nothing is written.
        source: network that makes the examples of the transfer attacks.
        resume: go on with the run in ``out``; afresh if there is none, nothing to do if finished.
        say: where messages go; progress goes to stderr.

    Raises:
        InputError: bad images, labels, weights or settings; a folder that cannot be written, or
            holds another run.
    """
    # Before anything is written.
    if config.linearity and config.norm != "linf":
        raise InputError(f"linearity: expected the norm linf, in which it is, got {config.norm}")
    try:
        check_evaluation(
            model, data.images, data.labels, config.attack, source=source, **_numbers(config)
        )
    except (ValueError, ImportError) as error:
        raise InputError(str(error)) from None
    if out is None:
        if resume:
            raise InputError("resume: expected --out with the folder of the run")
        evaluation = _all_parts(model, data, config, source, None)
        gamma = _linearity(model, data, config, evaluation.correct, None)
        return _metrics(model, evaluation, config, gamma)
    header = {
        "kind": KIND,
        "model": digest(*model.state_dict().values()),
        "source": None if source is None else digest(*source.state_dict().values()),
        "data": digest(data.images, data.labels),
        "data_name": data.name,
        "rows": len(data),
        "settings": asdict(config),
    }
    finished = begin_run(
        out,
        header,
        results=_RESULTS,
        what="an attack",
        same="the run of the same network, data and settings",
        resume=resume,
        say=say,
    )
    if finished is not None:
        return finished
    parts = out / "parts"
    parts.mkdir(exist_ok=True)
    evaluation = _all_parts(model, data, config, source, parts)
    gamma = _linearity(model, data, config, evaluation.correct, parts)
    write_whole(out / "examples.csv", lambda stream: _write_csv(stream, evaluation, data, gamma))
    write_whole(
        out / "adversarial.npz",
        lambda stream: np.savez_compressed(
            stream,
            adversarial=evaluation.adversarial.numpy(),
            labels=data.labels.numpy(),
            success=evaluation.success.numpy(),
        ),
    )
    draw_attacks(out / "adversarial.png", data, evaluation)
    metrics = _metrics(model, evaluation, config, gamma)
    write_json(out / "metrics.json", metrics)
    shutil.rmtree(parts, ignore_errors=True)
    return metrics


def _all_parts(
    model: nn.Module,
    data: Images,
    config: AttackConfig,
    source: nn.Module | None,
    folder: Path | None,
) -> Evaluation:
    """The evaluation of all rows, batch by batch; batches already in ``folder`` are read."""
    found: list[Evaluation] = []
    progress: Progress | None = None
    standing = 0
    for index, at in enumerate(range(0, len(data), config.batch)):
        file = None if folder is None else folder / f"{index:06d}.npz"
        some = slice(at, at + config.batch)
        part = None if file is None else _read_part(file, len(data.labels[some]))
        if part is None:
            progress = progress or Progress("row", len(data), at)
            tell = _teller(progress, at, _share(standing, at))
            part = _evaluate(model, data.images[some], data.labels[some], config, source, at, tell)
            if file is not None:
                write_whole(file, partial(_write_part, part=part))
        found.append(part)
        standing += int((~part.success).sum())
        done = min(at + config.batch, len(data))
        if progress is not None and (done == len(data) or progress.due()):
            progress.report(done, _share(standing, done), done == len(data))
    return Evaluation.merge(found)


def _teller(progress: Progress, at: int, note: str) -> Callable[[int, str], None]:
    def tell(done: int, name: str) -> None:
        if progress.due():
            progress.report(at + done, f"{name}  {note}")

    return tell


def _share(standing: int, rows: int) -> str:
    return f"robust {100 * standing / rows:.2f} %" if rows else ""


def _numbers(config: AttackConfig) -> dict[str, Any]:
    """The settings that ``evaluate`` takes under the same names."""
    numbers = asdict(config)
    del numbers["attack"], numbers["each"], numbers["linearity"]
    return numbers


def _evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: AttackConfig,
    source: nn.Module | None,
    first_row: int,
    progress: Callable[[int, str], None],
) -> Evaluation:
    try:
        return evaluate(
            model,
            images,
            labels,
            config.attack,
            source=source,
            cascade=not config.each,
            first_row=first_row,
            progress=progress,
            **_numbers(config),
        )
    except (ValueError, ImportError) as error:
        raise InputError(str(error)) from None


_ARRAYS = (
    "adversarial",
    "success",
    "correct",
    "prediction",
    "clean_margin",
    "broken_by",
    "step",
    "distance",
    "gradient_norm",
)


def _write_part(stream: IO[bytes], part: Evaluation) -> None:
    head = {
        "attacks": [asdict(record) for record in part.attacks],
        "settings": part.settings,
        "saturated": part.saturated,
    }
    arrays: dict[str, Any] = {name: getattr(part, name).numpy() for name in _ARRAYS}
    np.savez(stream, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)


def _read_part(file: Path, rows: int) -> Evaluation | None:
    """A finished batch, or None where there is none or one that cannot be used."""
    try:
        with np.load(file, allow_pickle=False) as content:
            head = json.loads(content["head"].tobytes())
            tensors = {name: torch.from_numpy(content[name]) for name in _ARRAYS}
        if len(tensors["success"]) != rows:
            return None
        return Evaluation(
            **tensors,
            attacks=[AttackRecord(**record) for record in head["attacks"]],
            settings=head["settings"],
            saturated=head["saturated"],
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _linearity(
    model: nn.Module, data: Images, config: AttackConfig, correct: Tensor, folder: Path | None
) -> Tensor | None:
    """gamma(eps, x) of all rows, (n,), batch by batch as the attacks; NaN where the network is
    wrong, as such rows are not attacked either. None if it is not asked for."""
    if not config.linearity:
        return None
    found: list[Tensor] = []
    progress: Progress | None = None
    for index, at in enumerate(range(0, len(data), config.batch)):
        file = None if folder is None else folder / f"linearity-{index:06d}.npy"
        rows = torch.nonzero(correct[at : at + config.batch]).squeeze(1) + at
        part = None if file is None else _read_gamma(file, len(rows))
        if part is None:
            progress = progress or Progress("linearity", len(data), at)
            device = _device_of(model, data.images)
            part = local_linearity(
                model,
                data.images[rows].to(device),
                data.labels[rows].to(device),
                config.eps,
                steps=_LINEARITY_STEPS,
                seed=config.seed,
                batch=config.batch,
                rows=rows.tolist(),
                binary=config.binary,
            ).gamma.cpu()
            if file is not None:
                write_whole(file, partial(np.save, arr=part.numpy()))
        found.append(part)
        done = min(at + config.batch, len(data))
        if progress is not None and (done == len(data) or progress.due()):
            progress.report(done, "", done == len(data))
    gamma = torch.full((len(data),), torch.nan, dtype=torch.float64)
    gamma[correct] = torch.cat(found).double()
    return gamma


def _read_gamma(file: Path, rows: int) -> Tensor | None:
    """A finished batch, or None where there is none or one that cannot be used."""
    try:
        values = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return torch.from_numpy(values) if values.shape == (rows,) else None


def _write_csv(
    stream: IO[bytes], evaluation: Evaluation, data: Images, gamma: Tensor | None
) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        ["row", "label", "clean_margin", "outcome", "broken_by", "step", "prediction", "distance"]
        + ([] if gamma is None else ["gamma"])
    )
    names = {-1: "", -2: "", **{i: record.name for i, record in enumerate(evaluation.attacks)}}
    for row in range(len(evaluation)):
        broken_by = int(evaluation.broken_by[row])
        outcome = {-1: "stands", -2: "wrong before"}.get(broken_by, "broken")
        table.writerow(
            [
                row,
                int(data.labels[row]),
                f"{float(evaluation.clean_margin[row]):.7g}",
                outcome,
                names[broken_by],
                int(evaluation.step[row]),
                int(evaluation.prediction[row]),
                f"{float(evaluation.distance[row]):.7g}",
                *([] if gamma is None else [_cell(float(gamma[row]))]),
            ]
        )
    stream.write(text.getvalue().encode())


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.7g}"


def _metrics(
    model: nn.Module, evaluation: Evaluation, config: AttackConfig, gamma: Tensor | None
) -> dict[str, Any]:
    n = len(evaluation)
    attacks = []
    for index, record in enumerate(evaluation.attacks):
        entry = asdict(record)
        entry["robust_accuracy_after"] = evaluation.robust_accuracy_after(index)
        if config.each:
            entry["robust_accuracy_alone"] = evaluation.clean_accuracy - record.broken / n
        attacks.append(entry)
    correct = evaluation.correct
    any_correct = bool(correct.any())
    margins, slopes = evaluation.clean_margin[correct], evaluation.gradient_norm[correct]
    linearity = {}
    if gamma is not None:
        measured = gamma[correct]
        linearity["local_linearity"] = {
            "eps": config.eps,
            "steps": _LINEARITY_STEPS,
            "rows": len(measured),
            "mean": float(measured.mean()) if any_correct else None,
            "median": float(measured.median()) if any_correct else None,
            "max": float(measured.max()) if any_correct else None,
        }
    return {
        "rows": n,
        "clean_accuracy": evaluation.clean_accuracy,
        "robust_accuracy": evaluation.robust_accuracy,
        "attacks": attacks,
        "alarms": alarms(evaluation),
        "settings": asdict(config),
        "median_clean_margin": float(margins.median()) if any_correct else None,
        "median_gradient_l1": float(slopes.median()) if any_correct else None,
        "rows_without_xent_gradient": evaluation.saturated,
        **linearity,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": sum(record.seconds for record in evaluation.attacks),
        "build": build_info(),
    }


# --- the command line --------------------------------------------------------------------------


def add_attack_command(commands: Any) -> None:
    """Adds ``attack`` to the subparsers of the command line."""
    one = commands.add_parser(
        "attack",
        help="the robust accuracy of a classifier, as JSON",
        description="Attacks a classifier and prints, as JSON, its accuracy before and after, and "
        "alarms where the figure is likely too high. Attacks: " + ", ".join(ATTACKS) + ".",
    )
    one.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="of a classifier")
    one.add_argument("--model", metavar="MODULE:FACTORY", help="any network, instead of CHECKPOINT")
    one.add_argument("--model-options", metavar="JSON", help="keyword arguments of FACTORY")
    one.add_argument("--weights", metavar="FILE", help="state dict for --model")
    one.add_argument("--source", metavar="CHECKPOINT", help="network of the transfer attacks")
    one.add_argument("--source-model", metavar="MODULE:FACTORY", help="instead of --source")
    one.add_argument("--source-weights", metavar="FILE", help="state dict for --source-model")
    one.add_argument("--data", metavar="DIR", help="images; scikit-learn's digits if left out")
    one.add_argument("--split", default="test", help="test or train")
    one.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    one.add_argument("--merge-labels", type=int, metavar="N", help="merge the classes into N")
    one.add_argument(
        "--attack",
        default=AttackConfig.attack,
        metavar="NAMES",
        help="comma-separated; the worst case over all counts",
    )
    one.add_argument("--eps", type=float, help="radius; 0.3, or 0.031 for CIFAR10")
    one.add_argument("--step", type=float, help="length of a PGD step; 0.01, or 0.003 for CIFAR10")
    one.add_argument("--iters", type=int, help="PGD steps; 40, or 20 for CIFAR10")
    one.add_argument("--restarts", type=int, default=1, help="random starts of PGD")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--norm", default="linf", help="linf or l2")
    one.add_argument("--batch", type=int, default=250, help="images at once, and between two saves")
    one.add_argument("--binary", action="store_true", help="the network has one logit")
    one.add_argument(
        "--each",
        action="store_true",
        help="every attack on all correct images, for its figure alone",
    )
    one.add_argument(
        "--linearity",
        action="store_true",
        help="also how far the cross entropy is from linear in the L_inf box around the images "
        "that are attacked, max |l(x + d) - l(x) - d . grad l(x)|: mean, median and max",
    )
    one.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    one.add_argument("--out", metavar="DIR", help="folder for results per image")
    one.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    one.set_defaults(run=_command)


def _command(args: argparse.Namespace) -> None:
    device = parse_device(args.device)
    model = _network("CHECKPOINT or --model", args.checkpoint, args.model, args, device)
    source = None
    if args.source is not None or args.source_model is not None:
        what = "--source or --source-model"
        source = _network(what, args.source, args.source_model, args, device)
    if args.batch < 1:
        raise InputError(f"batch: expected at least 1, got {args.batch}")
    data = load_images(args.data, args.split, args.limit)
    if args.merge_labels is not None:
        if not 1 <= args.merge_labels <= data.classes:
            raise InputError(f"merge-labels: expected 1 to {data.classes}, got {args.merge_labels}")
        merged = merge_labels(data.labels, args.merge_labels, original=data.classes)
        data = Images(data.images, merged, data.name, args.merge_labels)
    eps, step, iters = _DEFAULTS.get(data.name, _DEFAULTS[""])
    options = getattr(model, "config", {}).get("options", {})
    config = AttackConfig(
        attack=args.attack,
        eps=eps if args.eps is None else args.eps,
        step=step if args.step is None else args.step,
        iters=iters if args.iters is None else args.iters,
        restarts=args.restarts,
        seed=args.seed,
        norm=args.norm,
        batch=args.batch,
        binary=args.binary or options.get("classes") == 1,
        each=args.each,
        linearity=args.linearity,
    )
    metrics = run_attack(
        model,
        data,
        config,
        out=None if args.out is None else Path(args.out),
        source=source,
        resume=args.resume,
        say=say,
    )
    for sentence in metrics["alarms"]:
        say(f"alarm: {sentence}")
    print(json.dumps(plain(metrics), indent=2))


def _network(
    what: str,
    checkpoint: str | None,
    factory: str | None,
    args: argparse.Namespace,
    device: torch.device,
) -> nn.Module:
    if (checkpoint is None) == (factory is None):
        got = "neither" if checkpoint is None else "both"
        raise InputError(f"model: expected {what}, got {got}")
    if checkpoint is not None:
        return fast_order(load_classifier(checkpoint, device))
    assert factory is not None
    if factory is not args.model:
        return load_foreign(factory, args.source_weights, None, device)
    options: Any = {}
    if args.model_options is not None:
        try:
            options = json.loads(args.model_options)
        except ValueError as error:
            raise InputError(f"model-options: expected a JSON object ({error})") from None
        if not isinstance(options, dict):
            raise InputError(f"model-options: expected a JSON object, got {args.model_options!r}")
    return load_foreign(factory, args.weights, options, device)
