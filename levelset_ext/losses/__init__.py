"""Losses that act on level sets through the sample network."""

from levelset_ext.losses.geometric_svm import (
    GeometricSvmLoss,
    SvmSamples,
    geometric_svm,
    svm_samples,
)
from levelset_ext.losses.reconstruction import ReconstructionLoss, reconstruction
from levelset_ext.losses.robust import RobustLoss, robust

__all__ = [
    "GeometricSvmLoss",
    "ReconstructionLoss",
    "RobustLoss",
    "SvmSamples",
    "geometric_svm",
    "reconstruction",
    "robust",
    "svm_samples",
]
