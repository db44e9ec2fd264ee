"""Figure 2: test accuracy of a binary classifier trained on a small fraction of the images.

    python python_examples/figure2_fractions.py --out DIR --quick          (digits, two seeds)
    python python_examples/figure2_fractions.py --out DIR                  (digits)
    python python_examples/figure2_fractions.py --out DIR --data FOLDER    (MNIST, as the paper)

The ten labels are merged into two (0-4, 5-9). The geometric SVM (Eq. 11, alpha -1, L_inf) is
compared with cross entropy and hinge loss, on one logit F. A seed fixes the start of the network,
the rows that are kept and the order of the batches, alike for all methods, so that differences
are paired.

Every method gets the same number of trials: the candidates of --candidates, tried per fraction
with seeds of their own and judged on training images outside the fraction. The best one is then
run with the seeds that are reported. Test images play no part in it. For cross entropy and hinge
the candidates are learning rates (with --data the paper's: 0.001, 0.005, 0.01, 0.02), for Eq. 11
pairs of learning rate and final lambda. --methods cross-entropy,hinge --rates 0.02,0.05,0.1,0.2
shows what those two make of other rates.

accuracy.csv        mean test accuracy and its 95 % confidence interval (Student's t over the
                    seeds), per fraction and method; and the paired differences Eq. 11 minus each
                    of the others, with their own intervals
runs.csv, tuning.csv    every run, every trial
accuracy.png        the curves with the intervals, and the paired differences

The paper's setting (Table A2, MNIST): ConvNet-2b, SGD with Nesterov momentum 0.9, weight decay
1e-4, 200 epochs, batches of 32, learning rate halved at epochs 50, 100, 120, 140, 160 and 180,
lambda from 0.01 to 0.2 over 50 epochs, 20 iterations, 100 seeds. The digits use ConvNet-2a, larger
learning rates, and hinge loss for the first quarter of the epochs of Eq. 11: where a network says
the same of every image there is no boundary yet that could be moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _robustness import numbers
from _shared import (
    BLUE,
    GREY,
    ORANGE,
    RED,
    Run,
    arguments,
    check_network,
    command,
    images_digest,
    interval,
    pyplot,
    save_picture,
    write_table,
)
from torch import Tensor, nn

import levelset_ext as ls
from levelset_ext.data.images import fraction, load_images, merge_labels
from levelset_ext.errors import InputError
from levelset_ext.networks import build
from levelset_ext.recipes.devices import parse_device

COLORS = {"geometric-svm": BLUE, "cross-entropy": ORANGE, "hinge": RED}
OTHERS = ("cross-entropy", "hinge")
HALVED_AT = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the epochs: 50, 100, 120, 140, 160, 180 of 200
TRIAL_SEED = 10_000  # trials use seeds from here on, which no reported run uses


@dataclass(frozen=True)
class Setting:
    network: str = "convnet-2b"
    fractions: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01)
    seeds: int = 100
    trial_seeds: int = 3
    epochs: int = 200
    most_steps: int | None = None  # fewer epochs for the fractions that would take more
    batch: int = 32
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warm: float = 0.0  # share of the epochs that Eq. 11 leaves to the hinge loss
    lam_first: float = 0.01
    lam_share: float = 0.25  # of the epochs, in which lambda grows to its final value
    max_iters: int = 20
    tol: float = 1e-4  # of the levels, which are 1 apart
    validation_rows: int = 2000
    test_rows: int = 10_000
    # (learning rate, final lambda); lambda is Eq. 11's alone.
    svm: tuple[tuple[float, float], ...] = ((0.02, 0.2), (0.02, 0.05), (0.005, 0.2), (0.005, 0.05))
    plain: tuple[tuple[float, float], ...] = ((0.02, 0), (0.01, 0), (0.005, 0), (0.001, 0))


DIGITS = Setting(
    network="convnet-2a",
    fractions=(0.01, 0.02, 0.05, 0.1),
    seeds=20,
    epochs=200,
    batch=72,
    warm=0.25,
    max_iters=10,
    tol=1e-3,
    svm=((0.1, 0.1), (0.1, 0.05), (0.05, 0.1), (0.1, 0.2)),
    plain=((0.05, 0), (0.1, 0), (0.02, 0), (0.2, 0)),
    validation_rows=600,
    test_rows=360,
)
QUICK: dict[str, Any] = {
    "fractions": (0.02, 0.05),
    "seeds": 2,
    "trial_seeds": 1,
    "epochs": 100,
}


@dataclass(frozen=True)
class Rows:
    """Images with labels 0 and 1."""

    x: Tensor
    y: Tensor

    def of(self, rows: Tensor) -> Rows:
        return Rows(self.x[rows], self.y[rows])


def loss_of(method: str, network: nn.Module, batch: Rows, lam: float, setting: Setting) -> Tensor:
    sign = batch.y.to(batch.x.dtype) * 2 - 1
    if method == "geometric-svm":
        return ls.losses.geometric_svm(
            network,
            batch.x,
            batch.y,
            alpha=-1.0,
            lam=lam,
            distance="linf",
            max_iters=setting.max_iters,
            tol=setting.tol,
        ).total
    margins = sign * network(batch.x)[:, 0]
    if method == "hinge":
        return (1 - margins).clamp(min=0).mean()
    return nn.functional.softplus(-margins).mean()


def epochs_of(count: int, setting: Setting) -> int:
    """Epochs of a training on so many images."""
    if setting.most_steps is None:
        return setting.epochs
    return min(setting.epochs, max(1, setting.most_steps // math.ceil(count / setting.batch)))


def train(
    method: str, data: Rows, seed: int, lr: float, last_lam: float, setting: Setting
) -> nn.Module:
    """One run. Everything random depends on the seed and not on the method."""
    torch.manual_seed(seed)
    channels, height, width = data.x.shape[1:]
    network = build(setting.network, 1, (channels, height, width)).to(data.x.device)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr,
        setting.momentum,
        weight_decay=setting.weight_decay,
        nesterov=True,
    )
    generator = torch.Generator().manual_seed(seed)
    epochs = epochs_of(len(data.y), setting)
    for epoch in range(epochs):
        share = epoch / epochs
        optimizer.param_groups[0]["lr"] = lr * 0.5 ** sum(share >= at for at in HALVED_AT)
        first = min(setting.lam_first, last_lam)
        lam = first + (last_lam - first) * min(1.0, share / setting.lam_share)
        kind = "hinge" if share < setting.warm and method == "geometric-svm" else method
        for rows in torch.randperm(len(data.y), generator=generator).split(setting.batch):
            optimizer.zero_grad()
            loss_of(kind, network, data.of(rows.to(data.x.device)), lam, setting).backward()
            optimizer.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, data: Rows) -> float:
    right = 0
    for x, y in zip(data.x.split(500), data.y.split(500), strict=True):
        right += int(((network(x)[:, 0] > 0).long() == y).sum())
    return right / len(data.y)


def split(train_all: Rows, share: float, seed: int, setting: Setting) -> tuple[Rows, Rows]:
    """The rows of a fraction, and validation rows outside it."""
    rows = fraction(train_all.y.cpu(), share, seed)
    rest = torch.ones(len(train_all.y), dtype=torch.bool)
    rest[rows] = False
    outside = torch.nonzero(rest).squeeze(1)
    order = torch.randperm(len(outside), generator=torch.Generator().manual_seed(seed))
    return train_all.of(rows), train_all.of(outside[order[: setting.validation_rows]])


def work(argv: Sequence[str] | None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", metavar="DIR", help="MNIST or CIFAR10 files (default: digits)")
    parser.add_argument("--fractions", help="of the training images, with commas between")
    parser.add_argument("--network", help="a name of networks.build")
    parser.add_argument("--warm", type=float, help="share of Eq. 11's epochs on hinge loss")
    parser.add_argument(
        "--methods", default=",".join(COLORS), help="to train, with commas between; all"
    )
    parser.add_argument(
        "--rates", help="learning rates that cross entropy and hinge try, instead of candidates"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    for name, what in (
        ("seeds", "runs per fraction and method"),
        ("trial_seeds", "runs per candidate; 0 takes the first candidate untried"),
        ("epochs", "of every run"),
        ("most_steps", "a run of more steps has fewer epochs"),
        ("test_rows", "test images"),
        ("candidates", "how many settings every method may try, at most 4"),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=what)
    args = parser.parse_args(argv)
    device = parse_device(args.device)
    setting = Setting() if args.data is not None else DIGITS
    if args.quick:
        setting = replace(setting, **QUICK)
    given = ("seeds", "trial_seeds", "epochs", "most_steps", "test_rows", "network", "warm")
    changes = {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    if args.fractions is not None:
        try:
            changes["fractions"] = tuple(float(part) for part in args.fractions.split(","))
        except ValueError:
            raise InputError(f"fractions: expected numbers, got {args.fractions!r}") from None
    candidates = 4 if args.candidates is None else args.candidates
    if args.quick and args.candidates is None:
        candidates = 1
    most = len(setting.svm)
    if not 1 <= candidates <= most:
        raise InputError(f"candidates: expected 1 to {most}, got {candidates}")
    changes["svm"], changes["plain"] = setting.svm[:candidates], setting.plain[:candidates]
    if args.rates is not None:
        rates = numbers("rates", args.rates, float, 1e-6, 1e3)
        changes["plain"] = tuple((rate, 0) for rate in rates)
    methods = args.methods.split(",")
    if unknown := [name for name in methods if name not in COLORS]:
        raise InputError(f"methods: expected some of {', '.join(COLORS)}, got {unknown[0]!r}")
    setting = replace(setting, **changes)
    for name in ("seeds", "epochs", "most_steps", "test_rows"):
        count = getattr(setting, name)
        if count is not None and count < 1:
            raise InputError(f"{name.replace('_', '-')}: expected at least 1, got {count}")
    if setting.trial_seeds < 0:
        raise InputError(f"trial-seeds: expected at least 0, got {setting.trial_seeds}")
    if not 0 <= setting.warm < 1:
        raise InputError(f"warm: expected 0 <= share < 1, got {setting.warm}")
    if not all(0 < share < 1 for share in setting.fractions):
        raise InputError(f"fractions: expected 0 < fraction < 1, got {args.fractions}")

    splits = (("train", None), ("test", setting.test_rows))
    used = [load_images(args.data, name, limit) for name, limit in splits]
    check_network(setting.network, 1, used[0])
    train_all, test = (
        Rows(images.images.to(device), merge_labels(images.labels, 2).to(device)) for images in used
    )
    pairs_of = {m: setting.svm if m == "geometric-svm" else setting.plain for m in methods}
    trials = {m: setting.trial_seeds if len(pairs_of[m]) > 1 else 0 for m in methods}
    for share in setting.fractions if any(trials.values()) else ():
        if len(split(train_all, share, args.seed, setting)[1].y) == 0:
            raise InputError(
                "fractions: expected some training images outside, to judge the candidates by, got "
                f"none with {share:g} of {len(train_all.y)}"
            )
    settings = {
        **asdict(setting),
        "data": images_digest(*used),
        "seed": args.seed,
        "methods": methods,
    }
    units = len(setting.fractions) * sum(
        len(pairs_of[m]) * trials[m] + setting.seeds for m in methods
    )
    run = Run(args.out, "figure2", settings, units, args.resume)

    def one(name: str, method: str, share: float, seed: int, pair: Any, judge: str) -> float:
        def compute() -> dict[str, Any]:
            data, validation = split(train_all, share, seed, setting)
            network = train(method, data, seed, pair[0], pair[1], setting)
            return {"accuracy": accuracy(network, validation if judge == "validation" else test)}

        return run.unit(f"{name}-{method}-{share:g}-{pair[0]:g}-{pair[1]:g}-{seed}", compute)[
            "accuracy"
        ]

    tuning: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    gains: list[dict[str, Any]] = []
    for share in setting.fractions:
        results = {}
        for method in methods:
            pairs = pairs_of[method]
            score = dict.fromkeys(pairs, 0.0)
            for pair in pairs:
                found = [
                    one("trial", method, share, TRIAL_SEED + args.seed + k, pair, "validation")
                    for k in range(trials[method])
                ]
                if found:
                    score[pair] = math.fsum(found) / len(found)
                    tuning.append(
                        {
                            "fraction": share,
                            "method": method,
                            "learning_rate": pair[0],
                            "lambda": float(pair[1]),
                            "validation_accuracy": score[pair],
                        }
                    )
            pair = max(score, key=score.__getitem__)
            values = [
                one("run", method, share, args.seed + k, pair, "test") for k in range(setting.seeds)
            ]
            results[method] = values
            for k, value in enumerate(values):
                runs.append(
                    {"fraction": share, "method": method, "seed": k, "test_accuracy": value}
                )
            mean, half = interval(values)
            table.append(
                {
                    "fraction": share,
                    "rows": len(fraction(train_all.y.cpu(), share, args.seed)),
                    "method": method,
                    "learning_rate": pair[0],
                    "lambda": float(pair[1]),
                    "seeds": setting.seeds,
                    "mean": mean,
                    "low": mean - half,
                    "high": mean + half,
                }
            )
        for other in OTHERS:
            if not {"geometric-svm", other} <= results.keys():
                continue
            both = zip(results["geometric-svm"], results[other], strict=True)
            mean, half = interval([a - b for a, b in both])
            gains.append(
                {
                    "fraction": share,
                    "rows": table[-1]["rows"],
                    "method": f"geometric-svm minus {other}",
                    "learning_rate": "",
                    "lambda": "",
                    "seeds": setting.seeds,
                    "mean": mean,
                    "low": mean - half,
                    "high": mean + half,
                }
            )
    write_table(args.out / "accuracy.csv", table + gains)
    write_table(args.out / "runs.csv", runs)
    if tuning:
        write_table(args.out / "tuning.csv", tuning)
    draw(table, gains, args.out / "accuracy.png")


def draw(table: list[dict[str, Any]], gains: list[dict[str, Any]], path: Path) -> None:
    plt = pyplot()
    panels = 2 if gains else 1
    figure, found = plt.subplots(1, panels, figsize=(5 * panels, 3.8), squeeze=False)
    axes = found[0]

    def curve(axis: Any, rows: list[dict[str, Any]], color: str, label: str, shift: float) -> None:
        if not rows:  # not among the --methods
            return
        x = [100 * row["fraction"] * shift for row in rows]
        mean = [100 * row["mean"] for row in rows]
        half = [100 * (row["high"] - row["mean"]) for row in rows]
        half = [0.0 if math.isnan(h) else h for h in half]
        axis.errorbar(x, mean, half, fmt="o-", ms=4, capsize=3, color=color, label=label, lw=1.4)

    for (method, color), shift in zip(COLORS.items(), (1, 1.04, 0.96), strict=True):
        curve(axes[0], [r for r in table if r["method"] == method], color, method, shift)
    for other, shift in zip(OTHERS, (1.02, 0.98), strict=True) if gains else ():
        name = f"geometric-svm minus {other}"
        rows = [row for row in gains if row["method"] == name]
        curve(axes[1], rows, COLORS[other], f"Eq. 11 minus {other}", shift)
    axes[0].set(title="mean and 95 % interval", ylabel="test accuracy, %")
    if gains:
        axes[1].axhline(0, color=GREY, lw=1)
        axes[1].set(title="paired differences", ylabel="percentage points")
    shares = sorted({100 * row["fraction"] for row in table})
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(shares, [f"{share:g}" for share in shares], minor=False)
        axis.minorticks_off()
        axis.set_xlabel("training images, %")
        axis.legend()
    save_picture(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    return command(work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
