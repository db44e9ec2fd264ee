"""The page's parts on classifiers that keep their distance."""

from __future__ import annotations

import math
from typing import Any

from tools.results import published
from tools.results.tables import (
    NOT_RUN,
    Book,
    bold_best,
    example,
    fixed,
    half_width,
    interval,
    number,
    percent,
    seconds,
    small,
    table,
    with_interval,
)

NAMES = {
    "ours": "ours (Eq. 12)",
    "first": "ours, first settings",
    "longer": "ours, and 34 epochs more",
    "madry": "Madry",
    "trades": "TRADES",
    "mma": "MMA",
    "llr": "LLR",
    "large-margin": "Elsayed et al.",
    "standard": "standard",
}
# The setting that is the box which a training asks to be safe in, where it is not eps.
BOXES = {"ours": "eps_correct", "mma": "eps_max", "large-margin": "gamma"}
# What there is; a run may look at fewer.
TEST_ROWS = {"digits": 360, "MNIST": 10_000, "CIFAR10": 10_000}
COLUMNS = {
    "xent": "PGD Xent",
    "margin": "PGD margin",
    "multi_targeted": "multi-targeted",
    "autoattack": "AutoAttack",
    "black_box": "black box, lowest",
    "worst": "worst",
}


def published_table1(data: str, network: str) -> str:
    known = example("table1_robustness").PUBLISHED[data, network]
    return table(
        ["published", "clean", "PGD Xent", "PGD margin"],
        [
            [name.replace("Ours", "the paper's"), *(f"{value:.2f}" for value in values)]
            for name, values in known.items()
        ],
    )


def published_transfer(data: str, network: str) -> str:
    script = example("table1_robustness")
    parts = []
    for loss, matrix in script.PUBLISHED_TRANSFER[data, network].items():
        rows = [
            [name.replace("Ours", "the paper's"), *(f"{value:.2f}" for value in values)]
            for name, values in matrix.items()
        ]
        sources = [name.replace("Ours", "the paper's") for name in script.SOURCES]
        parts.append(f"Published, {_loss(loss)}; rows are attacked, columns make the attack:\n")
        parts.append(table(["attacked", *sources], rows) + "\n")
    return "\n".join(parts)


# A training that began with the weights of another.
WENT_ON = {"longer": "ours"}


def _loss(name: str) -> str:
    return "PGD on cross entropy" if name == "xent" else "PGD on the margin"


