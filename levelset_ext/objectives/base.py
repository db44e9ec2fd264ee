"""What a training objective is: the loss of one batch, with whatever has to be found for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["Objective", "Step"]


@dataclass(frozen=True)
class Step:
    """What an objective says of one batch.

    Attributes:
        loss: scalar, what to call backward() on; always with a graph behind it.
        figures: further numbers worth a column in a table, each a detached scalar.
        offsets: (N, *event), where the search for adversarial or boundary points ended, relative to
            x; of objectives that can start where their last visit to these rows ended.
    """

    loss: Tensor
    figures: dict[str, Tensor] = field(default_factory=dict)
    offsets: Tensor | None = None


class Objective(Protocol):
    """Settings, and a call that turns a batch into a loss.

    Every objective is a frozen dataclass whose fields are plain numbers and strings, so that
    ``dataclasses.asdict`` describes it in full. It keeps nothing from one call to the next: one
    with a field ``warm_start`` > 0 is handed, as ``offsets``, what it returned for the same rows
    before.
    """

    def __call__(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        progress: float = 1.0,
        offsets: Tensor | None = None,
    ) -> Step:
        """The loss of a batch.

        Args:
            network: classifier (N, *event) -> logits (N, K), K >= 2, or (N,) or (N, 1) for two
                classes, in train mode. The ``.grad`` of its parameters is left alone.
            x: (N, *event).
            y: (N,) int64, 0 ... K - 1; for one logit 0 and 1.
            generator: source of all random choices, of the CPU whatever the device of x.
            progress: share of the training that is done, 0 ... 1; schedules depend on it.
            offsets: (N, *event), of the last visit to these rows; zeros before the first.
        """
        ...
