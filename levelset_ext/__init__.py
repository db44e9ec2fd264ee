"""Points on the level sets of neural networks, differentiable in the network's parameters.

    result = levelset_ext.project(net, points)           # Newton projection onto {x : net(x) = 0}
    p = levelset_ext.sample_network(net, result)         # p(theta): same points, gradient of Eq. 8

After "Controlling Neural Level Sets" (Atzmon et al., NeurIPS 2019); equation numbers in this
package are that paper's.
"""

import importlib
from types import ModuleType

# First, as it is the one that explains a compiled module that is missing or does not fit.
from levelset_ext._load import build_info

# isort: split
from levelset_ext import losses, networks, ops, samplers
from levelset_ext.field import value_and_jacobian
from levelset_ext.layers import LayerField
from levelset_ext.result import LevelSetResult, Status
from levelset_ext.sample_network import SampleNetwork, sample_network
from levelset_ext.samplers import false_position, find_boundary, level_points, project

__version__ = build_info()["version"]

__all__ = [
    "LayerField",
    "LevelSetResult",
    "SampleNetwork",
    "Status",
    "attacks",
    "build_info",
    "false_position",
    "find_boundary",
    "geometry",
    "level_points",
    "losses",
    "networks",
    "objectives",
    "ops",
    "project",
    "sample_network",
    "samplers",
    "value_and_jacobian",
]

# Imported when first used: they bring in libraries that the rest does without.
_LATER = ("attacks", "geometry", "objectives")


def __getattr__(name: str) -> ModuleType:
    if name in _LATER:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