def robust_mnist(book: Book) -> str:
    found = book.files.json("robust_mnist.json")
    lines = [published_table1("mnist", "convnet-4a"), ""]
    if found is None:
        return "\n".join([*lines, f"Ours: {NOT_RUN}."])
    runs = found["runs"]
    rows = []
    for name in (name for name in NAMES if name in runs):
        run = runs[name]
        training, pgd, strong = run["training"], run["pgd"], run["autoattack"]
        parts = [training, *([runs[WENT_ON[name]]["training"]] if name in WENT_ON else [])]
        minutes = sum(part.get("cpu_seconds", part["training_seconds"]) for part in parts) / 60
        many = book.files.json(f"multi_targeted_{name}.json")
        rows.append(
            [
                NAMES[name],
                fixed(0)(sum(part["epochs"] for part in parts)),
                fixed(1)(minutes),
                percent(training["clean_accuracy"], 2),
                with_interval(100 * pgd["attacks"][0]["robust_accuracy_after"], pgd["rows"]),
                with_interval(100 * pgd["robust_accuracy"], pgd["rows"]),
                "-" if many is None else with_interval(100 * many["robust_accuracy"], many["rows"]),
                "-" if strong is None else _strong(run),
                "-" if strong is None else fixed(2)(100 * strong["robust_accuracy"] / minutes),
            ]
        )
    ours, madry = _long_runs(found)
    many = book.files.json("multi_targeted_madry.json")
    head = [
        "network", "epochs", "min", "clean", f"PGD margin, {_images(ours['pgd'])}",
        "worst of margin and Xent",
        "multi-targeted" + (f", {_images(many)}" if many else ""),
        f"AutoAttack, {_images(madry['autoattack'])}", "AutoAttack per training minute",
    ]  # fmt: skip
    lines += [
        "Measured, percent of test images, in brackets the 95 % interval that so many images "
        "allow; " + found.get("machine", "see the table of runs") + ":",
        "",
        table(head, rows),
        "",
        "AutoAttack's public table for MNIST, eps 0.3, all 10 000 images: "
        + ", ".join(f"{name} {value:.2f}" for name, value in published.AUTOATTACK_MNIST.items())
        + ".",
    ]
    if "remark" in found:
        lines += ["", found["remark"]]
    lines += [
        "",
        "The settings of ours were searched, Madry's are those of its authors with a rate and an "
        "average for short trainings: it has no shifted images, no steps that shrink and the box "
        "of the attack where ours has 0.33. `train madry` takes `shift`, `step_last` and `eps`; "
        "what they would give it in this time was not run.",
    ]
    if ours["autoattack"] is not None:
        rows_aa = ours["autoattack"]["rows"]
        own = 100 * ours["autoattack"]["robust_accuracy"]
        book.compare(
            f"MNIST, 51 min: AutoAttack, {rows_aa} rows", own,
            {"Madry, same time": 100 * madry["autoattack"]["robust_accuracy"]}, fixed(1), low=False,
            rows=rows_aa,
        )  # fmt: skip
    best = runs.get("longer", ours)
    own = 100 * best["autoattack"]["robust_accuracy"]
    trades = {"TRADES": published.AUTOATTACK_MNIST["TRADES"]}
    for what, others in (("best", published.AUTOATTACK_MNIST), ("TRADES", trades)):
        book.compare(
            f"MNIST: AutoAttack, {what} published", own, others, fixed(1), low=False,
            near=half_width(own, best["autoattack"]["rows"]),
        )  # fmt: skip
    rows_pgd, own = ours["pgd"]["rows"], 100 * ours["pgd"]["robust_accuracy"]
    book.compare(
        f"MNIST, 51 min: worst of PGD margin and Xent, {rows_pgd} rows", own,
        {"Madry, same time": 100 * madry["pgd"]["robust_accuracy"]}, fixed(1), low=False,
        rows=rows_pgd,
    )  # fmt: skip
    clean = {"Madry, same time": 100 * madry["training"]["clean_accuracy"]}
    book.compare(
        "MNIST, 51 min: clean", 100 * ours["training"]["clean_accuracy"], clean, fixed(2),
        low=False, rows=ours["training"]["test_rows"],
    )  # fmt: skip
    paper = example("table1_robustness").PUBLISHED["mnist", "convnet-4a"]["Ours (0.4)"]
    own = 100 * best["pgd"]["attacks"][0]["robust_accuracy_after"]
    book.compare(
        "MNIST: PGD margin against the paper's own figure", own,
        {"the paper, 200 epochs on a GPU": paper[2]}, fixed(1), low=False,
        near=half_width(own, best["pgd"]["rows"]),
    )  # fmt: skip
    return "\n".join(lines)


def _images(attack: dict[str, Any]) -> str:
    """Which images of MNIST an attack saw."""
    return _some(attack["rows"], attack.get("every", 1), "MNIST")


