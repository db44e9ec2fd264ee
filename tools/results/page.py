"""docs/results.md, made from the files under benchmarks/results."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from tools.results import more, robustness, surfaces
from tools.results.registry import FILES, RESULTS, ROOT, Result, by_name
from tools.results.runner import read_record
from tools.results.tables import NOT_RUN, Book, Files, table

__all__ = ["PAGE", "page"]

PAGE = "docs/results.md"

Section = Callable[[Book], str]

# What a result says, by its name.
TEXTS: dict[str, Section] = {
    "reconstruct_fast": partial(surfaces.reconstruct, "reconstruct_fast"),
    "surface_table": surfaces.surface_table,
    "close_ups": surfaces.close_ups,
    "surface_ablation": surfaces.ablation,
    "surface_trials": surfaces.trials,
    "figure_a2": surfaces.figure_a2,
    "curves": surfaces.curves,
    "figure3": surfaces.figure3,
    "robust_mnist": robustness.robust_mnist,
    "transfer_mnist": robustness.transfer,
    "equal_digits": partial(robustness.equal, name="equal_digits", what="digits"),
    "equal_mnist": partial(robustness.equal, name="equal_mnist", what="MNIST"),
    "equal_cifar10": partial(robustness.equal, name="equal_cifar10", what="CIFAR10"),
    "robust_ablation": robustness.ablation,
    "cifar10": robustness.cifar10,
    "batch_norm": robustness.batch_norm,
    "distances": robustness.distances,
    "convergence": robustness.convergence,
    "train_step": robustness.train_step,
    "attack_strength": robustness.attack_strength,
    "figure2": more.figure2,
    "figure1": more.figure1,
    "figure_a1": more.figure_a1,
    "newton": more.newton,
    "hidden_margin": more.hidden_margin,
    "fit_depth": more.fit_depth,
    "move_vertex": more.move_vertex,
    "bench": more.bench,
    "attack_throughput": more.attack_throughput,
    "warm_pool": more.warm_pool,
}
# Pictures, with what a reader who cannot see them should know.
PICTURES: dict[str, tuple[tuple[str, str], ...]] = {
    "surface_table": (
        ("surface_table.png", "Clouds, true surfaces and the meshes of all methods"),
    ),
    "close_ups": (
        ("close_ups.png", "Three places of each scan: the truth, ours, screened Poisson"),
    ),
    "figure_a2": (("figure_a2_levels.png", "Iso-levels on a cut, F against the distance"),),
    "figure3": (("figure3_curves.png", "Curves from noisy and from partial points"),),
    "equal_digits": (
        ("equal_digits.png", "Accuracies of seven trainings as bars; clean against worst case"),
    ),
    "transfer_mnist": (
        ("transfer_digits.png", "Digits: accuracies of seven networks under each other's attacks"),
    ),
    "equal_mnist": (
        ("equal_mnist.png", "Accuracies of seven trainings as bars; clean against worst case"),
    ),
    "equal_cifar10": (
        (
            "equal_cifar10.png",
            "Accuracies of seven trainings as bars; clean against worst case, CIFAR10",
        ),
    ),
    "surface_ablation": (
        ("surface_ablation.png", "How much further away the variants are, with intervals"),
    ),
    "robust_ablation": (
        ("robust_ablation.png", "Differences of the variants from ours, with intervals"),
    ),
    "distances": (("distance_histogram.png", "Histograms of distances to the boundary, digits"),),
    "convergence": (("convergence_mnist.png", "Shares of crossed and converged rows by epoch"),),
    "attack_strength": (("attack_strength.png", "Accuracy against steps, eps and restarts"),),
    "figure2": (("figure2_digits.png", "Accuracy against the fraction of the digits"),),
    "figure1": (("figure1_boundaries.png", "Four boundaries through the same 16 points"),),
    "figure_a1": (("figure_a1.png", "Samples of a boundary in four ways, and their cost"),),
    "newton": (
        ("newton_methods.png", "Time and evaluations of five ways to the level set"),
        ("newton_residuals.png", "What is left of F by Newton step"),
        ("newton_images.png", "Test images, boundary points found from them, differences"),
    ),
    "hidden_margin": (("hidden.png", "Noise against switched hidden units"),),
    "fit_depth": (("depth.png", "Target images and fits"),),
    "move_vertex": (("vertex.png", "A sphere before and after one vertex was moved"),),
}
# Results shown inside the text of another one.
WITHIN = {
    "multi_targeted": "robust_mnist",
    "equal_digits_autoattack": "equal_digits",
    "equal_mnist_autoattack": "equal_mnist",
    "equal_cifar10_autoattack": "equal_cifar10",
    "figure2_cifar10": "figure2",
}
CHAPTERS: dict[str, tuple[str, ...]] = {
    "Surfaces": (
        "reconstruct_fast", "surface_table", "close_ups", "surface_ablation",
        "surface_trials", "figure_a2", "warm_pool",
    ),
    "Curves": ("curves", "figure3"),
    "Robust classifiers": (
        "robust_mnist", "equal_digits", "equal_mnist", "robust_ablation", "transfer_mnist",
        "equal_cifar10", "cifar10", "batch_norm", "attack_strength", "distances", "convergence",
        "train_step",
    ),
    "Few images, and the plane": ("figure2", "figure1", "figure_a1"),
    "The search itself": ("newton",),
    "Beyond the paper": ("hidden_margin", "fit_depth", "move_vertex"),
    "Speed": ("bench", "attack_throughput"),
}  # fmt: skip

HEAD = """\
# Results

