"""The command that attacks a classifier: from a checkpoint and a data folder to JSON.

A run with a folder can be interrupted at any moment and goes on where it was. The folder holds

    config.json        which network, which data, every setting
    parts/             finished batches, until all are done
    examples.csv       one line per image: its row in the split, label, whether it stood, what broke
                       it, and with --linearity gamma(eps, x)
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
from levelset_ext.recipes.files import plain, write_json
from levelset_ext.recipes.progress import Progress, say
from levelset_ext.recipes.ranks import ALONE, Ranks, in_rounds, launched, restarted
from levelset_ext.recipes.run_folder import begin_run, digest, network_digest
from levelset_ext.whole_files import write_whole

__all__ = ["AttackConfig", "add_attack_command", "run_attack"]

KIND = "levelset_ext attack 1"
# What the paper attacks with, and what stands for it on the digits.
_STRENGTHS = {
    "cifar10": {"eps": 0.031, "step": 0.003, "iters": 20},
    "mnist": {"eps": 0.3, "step": 0.01, "iters": 40},
    "digits": {"eps": 0.15, "step": 0.005, "iters": 40},
}
_RESULTS = ("examples.csv", "adversarial.npz", "adversarial.png", "parts")
_LINEARITY_STEPS = 50  # of the ascent that gamma is found by; those of the attacks may be too few


def strength(images: str, **given: float | None) -> dict[str, Any]:
    """eps, step and iters of an attack: what is given, else what images of that name get."""
    return _STRENGTHS[images] | {name: value for name, value in given.items() if value is not None}


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


def check_attack(
    model: nn.Module, data: Images, config: AttackConfig, source: nn.Module | None = None
) -> None:
    """Raises InputError if networks, images and settings do not fit, or a package is missing."""
    if config.linearity and config.norm != "linf":
        raise InputError(f"linearity: expected the norm linf, in which it is, got {config.norm}")
    try:
        check_evaluation(
            model, data.images, data.labels, config.attack, source=source, **_numbers(config)
        )
    except (ValueError, ImportError) as error:
        raise InputError(str(error)) from None


def run_attack(
    model: nn.Module,
    data: Images,
    config: AttackConfig,
    *,
    out: Path | None = None,
    source: nn.Module | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Attacks ``model`` on all rows of ``data`` and returns the contents of metrics.json.

    Args:
        model: classifier, on the device to run on.
        data: images and labels.
        config: settings.
        out: folder of the run; without one nothing is written.
        source: network that makes the examples of the transfer attacks.
        resume: go on with the run in ``out``; afresh if there is none, nothing to do if finished.
        say: where messages go; progress goes to stderr. Of several processes the first one speaks.
        ranks: the processes of the run, all of which call this and get the same; each attacks some
            of the batches, and the first one writes.

    Raises:
        InputError: bad images, labels, weights or settings; a folder that cannot be written, or
            holds another run.
    """
    check_attack(model, data, config, source)  # before anything is written
    if out is None:
        if resume:
            raise InputError("resume: expected --out with the folder of the run")
        evaluation = _all_parts(model, data, config, source, None, ranks)
        gamma = _linearity(model, data, config, evaluation, None, ranks)
        return ranks.first(lambda: _metrics(model, _known(evaluation), data, config, gamma))
    header = {
        "kind": KIND,
        "model": network_digest(model),
        "source": None if source is None else network_digest(source),
        "data": digest(data.images, data.labels),
        "data_name": data.name,
        "rows": len(data),
        **({} if data.every == 1 else {"every": data.every}),
        "settings": asdict(config),
    }
    finished = ranks.first(
        lambda: begin_run(
            out,
            header,
            results=_RESULTS,
            what="an attack",
            same="the run of the same network, data and settings",
            resume=resume,
            say=say,
        )
    )
    if finished is not None:
        return finished
    parts = out / "parts"
    if ranks.main:
        parts.mkdir(exist_ok=True)
    evaluation = _all_parts(model, data, config, source, parts, ranks)
    gamma = _linearity(model, data, config, evaluation, parts, ranks)
    return ranks.first(lambda: _write_results(out, model, _known(evaluation), data, config, gamma))


def _write_results(
    out: Path,
    model: nn.Module,
    evaluation: Evaluation,
    data: Images,
    config: AttackConfig,
    gamma: Tensor | None,
) -> dict[str, Any]:
    """The files of a run whose parts are all there; returns the metrics."""
    write_whole(out / "examples.csv", lambda stream: _write_csv(stream, evaluation, data, gamma))
    write_whole(
        out / "adversarial.npz",
        lambda stream: np.savez_compressed(
            stream,
            rows=np.array(_numbers_of(data)),
            adversarial=evaluation.adversarial.numpy(),
            labels=data.labels.numpy(),
            success=evaluation.success.numpy(),
        ),
    )
    draw_attacks(out / "adversarial.png", data, evaluation)
    metrics = _metrics(model, evaluation, data, config, gamma)
    write_json(out / "metrics.json", metrics)
    shutil.rmtree(out / "parts", ignore_errors=True)
    return metrics


