"""Robust accuracy against the strength of the attack: does more of it still break more?

    python python_examples/attack_strength.py --out DIR --quick                       (digits)
    python python_examples/attack_strength.py --out DIR --data FOLDER CHECKPOINT ...

A checkpoint is what ``levelset-ext train`` writes, or the folder it is in. Without one, two
networks are trained on the digits first, by cross entropy and by adversarial training (Madry).

Three sweeps of white-box PGD, on cross entropy and on the margin, each from the paper's attack
(eps 0.3, 40 steps of 0.01 on MNIST; 0.031, 20 steps of 0.003 on CIFAR10):

steps      10, 20, 40, 100, 200. Fewer steps than the paper's are longer, so that they get as far.
eps        from 0 to far beyond what anyone trains with, the steps in proportion. At the largest a
           ball holds images that are no class any more, or all of them: a network that still stands
           there hides its gradients and is not robust. No accuracy may rise with eps either.
restarts   1, 2, 5, 10 random starts

and at every eps the local linearity gamma(eps, x) of the cross entropy, the largest of
|l(x + d) - l(x) - d . grad l(x)| in the ball, over all rows: where it is large, gradients lead
attacks astray.

strength.csv, .png   one row per network, sweep and value; accuracies in percent of all rows
summary.csv          what there is to worry about: the accuracy at the largest eps, the largest rise
                     with eps, how much 200 steps and 10 restarts still take
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _robustness import (
    BATCH,
    COLORS,
    LOSSES,
    Attack,
    Network,
    add_attack_options,
    attack_of,
    correct,
    numbers,
    percent,
    pgd_batches,
    plan,
    read_network,
    standing,
    train_network,
)
from _shared import Run, arguments, command, images_digest, pyplot, save_picture, write_table
from torch import Tensor

import levelset_ext as ls
from levelset_ext.data.images import Images, load_images
from levelset_ext.errors import InputError
from levelset_ext.recipes.devices import parse_device
from levelset_ext.recipes.progress import say
from levelset_ext.recipes.run_folder import network_digest

EPS = {
    "mnist": "0,0.05,0.1,0.15,0.2,0.25,0.3,0.35,0.4,0.45,0.5,0.6,0.8",
    "cifar10": "0,0.008,0.016,0.024,0.031,0.039,0.047,0.063,0.094,0.125,0.25,0.5",
    "digits": "0,0.05,0.1,0.15,0.2,0.25,0.3,0.4,0.5,0.6,0.8",
}
STANDS = 1.0  # percent of all rows above which something is said


@dataclass(frozen=True)
class Setting:
    rows: int = 1000
    steps: str = "10,20,40,100,200"
    restarts: str = "1,2,5,10"
    linearity_steps: int = 50
    epochs: float = 30.0
    seed: int = 0


QUICK = Setting(rows=150, steps="5,10,20,40", restarts="1,2,5", linearity_steps=20, epochs=20.0)
QUICK_EPS = "0,0.05,0.1,0.15,0.2,0.3,0.5,0.8"


def with_steps(attack: Attack, steps: int) -> Attack:
    """So many steps; where they are fewer, they are longer and get as far."""
    return replace(attack, iters=steps, step=attack.step * max(1.0, attack.iters / steps))


def with_eps(attack: Attack, eps: float) -> Attack:
    return replace(attack, eps=eps, step=attack.step * eps / attack.eps)


def both(network: Network, data: Images, attack: Attack, seed: int) -> dict[str, Tensor]:
    """Which rows stand PGD on either loss."""
    return {loss: standing(network, data, f"pgd-{loss}", attack, seed) for loss in LOSSES}


def first_restart(
    network: Network, data: Images, loss: str, attack: Attack, restarts: int, seed: int
) -> Tensor:
    """(n,) int64: the random start that breaks a row first, ``restarts`` where none does. A row
    leaves with it, so a run of ten starts also holds those of fewer."""
    runs = pgd_batches(network, data, loss, attack, seed, restarts=restarts)
    return torch.cat([torch.where(r.success, r.restart, restarts).cpu() for r in runs])


def linearity(network: Network, data: Images, eps: float, setting: Setting) -> Tensor:
    """(n,) gamma(eps, x); at eps = 0 it is 0."""
    if eps == 0:
        return torch.zeros(len(data))
    device = next(network.module.parameters()).device
    found = ls.attacks.local_linearity(
        network.module,
        data.images.to(device),
        data.labels.to(device),
        eps,
        steps=setting.linearity_steps,
        seed=setting.seed,
        batch=BATCH,
    )
    return found.gamma.cpu()


def row_of(
    network: Network, sweep: str, value: float, stands: dict[str, Tensor], gamma: Tensor | None
) -> dict[str, Any]:
    accuracies = {loss: percent(stands[loss]) for loss in LOSSES}
    row: dict[str, Any] = {"network": network.name, "sweep": sweep, "value": value, **accuracies}
    row["worst"] = percent(stands["xent"] & stands["margin"])
    for name in ("mean", "median", "max"):
        row[f"gamma_{name}"] = "" if gamma is None else float(getattr(gamma, name)())
    return row


def rows_of(
    run: Run, number: int, network: Network, data: Images, attack: Attack, setting: Setting,
    eps_values: Sequence[float],
) -> list[dict[str, Any]]:  # fmt: skip
    rows = []
    for steps in numbers("steps", setting.steps, int, 1, 100_000):

        def with_so_many(steps: int = steps) -> dict[str, Any]:
            return both(network, data, with_steps(attack, steps), setting.seed)

        found = run.unit(f"{number}-steps-{steps}", with_so_many)
        rows.append(row_of(network, "steps", steps, found, None))
    for eps in eps_values:

        def at_eps(eps: float = eps) -> dict[str, Any]:
            stands = both(network, data, with_eps(attack, eps), setting.seed)
            return {**stands, "gamma": linearity(network, data, eps, setting)}

        found = run.unit(f"{number}-eps-{eps:g}", at_eps)
        rows.append(row_of(network, "eps", eps, found, found["gamma"]))
    counts = numbers("restarts", setting.restarts, int, 1, 10_000)

    def restarted() -> dict[str, Any]:
        first = {
            loss: first_restart(network, data, loss, attack, counts[-1], setting.seed)
            for loss in LOSSES
        }
        return {"correct": correct(network, data.images, data.labels), **first}

    found = run.unit(f"{number}-restarts", restarted)
    for count in counts:
        stands = {loss: found["correct"] & (found[loss] >= count) for loss in LOSSES}
        rows.append(row_of(network, "restarts", count, stands, None))
    return rows


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one network: where its curves do what those of a robust network do not."""
    curves = {
        sweep: [row["worst"] for row in rows if row["sweep"] == sweep]
        for sweep in ("steps", "eps", "restarts")
    }
    by_eps = [row for row in rows if row["sweep"] == "eps"]
    # Each curve is to fall for itself: the worst case of both hides a rise of one.
    rises = [max([0.0, *(b[loss] - a[loss] for a, b in pairwise(by_eps))]) for loss in LOSSES]
    return {
        "network": rows[0]["network"],
        "largest_eps": by_eps[-1]["value"],
        "at_largest_eps": curves["eps"][-1],
        "rise_xent": rises[0],
        "rise_margin": rises[1],
        "most_steps_take": curves["steps"][0] - curves["steps"][-1],
        "most_restarts_take": curves["restarts"][0] - curves["restarts"][-1],
    }


