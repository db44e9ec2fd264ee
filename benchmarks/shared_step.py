"""A step of ``reconstruct`` as one of k processes takes it: processor time of its share, and
what it would send. Nothing is sent: one process plays rank 0 of k, so that the figures hold on a
machine with few cores and other work.

    python benchmarks/shared_step.py --out benchmarks/results/shared_step.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from levelset_ext.data.scans import Normalization
from levelset_ext.recipes.files import write_json
from levelset_ext.recipes.progress import say
from levelset_ext.recipes.ranks import Ranks
from levelset_ext.recipes.reconstruct import Training, load_cloud, preset


@dataclass(frozen=True)
class Counted(Ranks):
    """Counts messages and their bytes instead of sending them."""

    sent: Counter[str] = field(default_factory=Counter)

    def _count(self, size: int) -> None:
        self.sent["messages"] += 1
        self.sent["bytes"] += size

    def total(self, *numbers: float) -> list[float]:
        self._count(8 * len(numbers))
        return list(numbers)

    def add(self, values: Tensor) -> Tensor:
        self._count(values.nbytes)
        return values

    def rows(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return work(x)  # once, before the first step

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        self._count(sum(p.nbytes for p in parameters))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", default="1,2,4,8,16")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    points = load_cloud(None, 0).points
    unit = torch.from_numpy(Normalization.fit(points).to_unit(points).astype(np.float32))
    sizes = [int(size) for size in args.processes.split(",")]
    config = preset("fast")
    runs = {}
    for size in sizes:
        ranks = Counted(0, size)
        training = Training(unit, config, ranks if size > 1 else Ranks())
        for _ in range(5):
            training.advance()
        ranks.sent.clear()
        runs[size] = (training, ranks)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(args.rounds):  # in turns: what disturbs the machine meets all alike
        for size, (training, _) in runs.items():
            began = time.process_time()
            training.advance()
            seconds[size].append(time.process_time() - began)
    cases = {}
    for size, (training, ranks) in runs.items():
        quartiles = statistics.quantiles(seconds[size], n=4)
        cases[str(size)] = {
            "rows": (config.projected + config.general + config.cloud_points) // size,
            "cpu_seconds": dict(zip(("q1", "median", "q3"), quartiles, strict=True)),
            "messages": ranks.sent["messages"] / args.rounds,
            "bytes": ranks.sent["bytes"] / args.rounds,
            "parameters": sum(p.numel() for p in training.network.parameters()),
        }
        say(f"{size}: {1e3 * quartiles[1]:.1f} ms, {cases[str(size)]}")
    write_json(
        args.out,
        {
            "command": "python benchmarks/shared_step.py --out FILE",
            "rounds": args.rounds,
            "threads": 1,
            "torch": torch.__version__,
            "machine": "one of 2 shared cores (x86-64, AVX-512), processor time",
            "cases": cases,
        },
    )


if __name__ == "__main__":
    main()
