"""When not to believe a robustness figure: plain sentences from the numbers of an evaluation.

Gradients that are hidden, not absent, have made many networks look robust. The signs are known: a
loss whose gradient vanishes, one attack far behind another, an attack without gradients ahead of
one with them, and a figure that still falls when the attack gets more steps or starts.
"""

from __future__ import annotations

import torch

from levelset_ext.attacks.evaluate import Evaluation

__all__ = ["alarms"]

# Above this margin 1 - softmax(f)_y is below half a unit in the last place of 1 in float32, so the
# right class drops out of the cross-entropy gradient.
_SATURATED_MARGIN = 16.6

_XENT = ("pgd-xent", "advertorch-xent")
_STRONGER = (
    "pgd-margin",
    "pgd-rescaled-xent",
    "multi-targeted",
    "autoattack",
    "advertorch-margin",
)


def alarms(evaluation: Evaluation, *, threshold: float = 0.01) -> list[str]:
    """The reasons for which the robust accuracy is likely too high; an empty list if none was seen.

    Args:
        evaluation: of one network; the more attacks it holds the more can be seen.
        threshold: share of all rows from which on a difference counts.

    Returns:
        Sentences, each with the numbers that it rests on.
    """
    n = len(evaluation)
    found: list[str] = []
    if n == 0 or not bool(evaluation.correct.any()):
        return found
    found += _saturation(evaluation)
    found += _weaker_than(evaluation, threshold)
    found += _still_falling(evaluation, threshold)
    kinds = {record.kind for record in evaluation.attacks}
    if kinds <= set(_XENT) and evaluation.robust_accuracy > 0:
        found.append(
            "The figure rests on cross entropy alone; PGD on the margin, the multi-targeted attack "
            "and AutoAttack are often much stronger."
        )
    if kinds == {"deepfool"} and evaluation.robust_accuracy > 0:
        found.append(
            "The figure rests on DeepFool alone, which looks for a near boundary and not for the "
            "worst image in the ball; PGD on the margin, the multi-targeted attack and AutoAttack "
            "are often much stronger."
        )
    return found


def _saturation(evaluation: Evaluation) -> list[str]:
    correct = evaluation.correct
    count = int(correct.sum())
    found = []
    if evaluation.saturated >= max(1, 0.01 * count):
        found.append(
            f"The cross-entropy gradient is exactly zero at {evaluation.saturated} of {count} "
            f"correct images ({evaluation.saturated / count:.1%}): attacks on cross entropy cannot "
            "move them."
        )
    median = float(evaluation.clean_margin[correct].median())
    if median > _SATURATED_MARGIN:
        share = float((evaluation.clean_margin[correct] > _SATURATED_MARGIN).double().mean())
        found.append(
            "The logits are so far apart that cross entropy saturates in float32: the median "
            f"margin is {median:.4g}, and {share:.1%} of the correct images lie above "
            f"{_SATURATED_MARGIN}; rescale the logits or attack the margin."
        )
    return found


def _weaker_than(evaluation: Evaluation, threshold: float) -> list[str]:
    """Rows that one family of attacks breaks and another one, tried on them, does not."""
    n = len(evaluation)
    found = []
    records = evaluation.attacks
    broken = torch.tensor([record.broken for record in records])
    for i, later in enumerate(records):
        if later.attacked == 0:
            continue
        for j, earlier in enumerate(records):
            # In a cascade the later attack breaks only what the earlier one left standing. Run side
            # by side, the difference of the two counts is what is missing at least.
            if later.attacked == earlier.attacked:
                missed = int(broken[i] - broken[j])
            elif j < i:
                missed = int(broken[i])
            else:
                continue
            if i == j or missed < max(1, threshold * n):
                continue
            if earlier.kind in _XENT and later.kind in _STRONGER:
                found.append(
                    f"{later.name} breaks {missed} of {n} rows ({missed / n:.1%}) that stand "
                    f"{earlier.name}: the cross-entropy figure is not the robustness of this "
                    "network."
                )
            elif later.kind.startswith("transfer") and _white_box(earlier.kind):
                found.append(
                    f"The black-box attack {later.name} breaks {missed} of {n} rows "
                    f"({missed / n:.1%}) that stand the white-box attack {earlier.name}: gradients "
                    "of this network lead attacks astray."
                )
            elif later.kind in ("multi-targeted", "autoattack") and earlier.kind == "pgd-margin":
                found.append(
                    f"{later.name} breaks {missed} of {n} rows ({missed / n:.1%}) that stand "
                    f"{earlier.name}: PGD on the margin gets stuck before the boundary."
                )
    return found


def _white_box(kind: str) -> bool:
    return not kind.startswith("transfer")


def _still_falling(evaluation: Evaluation, threshold: float) -> list[str]:
    n = len(evaluation)
    found = []
    for record in evaluation.attacks:
        if record.late >= max(1, threshold * n):
            found.append(
                f"{record.name} broke {record.late} of {n} rows ({record.late / n:.1%}) in the "
                f"last quarter of its {record.iters} steps: more steps are likely to break more."
            )
        if record.late_restart >= max(1, threshold * n):
            found.append(
                f"{record.name} broke {record.late_restart} of {n} rows "
                f"({record.late_restart / n:.1%}) only in the last of {record.restarts} restarts: "
                "more restarts are likely to break more."
            )
    return found
