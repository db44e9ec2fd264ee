"""From a raw point cloud to a mesh: train a network with Eq. 13, extract its zero level set.

A run is a folder. Everything in it is written beside its name and renamed, and the folder alone is
enough to go on after the process was killed at any moment:

    config.json      every setting, and which cloud
    checkpoint.pt    network, optimizer, random state, step
    history.csv      losses over the steps, and history.png
    mesh.ply         the zero level set in input units
    preview.png      the cloud and the mesh
    metrics.json     written last: a folder with it holds a finished run
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import trimesh
from torch import Tensor

from levelset_ext import losses, ops
from levelset_ext._load import build_info
from levelset_ext.data.meshes import write_mesh
from levelset_ext.data.scans import Normalization, read_points, synthetic_scan, validate_cloud
from levelset_ext.errors import InputError
from levelset_ext.geometry.compare import compare_meshes
from levelset_ext.geometry.extract import Mesh, extract_mesh
from levelset_ext.geometry.preview import render_preview
from levelset_ext.networks import MLP, ImplicitMLP
from levelset_ext.recipes.files import kept_checkpoint, save_checkpoint, taking_up, write_json
from levelset_ext.recipes.guard import Guard, finite_gradient
from levelset_ext.recipes.history import HistoryPicture, HistoryTable
from levelset_ext.recipes.observers import Observer, Observers, ProgressLine, Run
from levelset_ext.recipes.progress import Spent, clock, peak_memory_gb
from levelset_ext.recipes.ranks import ALONE, Ranks
from levelset_ext.recipes.run_folder import begin_run
from levelset_ext.recipes.soap import Soap
from levelset_ext.recipes.tensorboard import FOLDER as TENSORBOARD_FOLDER
from levelset_ext.result import LevelSetResult, Status
from levelset_ext.samplers import SamplePool, level_points, project

KIND = "levelset_ext reconstruct 1"
SIDES = 0.01  # in normalised units: beyond the noise of a scan, within what bounds a part
SIDES_EVERY = 25  # steps between two looks at the sign of F
SIDES_ROWS = 2000  # disks of such a look


@dataclass(frozen=True)
class ReconstructConfig:
    """Settings of a run. Lengths are in units of the normalised cloud (longest half side 0.9).

    Where samples start (``*_noise``, pairs of Gaussian sigma and share of the samples; what the
    shares leave is uniform in the cloud's bounding box widened by ``margin``): points near the
    cloud put samples where the surface must be decided, at several distances from it; uniform
    points find, and let Eq. 13 punish, sheets of the zero level set away from the cloud.
    """

    preset: str = "fast"
    seed: int = 0
    steps: int = 6000
    # network
    width: int = 128
    hidden_layers: int = 5
    activation: str = "silu"
    beta: float = 60.0
    skip: bool = False
    frequencies: tuple[float, ...] = ()
    start: str = "sphere"  # or "paper"
    start_radius: float = 0.64
    # Eq. 13
    lam_first: float = 1.0
    lam_last: float = 5.0
    lam_steps: int = 6000  # lambda grows over these
    lam_power: float = 2.0  # as this power of the steps done
    p: float = 2.0
    min_slope: float = 0.3
    levels: tuple[float, ...] = (0.0,)  # levels that samples are projected to; T has the others too
    # d(x, X): to the nearest "points", or to the "disks" around them, see losses.fit_disks, whose
    # centers are then the x_j of the second sum too.
    distance: str = "points"
    neighbours: int = 32  # of a disk
    # samples of one step
    projected: int = 512
    general: int = 1024
    cloud_points: int = 1024
    projected_noise: tuple[tuple[float, float], ...] = ((0.03, 0.85),)
    general_noise: tuple[tuple[float, float], ...] = ((0.02, 0.4), (0.1, 0.2), (0.3, 0.2))
    margin: float = 0.25
    # Points of the other levels are drawn from a pool of this size, whose nearest cloud points are
    # searched once: far from the cloud a search costs more than the network. 0 draws new ones.
    pool: int = 300_000
    newton_iters: int = 10
    # Points of a projected level are kept from step to step in a pool of this size and moved by
    # warm_jitter before they are projected again, see SamplePool. 0 draws new ones in every step.
    warm_pool: int = 0
    warm_jitter: float = 0.01
    warm_fresh: float = 0.1
    warm_iters: int = 2
    newton_tol: float = 1e-4
    newton_step: float = 0.15
    optimizer: str = "adam"  # or "soap", see levelset_ext.recipes.soap, with its own decays
    learning_rate: float = 3e-3
    beta2: float = 0.99  # of Adam
    schedule: str = "cosine"  # after a linear warm-up; or "halving"
    warmup: float = 0.05  # share of the steps
    warmup_steps: int = 0  # a second warm-up, so long however many steps there are
    halve_at: tuple[int, ...] = ()
    guard: bool = True  # goes back when the run diverges, see levelset_ext.recipes.guard
    # extraction
    resolution: int = 256
    checkpoint_every: int = 250


PRESETS: dict[str, ReconstructConfig] = {
    # At a rate of 7e-3 the bunny diverged; the guard is there for scans not tried yet.
    "fast": ReconstructConfig(
        steps=10_000,
        lam_steps=10_000,
        frequencies=(12.0, 24.0),
        distance="disks",
        optimizer="soap",
        learning_rate=5e-3,
        warmup_steps=100,
        pool=150_000,
    ),
    # The supplementary's setting: FC-2, an epoch is 10 batches of 10 K points, half of them moved
    # to the zero level set, 0.001 halved at epochs 500, 1500 and 3500, lambda 1 -> 5 over 1000
    # epochs.
    "paper": ReconstructConfig(
        preset="paper",
        steps=50_000,
        width=509,
        hidden_layers=7,
        activation="relu",
        skip=True,
        start="paper",
        lam_steps=10_000,
        lam_power=1.0,
        p=1.0,
        min_slope=0.0,
        projected=5_000,
        general=5_000,
        cloud_points=10_000,
        projected_noise=((0.1, 0.8),),
        general_noise=((0.01, 0.5), (0.2, 0.5)),
        margin=0.2,
        pool=0,
        newton_tol=1e-5,
        newton_step=math.inf,
        learning_rate=1e-3,
        beta2=0.999,
        schedule="halving",
        warmup=0.0,
        halve_at=(5_000, 15_000, 35_000),
        checkpoint_every=100,
    ),
}


def preset(
    name: str,
    steps: int | None = None,
    seed: int = 0,
    *,
    levels: tuple[float, ...] | None = None,
    p: float | None = None,
    lam: tuple[float, float] | None = None,
    resolution: int | None = None,
) -> ReconstructConfig:
    """A preset with another number of steps, its schedules stretched to it, a seed, settings of
    Eq. 13: levels to project to (normalised units), exponent, first and last lambda; and cells of
    the mesh along the longest side."""
    if name not in PRESETS:
        raise InputError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed: expected a number from 0 to 2^63 - 1, got {seed}")
    values = asdict(PRESETS[name])
    if steps is not None:
        if steps < 1:
            raise InputError(f"steps: expected at least 1, got {steps}")
        stretch = steps / values["steps"]
        values["lam_steps"] = max(1, round(values["lam_steps"] * stretch))
        values["halve_at"] = tuple(round(step * stretch) for step in values["halve_at"])
        values["steps"] = steps
    values["seed"] = seed
    if levels is not None:
        if not levels or len(levels) > values["projected"] or not np.isfinite(levels).all():
            raise InputError(f"levels: expected finite numbers, got {levels}")
        values["levels"] = levels
    if p is not None:
        if not 1 <= p < math.inf:
            raise InputError(f"p: expected an exponent >= 1, got {p}")
        values["p"] = p
    if lam is not None:
        if not (min(lam) >= 0 and max(lam) < math.inf):
            raise InputError(f"lam: expected two finite numbers >= 0, got {lam}")
        values["lam_first"], values["lam_last"] = lam
    if resolution is not None:
        if resolution < 1:
            raise InputError(f"resolution: expected at least 1, got {resolution}")
        values["resolution"] = resolution
    return config_from(values)


def config_from(values: dict[str, Any]) -> ReconstructConfig:
    """A config from JSON or a checkpoint, in which tuples have become lists."""
    known = {field.name for field in fields(ReconstructConfig)}
    if set(values) != known:
        odd = ", ".join(sorted(known.symmetric_difference(values)))
        raise InputError(f"config: expected the settings of this version, differs in {odd}")
    values = dict(values)
    for name in ("projected_noise", "general_noise"):
        values[name] = tuple(tuple(pair) for pair in values[name])
    for name in ("halve_at", "levels", "frequencies"):
        values[name] = tuple(values[name])
    values["newton_step"] = float(values["newton_step"])  # JSON has no infinity
    return ReconstructConfig(**values)


def network_of(config: ReconstructConfig) -> ImplicitMLP:
    """The network of a run, into which the parameters of its checkpoint fit."""
    return ImplicitMLP(
        3,
        1,
        config.width,
        config.hidden_layers,
        activation=config.activation,
        beta=config.beta,
        skip=config.skip,
        frequencies=config.frequencies,
    )


# --- one training run, without files ---


class Training:
    """The state of a run between two steps, and the step.

    Args:
        cloud: (N, d) float32 in normalised units, on the device to train on.
        config: settings.
        ranks: the processes that share the samples of a step; all have the whole cloud.
    """

    def __init__(self, cloud: Tensor, config: ReconstructConfig, ranks: Ranks = ALONE) -> None:
        self.cloud, self.config, self.ranks = cloud, config, ranks
        # All randomness is drawn on the CPU from one generator, so that a checkpoint holds all of
        # it and a seed means the same on every device.
        self.generator = torch.Generator().manual_seed(config.seed)
        self.network: ImplicitMLP = self.new_network().to(cloud.device)
        # Reads the parameters of the network in place.
        self.field = MLP.from_module(self.network)
        self.optimizer = self._new_optimizer()
        self.guard = Guard(self.network, self.optimizer, active=config.guard)
        self.disks: losses.Disks | None = None
        if config.distance == "disks":
            self.disks = losses.fit_disks(cloud, config.neighbours)
        self.low, self.high = cloud.amin(0) - config.margin, cloud.amax(0) + config.margin
        self.pool: tuple[Tensor, Tensor] | None = None
        if config.pool:
            starts = self._starts(config.pool, config.general_noise)
            self.pool = starts, ranks.rows(lambda x: ops.nearest_distance(x, cloud)[1], starts)
        self.warm = [self._warm_pool(level) for level in config.levels] if config.warm_pool else []
        self.step = 0
        # Sums over the steps so far, for the log and the metrics.
        self.converged_rows = 0
        self.projected_rows = 0
        self.rank_deficient_rows = 0
        self.skipped_steps = 0
        self.sign_changes: float | None = None  # at the last look

    def new_network(self) -> ImplicitMLP:
        """The network with its starting parameters, on the CPU."""
        config = self.config
        network = network_of(config)
        if config.start == "sphere":
            return network.init_sphere_(config.start_radius, self.generator)
        return network.init_paper_(self.generator)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        if config.optimizer == "soap":
            return Soap(self.network.parameters(), config.learning_rate)
        return torch.optim.Adam(
            self.network.parameters(),
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            eps=1e-12,
            fused=True,
        )

    def state(self) -> dict[str, Any]:
        counters = (
            "step",
            "converged_rows",
            "projected_rows",
            "rank_deficient_rows",
            "skipped_steps",
            "sign_changes",
        )
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "warm": [pool.state_dict() for pool in self.warm],
            "guard": self.guard.state(),
            "counters": {name: getattr(self, name) for name in counters},
        }

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.guard.load(state["guard"])
        for pool, kept in zip(self.warm, state["warm"], strict=True):
            pool.load_state_dict(kept)
        for name, value in state["counters"].items():
            setattr(self, name, value)

    def learning_rate(self) -> float:
        rate = self._scheduled_rate() * self.guard.rate
        if self.step < self.config.warmup_steps:
            rate *= (self.step + 1) / self.config.warmup_steps
        return rate

    def _scheduled_rate(self) -> float:
        config, done = self.config, self.step / self.config.steps
        if config.warmup > 0 and done < config.warmup:
            return config.learning_rate * (self.step + 1) / (config.warmup * config.steps)
        if config.schedule == "halving":
            return config.learning_rate * 0.5 ** sum(self.step >= at for at in config.halve_at)
        turn = (done - config.warmup) / (1 - config.warmup)
        return config.learning_rate * max(1e-3, 0.5 * (1 + math.cos(math.pi * turn)))

    def lam(self, step: int | None = None) -> float:
        """lambda of the next step, or of the one with this number, from 0."""
        config = self.config
        step = self.step if step is None else step
        grown = min(1.0, step / config.lam_steps) ** config.lam_power
        return config.lam_first + (config.lam_last - config.lam_first) * grown

    def _own(self, rows: Tensor) -> Tensor:
        """Those of this process."""
        return rows[self.ranks.share(len(rows))]

    def _rows(self, count: int) -> Tensor:
        """Random points of the cloud, or centers of its disks."""
        index = torch.randint(len(self.cloud), (count,), generator=self.generator)
        points = self.cloud if self.disks is None else self.disks.centers
        return points[index.to(self.cloud.device)]

    def _starts(self, count: int, noise: tuple[tuple[float, float], ...]) -> Tensor:
        """Starting points, see :class:`ReconstructConfig`."""
        parts: list[Tensor] = []
        rest = count
        for sigma, share in noise:
            some = min(round(share * count), rest)
            rest -= some
            offset = torch.randn(some, self.cloud.shape[1], generator=self.generator)
            parts.append(self._rows(some) + sigma * offset.to(self.cloud))
        unit = torch.rand(rest, self.cloud.shape[1], generator=self.generator).to(self.cloud)
        parts.append(self.low + unit * (self.high - self.low))
        return torch.cat(parts)

    def _newton_options(self) -> dict[str, Any]:
        config = self.config
        return {
            "tol": config.newton_tol,
            "max_step": config.newton_step,
            "box": (self.low - config.margin, self.high + config.margin),
        }

    def _warm_pool(self, level: float) -> SamplePool:
        config = self.config
        return SamplePool(
            config.warm_pool,
            lambda count: self._starts(count, config.projected_noise),
            level=level,
            jitter=config.warm_jitter,
            fresh=config.warm_fresh,
            max_iters=config.warm_iters,
            generator=self.generator,
            **self._newton_options(),
        )

    def samples(self) -> tuple[list[LevelSetResult], LevelSetResult, Tensor | None]:
        """Points projected to each level, points on whatever level set they lie on, and the cloud
        points nearest to the latter where the pool knows them: the share of this process."""
        config = self.config
        share = config.projected // len(config.levels)
        if self.warm:
            # Drawn whole by every process, as who is crowded depends on all.
            drawn = [pool.draw(self.field, share) for pool in self.warm]
            projected = [result[self.ranks.share(share)] for result in drawn]
        else:
            projected = [
                project(
                    self.field,
                    self._own(self._starts(share, config.projected_noise)),
                    level,
                    config.newton_iters,
                    **self._newton_options(),
                )
                for level in config.levels
            ]
        if self.pool is None:
            starts = self._own(self._starts(config.general, config.general_noise))
            nearest = None
        else:
            rows = torch.randint(config.pool, (config.general,), generator=self.generator)
            rows = self._own(rows.to(self.cloud.device))
            starts, nearest = self.pool[0][rows], self.pool[1][rows]
        return projected, level_points(self.field, starts), nearest

    def advance(self) -> losses.ReconstructionLoss:
        """One step of Eq. 13."""
        config = self.config
        self.guard.begin(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        projected, general, nearest = self.samples()
        loss = losses.reconstruction(
            self.field,
            [*projected, general],
            self.cloud,
            self._own(self._rows(config.cloud_points)),
            lam=self.lam(),
            p=config.p,
            min_slope=config.min_slope,
            nearest=[*(None for _ in projected), nearest],
            disks=self.disks,
            add_up=None if self.ranks.size == 1 else self.ranks.add,
        )
        self.optimizer.zero_grad(set_to_none=True)
        usable = bool(torch.isfinite(loss.total))
        if usable:
            loss.total.backward()
            self.ranks.add_gradients(self.network.parameters())
            usable = finite_gradient(self.network.parameters())
        if usable:
            self.optimizer.step()
        else:
            self.skipped_steps += 1
        converged, rows, deficient = map(
            int,
            self.ranks.total(
                sum(int(result.converged.sum()) for result in projected),
                sum(map(len, projected)),
                sum(
                    int((result.status == Status.RANK_DEFICIENT).sum())
                    for result in (*projected, general)
                ),
            ),
        )
        self.converged_rows += converged
        self.projected_rows += rows
        self.rank_deficient_rows += deficient
        self.step += 1
        returns = len(self.guard.returns)
        self.guard.after(
            self.step,
            float(loss.levels.sum() + loss.cloud),  # without lambda, which grows
            usable=usable,
            shares={"converged projections": converged / rows, **self._sides()},
            last=self.step == config.steps,
        )
        if len(self.guard.returns) > returns:
            self.sign_changes = None  # was of the weights that are gone
        return loss

    def _sides(self) -> dict[str, float]:
        """What the guard is told of the sign of F, looked at now and then."""
        if self.disks is None or self.network.outputs != 1:
            return {}
        if self.step % SIDES_EVERY == 0 or self.sign_changes is None:
            apart = max(1, len(self.cloud) // SIDES_ROWS)
            self.sign_changes = self.sign_change_share(self.disks, apart)
        return {"disks across which F changes its sign": self.sign_changes}

    @torch.no_grad()
    def sign_change_share(self, disks: losses.Disks, apart: int = 1) -> float:
        """The share of the disks across which F changes its sign, ``SIDES`` to either side.

        Eq. 13 knows |F| alone, so a loss that is small says nothing of it: where F has the same
        sign on both sides of the cloud, its zero level set is elsewhere, a film of bubbles, or a
        hole.

        Args:
            disks: of the cloud.
            apart: 1 looks at every disk, k at one of k.
        """
        centers, step = disks.centers[::apart], SIDES * disks.normals[::apart]
        beside = torch.cat([centers + step, centers - step])
        # In parts: the activations of a whole scan would be the largest memory of the command.
        values = torch.cat([self.network(part)[:, 0] for part in beside.split(16_384)])
        above, below = values.chunk(2)
        return float((above * below < 0).double().mean())


# --- the run as a folder ---


@dataclass(frozen=True)
class Cloud:
    """What is reconstructed: points in input units, and how config.json names them."""

    points: np.ndarray
    name: str
    truth: trimesh.Trimesh | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.points).tobytes()).hexdigest()


def load_cloud(scan: str | None, seed: int) -> Cloud:
    """The points of a file, or of the synthetic scan when there is none."""
    if scan is None:
        made = synthetic_scan(seed=seed)
        return Cloud(made.points, "synthetic scan", made.truth)
    points = read_points(scan)
    summary = validate_cloud(points, name=str(scan))
    if summary.coplanar:
        raise InputError(
            f"{scan}: expected points of a surface that bounds a volume, got {len(points)} points "
            "in one plane"
        )
    return Cloud(points, str(scan))


def reconstruct(
    cloud: Cloud,
    out: Path,
    config: ReconstructConfig,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
    observers: Sequence[Observer] = (),
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Runs, or with ``resume`` goes on with, a reconstruction in the folder ``out``.

    Args:
        cloud: what to reconstruct.
        out: folder, made if missing. Without ``resume`` a run that is there is replaced.
        config: settings.
        device: where to train.
        resume: continue the run in ``out``; afresh if there is none, nothing to do if it is
            finished.
        say: where messages go; progress goes to stderr. Of several processes the first one speaks.
        observers: who else watches, see :mod:`levelset_ext.recipes.observers`; the caller
            closes them. Of several processes the first one is watched.
        ranks: the processes of the run, all of which call this; the first one writes.

    Returns:
        The contents of metrics.json.

    Raises:
        InputError: ``out`` cannot be written, or holds the run of another cloud or other settings.
    """
    say = ranks.speaker(say)
    header = {"kind": KIND, "cloud": cloud.name, "digest": cloud.digest, "settings": asdict(config)}
    finished = ranks.first(
        lambda: begin_run(
            out,
            header,
            results=RESULTS,
            what="a reconstruction",
            same="a run with the same settings",
            named="cloud",
            resume=resume,
            say=say,
        )
    )
    if finished is not None:
        return finished

    if (note := outlier_note(cloud.points)) is not None:
        say(note)
    watch = watching(observers, say, ranks)
    run = train_in_folder(
        Training, cloud.points, out, config, KIND, device, resume, say, watch, ranks
    )
    training, normal = run.training, run.normal
    say(f"trained in {clock(run.trained)}; extracting at resolution {config.resolution}")

    mesh = _extract(training, normal)
    if mesh.empty:
        raise RuntimeError("the trained network has no zero level set inside the box of the cloud")

    def write() -> dict[str, Any]:
        write_mesh(out / "mesh.ply", mesh.vertices, mesh.faces, mesh.normals)
        in_unit = replace(mesh, vertices=normal.to_unit(mesh.vertices))
        render_preview(out / "preview.png", normal.to_unit(cloud.points), in_unit, training.field)
        metrics = _metrics(cloud, mesh, training, run.history, run.trained)
        metrics["seconds"] = run.spent.seconds()
        metrics["cpu_seconds"] = run.spent.cpu_seconds()
        watch.done({"preview": out / "preview.png"}, metrics)
        write_json(out / "metrics.json", metrics)
        return metrics

    return ranks.first(write)


def outlier_note(points: np.ndarray) -> str | None:
    """What to say of points (N, d) of which a few make the box much larger than the others, or
    None. The network sees the box at one size, and so the object the smaller the larger it is."""
    low = np.quantile(points, 0.001, axis=0, method="higher")
    high = np.quantile(points, 0.999, axis=0, method="lower")
    if not np.linalg.norm(np.ptp(points, axis=0)) > 2 * np.linalg.norm(high - low):
        return None
    # Twice as large, as 0.2 % of any cloud lie outside of the inner box itself.
    low, high = low - (high - low) / 2, high + (high - low) / 2
    count = int(((points < low) | (points > high)).any(1).sum())
    corners = " to ".join(
        "(" + ", ".join(f"{c:.4g}" for c in corner) + ")" for corner in (low, high)
    )
    return (
        f"note: the object is small in its box, which is made large by {count} of {len(points)} "
        f"points; remove outliers first, such as all points outside of {corners}"
    )


WATCHED = ("history.csv", "history.png", TENSORBOARD_FOLDER)  # what watching leaves in a folder
RESULTS = ("mesh.ply", "preview.png", "checkpoint.pt", *WATCHED)


def watching(
    observers: Sequence[Observer], say: Callable[[str], None], ranks: Ranks = ALONE
) -> Observers:
    """The sinks that every run has, and some more; none but on the first process."""
    if not ranks.main:
        return Observers([], say)
    return Observers([ProgressLine(), HistoryTable(), HistoryPicture(), *observers], say)


AnyTraining = TypeVar("AnyTraining", bound=Training)
AnyConfig = TypeVar("AnyConfig", bound=ReconstructConfig)


@dataclass(frozen=True)
class TrainedRun(Generic[AnyTraining]):
    """A training in a folder after its last step.

    normal: from input units to those of the training. history: the last losses. trained: seconds of
    training, those before a kill included; spent: the same until now, and on the processor.
    """

    training: AnyTraining
    normal: Normalization
    history: dict[str, float]
    trained: float
    spent: Spent


def train_in_folder(
    make: Callable[[Tensor, AnyConfig, Ranks], AnyTraining],
    points: np.ndarray,
    out: Path,
    config: AnyConfig,
    kind: str,
    device: torch.device | str,
    resume: bool,
    say: Callable[[str], None],
    watch: Observers,
    ranks: Ranks = ALONE,
) -> TrainedRun[AnyTraining]:
    """Makes the training of points (N, d) in input units, takes up its checkpoint in ``out`` with
    ``resume``, and takes all steps that are left, with checkpoints of the given kind."""
    spent = Spent()
    normal = Normalization.fit(points)
    unit = torch.from_numpy(normal.to_unit(points).astype(np.float32)).to(device)
    training = make(unit, config, ranks)
    training.guard.say = say
    saved = ranks.first(lambda: kept_checkpoint(out, kind)) if resume else None
    if saved is not None:
        with taking_up(out / "checkpoint.pt"):
            training.load(saved["training"])
            spent = Spent(
                saved["seconds"] + spent.seconds(), saved["cpu_seconds"] + spent.cpu_seconds()
            )
        say(f"going on at step {training.step} of {config.steps}")

    points_of_a_step = config.projected + config.general + config.cloud_points
    watch.begin(
        Run(
            out,
            config.steps,
            training.step,
            asdict(config),
            training,
            (points_of_a_step, "points"),
        )
    )
    # A run that was killed between its last step and its results has no step left to tell of.
    if saved is not None and training.step == config.steps:
        history = saved["last"]
    else:
        history = _take_steps(training, out, kind, spent, watch)
    return TrainedRun(training, normal, history, spent.seconds(), spent)


def _take_steps(
    training: Training, out: Path, kind: str, spent: Spent, watch: Observers
) -> dict[str, float]:
    """All steps that are left, with checkpoints of the given kind; returns the last losses."""
    config = training.config
    recent: dict[str, float] = {}
    while training.step < config.steps:
        loss = training.advance()
        last = training.step == config.steps
        due = training.step % config.checkpoint_every == 0 and training.guard.sound()
        saved = last or due
        if last:
            recent = _terms(loss)
        if saved and training.ranks.main:
            save_checkpoint(
                out / "checkpoint.pt",
                {
                    "kind": kind,
                    "seconds": spent.seconds(),
                    "cpu_seconds": spent.cpu_seconds(),
                    "settings": asdict(config),
                    "training": training.state(),
                    "last": recent,
                },
            )
        watch.after_step(training.step, partial(_look, training, loss), last=last, saved=saved)
    return recent


def _terms(loss: losses.ReconstructionLoss) -> dict[str, float]:
    return {
        "loss": float(loss.total.detach()),
        "loss_projected": float(loss.levels[:-1].sum()),
        "loss_other_levels": float(loss.levels[-1]),
        "loss_cloud": float(loss.cloud),
    }


def _look(training: Training, loss: losses.ReconstructionLoss) -> tuple[dict[str, float], str]:
    """The figures of the step that was taken last, and the same for a person."""
    figures = {
        **_terms(loss),
        "lam": training.lam(training.step - 1),
        "lr": training.optimizer.param_groups[0]["lr"],
        "converged_share": training.converged_rows / training.projected_rows,
        "zero_gradient": float(training.rank_deficient_rows),
        "skipped": float(training.skipped_steps),
    }
    note = (
        f"loss {figures['loss']:.5f} = {figures['loss_projected']:.5f} (projected) + "
        f"{figures['loss_other_levels']:.5f} (others) + {figures['lam']:.2f} x "
        f"{figures['loss_cloud']:.5f} (cloud)  converged {100 * figures['converged_share']:.1f} %  "
        f"zero gradient {training.rank_deficient_rows}"
    )
    return figures, note


def _extract(training: Training, normal: Normalization) -> Mesh:
    """The zero level set in input units, over the cloud's box widened by the samples' margin."""
    low, high = training.low.cpu().double().numpy(), training.high.cpu().double().numpy()
    network = training.network
    mesh = extract_mesh(
        network,
        (low, high),
        resolution=training.config.resolution,
        spread=training.ranks.spread,
    )
    return Mesh(**{**vars(mesh), "vertices": normal.to_input(mesh.vertices)})


def _metrics(
    cloud: Cloud,
    mesh: Mesh,
    training: Training,
    history: dict[str, float],
    trained: float,
) -> dict[str, Any]:
    surface = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    parts: list[np.ndarray] = list(
        trimesh.graph.connected_components(surface.face_adjacency, min_len=1)
    )
    extent = np.ptp(cloud.points, axis=0)
    diagonal = float(np.linalg.norm(extent))
    metrics: dict[str, Any] = {
        "points": len(cloud.points),
        "diagonal": diagonal,
        "vertices": len(mesh.vertices),
        "faces": len(mesh.faces),
        "watertight": bool(surface.is_watertight),
        "components": len(parts),
        "genus": (2 * len(parts) - int(surface.euler_number)) // 2
        if surface.is_watertight
        else None,
        "cloud_to_mesh": _cloud_distance(cloud, surface) / diagonal,
        "sign_change_share": training.sign_change_share(
            training.disks or losses.fit_disks(training.cloud, training.config.neighbours)
        ),
        "steps": training.step,
        "skipped_steps": training.skipped_steps,
        "divergences": training.guard.returns,
        "converged_share": training.converged_rows / training.projected_rows,
        "rank_deficient_rows": training.rank_deficient_rows,
        "extraction": {
            "evaluations": mesh.evaluations,
            "residual": mesh.residual,
            "tolerance": mesh.tolerance,
            "unrefined": mesh.unrefined,
        },
        "training_seconds": trained,
        "peak_memory_gb": peak_memory_gb(),
        "build": build_info(),
        **history,
    }
    if cloud.truth is not None:
        metrics["against_truth"] = compare_meshes(surface, cloud.truth)
    return metrics


def _cloud_distance(cloud: Cloud, surface: trimesh.Trimesh) -> float:
    """Mean distance from 20 000 cloud points to a dense sampling of the mesh, input units."""
    from scipy.spatial import cKDTree

    random = np.random.default_rng(0)
    dense = trimesh.sample.sample_surface(surface, 500_000, seed=0)[0]
    some = cloud.points[random.permutation(len(cloud.points))[:20_000]]
    return float(cKDTree(dense).query(some)[0].mean())
