"""Table 1 and Tables A3 and A4: robust accuracy of networks trained in several ways.

    python python_examples/table1_robustness.py --out DIR --quick                  (digits)
    python python_examples/table1_robustness.py --out DIR --data MNIST_FOLDER
    ... --data FOLDER --preset paper --device cuda                   (the paper's setting)
    ... --methods none --checkpoint ours=RUN --checkpoint madry=RUN  (networks that are there)

Methods, each trained as ``levelset-ext train`` does and kept in DIR/train: standard (cross
entropy), madry, trades, mma, llr, large-margin, ours (Eq. 12). --trades-betas 1,3,6 trains TRADES
with each of these weights in place of the preset's. --set METHOD.NAME=VALUE changes any setting of
a training, also batch, lr and epochs. The large-margin loss gets the norm and the distance that it
is judged by here, L_inf and eps. On the digits, which are attacked with eps 0.15, madry, trades and
llr train for 0.15 as well, mma for up to 0.2, and ours for 0.2 with the preset fast (paper: 0.4,
0.5 for wrong examples). The results page has a row for each with the box, the learning rate and
the average of weights of ours.

Every network is attacked by PGD on cross entropy and on the margin (MNIST: eps 0.3, 40 steps of
0.01; CIFAR10: 0.031, 20 steps of 0.003), with its own gradients and with those of every other
network (black box); by the multi-targeted attack; with --autoattack by AutoAttack. Figures of PGD
are means over --repeats runs with different random starts (the paper: 10).

table1.md, .csv        one row per network; the published figures beside them in the Markdown
transfer.csv           black box: one row per loss, attacked network and source
table1.json            all of it, with the settings
robustness.png         the columns as bars; clean against worst-case accuracy
transfer.png           black box, all against all

White box, a row is broken as soon as one iterate is misclassified; black box, by the last iterate.
"worst" are the rows that stand everything in the tables. Minutes are those of the training alone,
on whatever it ran on; compare those of one machine only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _robustness import (
    COLORS,
    LOSSES,
    Attack,
    Network,
    add_attack_options,
    attack_of,
    correct,
    examples,
    numbers,
    percent,
    plan,
    read_network,
    standing,
    train_network,
)
from _shared import Run, arguments, command, images_digest, pyplot, save_picture, write_table
from torch import Tensor

from levelset_ext.attacks.autoattack import load_autoattack
from levelset_ext.data.images import Images, load_images
from levelset_ext.errors import InputError
from levelset_ext.recipes.devices import parse_device
from levelset_ext.recipes.files import write_json
from levelset_ext.recipes.progress import say
from levelset_ext.recipes.run_folder import network_digest
from levelset_ext.recipes.settings import parse_settings
from levelset_ext.recipes.training import TrainConfig, plain_config
from levelset_ext.whole_files import write_whole

METHODS = {
    "standard": "cross-entropy",
    "madry": "madry",
    "trades": "trades",
    "mma": "mma",
    "llr": "llr",
    "large-margin": "large-margin",
    "ours": "robust",
}
# Of the digits the presets know little; 0.15 is the ball of the attack.
DIGITS: dict[str, dict[str, Any]] = {
    "madry": {"eps": 0.15, "step": 0.03, "warmup": 0.3},
    "trades": {"eps": 0.15, "step": 0.03, "warmup": 0.3},
    "mma": {"eps_max": 0.2, "step": 0.02},
    "llr": {"eps": 0.15, "steps": 5, "step": 0.05, "warmup": 0.3},
}
QUICK: dict[str, dict[str, Any]] = {
    "madry": {"iters": 5, "step": 0.05},
    "trades": {"iters": 5, "step": 0.05},
    "mma": {"iters": 8, "step": 0.025},
}

# --- published -------------------------------------------------------------------------------

# Table 1, percent: clean, PGD on cross entropy, PGD on the margin. Named by the paper; the number
# is the eps of the training.
PUBLISHED: dict[tuple[str, str], dict[str, tuple[float, float, float]]] = {
    ("mnist", "convnet-4a"): {
        "Standard": (99.34, 13.59, 0.00),
        "Madry (0.3)": (99.35, 96.04, 96.11),
        "Madry (0.4)": (99.16, 96.54, 96.53),
        "TRADES (0.3)": (98.97, 96.75, 96.74),
        "TRADES (0.4)": (98.62, 96.78, 96.76),
        "Ours (0.4)": (99.35, 99.23, 97.35),
    },
    ("cifar10", "convnet-4b"): {
        "Standard": (83.67, 0.0, 0.0),
        "Madry (0.031)": (71.86, 39.84, 38.18),
        "Madry (0.045)": (63.66, 41.53, 39.13),
        "TRADES (0.031)": (71.24, 41.89, 38.40),
        "TRADES (0.045)": (68.24, 42.04, 38.18),
        "Ours (0.045)": (71.96, 38.45, 38.54),
    },
    ("cifar10", "resnet-18"): {
        "Standard": (93.18, 0.0, 0.0),
        "Madry (0.031)": (81.0, 47.29, 46.58),
        "Madry (0.045)": (74.97, 49.84, 48.02),
        "TRADES (0.031)": (83.04, 53.31, 51.36),
        "TRADES (0.045)": (79.52, 53.49, 51.22),
        "Ours (0.045)": (81.3, 79.74, 43.17),
    },
}
# Tables A3 and A4, percent: loss -> attacked -> by source, in the order of SOURCES. Their diagonal
# is white box.
SOURCES = ("Standard", "Madry", "Trades", "Ours")
Matrix = dict[str, dict[str, tuple[float, float, float, float]]]
PUBLISHED_TRANSFER: dict[tuple[str, str], Matrix] = {
    ("mnist", "convnet-4a"): {
        "xent": {
            "Madry": (98.96, 96.04, 97.76, 99.21),
            "Trades": (98.57, 97.46, 96.78, 98.87),
            "Ours": (99.04, 97.78, 97.95, 99.23),
        },
        "margin": {
            "Madry": (98.95, 96.11, 97.81, 98.78),
            "Trades": (98.56, 97.5, 96.74, 98.46),
            "Ours": (99.04, 97.87, 97.99, 97.35),
        },
    },
    ("cifar10", "convnet-4b"): {
        "xent": {
            "Madry": (61.5, 41.53, 49.76, 50.97),
            "Trades": (67.84, 54.72, 41.89, 53.11),
            "Ours": (68.43, 56.71, 54.47, 38.45),
        },
        "margin": {
            "Madry": (61.46, 39.13, 39.14, 51.08),
            "Trades": (67.58, 53.15, 38.25, 53.1),
            "Ours": (68.42, 55.85, 54.04, 38.54),
        },
    },
}
# Public evaluations of the released networks by AutoAttack.
PUBLISHED_AUTOATTACK = {
    ("mnist", "convnet-4a"): "the paper's 90.85, Madry 88.50, MMA 91.40, TRADES 92.81, Gowal et "
    "al. 96.34 (eps 0.3, released networks)",
    ("cifar10", "resnet-18"): "the paper's 40.22 (eps 0.031, released network)",
}
_PUBLISHED_NAMES = {"standard": "Standard", "madry": "Madry", "trades": "TRADES", "ours": "Ours"}


def kind_of(network: Network, data: Images) -> tuple[str, str]:
    return data.name, getattr(network.module, "config", {}).get("network", "")


def published_row(network: Network, data: Images) -> str:
    """The row of Table 1 that a network is an attempt at, as text: of the same architecture and
    the smaller eps, trained for the ball of the attack. TRADES with another weight is none."""
    known = PUBLISHED.get(kind_of(network, data), {})
    start = _PUBLISHED_NAMES.get(network.name)
    for name, values in known.items():
        if start is not None and name.startswith(start):
            return " / ".join(_text(value) for value in values) + f" ({name})"
    return ""


# --- what to attack --------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    preset: str = "fast"
    rows: int | None = 1000
    every: int = 1
    repeats: int = 1
    multi_targeted: bool = True
    autoattack: bool = False
    seed: int = 0


def plans(data: Images, setting: Setting, args: Any, attack: Attack) -> dict[str, TrainConfig]:
    """What to train, by the name of the network."""
    wanted = [name.strip() for name in args.methods.split(",") if name.strip()]
    if wanted == ["none"]:
        wanted = []
    unknown = [name for name in wanted if name not in METHODS]
    if unknown:
        raise InputError(f"methods: expected some of {', '.join(METHODS)}, got {unknown[0]!r}")
    changes: dict[str, dict[str, Any]] = {name: {} for name in METHODS}
    for key, value in parse_settings(args.set).items():
        method, dot, name = key.partition(".")
        method = method.replace("_", "-")
        if method not in METHODS or not dot:
            raise InputError(f"set: expected METHOD.NAME=VALUE with a method, got {key!r}")
        changes[method][name] = value
    betas = (
        []
        if args.trades_betas is None
        else numbers("trades-betas", args.trades_betas, float, 0, 1e6)
    )
    if betas and "trades" not in wanted:
        raise InputError("trades-betas: expected trades among the methods")
    found: dict[str, TrainConfig] = {}
    for method in dict.fromkeys(wanted):
        own: dict[str, Any] = {}
        if method == "large-margin":
            own = {"norm": "linf", "gamma": attack.eps}
        if data.name == "digits":
            own |= DIGITS.get(method, {})
        if args.quick:
            own |= QUICK.get(method, {})
        own |= changes[method]
        versions = [(method, own)]
        if method == "trades" and betas:
            versions = [(f"trades-{beta:g}", {**own, "beta": beta}) for beta in betas]
        for name, settings in versions:
            found[name] = plan(
                METHODS[method],
                data,
                setting.preset,
                settings,
                network=args.network,
                seed=setting.seed,
                epochs=args.epochs if "epochs" not in settings else None,
            )
    return found


def given_networks(pairs: Sequence[str], taken: Sequence[str], device: Any) -> list[Network]:
    found: dict[str, Network] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise InputError(
                f"checkpoint: expected NAME=PATH with letters, digits, . _ and - in the name, got "
                f"{pair!r}"
            )
        if name in found or name in taken:
            raise InputError(f"checkpoint: expected every network once, got {name!r} twice")
        found[name] = read_network(name, Path(path), device)
    return list(found.values())


# --- attacks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """Which of the rows stand what: all tensors (..., n) bool over the n rows.

    Attributes:
        clean: by network.
        white: by (network, loss), (repeats, n).
        black: by (loss, source, target), source and target differ, (repeats, n).
        strong: by (network, attack), for "multi-targeted" and "autoattack".
    """

    clean: dict[str, Tensor]
    white: dict[tuple[str, str], Tensor]
    black: dict[tuple[str, str, str], Tensor]
    strong: dict[tuple[str, str], Tensor]

    def worst(self, name: str) -> Tensor:
        """(n,) rows of a network that stand everything."""
        parts = [self.clean[name][None]]
        parts += [stands for (own, _), stands in self.white.items() if own == name]
        parts += [stands for (_, _, target), stands in self.black.items() if target == name]
        parts += [stands[None] for (own, _), stands in self.strong.items() if own == name]
        return torch.cat(parts).all(0)


def strong_attacks(setting: Setting) -> list[str]:
    names = ["multi-targeted"] if setting.multi_targeted else []
    return names + (["autoattack"] if setting.autoattack else [])


def count_units(networks: int, setting: Setting) -> int:
    return networks * (1 + len(LOSSES) * setting.repeats + len(strong_attacks(setting)))


def attack_all(
    run: Run, networks: Sequence[Network], data: Images, attack: Attack, setting: Setting
) -> Results:
    """All attacks, one unit for every network that is looked at and every random start."""
    found = Results({}, {}, {}, {})
    for network in networks:

        def clean(network: Network = network) -> dict[str, Any]:
            return {"stands": correct(network, data.images, data.labels)}

        found.clean[network.name] = run.unit(f"{network.name}-clean", clean)["stands"]
    for source in networks:
        for loss in LOSSES:
            units = []
            for repeat in range(setting.repeats):
                seed = setting.seed + repeat

                def pgd(source: Network = source, loss: str = loss, seed: int = seed) -> Any:
                    stands = {"white": standing(source, data, f"pgd-{loss}", attack, seed)}
                    others = [other for other in networks if other is not source]
                    if others:
                        made = examples(source, data, loss, attack, seed)
                    for other in others:
                        right = correct(other, made, data.labels)
                        stands[f"on-{other.name}"] = right & found.clean[other.name]
                    return stands

                units.append(run.unit(f"{source.name}-{loss}-{repeat}", pgd))
            found.white[source.name, loss] = torch.stack([unit["white"] for unit in units])
            for target in networks:
                if target is not source:
                    found.black[loss, source.name, target.name] = torch.stack(
                        [unit[f"on-{target.name}"] for unit in units]
                    )
        for kind in strong_attacks(setting):

            def strong(source: Network = source, kind: str = kind) -> dict[str, Any]:
                return {"stands": standing(source, data, kind, attack, setting.seed)}

            found.strong[source.name, kind] = run.unit(f"{source.name}-{kind}", strong)["stands"]
    return found


# --- tables ----------------------------------------------------------------------------------


def spread(stands: Tensor) -> float:
    """Standard deviation of the accuracy over the repeats, in percent; NaN of one repeat."""
    shares = 100 * stands.double().mean(1)
    return float(shares.std()) if len(shares) > 1 else float("nan")


def table_rows(networks: Sequence[Network], results: Results) -> list[dict[str, Any]]:
    rows = []
    for network in networks:
        name = network.name
        row: dict[str, Any] = {
            "network": name,
            "objective": network.objective,
            "clean": percent(results.clean[name]),
        }
        for loss in LOSSES:
            row[loss] = percent(results.white[name, loss])
            row[f"{loss}_std"] = spread(results.white[name, loss])
        for kind in ("multi-targeted", "autoattack"):
            stands = results.strong.get((name, kind))
            row[kind.replace("-", "_")] = float("nan") if stands is None else percent(stands)
        # Of every source the mean over its repeats; the lowest of them.
        black = [
            percent(stands) for (_, _, target), stands in results.black.items() if target == name
        ]
        row["black_box"] = min(black, default=float("nan"))
        row["worst"] = percent(results.worst(name))
        row["minutes"] = float("nan") if network.minutes is None else network.minutes
        row["worst_per_minute"] = row["worst"] / row["minutes"] if network.minutes else float("nan")
        rows.append(row)
    return rows


def transfer_rows(networks: Sequence[Network], results: Results) -> list[dict[str, Any]]:
    rows = []
    for loss in LOSSES:
        for target in networks:
            for source in networks:
                same = source is target
                stands = (
                    results.white[target.name, loss]
                    if same
                    else results.black[loss, source.name, target.name]
                )
                rows.append(
                    {
                        "loss": loss,
                        "attacked": target.name,
                        "source": source.name,
                        "box": "white" if same else "black",
                        "accuracy": percent(stands),
                        "std": spread(stands),
                    }
                )
    return rows


def _text(value: float, digits: int = 2) -> str:
    return "" if value != value else f"{value:.{digits}f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def report(
    networks: Sequence[Network],
    rows: Sequence[dict[str, Any]],
    transfer: Sequence[dict[str, Any]],
    data: Images,
    attack: Attack,
    setting: Setting,
) -> str:
    """The tables as Markdown, the published figures among them named as such."""
    kinds = list(dict.fromkeys(kind_of(network, data) for network in networks))
    known = any(kind in PUBLISHED for kind in kinds)
    lines = [
        f"# Robust accuracy, {data.name}, {', '.join(kind[1] for kind in kinds)}",
        "",
        f"Percent of {len(data)} test images"
        + (f", one in {data.every}" if data.every > 1 else "")
        + f". PGD: L_inf, eps {attack.eps:g}, {attack.iters} steps "
        f"of {attack.step:g}, mean of {setting.repeats} run(s) with different random starts."
        + (" What is named *published* was not measured here." if known else ""),
        "",
    ]
    columns = {
        "clean": "clean",
        "xent": "PGD Xent",
        "margin": "PGD margin",
        "multi_targeted": "multi-targeted",
        "autoattack": "AutoAttack",
        "black_box": "black box, lowest",
        "worst": "worst",
        "minutes": "training, min",
        "worst_per_minute": "worst per min",
    }
    shown = [name for name in columns if any(row[name] == row[name] for row in rows)]
    head = ["network", *(columns[name] for name in shown)]
    if known:
        head.append("*published* clean / Xent / margin")
    body = []
    for network, row in zip(networks, rows, strict=True):
        cells = [network.name]
        for name in shown:
            text = _text(row[name])
            if name in LOSSES and row[f"{name}_std"] == row[f"{name}_std"]:
                text += f" ± {row[f'{name}_std']:.2f}"
            cells.append(text)
        if known:
            cells.append(published_row(network, data))
        body.append(cells)
    lines += [
        *_markdown(head, body),
        "",
        "worst: rows that stand everything in these tables. White box, a row is broken as soon as "
        "one iterate is misclassified; black box, by the last iterate. ± is the standard deviation "
        "over the runs. Minutes are of the training alone and of one machine.",
        "",
    ]
    names = [network.name for network in networks]
    for loss in LOSSES:
        lines += [
            f"## Black box, PGD on {'cross entropy' if loss == 'xent' else 'the margin'}",
            "",
            "Rows are attacked, columns make the attack; the diagonal is white box.",
            "",
        ]
        by_pair = {
            (row["attacked"], row["source"]): row["accuracy"]
            for row in transfer
            if row["loss"] == loss
        }
        cells_of = [[name, *(_text(by_pair[name, source]) for source in names)] for name in names]
        lines += [*_markdown(["attacked", *names], cells_of), ""]
    for kind in kinds if known else []:
        lines += published_tables(kind)
    return "\n".join(lines)


def published_tables(kind: tuple[str, str]) -> list[str]:
    """What there is for a data set and an architecture."""
    lines: list[str] = []
    if kind in PUBLISHED:
        lines += [f"## Published for {kind[1]}, not measured here", "", "The paper's Table 1:", ""]
        body = [[name, *map(_text, values)] for name, values in PUBLISHED[kind].items()]
        lines += [*_markdown(["network (training eps)", "clean", "Xent", "margin"], body), ""]
    for loss, matrix in PUBLISHED_TRANSFER.get(kind, {}).items():
        lines += [f"The paper's Table {'A3' if kind[0] == 'mnist' else 'A4'}, {loss}:", ""]
        body = [[name, *map(_text, values)] for name, values in matrix.items()]
        lines += [*_markdown(["attacked", *SOURCES], body), ""]
    if kind in PUBLISHED_AUTOATTACK:
        lines += [f"Public AutoAttack figures: {PUBLISHED_AUTOATTACK[kind]}.", ""]
    return lines


# --- pictures --------------------------------------------------------------------------------

_SHORT = {
    "clean": "clean",
    "xent": "PGD Xent",
    "margin": "PGD margin",
    "multi_targeted": "multi-targeted",
    "autoattack": "AutoAttack",
    "worst": "worst",
}


def draw_bars(rows: Sequence[dict[str, Any]], path: Path) -> None:
    plt = pyplot()
    figure, (bars, scatter) = plt.subplots(
        1, 2, figsize=(4.6 + 0.75 * len(rows), 3.6), width_ratios=(1.5 + 0.3 * len(rows), 2)
    )
    shown = [name for name in _SHORT if any(row[name] == row[name] for row in rows)]
    shades = dict(zip(_SHORT, ("#c9ced6", *COLORS[:3], COLORS[5], COLORS[3]), strict=True))
    width = 0.85 / len(shown)
    for k, name in enumerate(shown):
        at = [i + (k - (len(shown) - 1) / 2) * width for i in range(len(rows))]
        bars.bar(at, [row[name] for row in rows], width, color=shades[name], label=_SHORT[name])
    names = [row["network"] for row in rows]
    bars.set_xticks(range(len(rows)), names, rotation=30, ha="right")
    bars.set(ylabel="accuracy, %", ylim=(0, 100))
    bars.grid(axis="x", visible=False)
    figure.legend(loc="outside upper center", ncols=len(shown), fontsize=8)
    for row, color in zip(rows, COLORS * 9, strict=False):
        scatter.plot(row["clean"], row["worst"], "o", color=color, label=row["network"])
    sweep = [row for row in rows if row["network"].startswith("trades-")]
    if len(sweep) > 1:  # the trade-off that the weight makes
        scatter.plot(
            [row["clean"] for row in sweep], [row["worst"] for row in sweep], "-", color="#8a8f98",
            lw=1, zorder=0,
        )  # fmt: skip
    scatter.set(xlabel="clean accuracy, %", ylabel="worst-case accuracy, %")
    scatter.legend(fontsize=7.5)
    save_picture(figure, path)


def draw_transfer(
    networks: Sequence[Network], transfer: Sequence[dict[str, Any]], path: Path
) -> None:
    plt = pyplot()
    n = len(networks)
    size = 1.6 + 0.55 * max(n, 2)
    # "compressed", as panels of squares do not fill what the usual layout gives them.
    figure, axes = plt.subplots(1, 2, figsize=(2 * size + 0.6, size), layout="compressed")
    names = [network.name for network in networks]
    for panel, loss in zip(axes, LOSSES, strict=True):
        values = torch.tensor([row["accuracy"] for row in transfer if row["loss"] == loss])
        values = values.reshape(n, n)
        image = panel.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=100)
        for i in range(n):
            for j in range(n):
                color = "white" if values[i, j] < 55 else "black"
                weight = "bold" if i == j else "normal"
                panel.text(
                    j, i, f"{values[i, j]:.1f}", ha="center", va="center", color=color,
                    fontsize=7, weight=weight,
                )  # fmt: skip
        panel.set_xticks(range(n), names, rotation=40, ha="right")
        panel.set_yticks(range(n), names)
        panel.grid(visible=False)
        title = "cross entropy" if loss == "xent" else "the margin"
        panel.set(title=f"PGD on {title}", xlabel="made on")
    axes[0].set_ylabel("attacked (accuracy, %)")
    figure.colorbar(image, ax=axes, shrink=0.8)
    save_picture(figure, path)


# --- the command line ------------------------------------------------------------------------


def work(argv: Sequence[str] | None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", metavar="DIR", help="MNIST or CIFAR10 files (default: digits)")
    parser.add_argument(
        "--methods", default=",".join(METHODS), metavar="NAMES", help="to train; none for none"
    )
    parser.add_argument(
        "--checkpoint", action="append", default=[], metavar="NAME=PATH", help="no training"
    )
    parser.add_argument("--preset", help="of the trainings: fast (default) or paper")
    parser.add_argument("--network", metavar="NAME", help="to train; by the data if left out")
    parser.add_argument("--epochs", type=float, help="of every training; the preset's if left out")
    parser.add_argument("--train-rows", type=int, metavar="N", help="training images; all")
    parser.add_argument(
        "--set", action="append", default=[], metavar="METHOD.NAME=VALUE", help="of one training"
    )
    parser.add_argument("--trades-betas", metavar="B,B", help="TRADES with each of these weights")
    parser.add_argument("--rows", type=int, help="test images: 1000, with the preset paper all")
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="K",
        help="only one in K test images, all of them if --rows is left out; of MNIST's robust "
        "networks lose more in the first half",
    )
    parser.add_argument("--repeats", type=int, help="random starts: 1, with the preset paper 10")
    parser.add_argument("--autoattack", action="store_true", help="needs pyautoattack")
    parser.add_argument(
        "--no-multi-targeted", action="store_true", help="saves nine runs of PGD per network"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    add_attack_options(parser)
    args = parser.parse_args(argv)
    device = parse_device(args.device)
    name = args.preset or "fast"
    setting = Setting(
        name,
        multi_targeted=not args.no_multi_targeted,
        autoattack=args.autoattack,
        seed=args.seed,
    )
    if name == "paper":
        setting = replace(setting, rows=None, repeats=10)
    if args.quick:
        setting = replace(setting, rows=120, repeats=2)
        args.epochs = 20.0 if args.epochs is None else args.epochs
    setting = replace(
        setting,
        rows=setting.rows if args.rows is None and args.every == 1 else args.rows,
        every=args.every,
        repeats=setting.repeats if args.repeats is None else args.repeats,
    )
    if setting.repeats < 1:
        raise InputError(f"repeats: expected at least 1, got {setting.repeats}")
    if setting.autoattack:
        try:
            load_autoattack()
        except ImportError as error:
            raise InputError(str(error)) from None
    test = load_images(args.data, "test")
    some = load_images(args.data, "test", setting.rows, setting.every)
    attack = attack_of(test, args, 10 if args.quick else None)
    nothing = args.methods.strip() in ("", "none")
    train_images = test if nothing else load_images(args.data, "train", args.train_rows)
    configs = plans(train_images, setting, args, attack)
    given = given_networks(args.checkpoint, list(configs), device)
    if not configs and not given:
        raise InputError("methods: expected a method or a checkpoint, got neither")
    for network in given:  # one that cannot be attacked shows before anything is trained
        correct(network, some.images[:1], some.labels[:1])

    chosen = asdict(setting)
    if setting.every == 1:
        del chosen["every"]  # so that folders from before there was one go on
    settings = {
        **chosen,
        "attack": asdict(attack),
        "data": images_digest(some),
        "trained": {name: plain_config(config) for name, config in configs.items()},
        "train_rows": args.train_rows,
        "given": {n.name: network_digest(n.module) for n in given},
    }
    count = len(configs) + len(given)
    run = Run(args.out, "table 1", settings, count_units(count, setting), args.resume)
    networks = [
        train_network(
            name, train_images, test, args.out / "train" / name, config, device, args.resume
        )
        for name, config in configs.items()
    ] + given
    results = attack_all(run, networks, some, attack, setting)

    rows, transfer = table_rows(networks, results), transfer_rows(networks, results)
    write_table(args.out / "table1.csv", rows)
    write_table(args.out / "transfer.csv", transfer)
    write_json(
        args.out / "table1.json", {"settings": settings, "table1": rows, "transfer": transfer}
    )
    text = report(networks, rows, transfer, some, attack, setting)
    write_whole(args.out / "table1.md", lambda stream: stream.write(text.encode()))
    say(str(args.out / "table1.md"))
    draw_bars(rows, args.out / "robustness.png")
    draw_transfer(networks, transfer, args.out / "transfer.png")


def main(argv: Sequence[str] | None = None) -> int:
    return command(work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
