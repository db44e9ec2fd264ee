"""How strong is the search of a training whose steps go on from visit to visit?

    python benchmarks/warm_steps.py RUN/checkpoint.pt --data DIR [--rows 400] [--out FILE]

The network of a finished training stays as it is, its training images are visited again and again
by different rules of steps from where the training left them, and a share starts afresh each time,
as in ``warm_start``. For every rule: the mean cross entropy at the ends of each visit, and the
share of the images that are wrong there. What is higher is the stronger search.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from levelset_ext import build_info
from levelset_ext.attacks.pgd import Settings, climb
from levelset_ext.data.images import load_images
from levelset_ext.margin import margin
from levelset_ext.objectives.common import search_logits, warm_offsets
from levelset_ext.recipes.classifiers import KIND, fast_order, load_classifier
from levelset_ext.recipes.files import load_checkpoint

WARM = 0.95
RULES: dict[str, tuple[float, float | None, int]] = {  # step, step_last, iters
    "2 x 0.1": (0.1, None, 2),
    "2 x 0.05": (0.05, None, 2),
    "3 x 0.05": (0.05, None, 3),
    "4 x 0.05": (0.05, None, 4),
    "2, 0.1 to 0.02": (0.1, 0.02, 2),
    "3, 0.1 to 0.025": (0.1, 0.025, 3),
    "4, 0.1 to 0.02": (0.1, 0.02, 4),
    "6, 0.1 to 0.02": (0.1, 0.02, 6),
    "8, 0.2 to 0.02": (0.2, 0.02, 8),
}


def visits(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    offsets: Tensor,
    eps: float,
    rule: tuple[float, float | None, int],
    count: int,
) -> list[list[float]]:
    """Cross entropy, and the share of wrong rows, at the ends of every visit."""
    step, last, iters = rule
    settings = Settings(eps, step, iters, step_last=last)
    generator, logits, found = torch.Generator().manual_seed(0), search_logits(network, y), []
    for _ in range(count):
        offsets = climb(
            lambda d: functional.cross_entropy(logits(x + d), y, reduction="none"),
            x,
            warm_offsets(offsets, WARM, eps, generator),
            settings,
        )
        with torch.no_grad():
            ends = logits(x + offsets)
        wrong = (margin(ends, y, check=False) <= 0).double().mean()
        found.append([float(functional.cross_entropy(ends, y)), float(wrong)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--visits", type=int, default=6)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    images = load_images(args.data, "train", args.rows)
    x, y = images.images, images.labels.long()
    saved = load_checkpoint(args.checkpoint, KIND)
    settings, kept = saved["settings"], saved["training"]["offsets"]
    if kept is None or "eps_correct" not in settings["settings"]:
        parser.error(f"{args.checkpoint}: expected a robust training with warm starts")
    offsets, eps = kept[: args.rows].float(), settings["settings"]["eps_correct"]
    network = fast_order(load_classifier(args.checkpoint)).eval()
    rules: dict[str, Any] = {}
    for name, rule in RULES.items():
        rules[name] = found = visits(network, x, y, offsets, eps, rule, args.visits)
        print(
            f"{name:18} cross entropy "
            + " ".join(f"{value:.3f}" for value, _ in found)
            + f", wrong after the last {100 * found[-1][1]:.1f} %",
            flush=True,
        )
    if args.out is not None:
        result = {"trained": settings, "warm_start": WARM, "rows": args.rows, "rules": rules}
        args.out.write_text(json.dumps({**result, "build": build_info()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
