"""Results as a table to read, as JSON and CSV to keep, and as pictures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from levelset_ext.recipes.files import write_json
from levelset_ext.whole_files import write_whole

Result = dict[str, Any]


def lines(what: str, result: Result) -> Iterator[str]:
    """The table: a block per case, a line per competitor."""
    if what == "ops":
        yield ""
        yield "ops: time of ours, bytes moved, and the others' time over that of ours"
        yield from op_lines(result)
        return
    for case in result["cases"]:
        yield ""
        yield f"{what}: {case['case']}"
        yield from block(case)
        for name, why in case["skipped"].items():
            yield f"  {name}: left out ({why})"
        if "ours_gflops" in case:
            share = case.get("ours_share_of_matrix_rate")
            yield f"  ours: {case['ours_gflops']:.0f} GFLOP/s" + (
                "" if share is None else f", {share:.0%} of the fastest matrix product here"
            )
    for case in result.get("growth", []):
        if case is result["growth"][0]:
            yield ""
            yield f"{what}: growth, milliseconds"
        each = "  ".join(
            f"{name} {1e3 * entry['seconds']['median']:.3g}"
            for name, entry in case["competitors"].items()
        )
        yield f"  {case['axis']:>10} = {case['value']:<6} {each}"


def op_lines(result: Result) -> Iterator[str]:
    """A line per case: time, GB/s and the share of a copy of ours, and the ratios of the others."""
    order = {op: place for place, op in enumerate(result["geometric_mean_ratio"])}
    for case in sorted(result["cases"], key=lambda c: order[c["op"]]):
        op = case["op"]
        entries = case["competitors"]
        mine = entries[case["ours"]]
        others = "  ".join(
            f"{name} x{ratio['median']:.2f} ({ratio['q1']:.2f} ... {ratio['q3']:.2f})"
            for name, ratio in ((name, entry["ratio"]) for name, entry in entries.items())
            if name != case["ours"]
        )
        left_out = "".join(f"  {name} left out ({why})" for name, why in case["skipped"].items())
        yield (
            f"  {op:16} n {case['rows']:<8} l {case['outputs']} d {case['dimension']:<4} "
            f"{duration(mine['seconds']['median']):>8} {mine['gb_per_s']:6.2f} GB/s, "
            f"{mine['share_of_copy']:4.0%} of a copy{' ' if mine['near_copy'] else '*'} "
            f"{others}{left_out}"
        )
    for op, by_name in result["geometric_mean_ratio"].items():
        means = ", ".join(f"{name} x{ratio:.2f}" for name, ratio in by_name.items())
        yield f"  {op}, geometric mean over all sizes: {means}"
    for op, by_name in result["near_copy"].items():
        shares = ", ".join(f"{name} {some} of {every}" for name, (some, every) in by_name.items())
        yield f"  {op}, large cases at 60 % of a copy or more (* below): {shares}"


def block(case: Result) -> Iterator[str]:
    names = list(case["competitors"])
    width = max(map(len, names))
    head = f"{'time':>10} {'quartiles':>21} {'x ours':>7} {'quartiles':>15} {'x CPU':>6}"
    yield f"  {'':{width}}  {head}"
    for name, entry in case["competitors"].items():
        t, r, busy = entry["seconds"], entry["ratio"], entry["cpu_ratio"]
        text = (
            f"  {name:{width}}  {duration(t['median']):>10} "
            f"{duration(t['q1']) + ' ... ' + duration(t['q3']):>21} "
            f"{r['median']:7.2f} {r['q1']:6.2f} ... {r['q3']:<5.2f} {busy['median']:6.2f}"
        )
        yield (text + figures(entry)).rstrip()


def figures(entry: Result) -> str:
    """The rest of a line: whatever the case measures besides."""
    words = []
    if entry.get("peak_extra_mb") is not None:
        words.append(f"{entry['peak_extra_mb']:.0f} MB")
    if "row_evaluations" in entry:
        words.append(f"{entry['row_evaluations']:.2f} evaluations a row")
    if "converged" in entry:
        words.append(f"{entry['converged']} converged")
    if "share_of_copy" in entry:
        words.append(f"{entry['gb_per_s']:.2f} GB/s, {entry['share_of_copy']:.0%} of a copy")
    if "gradient_error" in entry:
        words.append(f"gradient within {entry['gradient_error']:.0e}")
    return "  " + ", ".join(words)


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def limit_lines(limits: Result) -> Iterator[str]:
    rates = ", ".join(f"{k} {v:.0f}" for k, v in limits["matrix_gflops"].items())
    shape = " x ".join(map(str, limits["matrix_shape"]))
    yield f"matrix products, GFLOP/s at {shape}: {rates}"
    copies = ", ".join(f"{k} {v:.1f}" for k, v in limits["copy_gb_per_s"].items())
    yield f"copy, GB/s: {copies}"
    calls = ", ".join(f"{k} {v:.1f}" for k, v in limits["call_microseconds"].items())
    yield f"a call, microseconds: {calls}"


def write(folder: Path, what: str, result: Result) -> list[str]:
    """WHAT.json, WHAT.csv and the pictures, if matplotlib is there; returns their names."""
    names = [f"{what}.json", f"{what}.csv"]
    write_json(folder / names[0], result)
    text = table_text(result)
    write_whole(folder / names[1], lambda stream: stream.write(text.encode()))
    return names + draw(folder, what, result)


_FLAT = (
    "case", "op", "axis", "value", "rows", "outputs", "dimension", "width", "hidden_layers",
    "cloud",
)  # fmt: skip


def table_text(result: Result) -> str:
    """One row per case and competitor."""
    rows = []
    for case in [*result["cases"], *result.get("growth", [])]:
        for name, entry in case["competitors"].items():
            row = {key: case.get(key, "") for key in _FLAT} | {"competitor": name}
            for key, value in entry.items():
                if isinstance(value, dict):
                    row |= {f"{key}_{part}": f"{number:.6g}" for part, number in value.items()}
                elif key != "about":
                    row[key] = f"{value:.6g}" if isinstance(value, float) else value
            rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = [c for c in columns if any(row.get(c, "") not in ("", None) for row in rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --- pictures -------------------------------------------------------------------------------------

# Everyone has one colour in all pictures.
_COLOURS = {
    "ours": "#1b7837",
    "ours, any network": "#7fbf7b",
    "ours, mixed": "#00441b",
    "ours, out=": "#7fbf7b",
    "ours, module": "#7fbf7b",
    "ours, new cloud": "#7fbf7b",
    "published": "#d73027",
    "eager": "#4575b4",
    "torch.compile": "#762a83",
    "torch.func": "#a6761d",
    "compaction": "#fdae61",
    "compaction, oneDNN": "#e08214",
    "scipy": "#878787",
    "scipy, new cloud": "#bababa",
    "cdist": "#91bfdb",
}
_OTHER = "#444444"


def draw(folder: Path, what: str, result: Result) -> list[str]:
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    names = []
    if what == "ops":
        names.append(_save(folder, f"{what}.png", _shares(result)))
    else:
        names.append(_save(folder, f"{what}.png", _bars(result)))
    if result.get("growth"):
        names.append(_save(folder, f"{what}_growth.png", _curves(result["growth"])))
    return names


def _save(folder: Path, name: str, figure: Any) -> str:
    write_whole(
        folder / name,
        lambda stream: figure.savefig(stream, format="png", dpi=110, bbox_inches="tight"),
    )
    import matplotlib.pyplot as plt

    plt.close(figure)
    return name


def _colour(name: str) -> str:
    return _COLOURS.get(name, _OTHER)


def _names(cases: list[Result]) -> list[str]:
    return list(dict.fromkeys(name for case in cases for name in case["competitors"]))


def _bars(result: Result) -> Any:
    """Ratios to ours, medians with quartiles, a panel per case."""
    import matplotlib.pyplot as plt

    cases = result["cases"]
    heights = [len(case["competitors"]) for case in cases]
    figure, axes = plt.subplots(
        len(cases),
        1,
        figsize=(7.5, 0.36 * sum(heights) + 0.9 * len(cases)),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        layout="constrained",
    )
    for axis, case in zip(axes[:, 0], cases, strict=True):
        entries = case["competitors"]
        names = list(entries)[::-1]
        ratios = [entries[name]["ratio"] for name in names]
        middle = [r["median"] for r in ratios]
        around = [
            [r["median"] - r["q1"] for r in ratios],
            [r["q3"] - r["median"] for r in ratios],
        ]
        colours = [_colour(name) for name in names]
        axis.barh(names, middle, xerr=around, color=colours, error_kw={"lw": 1, "capsize": 2})
        for place, name in enumerate(names):
            digits = 2 if middle[place] < 10 else 0
            seconds = entries[name]["seconds"]["median"]
            text = f"{middle[place]:.{digits}f}x   {duration(seconds)}"
            axis.annotate(
                text,
                (ratios[place]["q3"], place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axis.set_xlim(0, 1.3 * max(r["q3"] for r in ratios))
        axis.axvline(1.0, color="0.3", lw=0.8, ls=":")
        axis.set_title(case["case"], fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[-1, 0].set_xlabel("time over that of ours: median and quartiles", fontsize=8)
    return figure


def _curves(growth: list[Result]) -> Any:
    """Seconds against one size at a time."""
    import matplotlib.pyplot as plt

    order = _names(growth)
    keys = list(dict.fromkeys(case["axis"] for case in growth))
    columns = min(3, len(keys))
    count = -(-len(keys) // columns)
    figure, axes = plt.subplots(
        count, columns, figsize=(3.6 * columns, 3.0 * count), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(keys) :]:
        axis.axis("off")
    for axis, key in zip(axes.flat, keys, strict=False):
        most = []
        cases = [case for case in growth if case["axis"] == key]
        x = [case["value"] for case in cases]
        for name in order:
            spreads = [case["competitors"][name]["seconds"] for case in cases]
            colour = _colour(name)
            most += [1e3 * s["median"] for s in spreads]
            axis.plot(
                x, [1e3 * s["median"] for s in spreads], "o-", ms=3, lw=1.3, color=colour,
                label=name,
            )  # fmt: skip
            axis.fill_between(
                x,
                [1e3 * s["q1"] for s in spreads],
                [1e3 * s["q3"] for s in spreads],
                color=colour,
                alpha=0.2,
                lw=0,
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(x, [str(v) for v in x])
        axis.minorticks_off()
        # Whole powers of ten, so that there is more than one line to read off.
        axis.set_ylim(
            10 ** math.floor(math.log10(0.9 * min(most))),
            10 ** math.ceil(math.log10(1.1 * max(most))),
        )
        axis.set_xlabel(key, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(True, lw=0.3)
    axes[0, 0].set_ylabel("milliseconds", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


def _shares(result: Result) -> Any:
    """Ops: GB/s as a share of a copy of as many bytes, against n; a row for each op."""
    import matplotlib.pyplot as plt

    cases = result["cases"]
    order = _names(cases)
    kinds = list(dict.fromkeys(case["op"] for case in cases))
    shapes = sorted({(case["dimension"], case["outputs"]) for case in cases})
    figure, axes = plt.subplots(
        len(kinds),
        len(shapes),
        figsize=(1.9 * len(shapes), 1.6 * len(kinds)),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, op in enumerate(kinds):
        for column, (d, l) in enumerate(shapes):  # noqa: E741
            axis = axes[row, column]
            some = [
                case
                for case in cases
                if (case["op"], case["dimension"], case["outputs"]) == (op, d, l)
            ]
            if not some:
                axis.axis("off")
                continue
            for name in order:
                x = [c["rows"] for c in some if name in c["competitors"]]
                y = [
                    c["competitors"][name]["share_of_copy"]
                    for c in some
                    if name in c["competitors"]
                ]
                axis.plot(x, y, "o-", ms=3, lw=1.2, color=_colour(name), label=name)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.axhline(1.0, color="0.5", lw=0.8, ls=":")
            axis.tick_params(labelsize=7)
            axis.grid(True, lw=0.3)
            if row == 0:
                axis.set_title(f"l = {l}, d = {d}", fontsize=8)
            if column == 0:
                axis.set_ylabel(f"{op}\nshare of a copy", fontsize=7)
            axis.set_xlabel("rows" if row == len(kinds) - 1 else "", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure
