"""Losses that act on level sets through the sample network."""

from levelset_ext.losses.reconstruction import ReconstructionLoss, reconstruction

__all__ = ["ReconstructionLoss", "reconstruction"]