def warn(summary: dict[str, Any]) -> None:
    name = summary["network"]
    if summary["at_largest_eps"] > STANDS:
        say(
            f"alarm: {name}: {summary['at_largest_eps']:.1f} % stand eps "
            f"{summary['largest_eps']:g}, where nothing can: its gradients are masked"
        )
    for loss in LOSSES:
        rise = summary[f"rise_{loss}"]
        if rise > STANDS:
            say(
                f"alarm: {name}: accuracy under PGD on {loss} rises by {rise:.1f} points from one "
                "eps to a larger one: the attack gets lost"
            )


def draw(rows: list[dict[str, Any]], attack: Attack, path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(8.4, 6.3))
    names = list(dict.fromkeys(row["network"] for row in rows))
    titles = {"steps": "steps of PGD", "eps": r"$\epsilon$", "restarts": "random starts"}
    for panel, (sweep, title) in zip(axes.flat[:3], titles.items(), strict=True):
        for name, color in zip(names, COLORS * 9, strict=False):
            own = [row for row in rows if row["network"] == name and row["sweep"] == sweep]
            x = [row["value"] for row in own]
            panel.plot(x, [row["worst"] for row in own], "o-", ms=3, color=color, label=name)
            # Drawn over the others, where the curves coincide it is still seen to be there.
            panel.plot(x, [row["xent"] for row in own], ":", lw=1.8, color=color)
        if sweep != "eps":
            ticks = sorted({row["value"] for row in rows if row["sweep"] == sweep})
            panel.set_xscale("log")
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.minorticks_off()
        panel.set(xlabel=title, ylabel="robust accuracy, %", ylim=(-3, 103))
    axes[0, 0].plot([], [], "o-", ms=3, color="#20242c", label="PGD, worst of both losses")
    axes[0, 0].plot([], [], ":", lw=1.8, color="#20242c", label="PGD on cross entropy alone")
    line = {"color": "#20242c", "lw": 0.8, "ls": "--"}
    axes[0, 0].plot([], [], **line, label=rf"$\epsilon$ = {attack.eps:g}, that of the other sweeps")
    axes[0, 1].axvline(attack.eps, **line)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, fontsize=8)
    panel = axes[1, 1]
    for name, color in zip(names, COLORS * 9, strict=False):
        own = [
            row
            for row in rows
            if row["network"] == name and row["sweep"] == "eps" and row["gamma_mean"] > 0
        ]
        x = [row["value"] for row in own]
        panel.plot(x, [row["gamma_mean"] for row in own], "o-", ms=3, color=color)
        panel.plot(x, [row["gamma_median"] for row in own], ":", lw=1.5, color=color)
    panel.axvline(attack.eps, **line)
    panel.set_yscale("log")
    panel.set(xlabel=r"$\epsilon$", ylabel=r"$\gamma(\epsilon, x)$: mean, median dotted")
    save_picture(figure, path)


def work(argv: Sequence[str] | None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--data", metavar="DIR", help="MNIST or CIFAR10 files (default: digits)")
    parser.add_argument("--rows", type=int, help="test images")
    parser.add_argument("--steps-list", metavar="N,N", help="steps to try")
    parser.add_argument("--eps-list", metavar="E,E", help="radii to try")
    parser.add_argument("--restarts-list", metavar="N,N", help="numbers of random starts to try")
    parser.add_argument("--epochs", type=float, help="of the two networks, without checkpoints")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    add_attack_options(parser)
    args = parser.parse_args(argv)
    device = parse_device(args.device)
    given = {
        "rows": args.rows,
        "steps": args.steps_list,
        "restarts": args.restarts_list,
        "epochs": args.epochs,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    setting = replace(QUICK if args.quick else Setting(), seed=args.seed, **changes)
    if args.data is not None and not args.checkpoints:
        raise InputError("checkpoints: expected one or more with --data, got none")
    test = load_images(args.data, "test", setting.rows)
    attack = attack_of(test, args, 10 if args.quick else None)
    texts = args.eps_list or (QUICK_EPS if args.quick and test.name == "digits" else EPS[test.name])
    eps_values = numbers("eps-list", texts, float, 0, 1)
    counts = numbers("restarts-list", setting.restarts, int, 1, 10_000)
    step_counts = numbers("steps-list", setting.steps, int, 1, 100_000)
    setting = replace(
        setting, steps=",".join(map(str, step_counts)), restarts=",".join(map(str, counts))
    )

    networks = [read_network(_name(file), file, device) for file in args.checkpoints]
    _tell_apart(networks)
    settings = {
        **asdict(setting),
        "attack": asdict(attack),
        "eps_values": eps_values,
        "data": images_digest(test),
        "networks": [network_digest(network.module) for network in networks],
    }
    count = len(networks) or 2
    units = count * (len(step_counts) + len(eps_values) + 1)
    run = Run(args.out, "strength", settings, units, args.resume)
    if not networks:
        data = load_images(None, "train")
        for objective, own in (
            ("cross-entropy", {}),
            ("madry", {"eps": attack.eps, "iters": 5, "step": attack.eps / 3, "warmup": 0.3}),
        ):
            config = plan(objective, data, "fast", own, epochs=setting.epochs, seed=setting.seed)
            folder = args.out / "train" / objective
            networks.append(
                train_network(objective, data, test, folder, config, device, args.resume)
            )

    rows, summaries = [], []
    for number, network in enumerate(networks):
        own_rows = rows_of(run, number, network, test, attack, setting, eps_values)
        rows += own_rows
        summaries.append(summary_of(own_rows))
    write_table(args.out / "strength.csv", rows)
    write_table(args.out / "summary.csv", summaries)
    draw(rows, attack, args.out / "strength.png")
    for summary in summaries:
        warn(summary)


def _name(file: Path) -> str:
    return (file if file.is_dir() else file.parent).resolve().name or file.stem


def _tell_apart(networks: list[Network]) -> None:
    """Networks of folders with the same name get numbers."""
    names = [network.name for network in networks]
    for index, network in enumerate(networks):
        if names.count(network.name) > 1:
            networks[index] = replace(network, name=f"{network.name} {index + 1}")


def main(argv: Sequence[str] | None = None) -> int:
    return command(work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
