"""What each part of the robust training does: one thing changed at a time, with paired seeds.

    python python_examples/robust_ablation.py --out DIR --quick
    python python_examples/robust_ablation.py --out DIR                             (digits)
    python python_examples/robust_ablation.py --out DIR --data FOLDER --epochs 2    (MNIST)

Every variant is ``levelset-ext train robust`` with the preset "fast" and the changes that VARIANTS
names, or adversarial training (Madry) with its own; on the digits both begin with the eps of the
attack, 0.15. A seed fixes the start of the network and the
order of the batches, alike for all variants, so that differences are paired. All train for the
same epochs; what that costs stands beside it.

runs.csv       every training: accuracies on the test images and CPU seconds
ablation.csv   per variant the means over the seeds, and the difference from "ours" with its 95 %
               interval (Student's t over the paired seeds)
ablation.png   those differences

PGD: on the margin, white box, as in Table 1 (digits: eps 0.15, 40 steps of 0.005); "worst" also
stands the multi-targeted attack. Accuracies in percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _robustness import (
    Attack,
    add_attack_options,
    attack_of,
    correct,
    plan,
    standing,
    train_network,
)
from _shared import (
    BLUE,
    GREY,
    Run,
    arguments,
    chosen_variants,
    command,
    images_digest,
    interval,
    pyplot,
    save_picture,
    write_ablation,
)
from table1_robustness import DIGITS
from table1_robustness import QUICK as TABLE_QUICK

from levelset_ext.data.images import Images, load_images
from levelset_ext.errors import InputError
from levelset_ext.recipes.devices import parse_device
from levelset_ext.recipes.training import TrainConfig, plain_config


class Factor(float):
    """Of a setting, where a variant has another one."""


# Name: objective, and what differs from its preset; a Factor multiplies what the preset has.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("robust", {}),
    "without Eq. 12": ("robust", {"lam_correct": 0.0, "lam_wrong": 0.0}),
    "Eq. 12 a third as strong": ("robust", {"lam_correct": Factor(1 / 3)}),
    "Eq. 12 three times as strong": ("robust", {"lam_correct": Factor(3.0)}),
    "without cross entropy at the ends": ("robust", {"ends": 0.0}),
    "distance rho": ("robust", {"distance": "rho"}),
    "steps on the margin": ("robust", {"search": "margin"}),
    "no warm starts": ("robust", {"warm_start": 0.0}),
    "one step": ("robust", {"iters": 1}),
    "four steps": ("robust", {"iters": 4}),
    "eps from the start": ("robust", {"warmup": 0.0}),
    "eps a third larger": ("robust", {"eps_correct": Factor(4 / 3)}),
    "half the learning rate": ("robust", {"lr": Factor(0.5)}),
    "no averaged weights": ("robust", {"ema": 0.0}),
    "Madry": ("madry", {}),
    "eps two thirds larger": ("robust", {"eps_correct": Factor(5 / 3)}),
    "eps a third larger, from the start": (
        "robust", {"eps_correct": Factor(4 / 3), "warmup": 0.0},
    ),
    "Madry, eps a third larger": ("madry", {"eps": Factor(4 / 3)}),
}  # fmt: skip
QUICK = ("ours", "without Eq. 12", "Madry")
MEASURES = ("clean", "pgd", "worst")
FAR = 13.0


def config_of(data: Images, name: str, seed: int, epochs: float | None, quick: bool) -> TrainConfig:
    objective, changes = VARIANTS[name]
    base = {"robust": {"eps_correct": 0.15}, **DIGITS}.get(objective, {})
    base = base if data.name == "digits" else {}  # else what the preset has
    base = {**base, **(TABLE_QUICK.get(objective, {}) if quick else {})}
    usual = plan(objective, data, "fast", base)
    known = {"lr": usual.lr, **usual.settings}
    own = {k: v * known[k] if isinstance(v, Factor) else v for k, v in changes.items()}
    return plan(objective, data, "fast", {**base, **own}, seed=seed, epochs=epochs)


def measured(
    folder: Path, data: Images, test: Images, config: TrainConfig, attack: Attack, resume: bool,
    device: Any,
) -> dict[str, Any]:  # fmt: skip
    """Trains a network and attacks it; accuracies in percent, CPU seconds."""
    network = train_network(folder.name, data, test, folder, config, device, resume)
    stands = correct(network, test.images, test.labels)
    found: dict[str, Any] = {"clean": 100 * float(stands.float().mean())}
    for name, kind in (("pgd", "pgd-margin"), ("worst", "multi-targeted")):
        stands &= standing(network, test, kind, attack, config.seed)
        found[name] = 100 * float(stands.float().mean())
    return {**found, "cpu_seconds": 60 * float(network.minutes or 0.0)}


def summary(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """A row per variant: means over the seeds, differences from the first with intervals."""
    of = {name: [run for run in runs if run["variant"] == name] for name in names}
    rows = []
    for name in names:
        row: dict[str, Any] = {"variant": name, "seeds": len(of[name])}
        row["cpu_seconds"] = interval([run["cpu_seconds"] for run in of[name]])[0]
        for measure in MEASURES:
            values = [run[measure] for run in of[name]]
            first = [run[measure] for run in of[names[0]]]
            row[measure] = interval(values)[0]
            mean, half = interval([a - b for a, b in zip(values, first, strict=True)])
            row |= {f"{measure}_difference": mean, f"{measure}_half": half}
        rows.append(row)
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The differences; one of more than FAR points behind is a number at the edge."""
    figure, axes = pyplot().subplots(1, len(MEASURES), figsize=(11, 0.32 * len(rows) + 1.2))
    for axis, measure in zip(axes, MEASURES, strict=True):
        for at, row in enumerate(rows[1:]):
            mean, half = row[f"{measure}_difference"], row[f"{measure}_half"]
            told = abs(mean) > half
            if mean < -FAR:
                axis.text(-FAR, at, f"\u25c2 {mean:.0f} \u00b1 {half:.0f}", va="center", color=BLUE)
                continue
            axis.errorbar(
                mean, at, xerr=half, fmt="o", color=BLUE if told else GREY, capsize=3, markersize=4
            )
        axis.axvline(0, color="black", linewidth=0.8)
        labels = [row["variant"] for row in rows[1:]] if measure == MEASURES[0] else []
        axis.set_yticks(range(len(rows) - 1), labels or [""] * (len(rows) - 1))
        axis.invert_yaxis()
        own = rows[0][measure]
        axis.set_xlim(left=-FAR - 0.5)
        axis.set(title=f"{measure}, ours {own:.1f} %", xlabel="points more than ours")
    save_picture(figure, path)


