"""``--log tensorboard``: a training in TensorBoard's format, in the folder of the run.

tensorboard --logdir DIR
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from levelset_ext.errors import InputError
from levelset_ext.recipes.observers import Moment, Observer, Run

__all__ = ["FOLDER", "TensorBoard"]

FOLDER = "tensorboard"  # inside the folder of the run


class TensorBoard(Observer):
    """Figures of every so many steps as scalars, the pictures, and the settings with the results as
    hyperparameters.

    Raises:
        InputError: the package tensorboard is not there.
    """

    POINTS = 1000  # of a curve, about

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "log: expected the package tensorboard, from the extra "
                f'"levelset_ext[tensorboard]", cannot import it ({error})'
            ) from None
        self._open = SummaryWriter
        self._writer: Any = None

    def begin(self, run: Run) -> None:
        self.every, self.settings = max(1, round(run.steps / self.POINTS)), run.settings
        # Of what a killed run wrote after its last checkpoint, or before its first, TensorBoard
        # shows nothing.
        self._writer = self._open(str(run.out / FOLDER), purge_step=run.first + 1)

    def due(self, step: int, *, last: bool, saved: bool) -> bool:
        return last or step % self.every == 0

    def see(self, moment: Moment) -> None:
        for name, value in moment.figures.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, moment.step)

    def done(self, pictures: Mapping[str, Path], metrics: Mapping[str, Any]) -> None:
        for name, path in pictures.items():
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(name, pixels, dataformats="HWC")
        results = {
            f"result/{name}": value
            for name, value in metrics.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self._writer.add_hparams(flat(self.settings), results, run_name=".")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | float | str]:
    """Settings as TensorBoard takes them: numbers, truth values and words, one level deep."""
    found: dict[str, bool | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        elif isinstance(value, bool | int | float | str):
            found[prefix + name] = value
        else:
            found[prefix + name] = str(value)
    return found
