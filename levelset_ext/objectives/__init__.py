"""What to train a classifier with: the paper's losses, and the ones they are compared with.

All have one interface, :class:`Objective`.
"""

from levelset_ext.objectives.adversarial import MMA, Madry, Trades
from levelset_ext.objectives.base import Objective, Step
from levelset_ext.objectives.level_sets import GeometricSvm, Robust
from levelset_ext.objectives.linearized import CURE, LLR, LargeMargin
from levelset_ext.objectives.plain import CrossEntropy, Hinge
from levelset_ext.objectives.statistics import with_batch_statistics

__all__ = [
    "CURE",
    "LLR",
    "MMA",
    "OBJECTIVES",
    "CrossEntropy",
    "GeometricSvm",
    "Hinge",
    "LargeMargin",
    "Madry",
    "Objective",
    "Robust",
    "Step",
    "Trades",
    "with_batch_statistics",
]

OBJECTIVES: dict[str, type] = {
    "cross-entropy": CrossEntropy,
    "hinge": Hinge,
    "madry": Madry,
    "trades": Trades,
    "mma": MMA,
    "large-margin": LargeMargin,
    "llr": LLR,
    "cure": CURE,
    "robust": Robust,
    "svm": GeometricSvm,
}
