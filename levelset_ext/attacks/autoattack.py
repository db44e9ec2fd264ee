"""AutoAttack (Croce and Hein), through the package ``pyautoattack``, which is optional."""

from __future__ import annotations

import logging
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from levelset_ext.attacks.prepare import LogitsFunction, seeded_devices

__all__ = ["load_autoattack", "run_autoattack"]

_NORMS = {"linf": "Linf", "l2": "L2"}


class _AsModule(nn.Module):
    """The package calls ``model(x)``, and some of its parts ask for a module."""

    def __init__(self, logits: LogitsFunction) -> None:
        super().__init__()
        self._logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self._logits(x)


def load_autoattack() -> Any:
    """The class ``pyautoattack.AutoAttack``.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise ImportError(
            "autoattack: expected the package pyautoattack to be installed "
            "(pip install --no-deps pyautoattack==0.2.0)"
        ) from None
    return AutoAttack


def run_autoattack(
    logits: LogitsFunction, x: Tensor, y: Tensor, classes: int, *, eps: float, norm: str, seed: int
) -> Tensor:
    """The standard version: APGD on cross entropy, targeted APGD, targeted FAB, Square.

    With fewer than ten classes the targeted attacks take all K - 1 wrong ones. Below four classes
    the targeted ratio of logits is not defined and the version is APGD on cross entropy, FAB and
    Square.

    Args:
        logits: (n, c, h, w) -> (n, K), a prepared network.
        x: (n, c, h, w) float32, every row classified correctly.
        y: (n,) int64.
        classes: K.
        eps, norm: the ball.
        seed: of its random numbers, which all rows of a call share: other than for PGD, the result
            of a row depends on the rows that are attacked with it.

    Returns:
        (n, c, h, w): adversarial examples for broken rows, x for the others.

    Raises:
        ImportError: ``pyautoattack`` is not installed.
        ValueError: x is not (n, c, h, w), or eps is 0.
    """
    AutoAttack = load_autoattack()
    if x.dim() != 4:
        raise ValueError(f"autoattack: expected images (n, c, h, w), got shape {tuple(x.shape)}")
    if eps <= 0:
        raise ValueError(f"autoattack: expected eps > 0, got {eps}")
    if len(x) == 0:
        return x.clone()
    with _quiet_and_restored():
        few = classes < 4
        attack = AutoAttack(
            _AsModule(logits),
            eps=eps,
            norm=_NORMS[norm],
            seed=seed,
            device=x.device,
            version="custom" if few else "standard",
            attacks=["apgd-ce", "fab", "square"] if few else None,
        )
        attack.verbose = False
        attack.fab.n_restarts = attack.apgd.n_restarts = 1
        targets = min(9, classes - 1)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        found, _ = attack.run_standard_evaluation(x.clone(), y.clone(), batch_size=len(x))
    return found.detach()


@contextmanager
def _quiet_and_restored() -> Iterator[None]:
    """The package seeds the global generators, sets a trace function and logs; none of it lasts."""
    logger = logging.getLogger("auto-attack")
    level, disabled, trace, state = logger.level, logger.disabled, sys.gettrace(), random.getstate()
    try:
        logger.disabled = True
        with torch.random.fork_rng(seeded_devices()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled
        logger.setLevel(level)
        random.setstate(state)
        sys.settrace(trace)
