"""Fields whose level sets are known, as modules with parameters, shared by all tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Affine(nn.Module):
    """A x + b: l hyperplanes, a plane for l = 1, two planes for l = 2."""

    def __init__(self, l: int = 1, d: int = 3, seed: int = 0) -> None:  # noqa: E741
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(torch.randn(l, d, generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(l, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.A.to(x.dtype).T + self.b.to(x.dtype)

    def projection(self, x: Tensor, level: Tensor | float = 0.0) -> Tensor:
        """The orthogonal projection onto {A x + b = level}."""
        with torch.no_grad():
            return x - (x @ self.A.T + self.b - level) @ torch.linalg.pinv(self.A).T


class Sphere(nn.Module):
    """|x - centre| - radius in any dimension; gradient of length one."""

    def __init__(self, radius: float = 0.7, d: int = 3) -> None:
        super().__init__()
        self.radius = nn.Parameter(torch.tensor(radius, dtype=torch.float64))
        self.centre = nn.Parameter(torch.zeros(d, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x - self.centre.to(x.dtype), dim=1) - self.radius.to(
            x.dtype
        )


class Quadric(nn.Module):
    """|x|^2 - r^2: a sphere whose gradient is not of length one and vanishes at the origin."""

    def __init__(self, radius: float = 0.7) -> None:
        super().__init__()
        self.radius = nn.Parameter(torch.tensor(radius, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * x).sum(1) - self.radius.to(x.dtype) ** 2


class Torus(nn.Module):
    """Signed distance to a torus around the z axis."""

    def __init__(self, major: float = 1.0, minor: float = 0.3) -> None:
        super().__init__()
        self.major = nn.Parameter(torch.tensor(major, dtype=torch.float64))
        self.minor = nn.Parameter(torch.tensor(minor, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        ring = (x[:, 0] ** 2 + x[:, 1] ** 2).sqrt() - self.major.to(x.dtype)
        return ((ring**2 + x[:, 2] ** 2).sqrt() - self.minor.to(x.dtype))[:, None]


class Circle(nn.Module):
    """A sphere of squared radius and a plane, l = 2: the circle of that radius at height z."""

    def __init__(self, radius: float = 0.7, height: float = 0.2) -> None:
        super().__init__()
        self.radius = nn.Parameter(torch.tensor(radius, dtype=torch.float64))
        self.height = nn.Parameter(torch.tensor(height, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        cylinder = (x[:, :2] ** 2).sum(1) - self.radius.to(x.dtype) ** 2
        return torch.stack([cylinder, x[:, 2] - self.height.to(x.dtype)], 1)


class Three(nn.Module):
    """Three smooth outputs in five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a.to(x.dtype)
        return torch.stack(
            [
                x[:, 0] + torch.sin(x[:, 3]) - a[0],
                x[:, 1] * (1 + x[:, 4] ** 2) - a[1],
                x[:, 2] + x[:, 0] * x[:, 1] - a[2],
            ],
            1,
        )


def mlp(l: int = 1, d: int = 3, width: int = 16, dtype: torch.dtype = torch.float64, seed: int = 0):  # noqa: E741
    """A small smooth network, the same one for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(d, width), nn.Softplus(beta=4), nn.Linear(width, width), nn.Tanh(),
            nn.Linear(width, l),
        )  # fmt: skip
    return net.to(dtype)


def batch_norm_net(l: int = 1, d: int = 3) -> nn.Sequential:  # noqa: E741
    """Batch norm and dropout, in train mode, with running statistics that are not the initial."""
    net = nn.Sequential(
        nn.Linear(d, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Dropout(0.5), nn.Linear(8, l)
    ).double()
    net(torch.randn(64, d, dtype=torch.float64) + 1)
    return net.train()


def weight_norm_net(d: int = 3) -> nn.Sequential:
    """The parametrized kind on the first layer, the hook kind on the second."""
    first = nn.utils.parametrizations.weight_norm(nn.Linear(d, 8))
    second = nn.Linear(8, 1)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = nn.utils.weight_norm(second)
    return nn.Sequential(first, nn.Tanh(), second).double()


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh() ** 2)


class OnceDifferentiable(nn.Module):
    """A network whose double backward raises."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8).double(), nn.Linear(8, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_OnceOnly.apply(self.first(x)))


class Classifier(nn.Module):
    """Affine logits on images (n, 1, 28, 28) and the margin of class 0 over the others."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(784, classes).double()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.linear(x.flatten(1))
        return logits[:, 0] - logits[:, 1:].amax(1)


class RowCounter:
    """A plain callable around a field that keeps every point it was asked for."""

    def __init__(self, fn) -> None:
        self.fn = fn
        self.batches: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.batches.append(x.detach().clone())
        return self.fn(x)

    @property
    def rows(self) -> int:
        return sum(len(batch) for batch in self.batches)


def points(n: int, d: int = 3, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def well_conditioned(n: int, l: int, d: int, dtype=torch.float64, seed: int = 2) -> Tensor:  # noqa: E741
    """Random Jacobians (n, l, d) with singular values between 0.5 and 2; l <= d."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, l, generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(a)
    mix = torch.eye(l, dtype=torch.float64) * torch.linspace(1, 1.5, l, dtype=torch.float64)
    tilt = torch.randn(n, l, l, generator=generator, dtype=torch.float64)
    mix = mix + 0.4 / math.sqrt(l) * tilt / torch.linalg.matrix_norm(tilt, 2)[:, None, None]
    return (mix @ q.mT).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit: NaN equals NaN, and 0 does not equal -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = {4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(integer), b.detach().contiguous().view(integer))
