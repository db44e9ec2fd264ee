"""Notices that a training has diverged and takes it back to weights that were good."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

__all__ = ["Guard", "finite_gradient"]

WINDOW = 25  # steps that are judged together
MEMORY = 8  # windows that the recent range is made of
ENOUGH = 4  # of them, before anything is judged
BAD_WINDOWS = 2  # in a row make a divergence: what heals by itself is left alone
IN_A_ROW = 5  # steps that are not finite make one too
ANCHOR_EVERY = 100  # steps between two good states, if the training is well
ANCHORS = 3  # that many are kept, in checkpoints too
SETTLED = 100  # steps that a share is late by: a good state is so much before the first bad window
LOSS_FACTOR = 3.0
SHARE_DROP = 0.03
MOST = 4  # returns, then the run stops


class Guard:
    """Keeps the last good state of a training, and goes back to it when the training diverges.

    Steps are judged in windows of 25, and a window by the range of the eight good ones before it.
    It is bad when its median loss is three times the worst of theirs and more than half of what the
    loss was in the first window (else a loss near 0 would diverge by noise), or when a share, as of
    converged projections, falls 3 % below the worst of theirs: of Eq. 13 the loss is blind to most
    of what goes wrong. Two bad windows in a row, or five steps in a row that are not finite, are a
    divergence.

    Then the weights and the optimizer are those of the last good state again, the learning rate is
    halved for the rest of the run, and everything else (step, schedules, random numbers) goes on.
    A share shows late what has gone wrong, so a state is good against that only if a hundred good
    steps followed it; one from which the run diverges once more was not good at all, and the one
    before it is next. The weights of the start, which lose everything, come back only if nothing
    else is left. After four returns the run ends with an error. What is decided depends on the
    figures of the steps alone, so a run that is resumed decides the same.

    Args:
        parts: the modules and optimizers that go back.
        active: whether to judge at all; without, a run of steps that are not finite ends it.
        say: where the one sentence of a return goes.
    """

    def __init__(
        self,
        *parts: nn.Module | torch.optim.Optimizer,
        active: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.parts, self.active, self.say = parts, active, say
        self.rate = 1.0  # factor of the learning rate
        self.returns: list[dict[str, Any]] = []  # for metrics.json
        self.in_a_row = 0
        self._anchors: list[dict[str, Any]] = []  # good states, the oldest first
        self._first: float | None = None  # loss of the first window
        # Loss and shares of the steps of the open window, and of the last good windows.
        self._window: list[tuple[float, dict[str, float]]] = []
        self._memory: list[tuple[float, dict[str, float]]] = []
        self._bad = 0  # windows in a row
        self._before = math.inf  # a good state is not later

    def begin(self, step: int) -> None:
        """Before the first step: the starting weights are what is left if no state is good."""
        if self.active and not self._anchors:
            self._keep(step)

    def after(
        self,
        step: int,
        loss: float,
        *,
        usable: bool,
        shares: Mapping[str, float] | None = None,
        last: bool = False,
    ) -> None:
        """After every step.

        Args:
            step: how many steps are done.
            loss: of the step, the same on every process of the run.
            usable: whether the loss and its gradient were finite; otherwise the step was skipped.
            shares: from 0 to 1, of what is near 1 where all is well, by what they are shares of;
                the same ones after every step.
            last: whether it was the last one.

        Raises:
            RuntimeError: the run diverged once more after the last return, or had more than 20
                steps in a row that are not finite.
        """
        self.in_a_row = 0 if usable else self.in_a_row + 1
        if not self.active:
            if self.in_a_row > MOST * IN_A_ROW:
                raise RuntimeError(f"{self._not_finite()}, up to step {step}")
            return
        reason = None
        if self.in_a_row >= IN_A_ROW:
            reason = self._not_finite()
        elif last and not self.sound():
            reason = "the weights are not finite"
        else:
            if usable:
                self._window.append((loss, dict(shares or {})))
            if len(self._window) >= WINDOW:
                reason = self._judge(step)
        if reason is not None:
            self._return(step, reason)

    def sound(self) -> bool:
        """Whether all weights are finite: others are never written."""
        return all(
            bool(torch.isfinite(tensor).all())
            for part in self.parts
            if isinstance(part, nn.Module)
            for tensor in part.state_dict().values()
            if tensor.is_floating_point()
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and plain values."""
        return {name: getattr(self, name) for name in _KEPT}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on with what :meth:`state` returned."""
        for name in _KEPT:
            setattr(self, name, copy.deepcopy(state[name]))

    def _not_finite(self) -> str:
        return f"the loss or its gradient was not finite in {self.in_a_row} steps in a row"

    def _judge(self, step: int) -> str | None:
        """Closes the window; a reason if it makes a divergence."""
        loss = median(one[0] for one in self._window)
        shares = {name: fmean(one[1][name] for one in self._window) for name in self._window[0][1]}
        began = step - WINDOW
        self._window = []
        if self._first is None:
            self._first = loss
        worst = max((one[0] for one in self._memory), default=loss)
        least = {
            name: min((one[1][name] for one in self._memory), default=share)
            for name, share in shares.items()
        }
        reason = None
        fallen: list[str] = []
        if len(self._memory) >= ENOUGH:
            fallen = [name for name in shares if shares[name] < least[name] - SHARE_DROP]
            if loss > max(LOSS_FACTOR * worst, self._first / 2):
                reason = f"the loss rose from {worst:.3g} to {loss:.3g}"
            elif fallen:
                name = fallen[0]
                reason = (
                    f"the share of {name} fell from {100 * least[name]:.0f} % to "
                    f"{100 * shares[name]:.0f} %"
                )
        if reason is not None:
            if fallen:
                self._before = min(self._before, began - SETTLED)
            self._bad += 1
            return reason if self._bad >= BAD_WINDOWS else None
        self._bad, self._before = 0, math.inf
        # Kept only where it is as good as what came before: a divergence may have begun.
        well = loss <= 1.1 * worst and all(
            shares[name] >= least[name] - SHARE_DROP / 10 for name in shares
        )
        self._memory = [*self._memory, (loss, shares)][-MEMORY:]
        if well and step - self._anchors[-1]["step"] >= ANCHOR_EVERY and self.sound():
            self._keep(step)
        return None

    def _keep(self, step: int) -> None:
        parts = [copy.deepcopy(part.state_dict()) for part in self.parts]
        anchor = {"step": step, "parts": parts, "memory": self._memory, "used": False}
        self._anchors = [*self._anchors, anchor][-ANCHORS:]

    def _return(self, step: int, reason: str) -> None:
        if len(self.returns) == MOST:
            raise RuntimeError(
                f"diverged at step {step}: {reason}, after {MOST} returns to good weights with "
                f"the learning rate down to {self.rate:g} of its schedule; a smaller one may help"
            )
        while len(self._anchors) > 1:
            late = self._anchors[-1]["step"] > self._before and self._anchors[-2]["step"] > 0
            if not (late or self._anchors[-1]["used"]):
                break
            self._anchors.pop()
        anchor = self._anchors[-1]
        anchor["used"] = True
        for part, kept in zip(self.parts, anchor["parts"], strict=True):
            part.load_state_dict(copy.deepcopy(kept))  # an optimizer keeps what it is given
        self.rate /= 2
        back = anchor["step"]
        self.returns.append({"step": step, "back_to": back, "reason": reason, "rate": self.rate})
        # With the range of that time: what is still bad there would else be the new measure.
        self._window, self._memory, self._bad, self.in_a_row = [], anchor["memory"], 0, 0
        self._before = math.inf
        self.say(
            f"diverged at step {step}: {reason}; going on with the weights of step {back} and "
            f"{self.rate:g} of the learning rate"
        )


_KEPT = (
    "rate", "returns", "in_a_row", "_anchors", "_first", "_window", "_memory", "_bad", "_before",
)  # fmt: skip


def finite_gradient(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the gradient of all parameters together has a finite length."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return math.isfinite(float(nn.utils.get_total_norm(gradients))) if gradients else True