def _some(rows: int, every: int, data: str) -> str:
    """Which test images were looked at."""
    if rows < -(-TEST_ROWS[data] // every):
        return f"the first {rows} test images" + (f", one in {every}" if every > 1 else "")
    return f"all {rows} test images" if every == 1 else f"{rows} test images, one in {every}"


def _long_runs(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ours, with the settings of the preset, and Madry's."""
    return found["runs"]["ours"], found["runs"]["madry"]


# How the settings of the others were come by.
CHOSEN = {
    "equal_mnist": "Madry and TRADES got the better of boxes of 0.3 and 0.4, TRADES and MMA the "
    "better of rates of 0.002 and 0.005, LLR the better of 0.002 with 0.3 and 0.005 with 0.4, by "
    "PGD on 500 other test images.",
    "equal_cifar10": "The others got our rate and, but for MMA and Elsayed et al., our box. Other "
    "work beside a training is in its minutes, of which ours had most.",
}


def equal(book: Book, name: str, what: str) -> str:
    found = book.files.json(f"{name}.json")
    if found is None:
        return NOT_RUN
    rows_count = _rows_of(found, what)
    rows_of = {row["network"]: dict(row) for row in found["table1"]}
    rows_aa, every_aa = rows_count, _every_of(found)
    for network, row in rows_of.items():
        strong = book.files.json(f"{name}_autoattack_{network}.json")
        if strong is not None:
            row["autoattack"], rows_aa = 100 * strong["robust_accuracy"], strong["rows"]
            every_aa = strong.get("every", 1)
    order = [n for n in NAMES if n in rows_of]
    shown = [c for c in COLUMNS if any(math.isfinite(number(rows_of[n][c])) for n in order)]
    columns = {c: bold_best([number(rows_of[n][c]) for n in order], fixed(1), False) for c in shown}
    clean = bold_best([number(rows_of[n]["clean"]) for n in order], fixed(1), False)
    rows = []
    for k, network in enumerate(order):
        row = rows_of[network]
        minutes = number(row["minutes"])
        rows.append(
            [
                NAMES[network],
                fixed(2)(minutes),
                clean[k],
                *(columns[c][k] for c in shown),
                fixed(1)(number(row["worst"]) / minutes),
            ]
        )
    head = ["network", "min", "clean", *(COLUMNS[c] for c in shown), "worst per training minute"]
    if "autoattack" in shown and rows_aa != rows_count:
        head[3 + shown.index("autoattack")] += f", {rows_aa} rows"
    ours = rows_of["ours"]
    for column in ("clean", *(c for c in ("margin", "multi_targeted", "autoattack") if c in shown)):
        count = rows_aa if column == "autoattack" else rows_count
        own = number(ours[column])
        if not math.isfinite(own):
            continue
        book.compare(
            f"{what}, equal time: {COLUMNS.get(column, column)}, {count} rows", own,
            {NAMES[n]: number(rows_of[n][column]) for n in order if n != "ours"}, fixed(1),
            low=False, rows=count,
        )  # fmt: skip
    times = [number(row["minutes"]) for row in rows_of.values()]
    worst = number(ours["worst"])
    low, high = interval(worst / 100, rows_count)
    missing = [NAMES[n] for n in NAMES if n not in rows_of and n not in ("first", *WENT_ON)]
    attack = found["settings"]["attack"]
    text = [
        f"Percent of {_some(rows_count, _every_of(found), what)}; attacks with eps "
        f"{attack['eps']:g}, PGD with {attack['iters']} steps of {attack['step']:g}. At "
        f"{worst:.1f} % so many images leave a 95 % interval of {100 * low:.1f} to "
        f"{100 * high:.1f}, so what is nearer than that is not told apart. Minutes are processor "
        f"time of the training, {min(times):.2g} to {max(times):.2g} of them. The settings of ours "
        "were searched, in part on test images of this table; the others' less. Learning rate "
        "and box they were trained with: "
        + " ".join([_trained_with(found, order) + ".", CHOSEN.get(name, "")]).rstrip(),
        "",
        table(head, rows),
    ]
    if "autoattack" in shown and rows_aa != rows_count:
        text += [
            "",
            f"AutoAttack looked at {_some(rows_aa, every_aa, what)} alone, which need not be as "
            "hard as all: compare within its column. It is not in *worst*; - is not run.",
        ]
    if missing:
        text += ["", "Not run in this setting: " + ", ".join(missing).rstrip(".") + "."]
    return "\n".join(text)


def _trained_with(found: dict[str, Any], order: list[str]) -> str:
    """Learning rate and box of every training, those that share them together."""
    groups: dict[str, list[str]] = {}
    for name in order:
        training = found["settings"]["trained"][name]
        box = training["settings"].get(BOXES.get(name, "eps"))
        text = f"{training['lr']:g}" + ("" if box is None else f" and {box:g}")
        groups.setdefault(text, []).append(NAMES[name].rstrip("."))
    return "; ".join(f"{', '.join(names)} {text}" for text, names in groups.items())


def _rows_of(found: dict[str, Any], what: str) -> int:
    """How many test images a run of table1_robustness.py looked at."""
    wanted, there = found["settings"]["rows"], -(-TEST_ROWS[what] // _every_of(found))
    return there if wanted is None else min(wanted, there)


def _every_of(found: dict[str, Any]) -> int:
    return int(found["settings"].get("every", 1))


def transfer(book: Book) -> str:
    lines = []
    for file, what, long in (
        ("table1_mnist.json", "MNIST", ", 51 min"),
        ("equal_digits.json", "digits", ""),
    ):
        found = book.files.json(file)
        if found is None:
            lines += [f"{what}{long}: {NOT_RUN}.", ""]
            continue
        names = [n for n in NAMES if any(row["attacked"] == n for row in found["transfer"])]
        # The long training that these commands look at is the one with the first settings.
        called = {**NAMES, "ours": NAMES["first"]} if long else NAMES
        pairs = {
            (row["loss"], row["attacked"], row["source"]): number(row["accuracy"])
            for row in found["transfer"]
        }
        lines += [
            f"**{what}{long}**, margin (ddb) / cross entropy, percent of "
            f"{_some(_rows_of(found, what), _every_of(found), what)}; rows are attacked, "
            "columns make the attack, the diagonal is white box:",
            "",
        ]
        rows = []
        for target in names:
            cells = [
                f"{pairs['margin', target, source]:.1f} / {pairs['xent', target, source]:.1f}"
                for source in names
            ]
            lowest = [
                min(pairs[loss, target, source] for source in names) for loss in ("margin", "xent")
            ]
            rows.append([called[target], *cells, f"{lowest[0]:.1f} / {lowest[1]:.1f}"])
        lines += [table(["attacked", *(called[n] for n in names), "minimum"], rows), ""]
    lines += [
        "The authors' response gives the minimum column for MNIST (ddb / Xent; of the paper's own "
        "row the text is not certain): "
        + ", ".join(f"{n} {a:.1f} / {b:.1f}" for n, (a, b) in published.RESPONSE_WORST.items())
        + ".",
        "",
        published_transfer("mnist", "convnet-4a"),
    ]
    return "\n".join(lines)


def cifar10(book: Book) -> str:
    lines = []
    for network, file in (
        ("convnet-4b", "full/table1_cifar10.json"),
        ("resnet-18", "full/table1_cifar10_resnet.json"),
    ):
        found = book.files.json(file)
        ours = f"**{network}**, ours: {NOT_RUN}, it takes a GPU for days."
        if found is not None:
            shown = ("clean", "xent", "margin", "multi_targeted", "autoattack")
            rows = [
                [NAMES[row["network"]], *(fixed(2)(number(row[c])) for c in shown)]
                for row in found["table1"]
            ]
            ours = table([network, *shown], rows)
        lines += [ours, "", published_table1("cifar10", network), ""]
    lines += [
        "AutoAttack's public table, ResNet-18, eps 0.031: "
        + ", ".join(f"{name} {value}" for name, value in published.AUTOATTACK_CIFAR.items())
        + ".",
        "",
        published_transfer("cifar10", "convnet-4b"),
    ]
    return "\n".join(lines)


def ablation(book: Book) -> str:
    found = book.files.csv("robust_ablation.csv")
    if found is None:
        return NOT_RUN
    measures = {"clean": "clean", "pgd": "PGD margin", "worst": "and multi-targeted"}
    rows = []
    for k, row in enumerate(found):
        cells = [row["variant"], fixed(0)(number(row["cpu_seconds"]))]
        for measure in measures:
            mean = number(row[f"{measure}_difference"])
            half = number(row[f"{measure}_half"])
            cells.append(fixed(1)(number(row[measure])))
            told = "**" if abs(mean) > half else ""
            cells.append("" if k == 0 else f"{told}{mean:+.1f} ± {half:.1f}{told}")
        rows.append(cells)
    head = ["variant", "CPU s"]
    for name in measures.values():
        head += [name, "more than ours"]
    return (
        f"Means of {found[0]['seeds']} seeds, percent of all 360 test images; the differences are "
        "paired, ± half of a 95 % interval (Student's t), in bold where that leaves 0 out. With so "
        f"many comparisons one in twenty would be bold by chance.\n\n{table(head, rows)}\n\n"
        "All begin with the eps of the attack, 0.15. The preset `fast` of the digits has what is a "
        "third larger: these test images chose it. Madry's training has a fifth of our learning "
        "rate here, no average of weights and no reduced precision; with all three it is in "
        "the [table of seven](#seven-ways-to-train-about-a-minute-of-one-core-each-digits). "
        "Without cross entropy nothing says which side is right, and Eq. 12 finds no "
        "boundary to move."
    )


def batch_norm(book: Book) -> str:
    rows = []
    for objective in ("cross-entropy", "robust"):
        found = book.files.json(f"batch_norm_{objective}.json")
        if found is None:
            rows.append([objective, NOT_RUN, "-"])
            continue
        rows.append(
            [
                "Eq. 12" if objective == "robust" else "cross entropy",
                with_interval(100 * found["clean_accuracy"], found["rows"]),
                with_interval(100 * found["robust_accuracy"], found["rows"]),
            ]
        )
        eps, iters = found["settings"]["eps"], found["settings"]["iters"]
    if all(row[1] == NOT_RUN for row in rows):
        return NOT_RUN
    known = example("table1_robustness").PUBLISHED["cifar10", "resnet-18"]["Ours (0.045)"]
    return (
        table(["trained with", "clean", f"PGD margin, eps {eps:g}, {iters} steps"], rows)
        + "\n\nEight epochs of 720 images. Points, gradients and p(theta) all use the statistics "
        "of the clean batch, attacks the running ones; the paper's own network on CIFAR10 has "
        f"{known[2]:.2f} % on the margin and {known[1]:.2f} % on cross entropy."
    )


def distances(book: Book) -> str:
    rows = []
    for what, file in (("digits", "distance_digits.csv"), ("MNIST", "distance_mnist.csv")):
        found = book.files.csv(file)
        if found is None:
            rows.append([what, NOT_RUN, *["-"] * 7])
            continue
        for row in found:
            rows.append(
                [
                    what,
                    "ours, first settings"
                    if (what, row["network"]) == ("MNIST", "ours")
                    else row["network"],
                    row["images"],
                    percent(number(row["accuracy"])),
                    percent(number(row["converged_share"])),
                    *(fixed(3)(number(row[q])) for q in ("q10", "q25", "median", "q75")),
                ]
            )
    head = [
        "images", "network", "rows", "clean", "converged, %", "10 %", "25 %", "median", "75 %",
    ]  # fmt: skip
    return (
        table(head, rows, left=2)
        + "\n\nL_inf distances from test images to the point that Newton's method finds on the "
        "boundary of their label; negative for a wrong image. It is an upper bound of the "
        "distance, and where it is above 1 no more than that: Newton's method ended at what "
        "is no image."
    )


def convergence(book: Book) -> str:
    history, newton = (
        book.files.csv("robust_mnist_history.csv"),
        book.files.csv("convergence_newton.csv"),
    )
    lines = [f"Published: of ten Newton steps, {published.RESPONSE_CONVERGED}.", ""]
    if history is not None:
        rows = []
        own = [row for row in history if row["run"] == "first"]
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            row = own[round(share * (len(own) - 1))]
            rows.append(
                [
                    fixed(1)(number(row["epoch"])),
                    percent(number(row["crossed"])),
                    percent(number(row["converged"])),
                    percent(number(row["accuracy"])),
                ]
            )
        lowest = min(number(row["converged"]) for row in own)
        lines += [
            "Measured, our robust training on MNIST with its first settings: of a batch, the share "
            "that the attack carries over the boundary, and of those the share whose search met "
            f"its tolerance (lowest of the whole run {percent(lowest)} %):",
            "",
            table(["epoch", "crossed, %", "converged of these, %", "accuracy, %"], rows),
            "",
        ]
    if newton is not None:
        row = newton[0]
        lines += [
            f"Ten Newton steps on the finished network: {percent(number(row['newton']))} % within "
            f"the tolerance, {percent(number(row['newton_near']))} % within a step of 0.001; what "
            f"is left of F, median, {small(number(row['residual_median']))}.",
        ]
    return "\n".join(lines) if len(lines) > 2 else NOT_RUN


_STEPS = {"paper": "preset paper", "fast": "first settings of the preset fast"}


def train_step(book: Book) -> str:
    found = book.files.json("train_step.json")
    ratios = published.RESPONSE_RATIOS
    rows = [
        ["published, V100, robust training", f"{ratios['robust training']}", "-", "-", "-"],
        ["published, V100, surfaces", f"{ratios['surfaces']}", "-", "-", "-"],
    ]
    if found is not None:
        for name, case in found["cases"].items():
            rows.append(
                [
                    f"measured, robust training, {_STEPS[name]}",
                    fixed(1)(case["ratio"]["median"]),
                    fixed(1)(case["floor_ratio"]["median"]),
                    seconds(case["robust_seconds"]["median"]),
                    seconds(case["plain_seconds"]["median"]),
                ]
            )
            if name == "paper":
                book.compare(
                    "a robust step of the paper's setting, in plain steps", case["ratio"]["median"],
                    {"the authors' on a V100": float(ratios["robust training"])}, fixed(1),
                    low=True,
                )  # fmt: skip
    else:
        rows.append(["measured", NOT_RUN, "-", "-", "-"])
    head = ["", "step / plain step", "what its passes alone take", "a step", "a plain step"]
    return (
        table(head, rows)
        + "\n\nOn a CPU the attack's passes cost as much as training passes; the authors do not "
        "say what their plain step was."
    )


def attack_strength(book: Book) -> str:
    found = book.files.csv("attack_strength.csv")
    if found is None:
        return NOT_RUN
    columns = {
        "at_largest_eps": f"stand eps {number(found[0]['largest_eps']):g}, %",
        "rise_xent": "rise with eps, cross entropy",
        "rise_margin": "rise with eps, margin",
        "most_steps_take": "more steps take",
        "most_restarts_take": "more starts take",
    }
    rows = [
        [NAMES[row["network"]], *(fixed(0)(number(row[key])) for key in columns)] for row in found
    ]
    return (
        "PGD on MNIST, with the usual eps where it does not vary; accuracies in points. Of "
        "a network whose gradients can be trusted nothing stands an eps that turns any image into "
        "any other, no accuracy rises with eps, and more steps and starts take little. These are "
        "alarms, and that none rings proves nothing: AutoAttack takes more, see above.\n\n"
        + table(["network", *columns.values()], rows)
        + "\n\nEach falls where the box ends that it was trained in, that of the first settings "
        "later than Madry's."
    )


def answer(book: Book) -> str:
    """In a sentence: the long runs on MNIST."""
    found = book.files.json("robust_mnist.json")
    if found is None:
        return f"robust classifiers: {NOT_RUN}"
    ours, madry = _long_runs(found)
    longer, more = found["runs"].get("longer"), ""
    if longer is not None:
        minutes = longer["training"]["cpu_seconds"] / 60
        more = f", and {_strong(longer)} with ours after {minutes:.0f} minutes more"
    return (
        f"**Robust classifiers.** MNIST, eps 0.3, the same 51 minutes: PGD leaves "
        f"{percent(ours['pgd']['robust_accuracy'])} % with ours and "
        f"{percent(madry['pgd']['robust_accuracy'])} % with Madry, AutoAttack {_strong(ours)} and "
        f"{_strong(madry)}{more}; TRADES is published with "
        f"{published.AUTOATTACK_MNIST['TRADES']:.1f}. Robust against PGD is not robust."
    )


def _strong(run: dict[str, Any]) -> str:
    """What AutoAttack has left."""
    strong = run["autoattack"]
    if strong is None:
        return NOT_RUN
    return with_interval(100 * strong["robust_accuracy"], strong["rows"])
