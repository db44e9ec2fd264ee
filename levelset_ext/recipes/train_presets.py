"""What the train command does where nothing is said: two tables, and the rule that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from levelset_ext.data.images import Images
from levelset_ext.errors import InputError
from levelset_ext.networks import build
from levelset_ext.objectives import OBJECTIVES
from levelset_ext.recipes.settings import checked
from levelset_ext.recipes.training import TrainConfig, make_objective, plain_config

__all__ = ["PRESETS", "TUNABLE", "preset"]

Table = dict[tuple[str, str], dict[str, Any]]

# (objective, data set) -> settings; "*" is any. What is more special wins: ("*", "*"), then
# ("*", data set), then (objective, "*"), then both named. "settings" are the objective's and are
# joined name by name.

# What makes the most of a short training against attacks.
_LONG = {"lr": 5e-3, "ema": 0.998, "autocast": True}

# Sized for one CPU core: a step of ConvNet-4a with cross entropy takes 0.12 s there, an epoch of
# MNIST a minute, and a PGD step costs as much as a training step.
_FAST: Table = {
    ("*", "*"): {"batch": 128, "lr": 1e-3, "schedule": "cosine", "lr_warmup": 0.05},
    ("*", "mnist"): {"network": "convnet-4a", "epochs": 5},
    ("*", "cifar10"): {"network": "convnet-4b", "epochs": 10, "augment": True},
    ("*", "digits"): {"network": "convnet-2a", "epochs": 60},
    ("madry", "*"): {"settings": {"iters": 10, "step": 0.06}},
    ("madry", "mnist"): {**_LONG, "epochs": 11, "settings": {"warmup": 0.4}},
    ("madry", "cifar10"): {"settings": {"eps": 0.031, "iters": 7, "step": 0.008}},
    ("trades", "*"): {"settings": {"iters": 10, "step": 0.06}},
    ("trades", "cifar10"): {"settings": {"beta": 5.0, "eps": 0.031, "iters": 7, "step": 0.008}},
    ("mma", "*"): {"settings": {"iters": 15, "step": 0.03}},
    ("mma", "cifar10"): {"settings": {"eps_max": 0.047, "iters": 10, "step": 0.005}},
    ("large-margin", "cifar10"): {"settings": {"gamma": 0.1}},
    ("llr", "cifar10"): {"settings": {"eps": 0.031, "steps": 7, "step": 0.008}},
    ("robust", "*"): {
        **_LONG,
        "settings": {
            "search": "xent",
            "distance": "along",
            "iters": 2,
            "step": 0.1,
            "warmup": 0.4,
            "lam_correct": 10.0,
            "warm_start": 0.95,
            "tol": 1e-2,
        },
    },
    # For fifty minutes. What is trained for a few is better off with a larger box and no shifts.
    ("robust", "mnist"): {
        "epochs": 26,
        "shift": 2,
        "settings": {
            "eps_correct": 0.33,
            "iters": 3,
            "step": 0.08,
            "step_last": 0.02,
            "warmup": 0.33,
        },
    },
    # Images that are shifted and mirrored anew have no place to go on from.
    ("robust", "cifar10"): {
        "lr": 1e-3,
        "settings": {
            "eps_correct": 0.04,
            "eps_wrong": 0.05,
            "iters": 4,
            "step": 0.015,
            "warm_start": 0.0,
        },
    },
    ("robust", "digits"): {"settings": {"eps_correct": 0.2, "eps_wrong": 0.2, "step": 0.05}},
    ("svm", "*"): {"settings": {"max_iters": 10}},
}

_HALVED_AS_ROBUST = {"schedule": "halving", "halve_at": (100 / 200, 150 / 200), "lr_warmup": 0.0}
_HALVED_AS_SVM = {
    "schedule": "halving",
    "halve_at": tuple(epoch / 200 for epoch in (50, 100, 120, 140, 160, 180)),
    "lr_warmup": 0.0,
    "optimizer": "nesterov",
    "momentum": 0.9,
    "weight_decay": 1e-4,
}
_CIFAR_ADAM = {"lr": 3e-4, "weight_decay": 1e-6}

# The settings of the paper's experiments. Where it states none for an objective and a data set,
# those of the nearest experiment stand.
_PAPER: Table = {
    ("*", "*"): {"epochs": 200, "batch": 128, "lr": 1e-3, **_HALVED_AS_ROBUST},
    ("*", "mnist"): {"network": "convnet-4a"},
    ("*", "cifar10"): {"network": "convnet-4b", "augment": True, **_CIFAR_ADAM},
    ("*", "digits"): {"network": "convnet-2a"},
    # Table 1. On MNIST an example starts in a box of 0.4, a wrong one of 0.5.
    ("robust", "*"): {
        "settings": {"eps_correct": 0.4, "eps_wrong": 0.5, "iters": 40, "step": 0.01}
    },
    ("robust", "cifar10"): {
        "settings": {
            "eps_correct": 0.045,
            "eps_wrong": 0.05,
            "iters": 20,
            "step": 0.007,
            "step_eps": 0.031,
            "eps_first": 0.001,
            "warmup": 50 / 200,
            "lam_correct": 11.0,  # 4 for ResNet-18, with lr 1e-4
            "lam_wrong": 1.0,
        }
    },
    ("madry", "*"): {
        "lr": 1e-4,
        "weight_decay": 1e-6,
        "schedule": "constant",
        "settings": {"eps": 0.3, "iters": 40, "step": 0.01},
    },
    ("madry", "cifar10"): {"settings": {"eps": 0.031, "iters": 20, "step": 0.007}},
    ("trades", "*"): {
        "lr": 1e-4,
        "schedule": "constant",
        "settings": {"beta": 6.0, "eps": 0.3, "iters": 40, "step": 0.01},
    },
    ("trades", "cifar10"): {
        "optimizer": "sgd",
        "lr": 0.1,
        "settings": {"beta": 5.0, "eps": 0.031, "iters": 10, "step": 0.007},
    },
    ("mma", "cifar10"): {"settings": {"eps_max": 0.047, "iters": 20, "step": 0.003}},
    ("large-margin", "cifar10"): {"settings": {"gamma": 0.1}},
    ("llr", "cifar10"): {"settings": {"eps": 0.031, "steps": 10, "step": 0.007}},
    # Table A2.
    ("svm", "*"): {
        **_HALVED_AS_SVM,
        "lr": 0.02,
        "batch": 256,
        "settings": {"lam_first": 0.01, "lam": 0.2, "warmup": 50 / 200, "max_iters": 20},
    },
    ("svm", "mnist"): {"network": "convnet-2b"},
    ("svm", "cifar10"): {
        "epochs": 100,
        "lr": 0.01,
        "batch": 32,
        "halve_at": (50 / 100,),
        "augment": False,
        "settings": {"lam_first": 0.0, "lam": 0.01, "warmup": 50 / 100},
    },
    ("hinge", "*"): {**_HALVED_AS_SVM, "lr": 0.01, "batch": 256},
    ("hinge", "mnist"): {"network": "convnet-2b"},
    ("hinge", "cifar10"): {
        "epochs": 100,
        "lr": 0.01,
        "batch": 32,
        "halve_at": (50 / 100,),
        "augment": False,
    },
}

PRESETS: dict[str, Table] = {"fast": _FAST, "paper": _PAPER}

# Settings of the training that go by name, beside those of the objective. The others have an
# argument of their own.
TUNABLE = (
    "optimizer",
    "momentum",
    "beta2",
    "weight_decay",
    "clip_norm",
    "schedule",
    "lr_warmup",
    "halve_at",
    "ema",
    "shift",
    "bend",
    "held_out",
    "channels_last",
    "autocast",
    "guard",
    "log_every",
    "checkpoint_every",
)


def preset(
    objective: str,
    data: Images,
    name: str = "fast",
    *,
    network: str | None = None,
    network_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    epochs: float | None = None,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    augment: bool | None = None,
    settings: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The settings of a preset for an objective and a data set, with some of them replaced.

    Args:
        objective: a name of ``levelset_ext.objectives.OBJECTIVES``.
        data: what will be trained on: its name, the shape of its images and its classes count.
        name: of the preset.
        network: name, see ``networks.build``; the preset's for these images if left out.
        network_options: of ``networks.build``, beside the shape of the images and the classes; for
            the geometric SVM one logit.
        seed, epochs, steps, batch, lr, augment: see :class:`TrainConfig`; ``steps`` replaces
            ``epochs``.
        settings: of the objective, and those of :data:`TUNABLE`, by name.

    Raises:
        InputError: a name that is not known, or a value that cannot be used.
    """
    if name not in PRESETS:
        raise InputError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    if objective not in OBJECTIVES:
        raise InputError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if objective == "svm" and data.classes != 2:
        raise InputError(
            f"svm: expected images of 2 classes, into which --classes 2 merges them, got "
            f"{data.classes}"
        )
    values: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for rule_for in (("*", "*"), ("*", data.name), (objective, "*"), (objective, data.name)):
        rule = dict(PRESETS[name].get(rule_for, {}))
        own |= rule.pop("settings", {})
        values |= rule

    known = [field.name for field in fields(OBJECTIVES[objective])]
    for key, value in (settings or {}).items():
        if key in known:
            own |= checked(OBJECTIVES[objective], {key: value}, objective)
        elif key in TUNABLE:
            values |= checked(TrainConfig, {key: value}, "train")
        else:
            names = ", ".join((*known, *TUNABLE))
            raise InputError(f"set: expected a setting among {names}, got {key!r}")
    given: dict[str, Any] = {"network": network, "batch": batch, "lr": lr, "augment": augment}
    given |= {"epochs": epochs, "steps": steps}
    values |= {key: value for key, value in given.items() if value is not None}
    if steps is not None and steps < 1:
        raise InputError(f"steps: expected at least 1, got {steps}")
    if "network" not in values:
        raise InputError(f"network: expected a name, as there is none for images {data.name!r}")
    options = {
        "classes": 1 if objective == "svm" else data.classes,
        "shape": tuple(data.images.shape[1:]),
        **(network_options or {}),
    }
    made = _network_config(values.pop("network"), options)
    make_objective(objective, own)
    config = TrainConfig(
        objective=objective, settings=own, preset=name, seed=seed, **made, **values
    )
    return TrainConfig(**{**vars(config), "settings": plain_config(config)["settings"]})


def _network_config(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Name and options of a network as ``build`` writes them; no weights are made."""
    try:
        options = {**options, "shape": tuple(options["shape"])}
        with torch.device("meta"):
            return dict(build(name, **options).config)
    except (TypeError, ValueError) as error:
        raise InputError(f"network: {error}") from None
