"""What the experiments on robustness share: attacks of the paper, networks to attack, lists."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _shared import BLUE, GREEN, GREY, ORANGE, RED
from torch import Tensor, nn

import levelset_ext as ls
from levelset_ext.data.images import Images
from levelset_ext.errors import InputError
from levelset_ext.margin import margin
from levelset_ext.recipes.classifiers import KIND, fast_order, load_classifier
from levelset_ext.recipes.files import load_checkpoint
from levelset_ext.recipes.progress import say
from levelset_ext.recipes.train import train
from levelset_ext.recipes.train_presets import preset
from levelset_ext.recipes.training import TrainConfig

COLORS = (BLUE, ORANGE, GREEN, RED, GREY, "#7b52a3", "#2a9d9d", "#b8860b", "#d46a9f", "#5a5f2d")
LOSSES = ("xent", "margin")
BATCH = 250


@dataclass(frozen=True)
class Attack:
    """PGD in the L_inf ball."""

    eps: float
    step: float
    iters: int


# What the paper attacks with. The digits are 8 x 8: half as much already changes what one sees.
ATTACKS = {
    "mnist": Attack(0.3, 0.01, 40),
    "cifar10": Attack(0.031, 0.003, 20),
    "digits": Attack(0.15, 0.005, 40),
}


def add_attack_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--eps", type=float, help="of the attack; by the data if left out")
    parser.add_argument("--step", type=float, help="of PGD; by the data if left out")
    parser.add_argument("--iters", type=int, help="steps of PGD; by the data if left out")


def attack_of(data: Images, args: argparse.Namespace, iters: int | None = None) -> Attack:
    """The attack for some images; ``iters`` fewer steps, in proportion longer, if given."""
    attack = ATTACKS[data.name]
    if iters is not None:
        attack = replace(attack, iters=iters, step=attack.step * attack.iters / iters)
    names = ("eps", "step", "iters")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    attack = replace(attack, **given)
    for name in ("eps", "step"):
        if not 0 < getattr(attack, name) <= 1:
            raise InputError(f"{name}: expected a length in (0, 1], got {getattr(attack, name)}")
    if attack.iters < 1:
        raise InputError(f"iters: expected at least 1, got {attack.iters}")
    return attack


def numbers(name: str, text: str, kind: Callable[[str], Any], low: float, high: float) -> list[Any]:
    """Numbers with commas between, each once, sorted."""
    try:
        values = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        raise InputError(f"{name}: expected numbers with commas between, got {text!r}") from None
    if not all(low <= value <= high for value in values):
        raise InputError(f"{name}: expected numbers from {low:g} to {high:g}, got {text!r}")
    return values


# --- networks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network to attack: what it is called, and what is known of its training.

    minutes: of its training; on a CPU those of the processor, which other work on the machine does
    not change, where the training has written them down.
    """

    name: str
    module: nn.Module
    objective: str
    minutes: float | None


def module_device(module: nn.Module) -> str:
    return next(module.parameters()).device.type


def train_network(
    name: str, data: Images, test: Images, out: Path, config: TrainConfig, device: Any, resume: bool
) -> Network:
    """Trains in the folder ``out``, or goes on there, as ``levelset-ext train`` does."""
    say(f"{name}: {config.objective} in {out}")
    metrics = train(data, test, out, config, device=device, resume=resume, say=say)
    module = fast_order(load_classifier(out / "checkpoint.pt", device))
    seconds = metrics["training_seconds"]
    if module_device(module) == "cpu":
        seconds = metrics.get("cpu_seconds", seconds)
    return Network(name, module, config.objective, float(seconds) / 60)


def read_network(name: str, path: Path, device: Any) -> Network:
    """The network of a checkpoint, or of the folder of a training."""
    file = path / "checkpoint.pt" if path.is_dir() else path
    module = fast_order(load_classifier(file, device))
    content = load_checkpoint(file, KIND)
    settings, seconds = content.get("settings"), content.get("seconds")
    if module_device(module) == "cpu":
        seconds = content.get("cpu_seconds", seconds)
    objective = settings.get("objective", "") if isinstance(settings, Mapping) else ""
    minutes = float(seconds) / 60 if isinstance(seconds, int | float) else None
    return Network(name, module, str(objective), minutes)


def plan(
    objective: str, data: Images, name: str, settings: Mapping[str, Any], **more: Any
) -> TrainConfig:
    """``preset``, with batch, lr and epochs among the settings too."""
    own = dict(settings)
    for key in ("batch", "lr", "epochs"):
        if key in own:
            more[key] = own.pop(key)
    try:
        return preset(objective, data, name, settings=own, **more)
    except TypeError as error:  # a word where a number belongs
        raise InputError(f"set: {objective}: {error}") from None


# --- attacks ---------------------------------------------------------------------------------


def standing(network: Network, data: Images, kind: str, attack: Attack, seed: int) -> Tensor:
    """(n,) bool: correct before, and still so after a white-box attack. As soon as one iterate is
    misclassified a row is broken."""
    try:
        found = ls.attacks.evaluate(
            network.module,
            data.images,
            data.labels,
            kind,
            eps=attack.eps,
            step=attack.step,
            iters=attack.iters,
            seed=seed,
            batch=BATCH,
        )
    except ValueError as error:  # images of another size, another number of classes
        raise InputError(f"{network.name}: {error}") from None
    return ~found.success


def correct(network: Network, images: Tensor, labels: Tensor) -> Tensor:
    """(n,) bool: whether the label has the largest logit; a tie is wrong."""
    parts = []
    device = next(network.module.parameters()).device
    try:
        with torch.no_grad():
            for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
                parts.append((margin(network.module(x.to(device)), y.to(device)) > 0).cpu())
    except ValueError as error:
        raise InputError(f"{network.name}: {error}") from None
    return torch.cat(parts)


def pgd_batches(
    network: Network, data: Images, loss: str, attack: Attack, seed: int, **options: Any
) -> Iterator[ls.attacks.Attacked]:
    """``attacks.pgd`` with further options on all rows, a batch at a time. The random starts of a
    row do not depend on the batches."""
    device = next(network.module.parameters()).device
    for at in range(0, len(data), BATCH):
        x, y = data.images[at : at + BATCH], data.labels[at : at + BATCH]
        yield ls.attacks.pgd(
            network.module,
            x.to(device),
            y.to(device),
            objective=loss,
            eps=attack.eps,
            step=attack.step,
            iters=attack.iters,
            seed=seed,
            rows=range(at, at + len(y)),
            **options,
        )


def examples(network: Network, data: Images, loss: str, attack: Attack, seed: int) -> Tensor:
    """The ends of PGD on a network, for black-box attacks on others, (n, c, h, w).

    All rows take all steps, so these are the points at which ``attacks.evaluate`` with this network
    as its source looks; made once, they serve for every target.
    """
    runs = pgd_batches(network, data, loss, attack, seed, early_stop=False)
    return torch.cat([found.adversarial.cpu() for found in runs])


def percent(values: Tensor | Sequence[float]) -> float:
    return 100 * float(torch.as_tensor(values).double().mean())