def work(argv: Sequence[str] | None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", metavar="DIR", help="MNIST or CIFAR10 files (default: digits)")
    parser.add_argument("--variants", metavar="A,B", help="only these, and ours")
    parser.add_argument("--seeds", type=int, help="trainings of every variant (default: 5)")
    parser.add_argument("--epochs", type=float, help="of every training; the preset's if left out")
    parser.add_argument("--rows", type=int, default=1000, help="test images")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    add_attack_options(parser)
    args = parser.parse_args(argv)
    names = chosen_variants(args.variants, VARIANTS, QUICK if args.quick else VARIANTS)
    seeds = args.seeds if args.seeds is not None else (2 if args.quick else 5)
    if seeds < 1:
        raise InputError(f"seeds: expected at least 1, got {seeds}")
    epochs = 4.0 if args.quick and args.epochs is None else args.epochs
    device = parse_device(args.device)
    data, test = load_images(args.data, "train"), load_images(args.data, "test", args.rows)
    attack = attack_of(data, args, 10 if args.quick else None)

    plans = {
        (name, seed): config_of(data, name, args.seed + seed, epochs, args.quick)
        for name in names
        for seed in range(seeds)
    }
    settings = {
        "attack": asdict(attack),
        "data": images_digest(data, test),
        "plans": {f"{name}, {seed}": plain_config(c) for (name, seed), c in plans.items()},
    }
    run = Run(args.out, "robust-ablation", settings, len(plans), args.resume)
    runs = []
    # A seed of all variants before the next, so that an early end leaves pairs.
    for name, seed in sorted(plans, key=lambda key: (key[1], names.index(key[0]))):
        config = plans[name, seed]
        unit = f"{names.index(name)}-{seed}"

        def one(config: TrainConfig = config, unit: str = unit) -> dict[str, Any]:
            folder = args.out / "train" / unit
            return measured(folder, data, test, config, attack, args.resume, device)

        found = run.unit(unit, one)
        figures = {key: found[key] for key in (*MEASURES, "cpu_seconds")}
        runs.append({"variant": name, "seed": args.seed + seed, **figures})
    write_ablation(args.out, runs, summary(runs, names), draw)


def main(argv: Sequence[str] | None = None) -> int:
    return command(work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
