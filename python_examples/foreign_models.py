"""Level-set samples in the training of networks that know nothing of this package.

    python python_examples/foreign_models.py --quick

Three networks as their projects write them: an SDF network with weight norm, geometric start and a
skip (surface reconstruction), a SIREN (an occupancy field), and a ResNet in the usual layout (image
classification). Each is trained by its own loss alone and, from the same start and for the same
steps, with level-set samples besides; what was added stands between the two rules of dashes.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

import levelset_ext as ls

# --- an SDF network -------------------------------------------------------------------------------


class SDFNetwork(nn.Module):
    """f: R^3 -> R^1, about the distance to a sphere before training."""

    def __init__(self, width: int = 64, depth: int = 4, skip_in: tuple[int, ...] = (2,)) -> None:
        super().__init__()
        dims = [3] + [width] * depth + [1]
        self.num_layers, self.skip_in = len(dims), skip_in
        for l in range(self.num_layers - 1):  # noqa: E741
            out_dim = dims[l + 1] - dims[0] if l + 1 in skip_in else dims[l + 1]
            lin = nn.Linear(dims[l], out_dim)
            if l == self.num_layers - 2:
                nn.init.normal_(lin.weight, math.sqrt(math.pi) / math.sqrt(dims[l]), 1e-4)
                nn.init.constant_(lin.bias, -0.5)
            else:
                nn.init.normal_(lin.weight, 0.0, math.sqrt(2) / math.sqrt(out_dim))
                nn.init.constant_(lin.bias, 0.0)
            setattr(self, f"lin{l}", nn.utils.parametrizations.weight_norm(lin))
        self.softplus = nn.Softplus(beta=100)

    def forward(self, input: Tensor) -> Tensor:
        x = input
        for l in range(self.num_layers - 1):  # noqa: E741
            if l in self.skip_in:
                x = torch.cat([x, input], 1) / math.sqrt(2)
            x = getattr(self, f"lin{l}")(x)
            if l < self.num_layers - 2:
                x = self.softplus(x)
        return x


def box_distance(x: Tensor) -> Tensor:
    """Signed distance to a box, the shape to reconstruct."""
    q = x.abs() - torch.tensor([0.6, 0.4, 0.3])
    return q.clamp(min=0).norm(dim=1) + q.amax(1).clamp(max=0)


def box_cloud(count: int) -> Tensor:
    """Points of its faces."""
    size = torch.tensor([0.6, 0.4, 0.3])
    x = (2 * torch.rand(count, 3) - 1) * size
    areas = torch.tensor([size[1] * size[2], size[0] * size[2], size[0] * size[1]])
    axis = torch.multinomial(areas, count, replacement=True)[:, None]
    side = torch.where(torch.rand(count, 1) < 0.5, -1.0, 1.0)
    return x.scatter(1, axis, size[axis] * side)


def sdf(steps: int, samples: bool) -> dict[str, float]:
    torch.manual_seed(0)
    net, cloud = SDFNetwork(), box_cloud(400)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = 2 * torch.rand(128, 3, generator=generator) - 1
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        eikonal = (gradient.norm(dim=1) - 1).square().mean()
        loss = net(cloud).abs().mean() + 0.1 * eikonal
        if samples:
            # ------------------------------------------------------------------------------------
            x = x.detach()
            sets = [ls.project(net, x, max_iters=8), ls.level_points(net, x)]
            loss = loss + ls.losses.reconstruction(net, sets, cloud).total
            # ------------------------------------------------------------------------------------
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = 2 * torch.rand(20_000, 3, generator=generator) - 1
    on_surface = ls.project(net, x[:2000])
    off = box_distance(on_surface.points[on_surface.converged]).abs()
    with torch.no_grad():
        return {
            "iou of f < 0": iou(net(x)[:, 0] < 0, box_distance(x) < 0),
            "off the box": off.mean().item(),
        }


def iou(a: Tensor, b: Tensor) -> float:
    return ((a & b).sum() / (a | b).sum()).item()


# --- a SIREN --------------------------------------------------------------------------------------


class SineLayer(nn.Module):
    def __init__(self, in_features: int, out_features: int, is_first: bool, omega_0: float) -> None:
        super().__init__()
        self.omega_0 = omega_0
        self.linear = nn.Linear(in_features, out_features)
        bound = 1 / in_features if is_first else math.sqrt(6 / in_features) / omega_0
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return torch.sin(self.omega_0 * self.linear(input))


class Siren(nn.Module):
    def __init__(self, width: int = 48, hidden_layers: int = 2, omega_0: float = 12.0) -> None:
        super().__init__()
        widths = [2] + [width] * (hidden_layers + 1)
        layers: list[nn.Module] = [
            SineLayer(a, b, k == 0, omega_0) for k, (a, b) in enumerate(pairwise(widths))
        ]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, coords: Tensor) -> Tensor:
        return self.net(coords)


def star_radius(angle: Tensor) -> Tensor:
    return 0.55 + 0.15 * torch.cos(5 * angle)


def in_star(x: Tensor) -> Tensor:
    return x.norm(dim=1) < star_radius(torch.atan2(x[:, 1], x[:, 0]))


def siren(steps: int, samples: bool) -> dict[str, float]:
    torch.manual_seed(0)
    net = Siren()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    known = 2 * torch.rand(150, 2, generator=generator) - 1  # few labels, and the outline besides
    inside = in_star(known).float()
    angle = 2 * math.pi * torch.rand(300, generator=generator)
    outline = star_radius(angle)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    for _ in range(steps):
        loss = functional.binary_cross_entropy_with_logits(net(known)[:, 0], inside)
        if samples:
            # ------------------------------------------------------------------------------------
            start = 2 * torch.rand(128, 2, generator=generator) - 1
            found = ls.project(net, start, max_iters=8, max_step=0.1, box=(-1, 1))
            loss = loss + ls.losses.reconstruction(net, found, outline, min_slope=0.1).total
            # ------------------------------------------------------------------------------------
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = 2 * torch.rand(20_000, 2, generator=generator) - 1
    with torch.no_grad():
        return {"iou of f > 0": iou(net(x)[:, 0] > 0, in_star(x))}


# --- a ResNet -------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, blocks: tuple[int, ...] = (1, 1, 1, 1), num_classes: int = 4) -> None:
        super().__init__()
        self.inplanes = 8
        self.conv1 = nn.Conv2d(1, 8, 3, 1, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(8, blocks[0])
        self.layer2 = self._make_layer(16, blocks[1], stride=2)
        self.layer3 = self._make_layer(16, blocks[2], stride=2)
        self.layer4 = self._make_layer(32, blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(32, num_classes)

    def _make_layer(self, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        layers = [BasicBlock(self.inplanes, planes, stride)]
        self.inplanes = planes
        layers += [BasicBlock(planes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def gratings(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy stripes of four directions, 12 x 12 in [0, 1]: the class is the direction."""
    y = torch.randint(4, (count,), generator=generator)
    angle = y * math.pi / 4 + 0.15 * torch.randn(count, generator=generator)
    phase = 2 * math.pi * torch.rand(count, generator=generator)
    axis = torch.linspace(-1, 1, 12)
    u, v = torch.meshgrid(axis, axis, indexing="ij")
    wave = angle.cos()[:, None, None] * u + angle.sin()[:, None, None] * v
    images = 0.5 + 0.3 * torch.sin(7 * wave + phase[:, None, None])
    images = images + 0.08 * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1)[:, None], y


