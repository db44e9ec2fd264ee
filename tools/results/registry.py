"""Every result of the page: where its numbers come from and what makes them.

Commands are shell words. Before they run, ``$MNIST``, ``$CIFAR`` and ``$SCANS`` become the folders
that the runner was given, ``$OUT`` the result's own work folder, ``$WORK`` the folder of all work
folders, ``python`` and ``levelset-ext`` this interpreter and this checkout's command.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["IMAGES", "RESULTS", "ROOT", "Result", "Step", "by_name", "find"]

ROOT = Path(__file__).resolve().parents[2]
FILES = "benchmarks/results"
IMAGES = "docs/images"
DATA = ("MNIST", "CIFAR", "SCANS")  # what a command can need and the project does not ship


@dataclass(frozen=True)
class Step:
    """One command.

    command: shell words, see above.
    keep: file under $OUT that it leaves -> where in the repository it goes.
    printed: file under $OUT that takes what it prints.
    """

    command: str
    keep: Mapping[str, str] = field(default_factory=dict)
    printed: str = ""


@dataclass(frozen=True)
class Result:
    """A part of the page.

    name: for --only.
    title: heading on the page.
    paper: what of the paper, its supplementary, the authors' response or a review it answers.
    steps: the run that a CPU can do. Empty where the files were collected by hand.
    minutes: of one CPU core that they take, about.
    files: under benchmarks/results, that the page reads.
    seeds: of the run.
    full: the paper's setting, for a GPU; its files stand in benchmarks/results/full.
    full_minutes: of a GPU, a guess where nobody has run it.
    """

    name: str
    title: str
    paper: str
    files: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    minutes: float = 0.0
    seeds: str = "0"
    full: tuple[Step, ...] = ()
    full_minutes: float = 0.0

    def chosen(self, full: bool) -> tuple[Step, ...]:
        return self.full if full else self.steps

    def needs(self, full: bool = False) -> tuple[str, ...]:
        """The data that its commands take, names of DATA."""
        text = " ".join(step.command for step in self.chosen(full))
        return tuple(name for name in DATA if re.search(rf"\${name}\b", text))

    def kept(self, full: bool = False) -> Iterator[str]:
        """The files of the repository that its commands write."""
        for step in self.chosen(full):
            yield from step.keep.values()


def _example(name: str, options: str, **keep: str) -> Step:
    """A script of python_examples; FILE__csv=... names a kept file, as a dot is no identifier."""
    words = f"python python_examples/{name}.py --out $OUT {options}".strip()
    if "--resume" not in words:
        words += " --resume"
    return Step(words, {key.replace("__", "."): path for key, path in keep.items()})


def _data(name: str) -> str:
    return f"{FILES}/{name}"


def _full(name: str) -> str:
    return f"{FILES}/full/{name}"


def _image(name: str) -> str:
    return f"{IMAGES}/{name}"


_SCANS = ("fandisk", "homer", "rocker-arm", "stanford-bunny")
_OTHERS = ("trades", "mma", "llr", "large-margin", "standard")  # the presets of ours and Madry are
# made for short trainings already; these get what makes them fast, too
_SEVEN = "--methods ours,madry,trades,mma,llr,large-margin,standard"
_EQUAL_MNIST = " ".join(
    [
        "--data $MNIST --rows 500 --every 20",
        _SEVEN,
        # What ours' preset for MNIST was made for takes fifty minutes.
        "--set ours.epochs=2.5 --set ours.shift=0 --set ours.iters=2 --set ours.step=0.1",
        "--set ours.step_last=null --set ours.eps_correct=0.4 --set ours.warmup=0.4",
        "--set madry.epochs=1.18 --set trades.epochs=1.07",
        "--set mma.epochs=0.6 --set llr.epochs=0.71 --set large-margin.epochs=2.2",
        "--set standard.epochs=8",
        *(f"--set {name}.autocast=true --set {name}.ema=0.998" for name in _OTHERS),
        "--set trades.lr=0.005 --set mma.lr=0.005 --set llr.lr=0.002 --set large-margin.lr=0.005",
        *(f"--set {name}.warmup=0.4" for name in _OTHERS[:3]),
    ]
)
_EQUAL_DIGITS = " ".join(
    [
        _SEVEN,
        "--set ours.epochs=115 --set madry.epochs=85 --set trades.epochs=85 --set mma.epochs=65",
        "--set llr.epochs=95 --set large-margin.epochs=110 --set standard.epochs=600",
        # All with what ours has: a larger box than that of the attack, its rate and its average.
        "--set madry.eps=0.2 --set trades.eps=0.2 --set llr.eps=0.2",
        *(f"--set {name}.lr=0.005 --set {name}.ema=0.998 --set {name}.autocast=true"
          for name in ("madry", *_OTHERS)),
    ]
)  # fmt: skip
_EQUAL_CIFAR = " ".join(
    [
        "--data $CIFAR --rows 500 --every 20",
        _SEVEN,
        "--set ours.epochs=2 --set madry.epochs=1.95 --set trades.epochs=1.4 --set mma.epochs=1.4",
        "--set llr.epochs=1.1 --set large-margin.epochs=2.1 --set standard.epochs=4",
        # All with the box that ours has; that of MMA is larger by itself.
        *(f"--set {name}.eps=0.04" for name in ("madry", "trades", "llr")),
        *(f"--set {name}.autocast=true --set {name}.ema=0.998" for name in ("madry", *_OTHERS)),
        *(f"--set {name}.warmup=0.4" for name in ("madry", *_OTHERS[:3])),
    ]
)  # fmt: skip
_LONG = "$WORK/robust_mnist"
# The settings that ours had before it was asked what AutoAttack takes, see docs/design.md. What
# looks at a long training looks at this one.
_FIRST = (
    "--set shift=0 --set iters=2 --set step=0.1 --set step_last=null "
    "--set eps_correct=0.4 --set warmup=0.4"
)
# A search that keeps the best point it saw and begins with a long step, see there too.
_LONGER = (
    "--set warmup=0 --set iters=4 --set step=0.3 --set step_last=0.02 --set keep_best=true "
    "--set squares=2"
)


def _attack(
    run: str, attack: str, images: str, file: str, batch: int = 50, data: str = "--data $MNIST"
) -> Step:
    """An attack whose report is a result file; ``images`` are options that say on which."""
    words = f"levelset-ext attack {run}/checkpoint.pt {data} --attack {attack} {images}"
    words += f" --batch {batch} --out $OUT/{file.removesuffix('.json')} --resume"
    return Step(" ".join(words.split()), {file: _data(file)}, printed=file)


def _autoattack(
    of: str,
    networks: Sequence[str],
    limit: int,
    *,
    minutes: float,
    every: int = 1,
    attack: str = "autoattack",
    data: str = "--data $MNIST",
) -> Result:
    """AutoAttack on the networks that the result ``of`` has trained, on ``limit`` images."""
    images = f"--limit {limit}" if every == 1 else f"--limit {limit} --every {every}"
    files = tuple(f"{of}_autoattack_{name}.json" for name in networks)
    steps = tuple(
        _attack(f"$WORK/{of}/train/{name}", attack, images, file, data=data)
        for name, file in zip(networks, files, strict=True)
    )
    return Result(
        f"{of}_autoattack", "AutoAttack on them", "no counterpart in the paper", files, steps,
        minutes=minutes,
    )  # fmt: skip


def _few_images(data: str, settings: dict[str, str]) -> tuple[Step, ...]:
    """A training on few images for each name, with its settings."""
    return tuple(
        Step(
            f"python python_examples/figure2_fractions.py --out $OUT/{name} --data {data} "
            f"--network convnet-2a {options} --trial-seeds 1 --candidates 2 --warm 0.25 --resume",
            {f"{name}/accuracy.csv": _data(f"{name}.csv")},
        )
        for name, options in settings.items()
    )


_FEW_OF_CIFAR = {
    "figure2_cifar10": "--fractions 0.001,0.002,0.005,0.01 --seeds 5 --epochs 100 --most-steps 800 "
    "--test-rows 2000",
    "figure2_cifar10_02_short": "--fractions 0.02 --seeds 5 --epochs 25 --test-rows 2000",
    "figure2_cifar10_02": "--fractions 0.02 --seeds 8 --epochs 50 --test-rows 2000",
    "figure2_cifar10_05": "--fractions 0.05 --seeds 5 --epochs 50 --test-rows 2000",
    "figure2_cifar10_10_short": "--fractions 0.1 --seeds 5 --epochs 20 --test-rows 2000",
    "figure2_cifar10_10": "--fractions 0.1 --seeds 5 --epochs 50 --test-rows 2000",
}
# What cross entropy and hinge make of more learning rates than two.
_RATES = "--methods cross-entropy,hinge --rates 0.02,0.05,0.1,0.2"
_FEW_OF_MNIST = {
    "figure2_mnist": "--fractions 0.001,0.002,0.005,0.01,0.02,0.05 --seeds 5 --epochs 100 "
    "--most-steps 1900 --test-rows 2000",
    "figure2_mnist_10_short": "--fractions 0.1 --seeds 5 --epochs 100 --most-steps 1900 "
    "--test-rows 2000",
    "figure2_mnist_10": "--fractions 0.1 --seeds 3 --epochs 50 --test-rows 10000",
    "figure2_mnist_rates": f"{_RATES} --fractions 0.001,0.002,0.005,0.01,0.02,0.05 --seeds 5 "
    "--epochs 100 --most-steps 1900 --test-rows 2000",
    "figure2_mnist_10_rates": f"{_RATES} --fractions 0.1 --seeds 3 --epochs 50 --test-rows 10000",
}
_LONG_RUNS = ("ours", "first", "longer", "madry")
_MULTI_TARGETED = {name: f"multi_targeted_{name}.json" for name in _LONG_RUNS}
# Of the standard training nothing is left before AutoAttack's turn comes.
_ATTACKED = ("ours", "madry", "trades", "mma", "llr", "large-margin")
_STRONGLY_ATTACKED = ("ours", "longer", "madry")
_BENCH = ("newton", "false-position", "train-step", "nearest", "ops")

RESULTS: tuple[Result, ...] = (
    # --- surfaces and curves ---------------------------------------------------------------
    Result(
        "reconstruct_fast",
        "Four raw scans, the whole preset",
        "Table 2, Figure 3 (surfaces)",
        ("reconstruct_fast.json",),
        (
            Step(
                "python benchmarks/reconstruct_scans.py $SCANS --preset fast --work $OUT "
                "--json $OUT/reconstruct_fast.json",
                {"reconstruct_fast.json": _data("reconstruct_fast.json")},
            ),
        ),
        minutes=30,
        full=(
            Step(
                "python benchmarks/reconstruct_scans.py $SCANS --preset paper --device cuda "
                "--work $OUT --json $OUT/reconstruct_paper.json",
                {"reconstruct_paper.json": _full("reconstruct_paper.json")},
            ),
        ),
        full_minutes=600,
    ),
    Result(
        "surface_table",
        "Against other methods, in the same time",
        "Table 2 (AtlasNet), with IGR and screened Poisson",
        ("surface_table.json",),
        (
            _example(
                "surface_table",
                "$SCANS --seconds 90",
                surface_table__json=_data("surface_table.json"),
                surface_table__png=_image("surface_table.png"),
            ),
        ),
        minutes=40,
        full=(
            _example(
                "surface_table",
                "$SCANS --seconds 900",
                surface_table__json=_full("surface_table.json"),
            ),
        ),
        full_minutes=400,
    ),
    Result(
        "close_ups",
        "Thin parts and creases from near",
        "no counterpart in the paper",
        ("close_ups.json",),
        (
            _example(
                "close_ups",
                "$SCANS --runs $WORK/reconstruct_fast",
                close_ups__json=_data("close_ups.json"),
                close_ups__png=_image("close_ups.png"),
            ),
        ),
        minutes=4,
    ),
    Result(
        "surface_ablation",
        "What each part of surface reconstruction does",
        "no counterpart",
        ("surface_ablation.csv",),
        (
            _example(
                "surface_ablation",
                "$SCANS --scans homer --steps 1000 --variants 'no waves,Adam,distance to points,"
                "p = 1,flat rows count,lambda 1 throughout'",
                ablation__csv=_data("surface_ablation.csv"),
                ablation__png=_image("surface_ablation.png"),
            ),
        ),
        minutes=20,
        seeds="0 to 2",
    ),
    Result(
        "surface_trials",
        "Trials on the way to the recipe",
        "no counterpart",
        ("surface_trials.json",),
    ),
    Result(
        "figure_a2",
        "Is F a distance?",
        "Figure A2",
        ("figure_a2_bands.csv", "figure_a2_spacing.csv", "figure_a2.json"),
        (
            _example(
                "figure_a2_levels",
                "--run $WORK/surface_table/runs/homer --scan $SCANS/homer.ply "
                "--truth $SCANS/truth/homer.ply",
                figure_a2_bands__csv=_data("figure_a2_bands.csv"),
                figure_a2_spacing__csv=_data("figure_a2_spacing.csv"),
                figure_a2__json=_data("figure_a2.json"),
                figure_a2_levels__png=_image("figure_a2_levels.png"),
            ),
        ),
        minutes=2,
    ),
    Result(
        "curves",
        "Ten curves",
        "Figure 3 (f, g), supplementary 2.4",
        ("curve_fast.json",),
        (
            Step(
                "python benchmarks/curve_accuracy.py --out $OUT/curve_fast.json",
                {"curve_fast.json": _data("curve_fast.json")},
            ),
        ),
        minutes=5,
        seeds="0 to 9",
    ),
    Result(
        "figure3",
        "The three clouds of Figure 3",
        "Figure 3 (f, g)",
        ("figure3_curves.csv",),
        (
            _example(
                "figure3_curves",
                "--seed 2",
                curves__csv=_data("figure3_curves.csv"),
                curves__png=_image("figure3_curves.png"),
            ),
        ),
        minutes=2,
        seeds="2",
    ),
    # --- robustness ------------------------------------------------------------------------
    Result(
        "robust_mnist",
        "MNIST, 51 minutes of one core each",
        "Table 1 (MNIST)",
        ("robust_mnist.json",),
        (
            Step("levelset-ext train robust --data $MNIST --out $OUT/ours --resume"),
            Step(
                "levelset-ext train robust --data $MNIST --out $OUT/first --epochs 30 "
                f"{_FIRST} --resume"
            ),
            Step(
                "levelset-ext train robust --data $MNIST --out $OUT/longer --init "
                f"$OUT/ours/checkpoint.pt --epochs 34 --lr 3e-3 {_LONGER} --resume"
            ),
            Step("levelset-ext train madry --data $MNIST --out $OUT/madry --resume"),
            *(
                Step(
                    f"levelset-ext attack $OUT/{name}/checkpoint.pt --data $MNIST {options} "
                    f"--attack {attack} --out $OUT/{name}-{short} --resume"
                )
                for attack, short, options, names in (
                    ("pgd-margin,pgd-xent", "pgd", "--every 5 --batch 250", _LONG_RUNS),
                    ("autoattack", "autoattack", "--every 10 --batch 125", _STRONGLY_ATTACKED),
                )
                for name in names
            ),
            Step(
                f"python benchmarks/collect_robust.py $OUT {' '.join(_LONG_RUNS)} "
                "--without-autoattack first --json $OUT/robust_mnist.json "
                "--history $OUT/robust_mnist_history.csv",
                {
                    "robust_mnist.json": _data("robust_mnist.json"),
                    "robust_mnist_history.csv": _data("robust_mnist_history.csv"),
                },
            ),
        ),
        minutes=430,
        full=(
            _example(
                "table1_robustness",
                "--data $MNIST --preset paper --device cuda --autoattack",
                table1__json=_full("table1_mnist.json"),
            ),
        ),
        full_minutes=3000,
    ),
    Result(
        "multi_targeted",
        "The multi-targeted attack",
        "no counterpart in the paper; LLR's evaluation",
        tuple(_MULTI_TARGETED.values()),
        tuple(
            _attack(f"{_LONG}/{name}", "multi-targeted", "--limit 200", file, 200)
            for name, file in _MULTI_TARGETED.items()
        ),
        minutes=5,
    ),
    Result(
        "transfer_mnist",
        "Black box: all against all",
        "Table A3, the authors' response",
        ("table1_mnist.json",),
        (
            _example(
                "table1_robustness",
                f"--data $MNIST --methods none --checkpoint ours={_LONG}/first --checkpoint "
                f"madry={_LONG}/madry --rows 500 --no-multi-targeted",
                table1__json=_data("table1_mnist.json"),
            ),
        ),
        minutes=5,
    ),
    Result(
        "equal_digits",
        "Seven ways to train, about a minute of one core each: digits",
        "Table 1, with MMA, LLR and Elsayed et al. beside it",
        ("equal_digits.json",),
        (
            _example(
                "table1_robustness",
                _EQUAL_DIGITS,
                table1__json=_data("equal_digits.json"),
                robustness__png=_image("equal_digits.png"),
                transfer__png=_image("transfer_digits.png"),
            ),
        ),
        minutes=6,
    ),
    _autoattack(
        "equal_digits",
        _ATTACKED,
        100,
        attack="autoattack --eps 0.15",
        data="",
        minutes=4,
    ),
    Result(
        "equal_mnist",
        "Seven ways to train, four minutes of one core each: MNIST",
        "Table 1 (MNIST)",
        ("equal_mnist.json",),
        (
            _example(
                "table1_robustness",
                _EQUAL_MNIST,
                table1__json=_data("equal_mnist.json"),
                robustness__png=_image("equal_mnist.png"),
            ),
        ),
        minutes=40,
    ),
    _autoattack("equal_mnist", _ATTACKED, 100, every=100, minutes=40),
    Result(
        "equal_cifar10",
        "Seven ways to train, six minutes of one core each: CIFAR10",
        "Table 1 (CIFAR10)",
        ("equal_cifar10.json",),
        (
            _example(
                "table1_robustness",
                _EQUAL_CIFAR,
                table1__json=_data("equal_cifar10.json"),
                robustness__png=_image("equal_cifar10.png"),
            ),
        ),
        minutes=75,
    ),
    _autoattack(
        "equal_cifar10", _ATTACKED, 200, every=50, data="--data $CIFAR", minutes=30
    ),
    Result(
        "robust_ablation",
        "What each part of the robust training does: digits",
        "no counterpart",
        ("robust_ablation.csv",),
        (
            _example(
                "robust_ablation",
                "",
                ablation__csv=_data("robust_ablation.csv"),
                ablation__png=_image("robust_ablation.png"),
            ),
        ),
        minutes=25,
        seeds="0 to 4",
    ),
    Result(
        "cifar10",
        "CIFAR10",
        "Table 1 (CIFAR10, two networks), Table A4",
        ("full/table1_cifar10.json", "full/table1_cifar10_resnet.json"),
        full=(
            Step(
                "python python_examples/table1_robustness.py --out $OUT/convnet --data $CIFAR "
                "--preset paper --device cuda --autoattack --resume",
                {"convnet/table1.json": _full("table1_cifar10.json")},
            ),
            Step(
                "python python_examples/table1_robustness.py --out $OUT/resnet --data $CIFAR "
                "--network resnet-18 --set ours.lr=0.0001 --set ours.lam_correct=4 "
                "--preset paper --device cuda --autoattack --resume",
                {"resnet/table1.json": _full("table1_cifar10_resnet.json")},
            ),
        ),
        full_minutes=6000,
    ),
    Result(
        "batch_norm",
        "A network with batch normalisation: ResNet-18 on the digits",
        "Section 5.2 (its low figure for ResNet-18, laid to batch norm)",
        ("batch_norm_robust.json", "batch_norm_cross-entropy.json"),
        tuple(
            step
            for objective in ("robust", "cross-entropy")
            for step in (
                Step(
                    f"levelset-ext train {objective} --network resnet-18 --limit 720 --epochs 8 "
                    f"--lr 0.001 --out $OUT/{objective} --resume"
                ),
                Step(
                    f"levelset-ext attack $OUT/{objective}/checkpoint.pt --attack pgd-margin "
                    "--eps 0.15 --step 0.015 --iters 20 --batch 180",
                    {f"batch_norm_{objective}.json": _data(f"batch_norm_{objective}.json")},
                    printed=f"batch_norm_{objective}.json",
                ),
            )
        ),
        minutes=14,
    ),
    Result(
        "distances",
        "How far test images are from the boundary",
        "the authors' response (inset histogram)",
        ("distance_mnist.csv", "distance_digits.csv"),
        (
            Step(
                "python python_examples/distance_histogram.py --out $OUT/digits --resume",
                {
                    "digits/summary.csv": _data("distance_digits.csv"),
                    "digits/distances.png": _image("distance_histogram.png"),
                },
            ),
            Step(
                "python python_examples/distance_histogram.py --out $OUT/mnist --data $MNIST "
                f"--rows 500 {_LONG}/first/checkpoint.pt {_LONG}/madry/checkpoint.pt --resume",
                {"mnist/summary.csv": _data("distance_mnist.csv")},
            ),
        ),
        minutes=4,
    ),
    Result(
        "convergence",
        "How many rows reach the boundary",
        "the authors' response (80-90 % early, 20-30 % late)",
        ("robust_mnist_history.csv", "convergence_newton.csv"),
        (
            _example(
                "convergence_share",
                f"{_LONG}/first --data $MNIST",
                newton__csv=_data("convergence_newton.csv"),
                history__png=_image("convergence_mnist.png"),
            ),
        ),
        minutes=2,
    ),
    Result(
        "train_step",
        "What a step of robust training costs",
        "the authors' response (x 8, x 2)",
        ("train_step.json",),
        (
            Step(
                f"python benchmarks/train_step.py --data $MNIST --checkpoint {_LONG}/first/"
                f"checkpoint.pt {_FIRST} --json $OUT/train_step.json",
                {"train_step.json": _data("train_step.json")},
            ),
        ),
        minutes=3,
    ),
    Result(
        "attack_strength",
        "Does a stronger attack break more?",
        "no counterpart; a check that every robust accuracy needs",
        ("attack_strength.csv",),
        (
            _example(
                "attack_strength",
                f"--data $MNIST --rows 100 {_LONG}/first {_LONG}/madry",
                summary__csv=_data("attack_strength.csv"),
                strength__png=_image("attack_strength.png"),
            ),
        ),
        minutes=12,
    ),
    # --- few images, and the plane ------------------------------------------------------------
    Result(
        "figure2",
        "Training on few images",
        "Figure 2, Table A2",
        (
            "figure2_digits.csv",
            "figure2_digits_rates.csv",
            *(f"{name}.csv" for name in _FEW_OF_MNIST),
        ),
        (
            Step(
                "python python_examples/figure2_fractions.py --out $OUT/digits --fractions "
                "0.02,0.05,0.1 --seeds 10 --trial-seeds 2 --candidates 2 --resume",
                {
                    "digits/accuracy.csv": _data("figure2_digits.csv"),
                    "digits/accuracy.png": _image("figure2_digits.png"),
                },
            ),
            Step(
                "python python_examples/figure2_fractions.py --out $OUT/digits_rates --methods "
                "cross-entropy,hinge --rates 0.05,0.1,0.2,0.4 --fractions 0.02,0.05,0.1 --seeds 10 "
                "--trial-seeds 2 --resume",
                {"digits_rates/accuracy.csv": _data("figure2_digits_rates.csv")},
            ),
            *_few_images("$MNIST", _FEW_OF_MNIST),
        ),
        minutes=190,
        seeds="0 to 9 (digits), 0 to 4 (MNIST), 0 to 2 (10 % of MNIST)",
        full=(
            _example(
                "figure2_fractions",
                "--data $MNIST --seeds 100 --device cuda",
                accuracy__csv=_full("figure2_mnist.csv"),
            ),
        ),
        full_minutes=2000,
    ),
    Result(
        "figure2_cifar10",
        "Training on few images of CIFAR10",
        "Figure 2, Table A2",
        tuple(f"{name}.csv" for name in _FEW_OF_CIFAR),
        _few_images("$CIFAR", _FEW_OF_CIFAR),
        minutes=330,
        seeds="0 to 4, 0 to 7 at 2 %",
        full=(
            _example(
                "figure2_fractions",
                "--data $CIFAR --seeds 100 --device cuda",
                accuracy__csv=_full("figure2_cifar10.csv"),
            ),
        ),
        full_minutes=2000,
    ),
    Result(
        "figure1",
        "Four boundaries through 16 points",
        "Figure 1",
        ("figure1_margins.csv",),
        (
            _example(
                "figure1_boundaries",
                "--quick --sets 3",
                margins__csv=_data("figure1_margins.csv"),
                boundaries__png=_image("figure1_boundaries.png"),
            ),
        ),
        minutes=6,
        full=(
            _example("figure1_boundaries", "", margins__csv=_full("figure1_margins.csv")),
        ),
        full_minutes=60,
    ),
    Result(
        "figure_a1",
        "How well samples cover a level set",
        "Figure A1, the authors' response",
        ("coverage_summary.csv", "coverage_networks.csv", "coverage_cost.csv"),
        (
            _example(
                "figure_a1_coverage",
                "",
                summary__csv=_data("coverage_summary.csv"),
                coverage__csv=_data("coverage_networks.csv"),
                cost__csv=_data("coverage_cost.csv"),
                coverage__png=_image("figure_a1.png"),
            ),
        ),
        minutes=3,
    ),
    Result(
        "newton",
        "Newton's method against others, and what is left of F",
        "the review: gradient descent and L-BFGS on the clock, what is left of F, sample images",
        ("newton_residuals.csv", "newton_methods.csv"),
        (
            _example(
                "newton_questions",
                "--quick --rows 100 --data $MNIST",
                residuals__csv=_data("newton_residuals.csv"),
                methods__csv=_data("newton_methods.csv"),
                residuals__png=_image("newton_residuals.png"),
                methods__png=_image("newton_methods.png"),
                images__png=_image("newton_images.png"),
            ),
        ),
        minutes=2,
    ),
    # --- beyond the paper -----------------------------------------------------------------------
    Result(
        "hidden_margin",
        "Level sets inside the network",
        "the conclusion's future work",
        ("hidden_margin.json", "hidden_margin.csv"),
        (
            _example(
                "hidden_margin",
                "",
                hidden__json=_data("hidden_margin.json"),
                hidden__csv=_data("hidden_margin.csv"),
                hidden__png=_image("hidden.png"),
            ),
        ),
        minutes=3,
        seeds="0 to 4",
    ),
    Result(
        "fit_depth",
        "A shape from pictures",
        "no counterpart",
        ("fit_depth.json",),
        (
            _example(
                "fit_depth", "", fit__json=_data("fit_depth.json"), fit__png=_image("depth.png")
            ),
        ),
        minutes=15,
    ),
    Result(
        "move_vertex",
        "A vertex moved to a target",
        "no counterpart",
        ("move_vertex.json",),
        (
            _example(
                "move_vertex",
                "",
                vertex__json=_data("move_vertex.json"),
                vertex__png=_image("vertex.png"),
            ),
        ),
        minutes=2,
    ),
    # --- speed ------------------------------------------------------------------------------------
    Result(
        "bench",
        "Against other ways to do the same",
        "no counterpart",
        tuple(f"bench/{name}.csv" for name in _BENCH)
        + tuple(f"bench_xeon/{name}.csv" for name in _BENCH[:4]),
        (
            Step(
                "levelset-ext bench all --repeats 3 --out $OUT",
                {
                    f"{name}.{kind}": _data(f"bench/{name}.{kind}")
                    for name in _BENCH
                    for kind in ("csv", "json", "png")
                },
            ),
        ),
        minutes=15,
    ),
    Result(
        "attack_throughput",
        "What an attack costs",
        "no counterpart",
        ("attack_throughput.json",),
        (
            Step(
                "python benchmarks/attack_throughput.py --rows 500",
                {"printed.json": _data("attack_throughput.json")},
                printed="printed.json",
            ),
        ),
        minutes=3,
    ),
    Result(
        "warm_pool",
        "Keeping samples from step to step",
        "no counterpart",
        ("warm_pool.json",),
    ),
)  # fmt: skip


def by_name() -> dict[str, Result]:
    return {result.name: result for result in RESULTS}


def find(name: str) -> Result:
    known = by_name()
    if name not in known:
        raise ValueError(f"only: expected one of {', '.join(known)}, got {name!r}")
    return known[name]