<!-- Written by `make results` from benchmarks/results; edits here are lost. -->

Does it work, and is it better than what you have? Every table and figure of the paper, of its
supplementary and of the authors' response, and what the reviewers asked for, beside our numbers;
each with its command. This page is generated: no number on it was typed. What was not run says
*not run*.

```
make results MNIST=FOLDER CIFAR=FOLDER SCANS=FOLDER        # what is missing, on a CPU
make results-full MNIST=FOLDER CIFAR=FOLDER SCANS=FOLDER   # the paper's settings, on a GPU
python -m tools.results list             # every result, what it takes, whether it is there
```

* **Data.** MNIST and CIFAR10 are the usual files. FAUST's scans cannot be had; simulated range
  scans of four known meshes stand in (12 views, 170 000 points, noise 5e-4 of the diagonal,
  occluded parts missing, no normals), so Table 2's numbers cannot be compared, only its question
  answered.
* **Sizes.** Where the paper used a GPU for days, the run here is what one CPU core does in minutes,
  and the paper's figure stands beside it as *published*.
* **Names.** *Published* is what others have written down. Everything else was measured by the
  command under the table.
"""


def page(files: Files | None = None) -> str:
    """The whole page."""
    book = Book(files or Files())
    chapters = []
    for title, names in CHAPTERS.items():
        parts = [section(by_name()[name], book) for name in names]
        chapters.append("\n".join([f"## {title}", "", *parts]))
    # The chapters come first, as they find what these say.
    parts = [HEAD, summary(book), losses(book), advice(book), index(), *chapters]
    parts += [runs(), missing(book)]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def section(result: Result, book: Book) -> str:
    text = TEXTS[result.name](book)
    lines = [f"### {result.title}", "", f"*Stands for:* {result.paper}.", "", text, ""]
    if text != NOT_RUN:
        for name, words in PICTURES.get(result.name, ()):
            if (ROOT / "docs/images" / name).exists():
                lines += [f"![{words}](images/{name})", ""]
    lines += [_how(one) for one in (result, *_inside(result.name))]
    return "\n".join([*lines, ""])


def _inside(name: str) -> list[Result]:
    return [by_name()[inner] for inner, outer in WITHIN.items() if outer == name]


def _how(result: Result) -> str:
    """Where the numbers are and how they come about again, folded away."""
    files = ", ".join(f"`{FILES}/{name}`" for name in result.files if _there(name))
    name = result.name
    head = f"Seed {result.seeds}; {files or 'no file yet'}"
    if not result.steps and not result.full:
        return f"{head}; collected from single trials, which no one command repeats.\n"
    if not result.steps:
        return (
            f"{head}; `python -m tools.results run --only {name} --full`, on a GPU:\n\n"
            + _shell(result, full=True)
        )
    text = f"{head}; `python -m tools.results run --only {name}` runs\n\n{_shell(result, False)}"
    if result.full:
        made = all((ROOT / file).exists() for file in result.kept(True))
        state = "there" if made else f"**{NOT_RUN}**"
        text += f"\nThe full setting, on a GPU ({state}), `--full`:\n\n{_shell(result, True)}"
    return text


def _shell(result: Result, full: bool) -> str:
    commands = "\n".join(
        step.command + (f"  # prints {step.printed}" if step.printed else "")
        for step in result.chosen(full)
    )
    return f"```\n{commands}\n```\n"


def _there(name: str) -> bool:
    return (ROOT / FILES / name).exists()


def _rows(book: Book, verdict: str) -> list[list[str]]:
    return [
        [one.what, one.text(one.ours), one.text(one.other), one.who] for one in book.of(verdict)
    ]


# What the paper and the texts around it show -> the results that stand for it.
INDEX = {
    "Figure 1, boundaries in the plane": ("figure1",),
    "Figure 2, Table A2, few images": ("figure2",),
    "Figure 3, surfaces": ("reconstruct_fast", "surface_table"),
    "Figure 3, curves": ("curves", "figure3"),
    "Table 1, MNIST": ("robust_mnist", "equal_mnist", "equal_digits"),
    "Table 1, CIFAR10; Table A4": ("equal_cifar10", "cifar10"),
    "Table 2, surfaces in figures": ("surface_table", "reconstruct_fast"),
    "Table A3 and the response's black-box table": ("transfer_mnist",),
    "Figure A1 and the response's table of samples": ("figure_a1",),
    "Figure A2, iso-levels": ("figure_a2",),
    "the response: distances to the boundary": ("distances",),
    "the response: rows that converge": ("convergence",),
    "the response: what the search costs": ("train_step",),
    "the reviews: gradient descent, L-BFGS, what is left of F, sample images": ("newton",),
    "the reviews: Elsayed et al.": ("equal_digits", "equal_mnist"),
    "AutoAttack, multi-targeted": (
        "robust_mnist",
        "equal_digits",
        "equal_mnist",
        "equal_cifar10",
    ),
    "Table A1, architectures": (),
}


def index() -> str:
    rows = []
    for what, names in INDEX.items():
        results = [by_name()[name] for name in names]
        links = ", ".join(f"[{one.title}](#{_anchor(one.title)})" for one in results)
        states = {_state(part) for one in results for part in (one, *_inside(one.name))}
        state = states.pop() if len(states) == 1 else "in part"
        rows.append([what, links or "`levelset_ext.networks`", state if names else "there"])
    return "\n".join(
        ["## Where to find what", "", table(["of the paper", "here", "state"], rows, 3), ""]
    )


def _anchor(title: str) -> str:
    """As GitHub and mkdocs name a heading."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def _state(result: Result) -> str:
    there = [_there(name) for name in result.files]
    return "there" if all(there) else "in part" if any(there) else NOT_RUN