_pretrained: dict[int, ResNet] = {}


def pretrained(steps: int) -> ResNet:
    """The network as it is handed over: trained by cross entropy."""
    if steps not in _pretrained:
        torch.manual_seed(0)
        net, generator = ResNet(), torch.Generator().manual_seed(1)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(steps):
            x, y = gratings(64, generator)
            loss = functional.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        _pretrained[steps] = net
    return copy.deepcopy(_pretrained[steps])


def resnet(steps: int, samples: bool) -> dict[str, float]:
    net = pretrained(steps)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x, y = gratings(64, generator)
        loss = functional.cross_entropy(net(x), y)
        if samples:
            # ------------------------------------------------------------------------------------
            found = ls.find_boundary(net, x, y, 0.2, 0.2, 0.03, 8, generator=generator)
            loss = loss + 10 * ls.losses.robust(net, x, y, found, eps=0.2).total
            # ------------------------------------------------------------------------------------
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = gratings(300, generator)
    found = ls.find_boundary(net, x, y, 0.4, 0.4, 0.01, 40, random_start=False)
    margin = torch.where(found.margins > 0, 0.4, 0.0)  # no boundary within the box: at least 0.4
    offset = (found.result.points - x[found.rows]).abs().flatten(1).amax(1)
    margin[found.rows] = torch.where(found.correct, offset, -offset)
    return {
        "accuracy": (found.margins > 0).float().mean().item(),
        "mean margin (linf)": margin.mean().item(),
    }


# --------------------------------------------------------------------------------------------------

DEMONSTRATIONS: dict[str, tuple[Callable[[int, bool], dict[str, float]], int, int]] = {
    "SDF network": (sdf, 120, 1500),
    "SIREN": (siren, 120, 1500),
    "ResNet": (resnet, 40, 400),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds each")
    quick = parser.parse_args(arguments).quick
    for name, (train, few, many) in DEMONSTRATIONS.items():
        steps = few if quick else many
        alone, both = train(steps, False), train(steps, True)
        print(f"{name}, {steps} steps")
        for what in alone:
            print(
                f"    {what:20} {alone[what]:8.4f} alone {both[what]:8.4f} with level-set samples"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
