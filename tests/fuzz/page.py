"""Puts the counts of the last soak run into docs/reliability.md.

python tests/fuzz/page.py
"""

from __future__ import annotations

import json
from typing import Any

from driver import ROOT

SOAK = ROOT / "benchmarks" / "results" / "soak.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- soak -->\n", "<!-- end of soak -->\n"
WHAT = {
    "fuzz_ops": "random calls of ops, samplers and losses",
    "fuzz_geometry": "random calls of geometry, data, margins and attacks",
    "fuzz_readers": "mutated files",
    "guided_readers": "mutated files, by the branches they reach",
    "kill_runs": "kills of a training",
}


def table(soak: dict[str, Any]) -> str:
    """A row for every script that has run."""
    rows = ["| what | cases | failures | targets |", "|---|---|---|---|"]
    for name, what in WHAT.items():
        if name in soak:
            part = soak[name]
            targets = ", ".join(f"{t} {part['targets'][t]['cases']}" for t in part["targets"])
            rows.append(f"| {what} | {part['cases']} | {part['failures']} | {targets} |")
    return "\n".join(rows) + "\n"


def filled(page: str, soak: dict[str, Any]) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(soak)}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), json.loads(SOAK.read_text())))
