"""How far test images are from the decision boundary: the histogram of the authors' response.

    python python_examples/distance_histogram.py --out DIR --quick
    python python_examples/distance_histogram.py --out DIR --data FOLDER CHECKPOINT CHECKPOINT ...

Without checkpoints two networks are trained first, on the digits or the images of --data, from
the same start and with the same batches: one by cross entropy, one by Eq. 12. They are kept in
DIR as cross-entropy.pt and robust.pt. A checkpoint is what ``levelset-ext train`` or
``save_classifier`` writes.

Every test image x of label j is projected by Newton's method (Eq. 4) to the level set 0 of the
margin f_j - max_{i != j} f_i; its distance is that between x and the point found, negative for
images that the network gets wrong. The point need not be the nearest one, so a distance is an
upper bound. Images whose projection did not converge are counted and left out.

distances.png has the histograms, distances.csv one row per image and network, summary.csv
quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _shared import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    Run,
    arguments,
    check_network,
    class_margin,
    command,
    images_digest,
    pyplot,
    quantiles,
    save_picture,
    train_classifier,
    write_table,
)
from torch import Tensor, nn

import levelset_ext as ls
from levelset_ext.data.images import Images, load_images
from levelset_ext.errors import InputError
from levelset_ext.margin import prediction
from levelset_ext.networks import build
from levelset_ext.recipes.classifiers import load_classifier, save_classifier
from levelset_ext.recipes.run_folder import network_digest

ORDERS = {"l2": 2.0, "linf": torch.inf}


@dataclass(frozen=True)
class Setting:
    network: str = "convnet-4a"
    train_rows: int = 60_000
    rows: int = 2000
    steps: int = 5000
    eps: float = 0.3
    norm: str = "linf"
    seed: int = 0


QUICK = Setting(network="convnet-2a", train_rows=1437, rows=360, steps=600, eps=0.15)


def distances(network: nn.Module, data: Images, norm: str) -> tuple[Tensor, Tensor]:
    """Signed distance of every image to the boundary of its label, and which converged."""
    signed = torch.full((len(data),), torch.nan)
    converged = torch.zeros(len(data), dtype=torch.bool)
    with torch.no_grad():
        correct = torch.cat([prediction(network(x)) for x in data.images.split(500)]) == data.labels
    for label in range(data.classes):
        rows = torch.nonzero(data.labels == label).squeeze(1)
        for some in rows.split(500):
            x = data.images[some]
            # Logits of size 1000, as large margins bring, cannot be solved to 1e-5 in float32.
            found = ls.project(class_margin(network, label), x, 0.0, 50, 1e-3)
            length = torch.linalg.vector_norm((found.points - x).flatten(1), ORDERS[norm], dim=1)
            signed[some] = torch.where(correct[some], length, -length)
            converged[some] = found.converged
    return signed, converged


def train(name: str, data: Images, setting: Setting) -> nn.Module:
    """By cross entropy; "robust" goes on from a quarter of the steps with Eq. 12 alone."""
    torch.manual_seed(setting.seed)
    channels, height, width = data.images.shape[1:]
    network = build(setting.network, data.classes, (channels, height, width))
    generator = torch.Generator().manual_seed(setting.seed)

    def loss_of(x: Tensor, y: Tensor, step: int) -> Tensor:
        share = step / setting.steps
        if name == "cross-entropy" or share < 0.25:
            return nn.functional.cross_entropy(network(x), y)
        eps = setting.eps * min(1.0, (share - 0.25) / 0.25)
        step_size = max(eps, 0.01) / 8
        samples = ls.find_boundary(
            network, x, y, eps, setting.eps, step_size, 10, generator=generator, max_iters=20
        )
        return ls.losses.robust(network, x, y, samples, eps=eps).total

    train_classifier(network, data.images, data.labels, loss_of, setting.steps, seed=setting.seed)
    return network.eval()


def draw(found: dict[str, tuple[Tensor, Tensor]], norm: str, path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    kept = {name: signed[converged] for name, (signed, converged) in found.items()}
    everything = torch.cat(list(kept.values()))
    low, high = quantiles(everything, (0.002, 0.998))
    bins = torch.linspace(low, high, 35).numpy()
    for (name, values), color in zip(kept.items(), (BLUE, ORANGE, GREEN, RED) * 9, strict=False):
        median = quantiles(values, (0.5,))[0]
        axes.hist(
            values.numpy(), bins, alpha=0.55, color=color, label=f"{name}, median {median:.3g}"
        )
        axes.axvline(median, color=color, lw=1.2)
    axes.axvline(0, color="#20242c", lw=0.8)
    axes.set_xlabel(("$L_2$" if norm == "l2" else r"$L_\infty$") + " distance to the boundary")
    axes.set(ylabel="test images")
    axes.legend()
    save_picture(figure, path)


def work(argv: Sequence[str] | None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--data", metavar="DIR", help="MNIST or CIFAR10 files (default: digits)")
    parser.add_argument("--norm", help="linf (default) or l2")
    parser.add_argument("--rows", type=int, help="test images")
    parser.add_argument("--steps", type=int, help="training steps of the two networks")
    parser.add_argument("--network", help="of the two networks, a name of networks.build")
    parser.add_argument("--eps", type=float, help="target distance of Eq. 12, in L_inf")
    args = parser.parse_args(argv)
    given = ("norm", "rows", "steps", "network", "eps")
    changes = {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    small = args.quick or args.data is None  # the digits are small enough for the small setting
    setting = replace(QUICK if small else Setting(), seed=args.seed, **changes)
    if setting.norm not in ORDERS:
        raise InputError(f"norm: expected one of {', '.join(ORDERS)}, got {setting.norm!r}")
    if setting.steps < 1:
        raise InputError(f"steps: expected at least 1, got {setting.steps}")
    if not 0 < setting.eps < math.inf:
        raise InputError(f"eps: expected a number > 0, got {setting.eps}")
    test = load_images(args.data, "test", setting.rows)
    networks: dict[str, nn.Module | None] = {}
    for file in args.checkpoints:
        name = file.parent.name or file.stem
        networks[name if name not in networks else str(file)] = load_classifier(file)
    files = dict(zip(networks, args.checkpoints, strict=False))
    used, trained_on = [test], None
    if not networks:
        check_network(setting.network, test.classes, test)
        networks = dict.fromkeys(("cross-entropy", "robust"))
        trained_on = load_images(args.data, "train", setting.train_rows)
        used.append(trained_on)
    given = [network_digest(network) for network in networks.values() if network is not None]
    settings = {**asdict(setting), "data": images_digest(*used), "checkpoints": given}
    run = Run(args.out, "distances", settings, len(networks), args.resume)

    found = {}
    for number, (name, one) in enumerate(networks.items()):

        def compute(name: str = name, network: nn.Module | None = one) -> dict[str, Any]:
            if network is None:
                assert trained_on is not None
                network = train(name, trained_on, setting)
                save_classifier(args.out / f"{name}.pt", network)
            try:
                signed, converged = distances(network, test, setting.norm)
            except ValueError as error:  # images of another size, another number of classes
                raise InputError(f"{files.get(name, name)}: {error}") from None
            return {"signed": signed, "converged": converged}

        unit = run.unit(f"{number}", compute)
        found[name] = (unit["signed"], unit["converged"])

    rows, summary = [], []
    for name, (signed, converged) in found.items():
        for index, (value, good) in enumerate(
            zip(signed.tolist(), converged.tolist(), strict=True)
        ):
            rows.append(
                {"network": name, "image": index, "distance": value, "converged": int(good)}
            )
        q = quantiles(signed[converged], (0.1, 0.25, 0.5, 0.75, 0.9))
        summary.append(
            {
                "network": name,
                "norm": setting.norm,
                "images": len(signed),
                "accuracy": float((signed > 0).float().mean()),
                "converged_share": float(converged.float().mean()),
                **dict(zip(("q10", "q25", "median", "q75", "q90"), q, strict=True)),
            }
        )
    write_table(args.out / "distances.csv", rows)
    write_table(args.out / "summary.csv", summary)
    draw(found, setting.norm, args.out / "distances.png")


def main(argv: Sequence[str] | None = None) -> int:
    return command(work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
