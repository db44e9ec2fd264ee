"""Classifier checkpoints, and networks that come from elsewhere.

A classifier checkpoint is a dict ``{"kind": "levelset_ext classifier 1", "network": name,
"options": {...}, "state": state_dict}``, to which a training run may add entries of its own.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from levelset_ext.data.torch_files import read_torch_file
from levelset_ext.errors import InputError
from levelset_ext.networks import build
from levelset_ext.recipes.files import load_checkpoint, save_checkpoint

__all__ = [
    "KIND",
    "classifier_state",
    "fast_order",
    "load_classifier",
    "load_foreign",
    "save_classifier",
]

KIND = "levelset_ext classifier 1"
_RESERVED = ("kind", "network", "options", "state")


def classifier_state(network: nn.Module) -> dict[str, Any]:
    """What a checkpoint holds of a network made by ``networks.build``."""
    config = getattr(network, "config", None)
    if not isinstance(config, dict) or set(config) != {"network", "options"}:
        raise ValueError(
            f"network: expected one made by networks.build, got {type(network).__name__}"
        )
    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    return {"kind": KIND, **config, "state": state}


def save_classifier(path: str | os.PathLike[str], network: nn.Module, **extra: Any) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        path: where to.
        network: made by :func:`levelset_ext.networks.build`.
        extra: further entries, tensors and plain values only.
    """
    taken = [name for name in extra if name in _RESERVED]
    if taken:
        raise ValueError(f"extra: expected other names than {', '.join(taken)}")
    save_checkpoint(Path(path), {**classifier_state(network), **extra})


def load_classifier(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """The network of a checkpoint, in eval mode. No code is unpickled.

    Raises:
        InputError: no such file, not a classifier checkpoint, or weights that do not fit the
            network it names.
    """
    file = Path(path)
    content = load_checkpoint(file, KIND)
    name, options, state = (content.get(key) for key in _RESERVED[1:])
    if not (isinstance(name, str) and isinstance(options, dict) and isinstance(state, dict)):
        raise InputError(f"{file}: expected entries network, options and state in a {KIND}")
    options = dict(options)
    if isinstance(options.get("shape"), (list, tuple)):
        options["shape"] = tuple(options["shape"])
    try:
        network = build(name, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: expected a network of this version ({error})") from None
    _load_state(network, state, file)
    return network.to(device).eval()


def fast_order(network: nn.Module) -> nn.Module:
    """A network of this package with its weights in the order in which convolutions on a CPU are
    fastest: an attack on ConvNet-4a takes two thirds of the time. On a GPU nothing changes."""
    if next(network.parameters()).device.type == "cpu":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def load_foreign(
    factory: str,
    weights: str | os.PathLike[str] | None,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A network that somebody else's code makes, with weights from a file, in eval mode.

    Args:
        factory: "module:function" or "module:Class", importable from here or from the working
            directory; called with ``options``.
        weights: a file that torch.save wrote: a state dict, or a dict with one under "state",
            "state_dict", "model_state_dict", "model" or "net". Only tensors and plain values are
            unpickled. None keeps the weights the factory makes.
        options: keyword arguments.
        device: where to.

    Raises:
        InputError: nothing importable under that name, a call that fails, not a module, or weights
            that cannot be read or do not fit.
    """
    module_name, _, name = factory.partition(":")
    if not module_name or not name:
        raise InputError(f"model: expected MODULE:FACTORY, got {factory!r}")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        made: Any = importlib.import_module(module_name)
        for part in name.split("."):
            made = getattr(made, part)
        network = made(**(options or {}))
    except Exception as error:  # other people's code raises anything
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"model: cannot make a network with {factory} ({reason})") from None
    finally:
        if here in sys.path:
            sys.path.remove(here)
    if not isinstance(network, nn.Module):
        raise InputError(
            f"model: expected {factory} to make a module, got {type(network).__name__}"
        )
    if weights is not None:
        file = Path(weights)
        _load_state(network, _read_state(file), file)
    return network.to(device).eval()


def _read_state(file: Path) -> dict[str, Any]:
    content = read_torch_file(file, "weights")
    for key in ("state", "state_dict", "model_state_dict", "model", "net"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{file}: expected a state dict, got {type(content).__name__}")
    # As written by a network inside nn.DataParallel.
    wrapped = all(str(name).startswith("module.") for name in content)
    return {str(k).removeprefix("module.") if wrapped else str(k): v for k, v in content.items()}


def _load_state(network: nn.Module, state: Mapping[str, Any], file: Path) -> None:
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = str(error).splitlines()
        reason = " ".join(line.strip() for line in lines[1:3]) or str(error)
        raise InputError(
            f"{file}: expected the weights of {type(network).__name__}, they do not fit ({reason})"
        ) from None
