"""Losses that act on level sets through the sample network."""

from levelset_ext.losses.geometric_svm import (
    GeometricSvmLoss,
    SvmSamples,
    geometric_svm,
    svm_samples,
)
from levelset_ext.losses.reconstruction import (
    Disks,
    ReconstructionLoss,
    fit_disks,
    reconstruction,
)
from levelset_ext.losses.robust import RobustLoss, robust

__all__ = [
    "Disks",
    "GeometricSvmLoss",
    "ReconstructionLoss",
    "RobustLoss",
    "SvmSamples",
    "fit_disks",
    "geometric_svm",
    "reconstruction",
    "robust",
    "svm_samples",
]
