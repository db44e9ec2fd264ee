"""Networks for implicit curves and surfaces, and the image classifiers of Table A1."""

from levelset_ext.compiled import MLP, compiled_fields
from levelset_ext.networks.classifiers import (
    CLASSIFIERS,
    ConvNet,
    ResNet18,
    build,
    convnet2a,
    convnet2b,
    convnet4a,
    convnet4b,
    resnet18,
)
from levelset_ext.networks.implicit import ImplicitMLP, fc1, fc2
from levelset_ext.networks.polytope import PolytopeMLP, from_mesh, from_polytope

__all__ = [
    "CLASSIFIERS",
    "MLP",
    "ConvNet",
    "ImplicitMLP",
    "PolytopeMLP",
    "ResNet18",
    "build",
    "compiled_fields",
    "convnet2a",
    "convnet2b",
    "convnet4a",
    "convnet4b",
    "fc1",
    "fc2",
    "from_mesh",
    "from_polytope",
    "resnet18",
]
