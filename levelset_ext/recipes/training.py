"""Training a classifier: settings, the state between two steps, and the step. No files."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from levelset_ext.data.augment import affine_between, augment_cifar, bent, random_affine, rolled
from levelset_ext.data.images import Images
from levelset_ext.errors import InputError
from levelset_ext.field import evaluation_copy
from levelset_ext.margin import margin
from levelset_ext.networks import build
from levelset_ext.objectives import OBJECTIVES, Objective, Step
from levelset_ext.recipes.guard import Guard
from levelset_ext.recipes.history import RESERVED, History
from levelset_ext.recipes.ranks import ALONE, Ranks, WholeDraws
from levelset_ext.recipes.settings import checked

__all__ = ["TrainConfig", "Training", "accuracy", "make_objective"]

OPTIMIZERS = ("adam", "adamw", "sgd", "nesterov")
SCHEDULES = ("cosine", "halving", "one-cycle", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Schedules are in shares of the training: they stretch to any length.

    An epoch is split evenly into the fewest batches of at most ``batch`` images, so that none is a
    small rest.

    schedule: "cosine" rises linearly to ``lr`` over the share ``lr_warmup`` and falls to 0 along a
    cosine; "one-cycle" rises from lr / 25 over that share and falls to 0, both linearly; "halving"
    and "constant" rise as "cosine" does, then halve ``lr`` at every share of ``halve_at``, or keep
    it. optimizer: "adam" (weight decay as a part of the loss), "adamw" (decoupled), "sgd" and
    "nesterov" (with momentum).
    """

    objective: str = "cross-entropy"
    settings: dict[str, Any] = field(default_factory=dict)  # of the objective; the rest by default
    network: str = "convnet-4a"
    options: dict[str, Any] = field(default_factory=dict)  # of networks.build
    preset: str = ""  # the name these settings started from; of no effect
    seed: int = 0
    epochs: float = 20.0
    steps: int = 0  # instead of epochs, if not 0
    batch: int = 128
    # optimizer
    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = math.inf  # longest gradient of all parameters together
    schedule: str = "cosine"
    lr_warmup: float = 0.05
    halve_at: tuple[float, ...] = ()
    # Decay of an exponential moving average of the weights, which then is the network of the
    # checkpoint; 0 for none. In the first steps it is (1 + step) / (10 + step).
    ema: float = 0.0
    augment: bool = False  # shifts by up to 4 pixels, mirrored half of the time
    # Pixels by which an image moves at most, up or down and to a side, anew at every visit; what
    # leaves comes in at the other side. The searches of warm starts move along.
    shift: int = 0
    # Largest angle (radians), slope of a shear and logarithm of a stretch of an affine map that
    # bends an image anew at every visit; ``shift`` is then part of the map, and zeros come in.
    bend: float = 0.0
    held_out: float = 0.0  # share of the training rows to validate on; 0 validates on the test rows
    # Weights and images in the order in which convolutions on a CPU are fastest.
    channels_last: bool = True
    # Whether the objective runs under torch.autocast with bfloat16; the weights stay float32.
    autocast: bool = False
    guard: bool = True  # goes back when the run diverges, see levelset_ext.recipes.guard
    log_every: int = 100  # steps
    checkpoint_every: int = 200  # steps, or once a minute where that is more often

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise InputError(
                f"objective: expected one of {', '.join(OBJECTIVES)}, got {self.objective!r}"
            )
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("schedule", self.schedule, SCHEDULES)
        check_seed(self.seed)
        for name in ("batch", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.shift < 0:
            raise InputError(f"shift: expected a number of pixels >= 0, got {self.shift}")
        if not 0 <= self.bend < 1:
            raise InputError(f"bend: expected 0 <= bend < 1, got {self.bend}")
        if self.steps < 0 or (self.steps == 0 and not 0 < self.epochs < math.inf):
            what = ("steps", self.steps) if self.steps else ("epochs", self.epochs)
            raise InputError(f"{what[0]}: expected a number > 0, got {what[1]}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr: expected a number > 0, got {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay: expected a number >= 0, got {self.weight_decay}")
        if not self.clip_norm > 0:
            raise InputError(f"clip_norm: expected a length > 0, got {self.clip_norm}")
        for name in ("momentum", "beta2", "lr_warmup", "ema", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        if not all(0 <= share <= 1 for share in self.halve_at):
            raise InputError(f"halve_at: expected shares from 0 to 1, got {self.halve_at}")
        if self.augment and self.settings.get("warm_start"):
            raise InputError(
                "augment: expected no augmentation with warm_start, which goes on with the images "
                "of the last epoch"
            )
        if self.optimizer == "nesterov" and self.momentum == 0:
            raise InputError("momentum: expected a number > 0 with nesterov, got 0")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise InputError(f"seed: expected a number from 0 to 2^63 - 1, got {seed}")


def _one_of(name: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise InputError(f"{name}: expected one of {', '.join(names)}, got {value!r}")


def make_objective(name: str, settings: Mapping[str, Any]) -> Objective:
    """An objective by its name, with settings checked; InputError names what does not fit."""
    _one_of("objective", name, tuple(OBJECTIVES))
    kind = OBJECTIVES[name]
    try:
        return kind(**checked(kind, settings, name))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None


def new_network(config: TrainConfig, seed: int) -> nn.Module:
    """The network of the settings with its first weights. Layers draw them from torch's own
    generator, which is lent a seed."""
    outside = torch.default_generator.get_state()
    try:
        torch.default_generator.manual_seed(seed)
        options = dict(config.options)
        if "shape" in options:
            options["shape"] = tuple(options["shape"])
        return build(config.network, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"network: {error}") from None
    finally:
        torch.default_generator.set_state(outside)


class Training:
    """The state of a run between two steps, and the step.

    Args:
        data: to train on; of every epoch each row is used once.
        config: settings.
        device: where to train.
        network: what to start from, made by ``networks.build``; it is copied. Without one a network
            is made from the settings and the seed.
        ranks: the processes that share every batch; all have all images.
    """

    def __init__(
        self,
        data: Images,
        config: TrainConfig,
        device: torch.device | str = "cpu",
        network: nn.Module | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.device, self.ranks = config, torch.device(device), ranks
        self.objective = make_objective(config.objective, config.settings)
        # All randomness is drawn on the CPU from one generator, so that a checkpoint holds all of
        # it and a seed means the same on every device.
        self.generator = torch.Generator().manual_seed(config.seed)
        if network is None:
            network = self._new_network()
        network = copy.deepcopy(network).to(self.device)
        if config.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network: nn.Module = network.train()
        self.average = copy.deepcopy(network) if config.ema else None
        self.optimizer = _optimizer(self.network, config)
        averages = [] if self.average is None else [self.average]
        self.guard = Guard(self.network, self.optimizer, *averages, active=config.guard)

        images, labels = data.images, data.labels.long()
        held = 0
        if config.held_out:
            held = min(max(1, round(config.held_out * len(data))), len(data) - 1)
            order = torch.randperm(len(data), generator=self.generator)
            images, labels = images[order], labels[order]
        self.images, self.labels = images[held:].to(self.device), labels[held:].to(self.device)
        self.held_out: Images | None = None
        if held:
            self.held_out = Images(images[:held], labels[:held], data.name, data.classes)
        self.steps_per_epoch = -(-len(self.labels) // config.batch)
        if ranks.size > 1:
            _check_shared(self.network, len(self.labels) // self.steps_per_epoch, ranks)
        self.steps = config.steps or max(1, round(config.epochs * self.steps_per_epoch))

        # Where the searches of the objective ended, per training row, if it goes on from there.
        self.offsets: Tensor | None = None
        if getattr(self.objective, "warm_start", 0) > 0:
            self.offsets = torch.zeros_like(self.images, dtype=torch.float16)
        # The maps by which the images were bent when these searches ended.
        self.maps: Tensor | None = None
        if config.bend and self.offsets is not None:
            self.maps = torch.eye(2, 3, device=self.device).repeat(len(self.labels), 1, 1)

        self.step = 0
        self.skipped_steps = 0
        self.order = torch.empty(0, dtype=torch.int64)  # the rows of the epoch that has begun
        self.history = History()

    def _new_network(self) -> nn.Module:
        return new_network(self.config, int(torch.randint(2**62, (), generator=self.generator)))

    @property
    def result(self) -> nn.Module:
        """The network that the run is for: the average of the weights where there is one."""
        return self.network if self.average is None else self.average

    @property
    def epoch(self) -> float:
        """How many epochs are done."""
        return self.step / self.steps_per_epoch

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`load` needs: tensors and plain values, shared and not copied."""
        return {
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "order": self.order,
            "offsets": self.offsets,
            "maps": self.maps,
            "history": self.history.state(),
            "guard": self.guard.state(),
            "counters": {name: getattr(self, name) for name in _COUNTERS},
        }

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.order = state["order"]
        if self.offsets is not None:
            self.offsets = state["offsets"].to(self.device)
        if self.maps is not None:
            self.maps = state["maps"].to(self.device)
        self.history.load(state["history"])
        self.guard.load(state["guard"])
        for name, value in state["counters"].items():
            setattr(self, name, value)

    def learning_rate(self) -> float:
        """Of the step that comes next."""
        return self.guard.rate * self._scheduled_rate()

    def _scheduled_rate(self) -> float:
        config, done = self.config, self.step / self.steps
        rising = done < config.lr_warmup
        rise = (self.step + 1) / max(1.0, config.lr_warmup * self.steps)
        if config.schedule == "one-cycle":
            if rising:
                return config.lr * (1 / 25 + (1 - 1 / 25) * min(1.0, rise))
            return config.lr * (1 - done) / (1 - config.lr_warmup)
        if rising:
            return config.lr * min(1.0, rise)
        if config.schedule == "cosine":
            turn = (done - config.lr_warmup) / (1 - config.lr_warmup)
            return config.lr * 0.5 * (1 + math.cos(math.pi * turn))
        if config.schedule == "halving":
            return config.lr * 0.5 ** sum(done >= share for share in config.halve_at)
        return config.lr

    def next_batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Images, labels and row numbers of the step that comes next, of all processes, and what
        moved the images, if anything: rolls (n, 2) or affine maps (n, 2, 3)."""
        rows, at = len(self.labels), self.step % self.steps_per_epoch
        if at == 0:
            self.order = torch.randperm(rows, generator=self.generator)
        start, end = (rows * k // self.steps_per_epoch for k in (at, at + 1))
        chosen = self.order[start:end].to(self.device)
        x, y = self.images[chosen], self.labels[chosen]
        if self.config.augment:
            x = augment_cifar(x, self.generator)
        moves: Tensor | None = None
        if self.config.bend:
            moves = random_affine(len(x), self.config.bend, self.config.shift, self.generator)
            moves = moves.to(self.device)
            x = bent(x, moves)
        elif self.config.shift:
            moves = torch.randint(
                -self.config.shift, self.config.shift + 1, (len(x), 2), generator=self.generator
            ).to(self.device)
            x = rolled(x, moves)
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, y, chosen, moves

    def advance(self) -> dict[str, float]:
        """One step; returns its figures, which also go into the history.

        Raises:
            RuntimeError: the run diverged, and going back to good weights has not helped.
        """
        began = time.monotonic()
        self.guard.begin(self.step)
        x, y, rows, moves = self.next_batch()
        count, own = len(y), self.ranks.share(len(y))
        share = (own.stop - own.start) / count
        lr = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.network.train()
        found = self._objective(
            x[own], y[own], rows[own], count, None if moves is None else moves[own]
        )
        self.optimizer.zero_grad(set_to_none=True)
        # Objectives are means over rows, so those of all rows are weighted means of the shares.
        (loss,) = self.ranks.total(share * float(found.loss.detach()))
        figures = {"loss": loss, "lr": lr, "gradient_norm": math.nan}
        usable = math.isfinite(figures["loss"])
        if usable:
            (share * found.loss if share < 1 else found.loss).backward()
            self.ranks.add_gradients(self.network.parameters())
            norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
            figures["gradient_norm"] = float(norm)
            usable = math.isfinite(figures["gradient_norm"])
        if usable:
            self.optimizer.step()
            self._move_average()
        else:
            self.skipped_steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        for name, value in self._figures(found, share).items():
            figures[f"objective_{name}" if name in RESERVED else name] = value
        self.step += 1
        self.history.add(
            figures, samples=count, seconds=time.monotonic() - began, skipped=not usable
        )
        self.guard.after(self.step, figures["loss"], usable=usable, last=self.step == self.steps)
        return figures

    def _figures(self, found: Step, share: float) -> dict[str, float]:
        """The objective's figures; of several processes means, weighted by their rows."""
        values: dict[str, float] = {}
        if found.figures:
            stacked = torch.stack([v.detach().double() for v in found.figures.values()])
            values = dict(zip(found.figures, stacked.tolist(), strict=True))
        if self.ranks.size == 1:
            return values
        everyone = self.ranks.gather((share, values))
        names = dict.fromkeys(name for _, own in everyone for name in own)
        return {
            name: _mean([(w, own[name]) for w, own in everyone if name in own]) for name in names
        }

    def _objective(
        self, x: Tensor, y: Tensor, rows: Tensor, count: int, moves: Tensor | None
    ) -> Step:
        """The objective on the rows of this process out of a batch of ``count``, with what it left
        behind for these rows, moved as the images are."""
        more: dict[str, Any] = {}
        if self.offsets is not None:
            more["offsets"] = self._carried(self.offsets[rows].to(x.dtype), rows, moves)
        alone = self.ranks.size == 1
        draws = nullcontext() if alone else WholeDraws(self.ranks, self.generator, count)
        with draws, torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast):
            found = self.objective(
                self.network,
                x,
                y,
                generator=self.generator,
                progress=self.step / self.steps,
                **more,
            )
        if self.offsets is not None and found.offsets is not None:
            self._keep(found.offsets, rows, moves)
        return found

    def _carried(self, kept: Tensor, rows: Tensor, moves: Tensor | None) -> Tensor:
        """Where searches ended, moved to where the images are now."""
        if self.maps is not None and moves is not None:
            return bent(kept, affine_between(self.maps[rows], moves), sharp=True)
        return kept if moves is None else rolled(kept, moves)

    def _keep(self, ends: Tensor, rows: Tensor, moves: Tensor | None) -> None:
        """Notes where searches ended: rolled back, but beside their maps, as to bend back and forth
        would wear them down."""
        assert self.offsets is not None
        if self.maps is None and moves is not None:
            ends = rolled(ends, -moves)
        for some, there, by in self.ranks.gather((rows, ends.to(self.offsets.dtype), moves)):
            self.offsets[some.to(self.device)] = there.to(self.device)
            if self.maps is not None and by is not None:
                self.maps[some.to(self.device)] = by.to(self.device)

    @torch.no_grad()
    def _move_average(self) -> None:
        if self.average is None:
            return
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        ours = self.network.state_dict().values()
        for mean, value in zip(self.average.state_dict().values(), ours, strict=True):
            if mean.is_floating_point():  # batch-norm statistics go with the weights
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)


def _check_shared(network: nn.Module, rows: int, ranks: Ranks) -> None:
    if rows < ranks.size:
        raise InputError(
            f"batch: expected at least an image for each of {ranks.size} processes, got {rows}"
        )
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise InputError(
            f"network: expected one without batch norm with {ranks.size} processes, as its "
            "statistics are of one process's rows"
        )


def _mean(weighted: list[tuple[float, float]]) -> float:
    """Of (weight, value), without values that are not numbers; NaN of none."""
    kept = [(weight, value) for weight, value in weighted if math.isfinite(value)]
    whole = sum(weight for weight, _ in kept)
    return sum(weight * value for weight, value in kept) / whole if whole > 0 else math.nan


_COUNTERS = ("step", "skipped_steps")


def _optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = network.parameters()
    if config.optimizer in ("adam", "adamw"):
        kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        return kind(
            parameters,
            lr=config.lr,
            betas=(config.momentum, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.optimizer == "nesterov",
        fused=True,
    )


def accuracy(
    network: nn.Module,
    data: Images,
    device: torch.device,
    batch: int = 500,
    ranks: Ranks = ALONE,
) -> float:
    """Share of the rows whose label has the largest logit; a tie counts as wrong."""
    quiet = evaluation_copy(network)
    right = 0
    with torch.no_grad():
        for at in range(ranks.rank * batch, len(data), ranks.size * batch):
            x, y = data.images[at : at + batch].to(device), data.labels[at : at + batch].to(device)
            right += int((margin(quiet(x), y) > 0).sum())
    return ranks.total(right)[0] / len(data)


def plain_config(config: TrainConfig) -> dict[str, Any]:
    """The settings as config.json has them, those of the objective in full."""
    values = asdict(config)
    values["settings"] = asdict(make_objective(config.objective, config.settings))  # type: ignore[call-overload]
    return values
