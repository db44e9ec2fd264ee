"""The image classifiers of Table A1, and ResNet-18 in the form used for 32 x 32 images.

Every network takes images (n, c, h, w) in [0, 1] and returns logits (n, classes); with
``classes=1`` the one logit of a binary network. Nothing is normalised inside: a distance measured
at the input is a distance between images.

Table A1 names kernel and stride of a convolution but no padding. The networks use what the
parameter counts and the works they are taken from imply: padding 1 in ConvNet-2a and 4b, none in
ConvNet-4a (64 x 4 x 4 values reach its first FC layer), and 2 in ConvNet-2b, which keeps the
size under its 5 x 5 kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "CLASSIFIERS",
    "ConvNet",
    "ResNet18",
    "build",
    "convnet2a",
    "convnet2b",
    "convnet4a",
    "convnet4b",
    "resnet18",
]

Shape = tuple[int, int, int]

_MNIST: Shape = (1, 28, 28)
_CIFAR: Shape = (3, 32, 32)

# Convolutions as (channels, kernel, stride, padding); "pool" is max-pooling over 2 x 2.
_Layer = tuple[int, int, int, int] | str
_FEATURES: dict[str, tuple[tuple[_Layer, ...], tuple[int, ...]]] = {
    "convnet-2a": (((16, 4, 2, 1), (32, 4, 2, 1)), (100,)),
    "convnet-2b": (((32, 5, 1, 2), "pool", (64, 5, 1, 2), "pool"), (512,)),
    "convnet-4a": (
        ((32, 3, 1, 0), (32, 3, 1, 0), "pool", (64, 3, 1, 0), (64, 3, 1, 0), "pool"),
        (200, 200),
    ),
    "convnet-4b": (((32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1)), (512, 512)),
}


class ConvNet(nn.Module):
    """A column of Table A1: convolutions and pooling, then FC layers, ReLU after all but the last.

    Args:
        name: "convnet-2a", "convnet-2b", "convnet-4a" or "convnet-4b".
        classes: number of logits.
        shape: (c, h, w) of an image.
        released: without the ReLUs between the FC layers. The public MNIST checkpoints of the
            paper's authors are such networks.
    """

    def __init__(
        self, name: str, classes: int = 10, shape: Shape = _MNIST, *, released: bool = False
    ) -> None:
        super().__init__()
        name = _known(name, _FEATURES)
        shape = _check(classes, shape)
        layers, hidden = _FEATURES[name]
        self.config: dict[str, Any] = {
            "network": name,
            "options": {"classes": classes, "shape": list(shape), "released": released},
        }
        self.shape = shape
        channels, height, width = shape
        parts: list[nn.Module] = []
        for layer in layers:
            if isinstance(layer, str):
                parts.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            else:
                out, kernel, stride, padding = layer
                parts += [nn.Conv2d(channels, out, kernel, stride, padding), nn.ReLU()]
                channels = out
                height = (height + 2 * padding - kernel) // stride + 1
                width = (width + 2 * padding - kernel) // stride + 1
            if height < 1 or width < 1:
                raise ValueError(f"shape: expected larger images for {name}, got {shape}")
        self.features = nn.Sequential(*parts)
        widths = (channels * height * width, *hidden, classes)
        parts = [nn.Flatten()]
        for index in range(len(widths) - 1):
            parts.append(nn.Linear(widths[index], widths[index + 1]))
            if index + 2 < len(widths) and not released:
                parts.append(nn.ReLU())
        self.classifier = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, classes)."""
        _check_images(x, self.shape)
        return self.classifier(self.features(x))