def summary(book: Book) -> str:
    counts = {verdict: len(book.of(verdict)) for verdict in ("ahead", "even", "behind")}
    answers = [surfaces.answer(book), robustness.answer(book), *more.answer(book)]
    text = [
        "## In short",
        "",
        *(f"* {one}" for one in answers),
        "",
        f"Of {sum(counts.values())} comparisons on this page ours is ahead in {counts['ahead']}, "
        f"not told apart in {counts['even']} and behind in {counts['behind']}. Two figures are not "
        "told apart within the 95 % interval of their difference for accuracies, within 2 % for "
        "lengths, 0.001 for normal consistency and 3 % for times of the benchmarks. Which settings "
        "each had, and what was chosen by which images, stands with the tables.",
        "",
        "### Where we are ahead",
        "",
        table(["what", "ours", "best other", "who"], _rows(book, "ahead")),
        "",
        "### Not told apart",
        "",
        table(["what", "ours", "best other", "who"], _rows(book, "even")),
        "",
    ]
    return "\n".join(text)


def losses(book: Book) -> str:
    return "\n".join(
        [
            "### Where we lose",
            "",
            table(["what", "ours", "best other", "who"], _rows(book, "behind")),
            "",
        ]
    )


def advice(book: Book) -> str:
    """What to use when; the names are typed, the numbers are not."""
    facts = surfaces.winners(book)
    rows = []
    if facts:
        rows += [
            [
                "a dense scan, every side seen",
                "screened Poisson first: seconds, and as near or nearer where its normals come out "
                f"right (nearest to the surface, or within 2 % of it: {facts['wins']} of "
                f"{facts['scans']} scans)",
            ],
            [
                "a scan without usable normals, or a differentiable surface for a larger model",
                f"this package: the best other method that trains is {facts['trained']} times as "
                f"far from the surface in the same time; one closed piece of {facts['scans']} "
                f"scans: {facts['closed']}",
            ],
        ]
    rows += _robust_advice(book)
    figure2 = [one for one in book.found if "% of the images" in one.what]
    if figure2:
        ahead, behind = (
            sum(one.verdict == verdict for one in figure2) for verdict in ("ahead", "behind")
        )
        rows.append(
            [
                "a classifier from a handful of images per class",
                f"Eq. 11, if ten times the training time is nothing: ahead of cross entropy and "
                f"hinge in {ahead} of {len(figure2)} comparisons, behind in {behind}",
            ]
        )
    rows += [
        [
            "points on a level set of a perceptron, on a CPU",
            "this package: " + _speed(book, "newton: "),
        ],
        [
            "distances to a fixed cloud alone",
            "SciPy's k-d tree, which is what this package uses: " + _speed(book, "nearest:"),
        ],
    ]
    return "\n".join(
        [
            "## What to use when",
            "",
            table(["you have", "use"], [r for r in rows if r[1]], left=2),
            "",
        ]
    )


