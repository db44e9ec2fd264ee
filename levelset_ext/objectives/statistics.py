"""Batch norm in training with level sets: one function of the rows, and its whole gradient.

Points of a level set, their levels, D_xF and p(theta) have to belong to one function of a row. A
network with batch norm in train mode is none: what it says of a row depends on which other rows are
evaluated with it, and the rows that have a boundary point are only some. In eval mode it is one,
but its running statistics lag behind the weights, with which a deep network does not train.

Here the statistics are those of the clean batch, measured once with a graph. Every other evaluation
of the step, at whatever points and of however few rows, is normalised by them, and gradients of
parameters include what they do to the statistics. The running statistics are updated by the same
measurement, as a forward in train mode would.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from levelset_ext.field import evaluation_copy

__all__ = ["with_batch_statistics"]


class _HeldNorm(nn.Module):
    """A batch norm that measures its statistics in one evaluation and keeps to them afterwards."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.training = False  # of this module alone: the layer inside is the network's own
        self.norm = norm
        self.measured: list[tuple[Tensor, Tensor]] = []
        self.measuring = True
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.measuring:
            mean, variance = self._measure(x)
            self.measured.append((mean, variance))
        else:
            # A layer that is used several times has statistics for every time.
            mean, variance = self.measured[self.calls % len(self.measured)]
            self.calls += 1
        shape = (1, -1, *(1,) * (x.dim() - 2))
        scale = torch.rsqrt(variance + self.norm.eps)
        if self.norm.affine:
            scale = scale * self.norm.weight
        out = (x - mean.view(shape)) * scale.view(shape)
        return out + self.norm.bias.view(shape) if self.norm.affine else out

    def _measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        over = [0, *range(2, x.dim())]
        values = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        count = values.numel() // values.shape[1]
        if count < 2:
            raise ValueError(
                f"x: expected more than one value per channel for batch norm, got {count}"
            )
        variance, mean = torch.var_mean(values, over, correction=0)
        norm = self.norm
        if norm.track_running_stats and norm.running_mean is not None:
            with torch.no_grad():
                assert norm.running_var is not None
                assert norm.num_batches_tracked is not None
                norm.num_batches_tracked += 1
                share = norm.momentum
                if share is None:
                    share = 1 / float(norm.num_batches_tracked)
                norm.running_mean.lerp_(mean.to(norm.running_mean), share)
                unbiased = variance * (count / (count - 1))
                norm.running_var.lerp_(unbiased.to(norm.running_var), share)
        return mean, variance


def with_batch_statistics(network: nn.Module, x: Tensor) -> nn.Module:
    """The network in eval mode, its batch norms normalising by the statistics of the batch x.

    Args:
        network: whose batch norms in train mode are meant; their running statistics move as in one
            forward in train mode. Without any, this is ``evaluation_copy`` and nothing is
            evaluated.
        x: (N, *event), the batch; more than one value per channel.

    Returns:
        A clone that shares the parameters. Several evaluations of it can enter one loss; a second
        ``backward()`` needs ``retain_graph``, as they share the graph of the statistics.
    """
    clone = evaluation_copy(network)
    held: dict[int, _HeldNorm] = {}
    # The clone has none of torch.compile's wrappers, nor their names.
    training = {
        ".".join(part for part in name.split(".") if part != "_orig_mod"): module
        for name, module in network.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm) and module.training
    }
    if not training:
        return clone
    for name, module in training.items():
        norm = held.setdefault(id(module), _HeldNorm(module))
        if name == "":
            clone = norm
        else:
            parent, _, last = name.rpartition(".")
            setattr(clone.get_submodule(parent), last, norm)
    clone(x.detach().clone())
    for norm in held.values():
        norm.measuring = False
    return clone
