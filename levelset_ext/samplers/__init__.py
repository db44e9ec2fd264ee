"""Finding points on level sets. Samplers know no gradients in theta; the sample network does."""

from levelset_ext.samplers.at_points import level_points
from levelset_ext.samplers.boundary import BoundarySamples, find_boundary, margin_field
from levelset_ext.samplers.captured import CapturedFalsePosition, CapturedProjection
from levelset_ext.samplers.false_position import false_position
from levelset_ext.samplers.pool import SamplePool
from levelset_ext.samplers.projection import project

__all__ = [
    "BoundarySamples",
    "CapturedFalsePosition",
    "CapturedProjection",
    "SamplePool",
    "false_position",
    "find_boundary",
    "level_points",
    "margin_field",
    "project",
]
