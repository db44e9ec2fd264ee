"""Attacks on classifiers, and what their figures are worth."""

from levelset_ext.attacks.advertorch_adapter import advertorch_pgd
from levelset_ext.attacks.deepfool import DeepFooled, deepfool
from levelset_ext.attacks.evaluate import (
    ATTACKS,
    AttackRecord,
    Evaluation,
    evaluate,
    parse_attacks,
)
from levelset_ext.attacks.linearity import LocalLinearity, local_linearity
from levelset_ext.attacks.pgd import OBJECTIVES, Attacked, multi_targeted, pgd
from levelset_ext.attacks.prepare import attack_copy, random_start
from levelset_ext.attacks.report import alarms
from levelset_ext.attacks.squares import search_squares

__all__ = [
    "ATTACKS",
    "OBJECTIVES",
    "AttackRecord",
    "Attacked",
    "DeepFooled",
    "Evaluation",
    "LocalLinearity",
    "advertorch_pgd",
    "alarms",
    "attack_copy",
    "deepfool",
    "evaluate",
    "local_linearity",
    "multi_targeted",
    "parse_attacks",
    "pgd",
    "random_start",
    "search_squares",
]
