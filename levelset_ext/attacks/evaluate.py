"""How many rows of a classifier stand several attacks: the worst case of each row over all."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from levelset_ext.attacks.advertorch_adapter import load_advertorch, run_advertorch
from levelset_ext.attacks.autoattack import load_autoattack, run_autoattack
from levelset_ext.attacks.deepfool import run_deepfool
from levelset_ext.attacks.pgd import (
    Attacked,
    Settings,
    check_finite,
    row_numbers,
    run_multi_targeted,
    run_pgd,
)
from levelset_ext.attacks.prepare import (
    LogitsFunction,
    attack_copy,
    check_batch,
    check_classes,
    input_gradient,
    lengths,
    outside_inference_mode,
)
from levelset_ext.margin import margin, prediction

__all__ = ["ATTACKS", "AttackRecord", "Evaluation", "evaluate", "parse_attacks"]

ATTACKS = {
    "pgd-xent": "PGD on cross entropy",
    "pgd-margin": "PGD on the margin (the paper's second column)",
    "pgd-rescaled-xent": "PGD on cross entropy of logits divided by the row's margin",
    "multi-targeted": "one PGD per wrong class on the difference of two logits",
    "deepfool": "repeated linearisation, the end pulled back into the ball",
    "autoattack": "AutoAttack, standard version (needs pyautoattack)",
    "transfer-xent": "PGD on cross entropy of another network (black box)",
    "transfer-margin": "PGD on the margin of another network (black box)",
    "advertorch-xent": "advertorch's PGD on cross entropy (needs advertorch)",
    "advertorch-margin": "advertorch's PGD on the margin (needs advertorch)",
}
_SYNONYMS = {"transfer": "transfer-margin"}
_WITH_STEPS = re.compile(
    r"((?:pgd|transfer|advertorch)-(?:rescaled-)?(?:xent|margin)|transfer|multi-targeted)-(\d+)"
)


@dataclass(frozen=True)
class Attack:
    """One attack as asked for: its kind (a key of :data:`ATTACKS`), its steps if it names them."""

    name: str
    kind: str
    iters: int | None = None


def parse_attacks(names: str | Sequence[str]) -> list[Attack]:
    """ "pgd-xent,pgd-margin-100,autoattack" as a list; a number at the end of a name is its steps.

    Raises:
        ValueError: an unknown name, one that is there twice, or none.
    """
    wanted = names.split(",") if isinstance(names, str) else list(names)
    attacks: list[Attack] = []
    for name in (w.strip().lower() for w in wanted):
        match = _WITH_STEPS.fullmatch(name)
        kind = match[1] if match else name
        kind = _SYNONYMS.get(kind, kind)
        if kind not in ATTACKS:
            raise ValueError(f"attack: expected one of {', '.join(ATTACKS)}, got {name!r}")
        if any(a.name == name for a in attacks):
            raise ValueError(f"attack: expected every attack once, got {name!r} twice")
        attacks.append(Attack(name, kind, int(match[2]) if match else None))
    if not attacks:
        raise ValueError("attack: expected at least one attack")
    return attacks


@dataclass
class AttackRecord:
    """What one attack of an evaluation did.

    Attributes:
        name: as asked for.
        kind: key of :data:`ATTACKS`.
        iters: steps of one run, 0 for attacks that choose them themselves.
        restarts: runs of each row.
        attacked: rows that were still standing when its turn came.
        broken: rows of these that it broke.
        late: rows that broke in the last quarter of the steps of their run.
        late_restart: rows that broke only in the last restart, of at least two.
        seconds: time it took.
    """

    name: str
    kind: str
    iters: int
    restarts: int
    attacked: int = 0
    broken: int = 0
    late: int = 0
    late_restart: int = 0
    seconds: float = 0.0


_ROWS = ("success", "correct", "prediction", "clean_margin", "broken_by", "step", "distance")


@dataclass(frozen=True)
class Evaluation:
    """The outcome for n rows; row-wise tensors are on the CPU.

    Attributes:
        adversarial: (n, *event): an example that is misclassified, where one was found; the last
            point tried for rows that stand; the image itself for rows that were wrong before.
        success: (n,) bool: some attack succeeded, or the row was wrong before.
        correct: (n,) bool: the margin of the image itself is positive.
        prediction: (n,) int64: what the network says at ``adversarial``.
        clean_margin: (n,) float64: F^y at the image (for a binary network with one logit +-f).
        broken_by: (n,) int64: index into ``attacks``; -1 where the row stands, -2 where it was
            wrong before.
        step: (n,) int64: PGD steps before it broke, -1 where there is no such number.
        distance: (n,) float64: length of adversarial - x in the norm of the attack.
        attacks: one record per attack, in the order in which they ran.
        settings: eps, step, iters, restarts, seed, norm.
        saturated: rows that were correct but have a cross-entropy gradient of exactly zero at the
            image.
        gradient_norm: (n,) float64, L1 norm of that gradient; NaN for rows that were wrong before.
    """

    adversarial: Tensor
    success: Tensor
    correct: Tensor
    prediction: Tensor
    clean_margin: Tensor
    broken_by: Tensor
    step: Tensor
    distance: Tensor
    attacks: list[AttackRecord]
    settings: dict[str, Any]
    saturated: int = 0
    gradient_norm: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.success)

    @property
    def clean_accuracy(self) -> float:
        """Share of rows that are correct before any attack, in [0, 1]; NaN without rows."""
        return float(self.correct.double().mean())

    @property
    def robust_accuracy(self) -> float:
        """Share of rows that stand all attacks, in [0, 1]; NaN without rows."""
        return float((~self.success).double().mean())

    def robust_accuracy_after(self, index: int) -> float:
        """Share of rows that stand the attacks 0 ... index."""
        broken = self.success & (self.broken_by <= index)
        return float((~broken).double().mean())

    @staticmethod
    def merge(parts: Sequence[Evaluation]) -> Evaluation:
        """The evaluations of consecutive rows, with the same attacks and settings, as one."""
        if not parts:
            raise ValueError("parts: expected at least one evaluation, got none")
        first = parts[0]
        records = [AttackRecord(**asdict(record)) for record in first.attacks]
        for part in parts[1:]:
            names = [r.name for r in part.attacks]
            if names != [r.name for r in records] or part.settings != first.settings:
                raise ValueError("parts: expected the same attacks and settings in all of them")
            for record, other in zip(records, part.attacks, strict=True):
                for name in ("attacked", "broken", "late", "late_restart", "seconds"):
                    setattr(record, name, getattr(record, name) + getattr(other, name))
        tensors = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in (*_ROWS, "adversarial", "gradient_norm")
        }
        saturated = sum(part.saturated for part in parts)
        return Evaluation(**tensors, attacks=records, settings=first.settings, saturated=saturated)


@outside_inference_mode
def evaluate(
    model: LogitsFunction,
    x: Tensor,
    y: Tensor,
    attack: str | Sequence[str] = "pgd-margin",
    *,
    eps: float = 0.3,
    step: float = 0.01,
    iters: int = 40,
    restarts: int = 1,
    seed: int = 0,
    norm: str = "linf",
    batch: int = 250,
    source: LogitsFunction | None = None,
    binary: bool = False,
    cascade: bool = True,
    rows: Sequence[int] | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> Evaluation:
    """Attacks a classifier and counts the rows that stand.

    Rows that are wrong before any attack are not attacked. Several attacks take turns, each on the
    rows that all before it left standing, which gives the worst case per row at the least cost:
    a row stands only if no attack breaks it. A network of batch-norm layers runs in eval mode;
    nothing about ``model`` changes.

    Args:
        model: module or callable, (n, *event) -> logits (n, K), K >= 2.
        x: (n, *event) floating point in [0, 1].
        y: (n,) integers, 0 <= y < K.
        attack: names from :data:`ATTACKS`, comma-separated or a sequence; "pgd-xent-100" means 100
            steps instead of ``iters``; "transfer" is "transfer-margin".
        eps: radius of the ball, in units of the images.
        step: length of a PGD step. iters: PGD steps. restarts: random starts per row (AutoAttack
            and DeepFool have their own numbers).
        seed: of all random numbers. The result of a row under PGD does not depend on the batch
            size or the other rows, up to the network's own batch-size rounding.
        norm: "linf" or "l2".
        batch: rows attacked at once.
        source: network that makes the examples of the transfer attacks, with all steps on all
            rows.
        binary: the network has one logit, (n,) or (n, 1), and labels are 0 and 1, or -1 and 1.
        cascade: False lets every attack begin with all correct rows, so that ``attacks[i].broken``
            is the figure of that attack alone; ``success`` is the same worst case.
        rows: numbers of the rows in their data set, for the random starts; 0 ... n - 1 if left out.
            A piece of a data set then gets what it would in the whole.
        progress: called as progress(rows done, name of the attack that runs) before each attack.

    Raises:
        ValueError: labels out of range, images outside [0, 1], weights or logits that are not
            finite, a network with a single class, shapes that do not belong together, ``rows`` of
            another length or negative, an unknown attack, a transfer attack without a source.
        ImportError: an attack whose package is not installed.
    """
    numbers = row_numbers(rows, x)
    attacks = check_evaluation(
        model,
        x,
        y,
        attack,
        eps=eps,
        step=step,
        iters=iters,
        restarts=restarts,
        seed=seed,
        norm=norm,
        batch=batch,
        source=source,
        binary=binary,
    )
    y = y.detach().long()
    logits = attack_copy(model, binary=binary)
    origin = None if source is None else attack_copy(source, binary=binary)
    settings = Settings(eps, step, iters, restarts, seed, norm)
    parts = []
    for at in range(0, max(len(x), 1), batch):
        some = slice(at, at + batch)
        told = None if progress is None else _at(progress, at)
        parts.append(
            _one_batch(
                logits,
                origin,
                x[some].detach().to(_device_of(model, x)),
                y[some].to(_device_of(model, x)),
                attacks,
                settings,
                numbers[some],
                binary,
                cascade,
                told,
            )
        )
    return Evaluation.merge(parts)


def check_evaluation(
    model: LogitsFunction,
    x: Tensor,
    y: Tensor,
    attack: str | Sequence[str],
    *,
    eps: float,
    step: float,
    iters: int,
    restarts: int,
    seed: int,
    norm: str,
    batch: int,
    source: LogitsFunction | None,
    binary: bool,
) -> list[Attack]:
    """The attacks by name, once everything that can be known beforehand fits; see
    :func:`evaluate` for the arguments and errors."""
    y = check_batch(x, y, norm, eps=eps, step=step, iters=iters, restarts=restarts)
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    attacks = parse_attacks(attack)
    kinds = {a.kind for a in attacks}
    if source is None and any(kind.startswith("transfer") for kind in kinds):
        raise ValueError("source: expected a network that makes the transfer examples, got none")
    if "autoattack" in kinds:
        load_autoattack()
    if any(kind.startswith("advertorch") for kind in kinds):
        load_advertorch()
    for network in (model, source):
        if network is not None:
            copy = attack_copy(network, binary=binary)
            one = x[:1].detach().to(_device_of(network, x)).clone()
            try:
                with torch.no_grad():
                    out = copy(one)
            except RuntimeError as error:
                first = str(error).strip().splitlines()[0]
                name = "model" if network is model else "source"
                raise ValueError(
                    f"{name}: expected a network of images {tuple(one.shape[1:])} in {one.dtype}, "
                    f"got from its forward: {first}"
                ) from error
            check_classes(out, y, binary)
    return attacks


def _at(progress: Callable[[int, str], None], done: int) -> Callable[[str], None]:
    return lambda name: progress(done, name)


def _device_of(model: LogitsFunction, x: Tensor) -> torch.device:
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return x.device


@dataclass(frozen=True)
class _Clean:
    logits: Tensor  # (n, K)
    y: Tensor  # (n,) labels as 0 ... K - 1
    gradient_norm: Tensor  # (n,) float64, L1 norm of the cross-entropy gradient


def _one_batch(
    logits: LogitsFunction,
    source: LogitsFunction | None,
    x: Tensor,
    y: Tensor,
    attacks: list[Attack],
    settings: Settings,
    rows: Sequence[int],
    binary: bool,
    cascade: bool,
    progress: Callable[[str], None] | None,
) -> Evaluation:
    at_images = _clean_pass(logits, x, y, binary)
    clean, y = at_images.logits, at_images.y
    clean_margin = margin(clean, y, check=False)
    correct = clean_margin > 0
    gradient = torch.where(correct, at_images.gradient_norm, math.nan)
    n = len(x)
    adversarial = x.clone()
    broken_by = torch.where(correct, -1, -2)
    step = torch.full((n,), -1, dtype=torch.int64, device=x.device)
    said = prediction(clean)
    records = []
    for index, attack in enumerate(attacks):
        chosen = settings
        if attack.iters is not None:
            chosen = Settings(**{**asdict(settings), "iters": attack.iters})
        record = AttackRecord(attack.name, attack.kind, *_numbers_of(attack, chosen))
        records.append(record)
        left = torch.nonzero(broken_by == -1 if cascade else correct)[:, 0]
        if len(left) == 0:
            continue
        if progress is not None:
            progress(attack.name)
        began = time.monotonic()
        found = _run(
            attack, logits, source, x[left], y[left], clean[left], chosen,
            [rows[i] for i in left.tolist()],
        )  # fmt: skip
        record.seconds = time.monotonic() - began
        record.attacked, record.broken = len(left), int(found.success.sum())
        if attack.kind != "deepfool":
            record.late = int((found.step > 0.75 * chosen.iters).sum()) if record.iters else 0
        if record.restarts > 1:
            # The runs of the multi-targeted attack are numbered through all its classes.
            runs = record.restarts
            if attack.kind == "multi-targeted":
                runs *= clean.shape[1] - 1
            last = runs * (record.restarts - 1) // record.restarts
            record.late_restart = int((found.restart >= last).sum())
        new = found.success & (broken_by[left] == -1)
        write = left[broken_by[left] == -1]  # the last points tried, until one is broken
        adversarial[write] = found.adversarial[broken_by[left] == -1]
        broken_by[left[new]] = index
        step[left[new]] = found.step[new]
    with torch.no_grad():
        # A row that stands was seen to have a positive margin: the network says its label.
        broken = torch.nonzero(broken_by >= 0)[:, 0]
        if len(broken):
            said[broken] = prediction(logits(adversarial[broken].clone()))
    return Evaluation(
        adversarial=adversarial.cpu(),
        success=(broken_by != -1).cpu(),
        correct=correct.cpu(),
        prediction=said.cpu(),
        clean_margin=clean_margin.double().cpu(),
        broken_by=broken_by.cpu(),
        step=step.cpu(),
        distance=lengths(adversarial - x, settings.norm).double().cpu(),
        attacks=records,
        settings=asdict(settings),
        saturated=int((gradient == 0).sum()),
        gradient_norm=gradient.cpu(),
    )


def _numbers_of(attack: Attack, settings: Settings) -> tuple[int, int]:
    if attack.kind in ("deepfool", "autoattack"):
        return 0, 1
    once = attack.kind.startswith(("transfer", "advertorch"))
    return settings.iters, 1 if once else settings.restarts


def _run(
    attack: Attack,
    logits: LogitsFunction,
    source: LogitsFunction | None,
    x: Tensor,
    y: Tensor,
    clean: Tensor,
    settings: Settings,
    rows: Sequence[int],
) -> Attacked:
    """One attack on rows that are classified correctly."""
    kind = attack.kind
    if kind.startswith("pgd-"):
        return run_pgd(logits, x, y, kind.removeprefix("pgd-"), settings, rows)
    if kind == "multi-targeted":
        return run_multi_targeted(logits, x, y, clean, settings, rows)
    if kind.startswith("transfer-"):
        assert source is not None
        once = Settings(**{**asdict(settings), "restarts": 1})
        objective = kind.removeprefix("transfer-")
        made = run_pgd(source, x, y, objective, once, rows, early_stop=False)
        return _judged(logits, x, y, made.adversarial, settings)
    if kind.startswith("advertorch-"):
        # Its start is drawn for the batch: the number of the first row tells batches apart.
        seed = (settings.seed * 1_000_003 + rows[0]) % 2**63
        loss = kind.removeprefix("advertorch-")
        found = run_advertorch(
            logits, x, y, loss, settings.eps, settings.step, settings.iters, seed, settings.norm
        )
        return _judged(logits, x, y, found, settings)
    if kind == "deepfool":
        fooled = run_deepfool(logits, x, y, clean, settings.norm, 50, 0.02, clean.shape[1] - 1)
        return _judged(logits, x, y, fooled.adversarial, settings)
    found = run_autoattack(
        logits,
        x,
        y,
        clean.shape[1],
        eps=settings.eps,
        norm=settings.norm,
        seed=settings.seed,
    )
    return _judged(logits, x, y, found, settings)


def _judged(
    logits: LogitsFunction, x: Tensor, y: Tensor, found: Tensor, settings: Settings
) -> Attacked:
    """Points made elsewhere, put into the ball and the box and looked at with the network."""
    delta = found.detach().to(x) - x
    if settings.norm == "linf":
        delta = delta.clamp(-settings.eps, settings.eps)
    else:
        size = lengths(delta, "l2").clamp_min(1e-30)
        # A little slack: a point of exactly the length eps shall not be moved.
        scale = torch.where(size > settings.eps * (1 + 1e-6), settings.eps / size, 1.0)
        delta = delta * scale.reshape(-1, *[1] * (x.dim() - 1))
    point = (x + delta).clamp_(0, 1)
    with torch.no_grad():
        broken = ~(margin(logits(point.clone()), y, check=False) > 0)
    step = torch.full_like(y, -1)
    return Attacked(point, broken, step, torch.where(broken, 0, -1))


def _clean_pass(logits: LogitsFunction, x: Tensor, y: Tensor, binary: bool) -> _Clean:
    """Logits and labels at the images, and the cross-entropy gradient that attacks start from."""
    with torch.enable_grad():
        point = x.clone().requires_grad_()
        out = logits(point.clone())
        y = check_classes(out, y, binary)
        check_finite(out.detach())
        gradient = input_gradient(nn.functional.cross_entropy(out, y, reduction="none"), point)
    norms = gradient.flatten(1).abs().double().sum(1)
    return _Clean(out.detach(), y, norms)
