"""Multilayer perceptrons whose level sets are curves and surfaces."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS = ("relu", "silu", "softplus")


class ImplicitMLP(nn.Module):
    """F: R^dim -> R^outputs.

    Args:
        dim: d of the points.
        outputs: l.
        width: units of every hidden layer.
        hidden_layers: how many hidden layers.
        activation: "relu"; "silu", z sigmoid(beta z); or "softplus", log(1 + exp(beta z)) / beta.
            The smooth two tend to ReLU as beta grows: 1 / beta is the width of the bend, in the
            units of the pre-activations, and so the sharpest edge that is cheap to represent.
        beta: sharpness of a smooth activation.
        skip: feed [h, x] instead of h to every layer between the first and the last.
        frequencies: angular ones, in radians per unit of x, of sines and cosines of every
            coordinate that the first layer reads beside x (Tancik et al. 2020), each divided by its
            frequency, so that all have the same slope. With them detail of the size of a wave is
            learnt early instead of last.

    Parameters start as He's normal distribution; see :meth:`init_sphere_` and :meth:`init_paper_`.
    """

    _wave_matrix: Tensor
    _wave_phases: Tensor
    _column_scale: Tensor

    def __init__(
        self,
        dim: int = 3,
        outputs: int = 1,
        width: int = 128,
        hidden_layers: int = 5,
        *,
        activation: str = "silu",
        beta: float = 40.0,
        skip: bool = False,
        frequencies: Sequence[float] = (),
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        for name, number in (("dim", dim), ("outputs", outputs), ("width", width)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        if hidden_layers < 1:
            raise ValueError(f"hidden_layers: expected at least 1, got {hidden_layers}")
        if not (beta > 0 and math.isfinite(beta)):
            raise ValueError(f"beta: expected a finite number > 0, got {beta}")
        if not all(frequency > 0 and math.isfinite(frequency) for frequency in frequencies):
            raise ValueError(f"frequencies: expected finite numbers > 0, got {tuple(frequencies)}")
        self.dim, self.outputs, self.skip = dim, outputs, skip
        self.activation, self.beta = activation, float(beta)
        inner = width + dim if skip else width
        self.frequencies = tuple(float(frequency) for frequency in frequencies)
        waves = 2 * dim * len(self.frequencies)
        if waves:
            self._make_waves(dim)
        self.hidden = nn.Sequential(
            nn.Linear(waves + dim, width),
            *(nn.Linear(inner, width) for _ in range(hidden_layers - 1)),
        )
        self.last = nn.Linear(width, outputs)
        self.reset_parameters()

    def _make_waves(self, dim: int) -> None:
        """sin(A x + b) are the sines and cosines, of which the first layer reads multiples."""
        eye = torch.eye(dim)
        sines = torch.cat([frequency * eye for frequency in self.frequencies])
        scale = torch.tensor(self.frequencies).reciprocal().repeat_interleave(dim)
        quarter = torch.full((len(sines),), math.pi / 2)
        # Not among what is saved: they follow from the arguments.
        self.register_buffer("_wave_matrix", torch.cat((sines, sines)), persistent=False)
        self.register_buffer(
            "_wave_phases", torch.cat((torch.zeros_like(quarter), quarter)), persistent=False
        )
        self.register_buffer(
            "_column_scale", torch.cat((scale, scale, torch.ones(dim))), persistent=False
        )

    def _layers(self) -> list[nn.Linear]:
        return [layer for layer in (*self.hidden, self.last) if isinstance(layer, nn.Linear)]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """He's normal distribution for the weights, 0 for the biases."""
        for layer in self._layers():
            layer.weight.normal_(0.0, math.sqrt(2 / layer.out_features), generator=generator)
            layer.bias.zero_()
        if self.frequencies:
            # The waves come in as they are learnt: the starts below are about x alone.
            self._layers()[0].weight[:, : -self.dim] = 0.0

    @torch.no_grad()
    def init_paper_(self, generator: torch.Generator | None = None) -> ImplicitMLP:
        """The authors' start: last layer with mean 2 sqrt(pi / fan_in), deviation 1e-4 and bias -1,
        the others N(0, 2 / fan_out). For ReLU it is roughly the distance to a sphere."""
        self.reset_parameters(generator)
        mean = 2 * math.sqrt(math.pi / self.last.in_features)
        self.last.weight.normal_(mean, 1e-4, generator=generator)
        self.last.bias.fill_(-1.0)
        return self

    @torch.no_grad()
    def init_sphere_(self, radius: float, generator: torch.Generator | None = None) -> ImplicitMLP:
        """Starts as about the signed distance to a sphere, negative inside, |grad F| about 1.

        The random hidden layers make a function that grows with |x|; the last layer is scaled and
        shifted so that its least-squares line over |x| in [0.2, 1] is |x| - radius. With this start
        the unsigned losses of Eq. 13 have one sign to keep: inside stays inside.
        """
        if self.outputs != 1:
            raise ValueError(f"init_sphere_: expected a network with 1 output, got {self.outputs}")
        self.reset_parameters(generator)
        width = self.last.in_features
        self.last.weight.normal_(math.sqrt(math.pi / width), 1e-4, generator=generator)
        directions = torch.randn(4096, self.dim, generator=generator)
        directions /= torch.linalg.vector_norm(directions, dim=1, keepdim=True)
        r = torch.rand(4096, 1, generator=generator) * 0.8 + 0.2
        values = self((directions * r).to(self.last.weight))[:, 0].cpu()
        r = r[:, 0]
        slope = ((values - values.mean()) * (r - r.mean())).sum() / (r - r.mean()).square().sum()
        self.last.weight /= slope.to(self.last.weight)
        self.last.bias.fill_(float((r - radius - values / slope).mean()))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(n, dim) -> (n, outputs)."""
        # The hidden state is carried as beta h: beta then multiplies vectors of biases instead of
        # every activation, which on a CPU costs as much as the activation.
        beta = 1.0 if self.activation == "relu" else self.beta
        first = x * beta if beta != 1.0 else x
        h = first
        if self.frequencies:
            waves = torch.sin(functional.linear(x, self._wave_matrix, self._wave_phases))
            h = torch.cat([waves * beta, first], 1)
        for index, layer in enumerate(self._layers()[:-1]):
            if self.skip and index > 0:
                h = torch.cat([h, first], 1)
            weight = layer.weight
            if self.frequencies and index == 0:
                weight = weight * self._column_scale
            z = functional.linear(h, weight, layer.bias * beta)
            if self.activation == "relu":
                h = torch.relu(z)
            elif self.activation == "silu":
                h = functional.silu(z)
            else:
                h = functional.softplus(z)
        return functional.linear(h, self.last.weight / beta, self.last.bias)

    def extra_repr(self) -> str:
        text = f"activation={self.activation!r}, beta={self.beta}, skip={self.skip}"
        return f"{text}, frequencies={self.frequencies}" if self.frequencies else text


def fc1(outputs: int = 1, dim: int = 3) -> ImplicitMLP:
    """FC-1 of Table A1: three hidden ReLU layers of 512. Two outputs for curves."""
    return ImplicitMLP(dim, outputs, 512, 3, activation="relu")


def fc2(dim: int = 3) -> ImplicitMLP:
    """FC-2 of Table A1: seven hidden ReLU layers of 509, the input fed to each after the first."""
    return ImplicitMLP(dim, 1, 509, 7, activation="relu", skip=True)
