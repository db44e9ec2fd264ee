"""Losses of the logits at the examples themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from levelset_ext.margin import margin
from levelset_ext.objectives.base import Step
from levelset_ext.objectives.common import accuracy, evaluate

__all__ = ["CrossEntropy", "Hinge"]


@dataclass(frozen=True)
class CrossEntropy:
    """Mean of -log softmax_y; for one logit the binary cross entropy.

    One forward in the mode the network is in. Figures: accuracy.
    """

    def __call__(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        progress: float = 1.0,
    ) -> Step:
        logits = evaluate(network, x.detach(), y)
        return Step(functional.cross_entropy(logits, y), {"accuracy": accuracy(logits, y)})


@dataclass(frozen=True)
class Hinge:
    """Mean of max(0, 1 - F^y), F^y = f_y - max_{j != y} f_j; for one logit F^y = +-f, so that this
    is max(0, 1 - y F) with y = +-1.

    One forward in the mode the network is in. Figures: accuracy.
    """

    def __call__(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        progress: float = 1.0,
    ) -> Step:
        logits = evaluate(network, x.detach(), y)
        loss = (1 - margin(logits, y, check=False)).clamp(min=0).mean()
        return Step(loss, {"accuracy": accuracy(logits, y)})
