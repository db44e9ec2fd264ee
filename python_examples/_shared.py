"""What the experiments share: their folder, what they keep for ``--resume``, tables, pictures."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student

from levelset_ext.data.images import Images
from levelset_ext.errors import InputError
from levelset_ext.margin import margin
from levelset_ext.networks import build
from levelset_ext.recipes.files import (
    load_checkpoint,
    plain,
    prepare_folder,
    read_json,
    save_checkpoint,
    write_json,
)
from levelset_ext.recipes.progress import Progress, say
from levelset_ext.recipes.run_folder import check_own_files, digest
from levelset_ext.whole_files import write_whole

BLUE, RED, ORANGE, GREEN, GREY = "#2f6db3", "#c8423b", "#e08a1e", "#3b8f5a", "#8a8f98"


class Run:
    """The folder of an experiment, which is made of named units that are kept as they finish.

    ``config.json`` describes the experiment, ``parts/NAME.pt`` is the result of the unit NAME. A
    folder is gone on with only for the experiment it was made by.

    Args:
        out: the folder.
        name: of the experiment.
        settings: everything its results depend on, plain values.
        units: how many there are, for the progress.
        resume: keep the units that are there.
    """

    def __init__(
        self, out: Path, name: str, settings: dict[str, Any], units: int, resume: bool
    ) -> None:
        self.out = prepare_folder(out)
        self.parts = out / "parts"
        self.kind = f"levelset_ext example {name}"
        header = json.loads(json.dumps(plain({"kind": self.kind, "settings": settings})))
        config = out / "config.json"
        if resume and config.exists():
            self._check(read_json(config), header)
        else:
            check_own_files(out, ("parts", "config.json"), self.kind, self.kind)
            shutil.rmtree(self.parts, ignore_errors=True)
            write_json(config, header)
        self.parts.mkdir(exist_ok=True)
        self.units, self.done = units, 0
        self.progress = Progress(name, units)

    def _check(self, stored: Any, header: dict[str, Any]) -> None:
        if not isinstance(stored, dict) or stored.get("kind") != self.kind:
            raise InputError(f"{self.out}: expected a folder of {self.kind}, got another")
        old, new = stored.get("settings") or {}, header["settings"]
        changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        if changed:
            raise InputError(
                f"{self.out}: expected the same settings to resume, got other {', '.join(changed)}"
            )

    def unit(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a unit, tensors and plain values: kept from before, or computed now."""
        file = self.parts / f"{name}.pt"
        state = None
        if file.exists():
            try:
                state = load_checkpoint(file, self.kind)
            except InputError:
                say(f"{file}: damaged, computed again")
        if state is None:
            state = {**compute(), "kind": self.kind}
            save_checkpoint(file, state)
        self.done += 1
        last = self.done == self.units
        if last or self.progress.due():
            self.progress.report(self.done, name, last)
        return state


def images_digest(*images: Images) -> str:
    """Images with their labels, for the settings of a :class:`Run`."""
    return digest(*(tensor for some in images for tensor in (some.images, some.labels)))


def check_network(name: str, classes: int, images: Images) -> None:
    """Says in one line why ``networks.build`` has no such network for these images."""
    channels, height, width = images.images.shape[1:]
    try:
        with torch.device("meta"):  # no weights are made
            build(name, classes, (channels, height, width))
    except ValueError as error:
        raise InputError(f"network: {error}") from None


class _Seed(argparse.Action):
    """Refuses what no generator of random numbers takes; argparse would print its usage as well."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if values < 0:
            raise InputError(f"seed: expected a number >= 0, got {values}")
        setattr(namespace, self.dest, values)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all experiments have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results")
    parser.add_argument("--quick", action="store_true", help="a small setting, about a minute")
    parser.add_argument("--resume", action="store_true", help="keep the units that are in DIR")
    parser.add_argument("--seed", type=int, action=_Seed, default=0, help="of every random choice")
    return parser


def command(work: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Runs an experiment; what cannot be used as input is one line and exit status 2."""
    try:
        work(argv)
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on", file=sys.stderr)
        return 130
    return 0


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """CSV with the keys of the first row as its head; numbers with six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_whole(path, lambda stream: stream.write(text.getvalue().encode()))
    say(f"{path}: {len(rows)} rows")


def pyplot() -> Any:
    """matplotlib without a display, set up alike for all pictures."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("pictures: expected matplotlib (pip install matplotlib)") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }
    )
    return plt


def save_picture(figure: Any, path: Path) -> None:
    # Without the version of matplotlib that it would note, equal pictures are equal files.
    write_whole(
        path,
        lambda stream: figure.savefig(stream, format="png", dpi=150, metadata={"Software": ""}),
    )
    pyplot().close(figure)
    say(str(path))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, float(student.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def chosen_variants(text: str | None, known: Iterable[str], usual: Iterable[str]) -> list[str]:
    """The names of an ablation in ``text``, comma-separated, or the usual ones; "ours" first."""
    known = list(known)
    chosen = [name.strip() for name in (text or "").split(",") if name.strip()]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InputError(f"variants: expected some of {', '.join(known)}, got {unknown[0]!r}")
    return list(dict.fromkeys(["ours", *(chosen or usual)]))


def write_ablation(
    out: Path,
    runs: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    draw: Callable[[Sequence[dict[str, Any]], Path], None],
) -> None:
    """The files of an ablation: every run, a row per variant, and the picture of those rows."""
    write_table(out / "runs.csv", runs)
    write_table(out / "ablation.csv", rows)
    draw(rows, out / "ablation.png")


def quantiles(values: torch.Tensor, shares: Sequence[float]) -> list[float]:
    """Quantiles of what is finite; NaN of nothing."""
    kept = values[torch.isfinite(values)].double()
    if len(kept) == 0:
        return [float("nan")] * len(shares)
    return torch.quantile(kept, torch.tensor(shares, dtype=torch.float64)).tolist()


def train_classifier(
    network: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    loss_of: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    steps: int,
    *,
    lr: float = 2e-3,
    batch: int = 64,
    seed: int = 0,
) -> None:
    """Adam with a learning rate that falls along a cosine, on batches in random order.

    ``loss_of(x, y, step)`` is the loss of a batch. The batches depend on the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        if len(order) < min(batch, len(x)):
            order = torch.randperm(len(x), generator=generator)
        rows, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        loss_of(x[rows], y[rows], step).backward()
        optimizer.step()


def class_margin(network: torch.nn.Module, label: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """F of Eq. 1: the margin of one class, whose level set 0 is its decision boundary."""

    def field(x: torch.Tensor) -> torch.Tensor:
        labels = torch.full((len(x),), label, device=x.device)
        return margin(network(x), labels, check=False)

    return field