class _Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm around which the input is added."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for small images: a 3 x 3 first convolution of stride 1 and no pooling after it.

    Four groups of two blocks with 64, 128, 256 and 512 channels, the last three groups halving the
    image, then the mean over what is left and one FC layer.

    Args:
        classes: number of logits.
        shape: (c, h, w) of an image; any h and w.
    """

    def __init__(self, classes: int = 10, shape: Shape = _CIFAR) -> None:
        super().__init__()
        self.shape = _check(classes, shape)
        self.config: dict[str, Any] = {
            "network": "resnet-18",
            "options": {"classes": classes, "shape": list(self.shape)},
        }
        self.conv1 = nn.Conv2d(self.shape[0], 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        blocks: list[nn.Module] = []
        before = 64
        for after, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [_Block(before, after, stride), _Block(after, after, 1)]
            before = after
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, classes)."""
        _check_images(x, self.shape)
        h = self.blocks(torch.relu(self.bn1(self.conv1(x))))
        return self.linear(h.mean((2, 3)))


def convnet2a(classes: int = 10, shape: Shape = _MNIST) -> ConvNet:
    """ConvNet-2a: CONV 16 4x4+2, CONV 32 4x4+2, FC 100, FC classes."""
    return ConvNet("convnet-2a", classes, shape)


def convnet2b(classes: int = 10, shape: Shape = _MNIST) -> ConvNet:
    """ConvNet-2b: CONV 32 5x5+1, pool, CONV 64 5x5+1, pool, FC 512, FC classes."""
    return ConvNet("convnet-2b", classes, shape)


def convnet4a(classes: int = 10, shape: Shape = _MNIST, *, released: bool = False) -> ConvNet:
    """ConvNet-4a, 312 202 parameters on MNIST; ``released`` as for :class:`ConvNet`."""
    return ConvNet("convnet-4a", classes, shape, released=released)


def convnet4b(classes: int = 10, shape: Shape = _CIFAR) -> ConvNet:
    """ConvNet-4b, 2.5 M parameters on CIFAR10."""
    return ConvNet("convnet-4b", classes, shape)


def resnet18(classes: int = 10, shape: Shape = _CIFAR) -> ResNet18:
    """ResNet-18 for CIFAR10, 11.2 M parameters, with batch normalisation."""
    return ResNet18(classes, shape)


CLASSIFIERS: dict[str, Callable[..., ConvNet | ResNet18]] = {
    "convnet-2a": convnet2a,
    "convnet-2b": convnet2b,
    "convnet-4a": convnet4a,
    "convnet-4b": convnet4b,
    "resnet-18": resnet18,
}


def build(
    name: str, classes: int = 10, shape: Shape | None = None, *, released: bool = False
) -> ConvNet | ResNet18:
    """A classifier by its name, with PyTorch's default initialisation.

    Args:
        name: one of :data:`CLASSIFIERS`; capitals, "-" and "_" do not matter.
        classes: number of logits; 1 for a binary network with one logit.
        shape: (c, h, w) of an image; (1, 28, 28) or (3, 32, 32) if left out, as the name implies.
        released: ConvNet-4a without ReLU between its FC layers, as in the public checkpoints.

    Raises:
        ValueError: an unknown name, images too small for the network, or ``released`` for
            another network than ConvNet-4a.
    """
    name = _known(name, CLASSIFIERS)
    options: dict[str, Any] = {"classes": classes}
    if shape is not None:
        options["shape"] = shape
    if released:
        if name != "convnet-4a":
            raise ValueError(f"released: expected only with convnet-4a, got it with {name}")
        options["released"] = True
    return CLASSIFIERS[name](**options)


def _known(name: str, names: dict[str, Any]) -> str:
    plain = name.lower().replace("-", "").replace("_", "")
    for known in names:
        if known.replace("-", "") == plain:
            return known
    raise ValueError(f"name: expected one of {', '.join(names)}, got {name!r}")


def _check(classes: int, shape: Shape) -> Shape:
    if classes < 1:
        raise ValueError(f"classes: expected at least 1, got {classes}")
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape: expected (c, h, w), each at least 1, got {tuple(shape)}")
    return int(shape[0]), int(shape[1]), int(shape[2])


def _check_images(x: Tensor, shape: Shape) -> None:
    if x.dim() != 4 or x.shape[1:] != shape:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"x: expected images (n, {expected}), got shape {tuple(x.shape)}")
