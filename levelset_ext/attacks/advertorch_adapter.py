"""PGD as the library ``advertorch`` runs it: the harness of the paper's tables, optional.

Its last release is older than the PyTorch this package supports: it imports a function that has
gone from ``torch.autograd.gradcheck`` and a module of torchvision that it hardly uses. Both are put
in place while it is imported, and taken away again.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from levelset_ext.attacks.pgd import _clean_pass
from levelset_ext.attacks.prepare import (
    LogitsFunction,
    attack_copy,
    check_batch,
    outside_inference_mode,
    seeded_devices,
)
from levelset_ext.margin import margin

__all__ = ["LOSSES", "advertorch_pgd", "load_advertorch", "run_advertorch"]


def _xent(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, y, reduction="sum")


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    return -margin(logits, y, check=False).sum()


LOSSES = {"xent": _xent, "margin": _margin}


def load_advertorch() -> Any:
    """The module ``advertorch.attacks``.

    Raises:
        ImportError: it is not installed, or cannot be imported even so.
    """
    if "advertorch.attacks" in sys.modules:
        return sys.modules["advertorch.attacks"]
    if importlib.util.find_spec("advertorch") is None:
        raise ImportError(
            "advertorch: expected the package to be installed "
            "(pip install --no-deps advertorch==0.2.3)"
        )
    with _shim():
        return importlib.import_module("advertorch.attacks")


def _zero_gradients(x: Tensor | Iterable[Tensor]) -> None:
    for tensor in [x] if isinstance(x, Tensor) else x:
        if tensor.grad is not None:
            tensor.grad.detach_()
            tensor.grad.zero_()


@contextlib.contextmanager
def _shim() -> Iterator[None]:
    importlib.import_module("torch.autograd.gradcheck")
    gradcheck: Any = sys.modules["torch.autograd.gradcheck"]
    had = hasattr(gradcheck, "zero_gradients")
    stubs: dict[str, ModuleType] = {}
    if importlib.util.find_spec("torchvision") is None:
        stubs = {name: ModuleType(name) for name in ("torchvision", "torchvision.transforms")}
        transforms: Any = stubs["torchvision.transforms"]
        # Made, not called, while its defences are imported; PGD never gets there.
        transforms.ToPILImage = transforms.ToTensor = lambda *_: None
        stubs["torchvision"].__dict__["transforms"] = transforms
    try:
        if not had:
            gradcheck.zero_gradients = _zero_gradients
        sys.modules.update(stubs)
        yield
    finally:
        if not had:
            del gradcheck.zero_gradients
        for name in stubs:
            sys.modules.pop(name, None)


@outside_inference_mode
def advertorch_pgd(
    model: LogitsFunction,
    x: Tensor,
    y: Tensor,
    *,
    loss: str = "margin",
    eps: float,
    step: float,
    iters: int,
    seed: int = 0,
    norm: str = "linf",
    binary: bool = False,
) -> tuple[Tensor, Tensor]:
    """advertorch's LinfPGDAttack or L2PGDAttack: one random start, loss summed, last iterate.

    Arguments as for :func:`levelset_ext.attacks.pgd`; ``loss`` is "xent" or "margin". The random
    start is drawn from PyTorch's global generator with ``seed``; its state is put back.

    Returns:
        adversarial (n, *event), and success (n,) bool at it.

    Raises:
        ImportError: advertorch is not installed.
        ValueError: as for :func:`levelset_ext.attacks.pgd`.
    """
    y = check_batch(x, y, norm, eps=eps, step=step, iters=iters)
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
    logits = attack_copy(model, binary=binary)
    x, y, _ = _clean_pass(logits, x, y, binary)
    found = run_advertorch(logits, x, y, loss, eps, step, iters, seed, norm)
    with torch.no_grad():
        return found, ~(margin(logits(found.clone()), y, check=False) > 0)


def run_advertorch(
    logits: LogitsFunction,
    x: Tensor,
    y: Tensor,
    loss: str,
    eps: float,
    step: float,
    iters: int,
    seed: int,
    norm: str,
) -> Tensor:
    """:func:`advertorch_pgd` on a prepared network; the last iterates (n, *event)."""
    attacks = load_advertorch()
    kind = attacks.LinfPGDAttack if norm == "linf" else attacks.L2PGDAttack
    attack = kind(
        logits,
        loss_fn=LOSSES[loss],
        eps=float(eps),
        eps_iter=float(step),
        nb_iter=iters,
        rand_init=True,
        clip_min=0.0,
        clip_max=1.0,
    )
    with torch.random.fork_rng(seeded_devices()), torch.enable_grad():
        torch.manual_seed(seed)
        return attack.perturb(x.clone(), y.clone()).detach()