def _all_parts(
    model: nn.Module,
    data: Images,
    config: AttackConfig,
    source: nn.Module | None,
    folder: Path | None,
    ranks: Ranks,
) -> Evaluation | None:
    """The evaluation of all rows, batch by batch; batches already in ``folder`` are read. Of
    several processes the first one gets it."""
    progress: Progress | None = None

    def rows(index: int) -> slice:
        return slice(index * config.batch, min((index + 1) * config.batch, len(data)))

    def read(index: int) -> Evaluation | None:
        some = rows(index)
        return None if folder is None else _read_part(_file(folder, index), some.stop - some.start)

    def make(index: int, found: dict[int, Evaluation]) -> Evaluation:
        nonlocal progress
        some = rows(index)
        if ranks.main:
            progress = progress or Progress("row", len(data), some.start)
        tell = _silent if progress is None else _teller(progress, some.start, _share(found))
        images, labels = data.images[some], data.labels[some]
        numbers = _numbers_of(data)[some]
        return _evaluate(model, images, labels, config, source, numbers, tell)

    def keep(index: int, part: Evaluation) -> None:
        if folder is not None:
            write_whole(_file(folder, index), partial(_write_part, part=part))

    def report(index: int, found: dict[int, Evaluation]) -> None:
        done = rows(index).stop
        if progress is not None and (done == len(data) or progress.due()):
            progress.report(done, _share(found), done == len(data))

    count = -(-len(data) // config.batch)
    parts = in_rounds(ranks, count, read, make, keep, report)
    return Evaluation.merge(parts) if ranks.main else None


def _numbers_of(data: Images) -> range:
    """Of the images in their split."""
    return range(0, len(data) * data.every, data.every)


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npz"


def _silent(done: int, name: str) -> None:
    """The progress of all processes but the first."""


def _teller(progress: Progress, at: int, note: str) -> Callable[[int, str], None]:
    def tell(done: int, name: str) -> None:
        if progress.due():
            progress.report(at + done, f"{name}  {note}")

    return tell


def _share(found: dict[int, Evaluation]) -> str:
    rows = sum(map(len, found.values()))
    standing = sum(int((~part.success).sum()) for part in found.values())
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
    rows: Sequence[int],
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
            rows=rows,
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
    model: nn.Module,
    data: Images,
    config: AttackConfig,
    evaluation: Evaluation | None,
    folder: Path | None,
    ranks: Ranks,
) -> Tensor | None:
    """gamma(eps, x) of all rows, (n,), batch by batch as the attacks; NaN where the network is
    wrong, as such rows are not attacked either. None if it is not asked for, and on all processes
    but the first."""
    if not config.linearity:
        return None
    correct = ranks.first(lambda: _known(evaluation).correct)
    numbers = _numbers_of(data)
    progress: Progress | None = None

    def rows(index: int) -> Tensor:
        at = index * config.batch
        return torch.nonzero(correct[at : at + config.batch]).squeeze(1) + at

    def file(index: int) -> Path | None:
        return None if folder is None else folder / f"linearity-{index:06d}.npy"

    def read(index: int) -> Tensor | None:
        path = file(index)
        return None if path is None else _read_gamma(path, len(rows(index)))

    def make(index: int, found: dict[int, Tensor]) -> Tensor:
        nonlocal progress
        if ranks.main:
            progress = progress or Progress("linearity", len(data), index * config.batch)
        device, some = _device_of(model, data.images), rows(index)
        if len(some) == 0:  # no network need take a batch of nothing
            return data.images.new_empty(0)
        return local_linearity(
            model,
            data.images[some].to(device),
            data.labels[some].to(device),
            config.eps,
            steps=_LINEARITY_STEPS,
            seed=config.seed,
            batch=config.batch,
            rows=[numbers[row] for row in some.tolist()],
            binary=config.binary,
        ).gamma.cpu()

    def keep(index: int, part: Tensor) -> None:
        path = file(index)
        if path is not None:
            write_whole(path, partial(np.save, arr=part.numpy()))

    def report(index: int, found: dict[int, Tensor]) -> None:
        done = min((index + 1) * config.batch, len(data))
        if progress is not None and (done == len(data) or progress.due()):
            progress.report(done, "", done == len(data))

    parts = in_rounds(ranks, -(-len(data) // config.batch), read, make, keep, report)
    if not ranks.main:
        return None
    gamma = torch.full((len(data),), torch.nan, dtype=torch.float64)
    gamma[correct] = torch.cat(parts).double()
    return gamma


def _known(evaluation: Evaluation | None) -> Evaluation:
    assert evaluation is not None  # on the first process
    return evaluation


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
    numbers = _numbers_of(data)
    names = {-1: "", -2: "", **{i: record.name for i, record in enumerate(evaluation.attacks)}}
    for row in range(len(evaluation)):
        broken_by = int(evaluation.broken_by[row])
        outcome = {-1: "stands", -2: "wrong before"}.get(broken_by, "broken")
        table.writerow(
            [
                numbers[row],
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
    model: nn.Module,
    evaluation: Evaluation,
    data: Images,
    config: AttackConfig,
    gamma: Tensor | None,
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
        "every": data.every,
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
    one.add_argument(
        "--limit", type=int, metavar="N", help="only the first N images, of those of --every"
    )
    one.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="K",
        help="only one in K images; of MNIST's test images robust networks lose more in the first "
        "half, so a sample wants to be spread over them",
    )
    one.add_argument("--merge-labels", type=int, metavar="N", help="merge the classes into N")
    one.add_argument(
        "--attack",
        default=AttackConfig.attack,
        metavar="NAMES",
        help="comma-separated; the worst case over all counts",
    )
    add_strength(one)
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


def add_strength(one: argparse.ArgumentParser) -> None:
    """The options that ``strength`` fills in."""
    for name, kind, what in (
        ("eps", float, "radius of the attack"),
        ("step", float, "length of a PGD step"),
        ("iters", int, "PGD steps"),
    ):
        known = ", ".join(f"{found[name]} for {images}" for images, found in _STRENGTHS.items())
        one.add_argument(f"--{name}", type=kind, help=f"{what}; {known}")


def _command(args: argparse.Namespace) -> None:
    with launched(args.device) as (ranks, device):
        _attack_as_told(args, ranks, device)


def _attack_as_told(args: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
    model = _network("model", args.checkpoint, args.model, args.weights, args.model_options, device)
    source = None
    given = (args.source, args.source_model, args.source_weights)
    if any(one is not None for one in given):
        source = _network("source", *given, None, device)
    if args.batch < 1:
        raise InputError(f"batch: expected at least 1, got {args.batch}")
    data = load_images(args.data, args.split, args.limit, args.every)
    if args.merge_labels is not None:
        if not 1 <= args.merge_labels <= data.classes:
            raise InputError(f"merge-labels: expected 1 to {data.classes}, got {args.merge_labels}")
        merged = merge_labels(data.labels, args.merge_labels, original=data.classes)
        data = replace(data, labels=merged, classes=args.merge_labels)
    if args.model is not None and args.weights is None and ranks.main:
        say(f"note: --model without --weights: attacks the network as {args.model} returns it")
    options = getattr(model, "config", {}).get("options", {})
    config = AttackConfig(
        attack=args.attack,
        **strength(data.name, eps=args.eps, step=args.step, iters=args.iters),
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
        resume=args.resume or (restarted() and args.out is not None),
        say=say,
        ranks=ranks,
    )
    if not ranks.main:
        return
    for sentence in metrics["alarms"]:
        say(f"alarm: {sentence}")
    print(json.dumps(plain(metrics), indent=2))


def _network(
    name: str,
    checkpoint: str | None,
    factory: str | None,
    weights: str | None,
    options: str | None,
    device: torch.device,
) -> nn.Module:
    """The network that is attacked, "model", or the one that makes the examples, "source"."""
    prefix = "" if name == "model" else f"{name}-"
    one, other = ("CHECKPOINT", "--model") if not prefix else ("--source", "--source-model")
    if (checkpoint is None) == (factory is None):
        got = "neither" if checkpoint is None else "both"
        raise InputError(f"{name}: expected {one} or {other}, got {got}")
    if checkpoint is not None:
        for option, value in (("weights", weights), ("model-options", options)):
            if value is not None:
                raise InputError(f"{prefix}{option}: expected it with {other} alone, got {value}")
        return fast_order(load_classifier(checkpoint, device))
    assert factory is not None
    given: Any = {}
    if options is not None:
        try:
            given = json.loads(options)
        except ValueError as error:
            raise InputError(f"model-options: expected a JSON object ({error})") from None
        if not isinstance(given, dict):
            raise InputError(f"model-options: expected a JSON object, got {options!r}")
    return load_foreign(factory, weights, given, device)
