"""Level sets of hidden units: the same samplers and sample network as for an output."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import levelset_ext as ls
from levelset_ext.field import evaluation_copy

DTYPE = torch.float64


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2)
    ).double()


def test_a_hidden_unit_is_what_the_layers_before_it_compute() -> None:
    net = network().eval()
    x = torch.randn(7, 3, dtype=DTYPE)
    whole = net[:4](x)
    torch.testing.assert_close(ls.LayerField(net, "3", 2)(x), whole[:, 2])
    torch.testing.assert_close(ls.LayerField(net, "3", (4, 1))(x), whole[:, [4, 1]])
    number: Any = np.int64(2)
    torch.testing.assert_close(ls.LayerField(net, "3", number)(x), whole[:, 2])
    torch.testing.assert_close(ls.LayerField(net, "3")(x), whole)
    difference = ls.LayerField(net, "3", lambda h: h[:, 0] - h[:, 1])
    torch.testing.assert_close(difference(x), whole[:, 0] - whole[:, 1])


def test_samplers_put_points_on_it_and_the_gradient_reaches_only_what_is_before() -> None:
    net = network()
    net(torch.randn(50, 3, dtype=DTYPE))  # running statistics of its own
    field = ls.LayerField(net, "3", (0, 3))
    found = ls.project(field, torch.randn(20, 3, dtype=DTYPE), max_iters=50, tol=1e-10)
    assert float(found.converged.double().mean()) > 0.5
    found = found[found.converged]
    inside = net.eval()[:4](found.points)[:, [0, 3]]
    torch.testing.assert_close(inside, torch.zeros_like(inside), atol=1e-9, rtol=0)
    p = ls.sample_network(field, found)
    assert torch.equal(p, found.points)
    p.square().sum().backward()
    for name, parameter in net.named_parameters():
        before = int(name.split(".")[0]) <= 3
        assert (parameter.grad is not None and bool(parameter.grad.any())) == before, name


def test_the_sample_moves_as_the_level_set_does() -> None:
    net = network().eval()
    field = ls.LayerField(net, "0", 1)  # affine: w x + b = 0
    found = ls.project(field, torch.randn(6, 3, dtype=DTYPE))
    p = ls.sample_network(field, found)
    w = net[0].weight[1].detach()
    (moved,) = torch.autograd.grad(p[:, 0].sum(), net[0].bias)
    expected = -6 * w[0] / w.dot(w)
    torch.testing.assert_close(moved[1], expected)


def test_nothing_is_left_behind_also_after_an_error() -> None:
    net = network()
    calls: list[int] = []
    net[3].register_forward_hook(lambda *_: calls.append(1))
    hooks = {name: dict(m._forward_hooks) for name, m in net.named_modules()}
    state = {k: v.clone() for k, v in net.state_dict().items()}
    field = ls.LayerField(net, "3", 0)
    ls.project(field, torch.randn(5, 3, dtype=DTYPE), max_iters=3)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match="units: expected numbers below 5"):
        ls.LayerField(net, "3", 9)(torch.randn(5, 3, dtype=DTYPE))
    with pytest.raises(RuntimeError):
        field(torch.randn(5, 4, dtype=DTYPE))
    assert {name: dict(m._forward_hooks) for name, m in net.named_modules()} == hooks
    assert len(calls) > 0  # the network's own hooks run
    assert net.training


def test_another_thread_may_use_the_network_meanwhile() -> None:
    net = evaluation_copy(network())
    x = torch.randn(40, 3, dtype=DTYPE)
    whole, hidden = net(x), net[:4](x)
    field = ls.LayerField(net, "3")
    wrong: list[str] = []

    def work(inner: bool) -> None:
        for _ in range(200):
            got = field(x) if inner else net(x)
            if not torch.equal(got, hidden if inner else whole):
                wrong.append("inner" if inner else "outer")

    threads = [threading.Thread(target=work, args=(k % 2 == 0,)) for k in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_many_threads_may_use_one_field() -> None:
    net = network()
    x = torch.randn(40, 3, dtype=DTYPE)
    hidden = net.eval()[:4](x)
    before = {name: len(m._forward_hooks) for name, m in net.named_modules()}
    field = ls.LayerField(net, "3")
    failed: list[str] = []

    def work() -> None:
        for _ in range(150):
            try:
                if not torch.equal(field(x), hidden):
                    failed.append("another output")
            except ValueError as error:
                failed.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failed == []
    assert {name: len(m._forward_hooks) for name, m in net.named_modules()} == before


class Odd(nn.Module):
    """One layer that is never used, one that gives a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.pair, self.last = nn.Linear(3, 3), Pair(), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pair(x)[0])


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_refusals() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="layer: expected one of unused, pair, last, got 'no'"):
        ls.LayerField(Odd(), "no")
    with pytest.raises(ValueError, match="expected unused to be used"):
        ls.LayerField(Odd(), "unused")(x)
    with pytest.raises(ValueError, match="expected pair to give one tensor of 4 rows, got tuple"):
        ls.LayerField(Odd(), "pair")(x)
    half: Any = 1.5
    with pytest.raises(ValueError, match=r"units: expected an integer, .*, got 1\.5"):
        ls.LayerField(Odd(), "pair", half)