def _speed(book: Book, start: str) -> str:
    """The ratios of the cases whose name starts so."""
    ratios = [one.other / one.ours for one in book.found if one.what.startswith(start)]
    if not ratios:
        return NOT_RUN
    span = f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else f"{ratios[0]:.2f}"
    return f"the best other way takes {span} times as long"


def _robust_advice(book: Book) -> list[list[str]]:
    rows = []
    for one in book.found:
        verdict = {
            "even": "either, AutoAttack does not tell them apart",
            "ahead": "ours",
            "behind": one.who,
        }[one.verdict]
        if one.what.startswith("MNIST, 51 min: AutoAttack"):
            rows.append(
                [
                    "an hour of one core for a robust classifier of MNIST's size",
                    f"{verdict} ({one.ours:.1f} against {one.other:.1f} %, {one.who})",
                ]
            )
        if one.what.startswith("MNIST: AutoAttack, best published"):
            best = one.who if one.verdict == "behind" else "ours"
            rows.append(
                [
                    "a GPU, and robustness is all that counts",
                    f"{best}: {max(one.ours, one.other):.1f} % under AutoAttack is published, ours "
                    f"has {one.ours:.1f} % (fewer rows, less training)",
                ]
            )
        if one.what.startswith("digits, equal time: AutoAttack"):
            rows.append(
                [
                    "a minute of one core, small images",
                    f"{verdict} ({one.ours:.1f} against {one.other:.1f} %, {one.who})",
                ]
            )
    return rows


def runs() -> str:
    """How, where and how long."""
    record = read_record()
    rows = []
    for result in RESULTS:
        made = record.get(result.name, {})
        rows.append(
            [
                f"`{result.name}`",
                result.paper,
                _state(result),
                result.seeds,
                made.get("machine", "-"),
                f"{made['cpu_minutes']:g}" if made.get("cpu_minutes") is not None else "-",
                f"{result.minutes:g}" if result.steps else "-",
            ]
        )
    head = ["result", "stands for", "state", "seed", "machine", "CPU minutes", "expected"]
    return "\n".join(
        [
            "## How each was made",
            "",
            "CPU minutes are those that `make results` wrote down; - where a result was made "
            "before it kept a record, and only its files say with what settings. The commands "
            "stand under each result.",
            "",
            table(head, rows, left=5),
            "",
        ]
    )


def missing(book: Book) -> str:
    lines = ["## What is not here", ""]
    for result in RESULTS:
        absent = [name for name in result.files if not _there(name)]
        if absent:
            lines.append(
                f"* `{result.name}` ({result.paper}): " + ", ".join(absent) + f", {NOT_RUN}."
            )
        elif result.full and not all((ROOT / file).exists() for file in result.kept(True)):
            lines.append(f"* `{result.name}` in the paper's setting: {NOT_RUN}, needs a GPU.")
    lines += [
        "* FAUST (Table 2): cannot be had.",
        "* Fashion-MNIST (Figure 2): its files are not at hand; its loader is MNIST's.",
        "* SIREN, SAL, DiGS, NeuralPull and other surface methods; Gowal et al. for robustness: "
        "published figures only.",
        "* The authors' ratio of training times for surfaces (x 2): not measured.",
        "",
    ]
    return "\n".join(lines)
