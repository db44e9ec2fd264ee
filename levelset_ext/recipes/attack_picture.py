"""The sheet that an attack leaves: images, what was done to them, and what the network says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from levelset_ext.attacks.evaluate import Evaluation
from levelset_ext.data.images import Images
from levelset_ext.whole_files import write_whole

__all__ = ["draw_attacks"]

COLUMNS, BROKEN = 12, 8  # images on the sheet, and how many of them are broken ones if there are
_SIDE, _GAP, _LEFT, _CAPTION = 96, 8, 132, 40
_TEXT, _GREY, _BAD = (40, 46, 56), (110, 118, 130), (190, 50, 42)


def draw_attacks(path: Path, data: Images, evaluation: Evaluation) -> bool:
    """Writes a PNG: a column for each of a dozen images, broken ones first, the same number of
    them from everywhere in the table. Above the image, in the middle what was added (grey is
    nothing, black and white the largest change on the sheet), below the two together.

    Args:
        path: where to.
        data: images (n, c, h, w) in [0, 1] with c = 1 or 3, and labels.
        evaluation: of these images.

    Returns:
        False, and nothing written, for images of another kind or if all rows were wrong before.
    """
    images = data.images.float().cpu()
    rows = _chosen(evaluation)
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not rows:
        return False
    change = evaluation.adversarial[rows].float() - images[rows]
    largest = float(change.abs().max())
    panels = [images[rows], 0.5 + 0.5 * change / (largest or 1.0), evaluation.adversarial[rows]]

    width = _LEFT + COLUMNS * (_SIDE + _GAP) + _GAP
    height = _GAP + 3 * (_SIDE + _GAP) + _CAPTION
    sheet = Image.new("RGB", (width, height), (252, 252, 253))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for line, name in enumerate(("image", f"change, to {largest:.3g}", "attacked image")):
        top = _GAP + line * (_SIDE + _GAP)
        draw.text((_GAP, top + _SIDE // 2 - 8), name, fill=_TEXT, font=font)
        for column in range(len(rows)):
            left = _LEFT + column * (_SIDE + _GAP)
            sheet.paste(_tile(panels[line][column]), (left, top))
    names = [record.name for record in evaluation.attacks]
    for column, row in enumerate(rows):
        left, top = _LEFT + column * (_SIDE + _GAP), _GAP + 3 * (_SIDE + _GAP)
        label, told = int(data.labels[row]), int(evaluation.prediction[row])
        by = int(evaluation.broken_by[row])
        says = f"{label} > {told}" if by >= 0 else f"{label} stands"
        draw.text((left, top), says, fill=_BAD if by >= 0 else _TEXT, font=font)
        draw.text((left, top + 17), _fitting(names[by] if by >= 0 else "", font), _GREY, font)
    write_whole(path, lambda stream: sheet.save(stream, format="PNG", optimize=False))
    return True


def _chosen(evaluation: Evaluation) -> list[int]:
    """Rows of the sheet, spread over the broken ones and those that stand."""
    broken = torch.nonzero(evaluation.broken_by >= 0).squeeze(1)
    stands = torch.nonzero(evaluation.broken_by == -1).squeeze(1)
    first = min(len(broken), max(BROKEN, COLUMNS - len(stands)))
    return _spread(broken, first) + _spread(stands, min(len(stands), COLUMNS - first))


def _spread(rows: Tensor, count: int) -> list[int]:
    return [int(rows[len(rows) * k // count]) for k in range(count)]


def _tile(image: Tensor) -> Image.Image:
    """An image (c, h, w) in [0, 1], its pixels as squares."""
    pixels = np.round(image.clamp(0, 1).numpy() * 255).astype(np.uint8).transpose(1, 2, 0)
    small = Image.fromarray(pixels.repeat(3, 2) if pixels.shape[2] == 1 else pixels, "RGB")
    return small.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while text and font.getlength(text) > _SIDE + _GAP // 2:
        text = text[:-1]
    return text
